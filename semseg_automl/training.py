"""The training half: the Lightning module, what happens around its steps, and the trainer that runs it.

The network itself is pure torch and knows nothing of this file. Which epoch is kept, how the learning rate follows
steps or clock, and what an interruption leaves behind are decided here.
"""

from __future__ import annotations

import inspect
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semseg_automl.data.dataset import Batch, MaskDataModule, MaskDataset
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import ConfigError, TrainingError, nearest
from semseg_automl.features import FeatureCache, feature_caches
from semseg_automl.losses import CRITERIA
from semseg_automl.metrics import build_metrics
from semseg_automl.models.mask_decoder import SegmentationOutput
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels, semantic_scores
from semseg_automl.peft import trainable_parameters
from semseg_automl.plan import Plan
from semseg_automl.task import SegmentationTask
from semseg_automl.third_party import lightning

Weights = dict[str, Tensor]
"""Trainable parameters by name, on the CPU."""


@dataclass
class TrainingResult:
    """What a training run leaves.

    Attributes:
        history: one entry per validation: epoch, step, seconds, train_loss, lr, and the validation metric by name.
        best_score: the best validation score, NaN if none was reached.
        best_epoch: the epoch it was reached in, -1 if none was.
        stopped_by: ``max_epochs``, ``patience``, ``time_limit`` or ``interrupt``.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_score: float = math.nan
    best_epoch: int = -1
    stopped_by: str = "max_epochs"


class FineTuneModule(lightning.LightningModule):
    """Loss, metric and optimizer around a network.

    Args:
        model: the network; only parameters that require gradients are optimised.
        plan: loss, optimizer and validation metric.
        task: what the masks hold.

    Attributes:
        caches: what the frozen part of the encoder computed, for ``train`` and ``validation``; either may be absent.
    """

    def __init__(self, model: SegmentationModel, plan: Plan, task: SegmentationTask) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.criterion = CRITERIA[plan.loss]
        name = plan.validation_metric
        self.metric = build_metrics([name], kind=task.kind, num_classes=task.num_classes)[name]
        self.caches: dict[str, FeatureCache] = {}

    def segment(self, batch: Batch, dataset: str) -> SegmentationOutput:
        """Run the network on a batch, from what the cache of its dataset knows on where there is one."""
        cache = self.caches.get(dataset)
        if cache is None:
            output: SegmentationOutput = self.model(batch.image)
            return output
        return self.model.finish(cache.states(batch.index, batch.image), cache.stage, batch.image)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch: the criterion plus the layers' auxiliary losses."""
        output = self.segment(batch, "train")
        loss = self.criterion(output, batch.mask) + self.model.aux_loss().to(batch.mask.device)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a batch at each image's own resolution."""
        size = (batch.image.shape[-2], batch.image.shape[-1])
        scores = semantic_scores(self.segment(batch, "validation"), size)
        for i, (geometry, mask) in enumerate(zip(batch.geometry, batch.native_masks, strict=True)):
            native = geometry.undo(scores[i])
            self.metric.update(native, hard_labels(native), mask.long())

    def on_validation_epoch_end(self) -> None:
        """Log the validation metric and start it anew."""
        self.log(self.plan.validation_metric, self.metric.compute().float(), prog_bar=True)
        self.metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what trains; biases, norms and other vectors are not decayed."""
        parameters = trainable_parameters(self).values()
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.plan.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.plan.lr)


def learning_rate_factor(progress: float, *, warmup: float, schedule: str) -> float:
    """Return the learning rate's share of its peak at `progress`, 0 to 1, through training.

    >>> [round(learning_rate_factor(p, warmup=0.1, schedule="cosine"), 3) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    rest = min(1.0, (progress - warmup) / (1 - warmup))
    return 1 - rest if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * rest))


