"""The training half: the Lightning module and the trainer that runs it.

The network itself is pure torch and knows nothing of this file. What is optimised at which learning rate, and what an
interruption leaves behind, are decided here; which epoch is kept, and how the learning rate follows steps or clock, in
`callbacks`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semseg_automl.build import build_method
from semseg_automl.callbacks import Clock, ExpertUsage, TrainingResult, WeightKeeper
from semseg_automl.data.cache import ImageCache
from semseg_automl.data.crops import CropRule
from semseg_automl.data.dataset import Batch, MaskDataModule, MaskDataset
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.repeats import row_repeats
from semseg_automl.data.table import MaskTable
from semseg_automl.features import FeatureCache, feature_caches
from semseg_automl.losses import CRITERIA
from semseg_automl.metrics import build_metrics
from semseg_automl.models.mask_decoder import SegmentationOutput
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels, semantic_scores
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.usage import expert_layers
from semseg_automl.plan import Plan
from semseg_automl.processes import ALONE, Processes, built_strategy
from semseg_automl.resume import SUFFIX, StateIO, StateKeeper, prepare_state
from semseg_automl.sharing import companions
from semseg_automl.slices import Slice
from semseg_automl.soup import Weights
from semseg_automl.task import SegmentationTask
from semseg_automl.third_party import lightning
from semseg_automl.tiling import join
from semseg_automl.trackers import LOG_EVERY, Previews, build_trackers, run_log
from semseg_automl.trainer_options import check_trainer_options, listed, quiet_lightning


class FineTuneModule(lightning.LightningModule):
    """Loss, metric and optimizer around a network.

    Args:
        model: the network; only parameters that require gradients are optimised.
        plan: loss, optimizer and validation metric.
        task: what the masks hold.

    Attributes:
        caches: what the frozen part of the encoder computed, for ``train`` and ``validation``; either may be absent.
        previews: validation images that are drawn for a tracker, or None.
    """

    def __init__(self, model: SegmentationModel, plan: Plan, task: SegmentationTask) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.criterion = CRITERIA[plan.loss]
        name = plan.validation_metric
        self.metric = build_metrics([name], kind=task.kind, num_classes=task.num_classes)[name]
        self.caches: dict[str, FeatureCache] = {}
        self.previews: Previews | None = None
        self.in_step = False
        """Whether a step has begun and has changed no weight yet."""
        self.strict_loading = False  # the state of a fit holds no frozen weights

    def segment(self, batch: Batch, dataset: str) -> SegmentationOutput:
        """Run the network on a batch, from what the cache of its dataset knows on where there is one."""
        cache = self.caches.get(dataset)
        if cache is None:
            output: SegmentationOutput = self.model(batch.image)
            return output
        return self.model.finish(cache.states(batch.index, batch.image), cache.stage, batch.image)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Let the noise of the experts follow from the batch alone, so that a fit gone on with draws the same.

        So do several processes, which take turns: they number the batches as one process would.
        """
        number = batch_index * self.trainer.world_size + self.global_rank
        words = [self.plan.seed, 0, self.trainer.global_step, number]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        self.in_step = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that weights change from here on."""
        self.in_step = False

    def on_validation_start(self) -> None:
        """Note that no step is at hand."""
        self.in_step = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out of the state of the fit."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name not in frozen}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch: the criterion plus the layers' auxiliary losses."""
        output = self.segment(batch, "train")
        # By image, so that a batch in smaller pieces, or shared by several processes, has the same loss.
        words = [[self.plan.seed, self.trainer.global_step, int(item)] for item in batch.index]
        seeds = [int(np.random.SeedSequence(each).generate_state(1)[0]) for each in words]
        loss = self.criterion(output, batch.mask.long(), seeds) + self.model.aux_loss().to(batch.mask.device)
        if output.class_logits is not None and self.trainer.world_size > 1:
            # Without a labelled pixel here the masks do not count, but the other processes wait for their gradients.
            loss = loss + 0.0 * output.mask_logits.sum()
        shown: dict[str, Any] = {"on_step": False, "on_epoch": True, "prog_bar": True, "sync_dist": True}
        self.log("train_loss", loss.detach(), batch_size=len(batch), **shown)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a batch at each image's own resolution, tiles as `Predictor` does: blended into one image."""
        size = (batch.image.shape[-2], batch.image.shape[-1])
        if batch.grid is not None:
            native = join(batch.grid, self._tile_scores(batch))
            self._judge(int(batch.index[0]), native, batch.native_masks[0])
            return
        scores = semantic_scores(self.segment(batch, "validation"), size)
        for i, (geometry, mask) in enumerate(zip(batch.geometry, batch.native_masks, strict=True)):
            self._judge(int(batch.index[i]), geometry.undo(scores[i]), mask)

    def _judge(self, row: int, scores: Tensor, mask: Tensor) -> None:
        """Take ``scores (C, H, W)`` of a validation row into the metric, and show them if they are to be drawn."""
        labels = hard_labels(scores)
        self.metric.update(scores, labels, mask.long())
        if self.previews is not None:
            self.previews.keep(row, labels, mask)

    def _tile_scores(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the scores of each tile at its own resolution, a micro-batch after the other."""
        geometries = iter(batch.geometry)
        for images in batch.image.split(self.plan.micro_batch_size):
            for scores in semantic_scores(self.model(images), self.plan.input_size):
                yield next(geometries).undo(scores)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metric and start it anew."""
        self.log(self.plan.validation_metric, self.metric.compute().float(), prog_bar=True, sync_dist=True)
        self.metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what trains.

        Biases, norms and other vectors are not decayed. The fine-tuning method says which of its parameters learn at
        another rate (LoRA+, Hayou et al. 2024, arXiv 2402.12354); each group keeps that ratio as ``lr_ratio``.
        """
        method = build_method(self.plan.peft, self.plan.peft_options)
        members: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in trainable_parameters(self.model).items():
            members.setdefault((parameter.ndim > 1, method.learning_rate_ratio(name)), []).append(parameter)
        groups = [
            {
                "params": members[decayed, ratio],
                "weight_decay": self.plan.weight_decay if decayed else 0.0,
                "lr": self.plan.lr * ratio,
                "lr_ratio": ratio,
            }
            for decayed, ratio in sorted(members, reverse=True)
        ]
        return torch.optim.AdamW(groups, lr=self.plan.lr)


def data_module(
    plan: Plan,
    task: SegmentationTask,
    train_table: MaskTable,
    validation_table: MaskTable,
    kept: DecodedFiles | None = None,
    cache: ImageCache | None = None,
) -> MaskDataModule:
    """Return the loaders of training and validation batches, all as the plan has it.

    Args:
        plan: input size, tiles, batch, views, sampling, augmentation, seed, loader processes.
        task: encodes the masks.
        train_table: shuffled, augmented.
        validation_table: in order, only resized.
        kept: what a check decoded, which goes over into the cache and is empty then.
        cache: of decoded images, from `image_cache`; None for a new one.
    """
    cache = image_cache(plan, train_table, validation_table) if cache is None else cache
    crops = None if plan.tile is None else CropRule(plan.tile, plan.balanced_crops)
    train = MaskDataset(train_table, task, plan.input_size, plan.augmentation, plan.seed, crops, cache)
    validation = MaskDataset(validation_table, task, plan.input_size, cache=cache, first_entry=len(train_table))
    if kept is not None:
        train.adopt(kept)
        validation.adopt(kept)
    repeats = row_repeats(train.classes(kept)) if plan.sampling == "repeat_factor" else None
    if kept is not None:
        kept.clear()
    return MaskDataModule(
        train,
        validation,
        batch_size=plan.micro_batch_size,
        views=plan.views,
        num_workers=plan.num_workers,
        seed=plan.seed,
        cached_views=plan.cached_views,
        tile=plan.tile,
        repeats=repeats,
    )


def image_cache(plan: Plan, train_table: MaskTable, validation_table: MaskTable) -> ImageCache | None:
    """Return room for the decoded images of both tables, as the plan has it, or None."""
    rows, shared = len(train_table) + len(validation_table), plan.num_workers > 0
    return ImageCache(rows, plan.image_cache, shared=shared) if plan.image_cache else None


@dataclass(frozen=True)
class Course:
    """When a training begins, is saved and ends, beside what its plan says.

    Attributes:
        states: saves the state of training now and then; None saves none.
        state: to go on with, from `resume.read_state`; None begins anew.
        deadline: `time.monotonic` seconds at which training, last validation included, must be over; earlier by what
            a fit that is gone on with took before. None for no such time.
        deadline_stands: whatever that took.
        stop_after: ends this slice of the training; None where it is done in one go.
    """

    states: StateKeeper | None = None
    state: dict[str, Any] | None = None
    deadline: float | None = None
    deadline_stands: bool = False
    stop_after: Slice | None = None

    @property
    def begun_as(self) -> str | None:
        """What the trainer is to call the state it goes on with; None where it begins anew."""
        return None if self.state is None else f"state{SUFFIX}"

    @property
    def savers(self) -> list[lightning.Callback]:
        """The callbacks that save, which must come last."""
        return [each for each in (self.states, self.stop_after) if each is not None]


def train(
    model: SegmentationModel,
    plan: Plan,
    task: SegmentationTask,
    data: MaskDataModule,
    *,
    result: TrainingResult,
    on_best: Callable[[Weights], None],
    on_epoch: Callable[[dict[str, float]], None],
    on_notice: Callable[[str], None],
    cache_folder: Path | None = None,
    course: Course | None = None,
    trainer_options: dict[str, Any] | None = None,
    processes: Processes = ALONE,
    progress_bar: bool = True,
) -> None:
    """Train the network in place and leave its best weights in it.

    Args:
        model: the network, its fine-tuning method applied.
        plan: the decisions.
        task: what the masks hold.
        data: training and validation batches, from `data_module`.
        result: filled in as training goes. An interrupt (Ctrl-C) ends it early and is named in ``stopped_by``.
        on_best: called with the trainable weights whenever they are the best so far; those are in place then.
        on_epoch: called with each complete entry of the history.
        on_notice: called with what the user should know besides, for example that the feature cache is full.
        cache_folder: for a feature cache on disk, made and deleted here; may be None without one.
        course: when it begins, is saved and ends; None: from the beginning to the end of the plan.
        trainer_options: passed on to Lightning's trainer by name.
        processes: that train together, as `trainer_processes` found them; each calls this.
        progress_bar: show Lightning's progress bar.

    Raises:
        ConfigError: a trainer option is unknown, or the plan caches on disk without a folder.
        TrainingError: the loss is no longer finite.
    """
    course = course or Course()
    if plan.checkpointing:
        model.encoder.checkpointing = True
    options = check_trainer_options(trainer_options or {})
    module = FineTuneModule(model, plan, task)
    usage = ExpertUsage(model)
    keeper = WeightKeeper(model, plan, result, usage, on_best, on_epoch)
    clock = Clock(plan, course.deadline, stands=course.deadline_stands)
    patience = _early_stopping(module)
    loggers, callbacks = _trackers(options, module, result, data.validation, processes)
    callbacks = [clock, usage, keeper, patience, *callbacks, *options.pop("callbacks", []), *course.savers]
    settings = _trainer_settings(module, processes, {"enable_progress_bar": progress_bar, "logger": loggers} | options)
    callbacks = companions(settings, model.encoder, cached=plan.feature_cache != "off") + callbacks
    if course.states is not None:
        settings["plugins"] = [StateIO(course.state), *listed(options.get("plugins"))]
    data.processes = processes
    if course.state is not None:
        position = prepare_state(course.state, plan.micro_batch_size * processes.count, clock.state_key)
        data.start = position.epoch, position.samples
    with quiet_lightning():
        trainer = lightning.Trainer(callbacks=callbacks, **settings)
        folder = None if cache_folder is None else cache_folder / f"rank{processes.rank}"
        noise, caches = _own_noise(trainer, plan), feature_caches(model, plan, data, folder, on_notice)
        with noise, caches as module.caches:
            interrupted = _fit_or_interrupt(trainer, module, data, course.begun_as)
            sliced = course.stop_after is not None and course.stop_after.over and not clock.out_of_time
            if plan.soup > 1 and not interrupted and not sliced:
                on_notice(_stir(keeper, module, data, settings, processes))
    keeper.restore()
    model.eval()
    reasons = {"interrupt": interrupted, "slice": sliced, "time_limit": clock.out_of_time}
    reasons["patience"] = bool(patience.stopped_epoch)
    result.stopped_by = next((name for name, true in reasons.items() if true), result.stopped_by)


def _stir(
    keeper: WeightKeeper,
    module: FineTuneModule,
    data: MaskDataModule,
    settings: Mapping[str, Any],
    processes: Processes,
) -> str:
    """Average the best weights where that scores higher, and say what came of it."""
    if processes.are_several:
        return "no soup of the best states: several processes trained. Fit with one for it."
    if len(keeper.top) < 2:
        return "no soup of the best states: there was one validation"
    alone = {"callbacks": None, "plugins": None, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(**{**settings, **alone})
    module.previews = None
    name, before = module.plan.validation_metric, keeper.result.best_score

    def judge() -> float:
        return float(trainer.validate(module, datamodule=data, verbose=False)[0][name])

    tried = len(keeper.top)
    count = keeper.stir(judge, higher_is_better=bool(module.metric.higher_is_better))
    if count == 1:
        return f"a soup of the best {tried} states does not score higher than the best one"
    return f"the best {count} of {tried} states averaged: {name} {keeper.result.best_score:.4f}, before {before:.4f}"


def _early_stopping(module: FineTuneModule) -> lightning.pytorch.callbacks.EarlyStopping:
    """Return what ends training when the validation metric has not got better for as long as the plan says."""
    return lightning.pytorch.callbacks.EarlyStopping(
        module.plan.validation_metric,
        mode="max" if module.metric.higher_is_better else "min",
        patience=module.plan.patience,
        check_finite=False,
    )


def _trackers(
    options: dict[str, Any],
    module: FineTuneModule,
    result: TrainingResult,
    validation: MaskDataset,
    processes: Processes,
) -> tuple[list[Any], list[lightning.Callback]]:
    """Take the choice of trackers out of `options`; return its loggers and what logs to them."""
    loggers = build_trackers(options.pop("logger", False), Path(options.get("default_root_dir") or "."))
    if not loggers:
        return [], []
    log = run_log(loggers, module.plan, result, validation, processes)
    module.previews = log.previews
    return loggers, [log]


@contextmanager
def _own_noise(trainer: lightning.Trainer, plan: Plan) -> Iterator[None]:
    """Begin with the plan's seed, and leave the random state as it was, of the processor and of the training device."""
    device = trainer.strategy.root_device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(plan.seed)
        yield


def _trainer_settings(module: FineTuneModule, processes: Processes, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what the plan and this module decide of Lightning's trainer, and over it what was asked."""
    plan = module.plan
    settings = {
        "max_epochs": plan.max_epochs,
        "accumulate_grad_batches": plan.batch_size // (plan.micro_batch_size * processes.count),
        "devices": 1,
        "precision": plan.precision,
        "gradient_clip_val": plan.gradient_clip,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": LOG_EVERY,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    } | asked
    if "strategy" in settings:
        lone = any(layer.experts == 1 for layer in expert_layers(module.model).values())  # their gates choose nothing
        settings["strategy"] = built_strategy(settings["strategy"], some_unused=lone)
    return settings


def _fit_or_interrupt(
    trainer: lightning.Trainer, module: FineTuneModule, data: MaskDataModule, state: str | None
) -> bool:
    """Run the trainer; return whether Ctrl-C ended it. Lightning turns that into an exit and mutes the signal."""
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main_thread else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=state)
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        return True
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, handler)
    return False