class Clock(lightning.Callback):
    """Lets the learning rate follow progress through training, and ends training when the time is up.

    Progress is the share of the steps or, under a time limit, of the time, whichever is further. The last
    validation and the saving have to fit into the limit too; the time they need is kept back.

    Args:
        plan: steps, schedule.
        deadline: `time.monotonic` seconds at which everything must be done, or None.
    """

    def __init__(self, plan: Plan, deadline: float | None) -> None:
        self.plan = plan
        self.deadline = deadline
        self.start = time.monotonic()
        self.reserve = 0.1 * (deadline - self.start) if deadline is not None else 0.0
        self.validation_start = self.start
        self.out_of_time = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.start = time.monotonic()

    def progress(self, trainer: lightning.Trainer) -> float:
        """Return the share of training that is over, 0 to 1."""
        done = trainer.global_step / max(1.0, trainer.estimated_stepping_batches)
        if self.deadline is None:
            return done
        available = max(1e-3, self.deadline - self.reserve - self.start)
        return max(done, (time.monotonic() - self.start) / available)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate of the coming step; never quite zero, so that the first step moves."""
        factor = learning_rate_factor(
            self.progress(trainer) + 1e-3, warmup=self.plan.warmup, schedule=self.plan.schedule
        )
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.plan.lr * factor

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when the time is up; Lightning then validates once more."""
        if self.deadline is not None and self.progress(trainer) >= 1:
            self.out_of_time = True
            trainer.should_stop = True

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Time the validation."""
        self.validation_start = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep back as much time as this validation took, half as much again, and a second for saving."""
        self.reserve = 1.5 * (time.monotonic() - self.validation_start) + 1.0


class WeightKeeper(lightning.Callback):
    """Averages the trainable weights over steps, validates the average, and keeps the best of them.

    The running mean decays by ``plan.ema``, faster in the first steps, and lives beside the weights that are
    optimised; they change places for each validation.

    Args:
        model: the network whose trainable weights are kept.
        plan: decay and validation metric.
        result: filled in with history and best score.
        on_best: called with the weights when they are the best so far.
        on_epoch: called with an epoch's entry of the history when it is complete.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        result: TrainingResult,
        on_best: Callable[[Weights], None],
        on_epoch: Callable[[dict[str, float]], None],
    ) -> None:
        self.parameters = trainable_parameters(model)
        self.plan = plan
        self.result = result
        self.on_best = on_best
        self.on_epoch = on_epoch
        self.average = [p.detach().clone() for p in self.parameters.values()]
        self.average_in_place = False
        self.best: Weights | None = None
        self.steps = 0
        self.started = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Average on the device that trains."""
        self.average = [p.detach().clone() for p in self.parameters.values()]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a finished optimizer step into the average."""
        if trainer.global_step == self.steps:
            return  # gradients were only accumulated
        self.steps = trainer.global_step
        decay = min(self.plan.ema, (1 + self.steps) / (10 + self.steps)) if self.plan.ema else 0.0
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters.values()], 1 - decay)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average in place."""
        self._swap()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the epoch, keep the weights if they are the best so far, and put the optimised ones back."""
        scores = trainer.callback_metrics
        score = float(scores[self.plan.validation_metric])
        higher = bool(getattr(pl_module, "metric").higher_is_better)  # noqa: B009
        self.result.history.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "seconds": round(time.monotonic() - self.started, 2),
                "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
                self.plan.validation_metric: score,
            }
        )
        best = self.result.best_score
        if self.best is None or math.isnan(best) or (score > best if higher else score < best):
            self.best = self.current()
            self.result.best_score, self.result.best_epoch = score, trainer.current_epoch
            self.on_best(self.best)
        self._swap()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the epoch's loss, which Lightning knows only now.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss = float(trainer.callback_metrics["train_loss"])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the training loss became {loss} in epoch {trainer.current_epoch} with optim.lr={self.plan.lr}. "
                "Lower optim.lr, or set env.precision='32-true'."
            )
        if self.result.history:
            self.result.history[-1]["train_loss"] = loss
            self.on_epoch(self.result.history[-1])

    def current(self) -> Weights:
        """Copy the weights that are in place now."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters.values(), self.average, strict=True):
            kept = parameter.data.clone()
            parameter.data.copy_(average)
            average.copy_(kept)
        self.average_in_place = not self.average_in_place

    def restore(self) -> None:
        """Put the best weights in place, or the average where no validation was reached."""
        if self.best is None:
            if not self.average_in_place:  # an interrupt during validation finds it there already
                self._swap()
            self.on_best(self.current())
            return
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.best[name])


def data_module(
    plan: Plan, task: SegmentationTask, train_table: MaskTable, validation_table: MaskTable
) -> MaskDataModule:
    """Return the loaders of training and validation batches, all as the plan has it.

    Args:
        plan: input size, batch, views, augmentation, seed, loader processes.
        task: encodes the masks.
        train_table: shuffled, augmented.
        validation_table: in order, only resized.
    """
    return MaskDataModule(
        MaskDataset(train_table, task, plan.input_size, plan.augmentation, plan.seed),
        MaskDataset(validation_table, task, plan.input_size),
        batch_size=plan.micro_batch_size,
        views=plan.views,
        num_workers=plan.num_workers,
        seed=plan.seed,
        cached_views=plan.cached_views,
    )


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
    deadline: float | None = None,
    trainer_options: dict[str, Any] | None = None,
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
        deadline: `time.monotonic` seconds at which training, last validation included, must be over.
        trainer_options: passed on to Lightning's trainer by name.
        progress_bar: show Lightning's progress bar.

    Raises:
        ConfigError: a trainer option is unknown, or the plan caches on disk without a folder.
        TrainingError: the loss is no longer finite.
    """
    if plan.checkpointing:
        model.encoder.checkpointing = True
    options = check_trainer_options(trainer_options or {})
    module = FineTuneModule(model, plan, task)
    keeper = WeightKeeper(model, plan, result, on_best, on_epoch)
    clock = Clock(plan, deadline)
    patience = lightning.pytorch.callbacks.EarlyStopping(
        plan.validation_metric,
        mode="max" if module.metric.higher_is_better else "min",
        patience=plan.patience,
        check_finite=False,
    )
    callbacks = [clock, keeper, patience, *options.pop("callbacks", [])]
    settings = _trainer_settings(plan) | {"enable_progress_bar": progress_bar} | options
    with _quiet_lightning():
        trainer = lightning.Trainer(callbacks=callbacks, **settings)
        folder = None if cache_folder is None else cache_folder / f"rank{trainer.global_rank}"
        with torch.random.fork_rng(), feature_caches(model, plan, data, folder, on_notice) as module.caches:
            torch.manual_seed(plan.seed)
            interrupted = _fit_or_interrupt(trainer, module, data)
    keeper.restore()
    model.eval()
    if interrupted:
        result.stopped_by = "interrupt"
    elif clock.out_of_time:
        result.stopped_by = "time_limit"
    elif patience.stopped_epoch:
        result.stopped_by = "patience"


def _trainer_settings(plan: Plan) -> dict[str, Any]:
    """Return what the plan and this module decide of Lightning's trainer."""
    return {
        "max_epochs": plan.max_epochs,
        "accumulate_grad_batches": plan.batch_size // plan.micro_batch_size,
        "precision": plan.precision,
        "gradient_clip_val": plan.gradient_clip,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advertisements, and its doubts about what the plan decided, from the user's screen."""
    talk = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = talk.level
    talk.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Loader processes are the plan's decision, and so is an epoch of few batches.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            # Lightning 2.6 with torch 2.13, on torch's own tree specs.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        talk.setLevel(level)


def _fit_or_interrupt(trainer: lightning.Trainer, module: FineTuneModule, data: MaskDataModule) -> bool:
    """Run the trainer; return whether Ctrl-C ended it. Lightning turns that into an exit and mutes the signal."""
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main_thread else None
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        return True
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, handler)
    return False


def check_trainer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `options` if Lightning's trainer knows them all; None and single callbacks become lists.

    Raises:
        ConfigError: an option is unknown; the nearest known one is named.
    """
    known = inspect.signature(lightning.Trainer.__init__).parameters
    for name in options:
        if name not in known or name == "self":
            raise ConfigError(f"fit has no argument '{name}', nor has Lightning's Trainer{nearest(name, known)}.")
    checked = dict(options)
    callbacks = checked.get("callbacks")
    if "callbacks" in checked and not isinstance(callbacks, list):
        checked["callbacks"] = [] if callbacks is None else [callbacks]
    return checked
