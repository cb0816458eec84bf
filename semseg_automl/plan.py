"""From what was asked, the data and the machine to a `Plan`: every "auto" decided, each with its reason.

Pure: nothing is read, built or timed here. The plan is saved as plan.yaml and rebuilds the same network; hardware
decides only the micro-batch, number format and loader processes, never the effective batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from semseg_automl.adaptation import choose_learning_rate, choose_method, has_frozen_prefix
from semseg_automl.capacity import fit_to_machine
from semseg_automl.config import Config, resolve
from semseg_automl.data.repeats import class_repeats
from semseg_automl.errors import ConfigError, UnsupportedCombination, check_known
from semseg_automl.fingerprint import ClassShare
from semseg_automl.framing import LARGE_SIDE, auto_area, choose_framing, unrepeated_views
from semseg_automl.hardware import Hardware
from semseg_automl.losses import CRITERIA
from semseg_automl.models.facts import EncoderFacts
from semseg_automl.peft import METHODS
from semseg_automl.task import SegmentationTask
from semseg_automl.tiling import tile_size


@dataclass(frozen=True)
class DataStats:
    """What the training table looks like.

    Attributes:
        rows: number of labelled images.
        sizes: ``(height, width)`` of each image in pixels.
        loading_seconds: what one thread takes to read and augment an image; None where nobody has measured.
        classes: how much of the data each class takes; empty where nobody has counted.
        object_width: how wide the objects typically are, relative to the root of their image's pixels; None where
            nobody has measured.
    """

    rows: int
    sizes: tuple[tuple[int, int], ...]
    loading_seconds: float | None = None
    classes: tuple[ClassShare, ...] = ()
    object_width: float | None = None


class Plan(BaseModel):
    """Everything that decides the result of a run, and the reason of each decision.

    Attributes:
        encoder: name of the image encoder.
        encoder_options: its architecture, enough to rebuild it without the checkpoint.
        checkpoint: file the encoder's weights come from, ``official`` for the published ones, or None for random ones.
        decoder_options: architecture of the mask decoder.
        input_size: ``(height, width)`` images, or their tiles, are resized to, in pixels.
        tile_scale: pixels of the input per pixel of an image, where images are seen in tiles; None for whole images.
        balanced_crops: half of the training crops lie around a class of the image, each class as often.
        peft: fine-tuning method.
        peft_options: its options.
        merged: what it learned is folded into the encoder's own weights.
        adapter: file or folder of adapter weights that training starts from, or None.
        loss: name of the criterion.
        lr: peak learning rate.
        soup: how many of the best states of the weights are averaged in the end, where that scores higher.
        batch_size: images per optimizer step.
        micro_batch_size: images per forward pass. The loss does not depend on it, but for what a method computes over
            a forward pass by its definition: the noise and the balancing loss of Conv-LoRA's experts.
        checkpointing: recompute activations in the backward pass.
        feature_cache: where features of frozen first blocks are kept: ``off``, ``memory`` or ``disk``.
        cached_views: augmented views per image that repeat then; 0 for fresh ones every time.
        image_cache: bytes of decoded images and masks kept in memory, shared by all loader processes; 0 for none.
        views: times each image is shown per epoch.
        sampling: ``uniform``, or ``repeat_factor`` for images of rare classes more often, others less.
        max_epochs: passes at most.
        time_limit: seconds for the whole fit, or None.
        mirrored: predictions are averaged with those of the mirrored image.
        preset: what the settings were laid over; empty in folders saved before it was kept.
        reasons: per decision, why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str
    encoder_options: dict[str, int | bool | str | list[int]]
    checkpoint: str | None
    decoder_options: dict[str, int | bool | None]
    input_size: tuple[int, int]
    tile_scale: float | None = Field(None, ge=0.01, le=16)
    balanced_crops: bool = False
    peft: str
    peft_options: dict[str, int | float | str | bool]
    merged: bool = False
    adapter: str | None = None
    loss: str
    lr: float
    weight_decay: float
    warmup: float
    schedule: str
    gradient_clip: float
    ema: float
    soup: int = Field(1, ge=1)
    batch_size: int
    micro_batch_size: int
    checkpointing: bool
    feature_cache: str
    cached_views: int
    views: int
    sampling: str = "uniform"
    max_epochs: int
    patience: int
    augmentation: str
    precision: str
    num_workers: int
    image_cache: int = 0
    validation_metric: str
    seed: int
    time_limit: float | None
    mirrored: bool = False
    preset: str = ""
    reasons: dict[str, str]

    @property
    def tile(self) -> tuple[int, int] | None:
        """Height and width of a tile in pixels of the image, None where images are seen whole."""
        return None if self.tile_scale is None else tile_size(self.input_size, self.tile_scale)

    def __str__(self) -> str:
        """Return a table with a line per decision: setting, value, reason."""
        lines = []
        for name, value in self.model_dump(exclude={"reasons"}).items():
            lines.append(f"{name:18} {value!s:{VALUE_WIDTH}} {self.reasons.get(name, '')}".rstrip())
        return "\n".join(lines)


VALUE_WIDTH = 20
"""Of the column of values where a plan is printed; longer values push their reason aside."""
DECODED_CHANNELS = 4  # three of the image and the mask, uint8
NEVER_AUTO = {"weight_decay", "warmup", "schedule", "gradient_clip", "ema", "soup"}
"""Settings of `OptimConfig` that a plan takes as they are."""

DETAIL_STRIDE = 16  # the detail branch's maps of 1/8 and 1/4 meet the decoder's there

USUAL_LOSS = {"binary": "structure", "class_tokens": "ce_dice", "queries": "set_criterion"}


def make_plan(
    config: Config,
    task: SegmentationTask,
    stats: DataStats,
    hardware: Hardware,
    encoder: EncoderFacts,
    *,
    validation_metric: str | None = None,
    seed: int = 0,
    time_limit: float | None = None,
) -> Plan:
    """Decide everything that `config` left open.

    Args:
        config: what the user asked for.
        task: what the masks hold.
        stats: the training data.
        hardware: the machine.
        encoder: what ``config.model`` names, looked up.
        validation_metric: chooses the best epoch; None for the task's usual one.
        seed: of weights, order and augmentation.
        time_limit: seconds for the whole fit, or None.

    Raises:
        ConfigError: a setting does not fit the data or the encoder.
        UnsupportedCombination: two settings exclude each other; those that work are named.
    """
    reasons: dict[str, str] = {"encoder": encoder.why}
    framing = choose_framing(config, stats.sizes, _size(config, stats, encoder, time_limit, reasons), encoder, reasons)
    peft, peft_options = choose_method(config, encoder, reasons)
    loss, decoder_options = _head(config, task, stats, encoder, reasons)
    batch_size, views, max_epochs = _budget(config, stats, encoder, time_limit, reasons)
    capacity = fit_to_machine(
        config,
        hardware,
        encoder,
        batch_size=batch_size,
        input_size=framing.input_size,
        rows=stats.rows,
        frozen_prefix=has_frozen_prefix(peft, peft_options, encoder.depth),
        grids_read=encoder.depth if METHODS[peft].reads_all_blocks else encoder.taps,
        loading_seconds=stats.loading_seconds,
        image_bytes=sum(DECODED_CHANNELS * height * width for height, width in stats.sizes),
        reasons=reasons,
    )
    return Plan(
        encoder=encoder.name,
        encoder_options=encoder.options,
        checkpoint=encoder.checkpoint,
        decoder_options=decoder_options,
        peft=peft,
        peft_options=peft_options,
        adapter=config.model.adapter,
        loss=loss,
        lr=choose_learning_rate(config, encoder, peft, reasons),
        batch_size=batch_size,
        views=views,
        sampling=_sampling(config, task, stats, reasons),
        max_epochs=max_epochs,
        patience=_patience(config, time_limit, reasons),
        augmentation=_augmentation(config, stats, reasons),
        validation_metric=validation_metric or ("iou" if task.kind == "binary" else "miou"),
        seed=seed,
        time_limit=time_limit,
        mirrored=config.data.mirrored,
        reasons=reasons,
        **config.optim.model_dump(include=NEVER_AUTO),
        **framing._asdict(),
        **(asdict(capacity) | unrepeated_views(config, framing, reasons)),
    )


def _size(
    config: Config, stats: DataStats, encoder: EncoderFacts, time_limit: float | None, reasons: dict[str, str]
) -> tuple[int, int]:
    """SAM's own size for SAM; else about `auto_area` pixels at the median aspect ratio, never above the images' own."""
    asked, stride = config.model.input_size, encoder.stride
    if encoder.fixed_size is not None:
        if asked not in ("auto", list(encoder.fixed_size), encoder.fixed_size):
            raise ConfigError(f"model.input_size is {asked}; {encoder.name} takes {encoder.fixed_size} alone.")
        reasons["input_size"] = f"the only one that {encoder.name} takes"
        return encoder.fixed_size
    if asked == "auto" and encoder.family == "sam":
        reasons["input_size"] = "what SAM was trained at; smaller is faster: model.input_size"
        return SAM_SIDE, SAM_SIDE
    if asked == "auto":
        height = sorted(h for h, _ in stats.sizes)[len(stats.sizes) // 2]
        width = sorted(w for _, w in stats.sizes)[len(stats.sizes) // 2]
        tiled = config.data.tiling != "off" and min(height, width) > LARGE_SIDE
        area, why = auto_area(encoder, None if tiled else stats.object_width, time_limit)
        scale = min(1.0, math.sqrt(area / (height * width)))
        size = _round_to(height * scale, stride), _round_to(width * scale, stride)
        reasons["input_size"] = f"median image {height} x {width}, at most {area} pixels{why}, multiples of {stride}"
        return size
    size = (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])
    if any(side < stride or side % stride for side in size):
        near = tuple(_round_to(side, stride) for side in size)
        raise ConfigError(
            f"model.input_size is {size[0]} x {size[1]}; both sides must be divisible by {stride}. "
            f"The nearest allowed size is {near[0]} x {near[1]}."
        )
    reasons["input_size"] = "as asked"
    return size


SAM_SIDE = 1024


def _round_to(length: float, stride: int) -> int:
    return max(stride, round(length / stride) * stride)


def _head(
    config: Config, task: SegmentationTask, stats: DataStats, encoder: EncoderFacts, reasons: dict[str, str]
) -> tuple[str, dict[str, int | bool | None]]:
    """Choose the loss and the shape of the mask decoder; each loss belongs to one kind of head."""
    dim = 256 if encoder.pretrained else 128
    why = "SAM's width, to read pretrained tokens" if encoder.pretrained else "narrow: more steps per second"
    if encoder.family == "sam":
        dim, why = 256, "SAM's own decoder"
        if config.model.decoder_dim not in ("auto", dim):
            raise UnsupportedCombination(
                f"model.decoder_dim is {config.model.decoder_dim}; SAM's decoder is {dim} wide. Leave it out."
            )
    dim = resolve(config.model.decoder_dim, dim, "decoder_options", why, reasons)
    auto_detail = encoder.stride == DETAIL_STRIDE and encoder.family != "sam"  # SAM's decoder starts as it was trained
    detail = auto_detail if config.model.detail == "auto" else config.model.detail
    if detail and encoder.stride != DETAIL_STRIDE:
        raise UnsupportedCombination(
            f"model.detail is True, which fits encoders of stride {DETAIL_STRIDE}; this one's is {encoder.stride}. "
            "Use model.detail=False."
        )
    mlp_dim = 2048 if encoder.family == "sam" else 4 * dim
    decoder: dict[str, int | bool | None] = {"dim": dim, "mlp_dim": mlp_dim, "detail": detail}
    asked = config.optim.loss
    if asked != "auto":
        check_known("optim.loss", asked, CRITERIA)
    if task.kind == "binary":
        head = "binary"
    elif config.model.multiclass_head != "auto":
        head = config.model.multiclass_head
    else:
        head = "queries" if asked != "auto" and CRITERIA[asked].head == "queries" else "class_tokens"
    loss = resolve(asked, *_loss_for(head, stats), reasons)
    if CRITERIA[loss].head != head:
        fitting = ", ".join(name for name, criterion in CRITERIA.items() if criterion.head == head)
        raise UnsupportedCombination(
            f"optim.loss is '{loss}', which does not fit the {head} head of this {task.kind} task. "
            f"Losses that do: {fitting}."
        )
    if head != "queries" and config.model.num_queries != "auto":
        raise UnsupportedCombination(f"model.num_queries belongs to the queries head; this plan has the {head} head.")
    if head == "binary":
        if config.model.multiclass_head != "auto":
            raise UnsupportedCombination("model.multiclass_head is set, but the masks are binary. Leave it out.")
        return loss, decoder | {"num_mask_tokens": 1, "num_classes": None}
    if head == "class_tokens":
        return loss, decoder | {"num_mask_tokens": task.num_classes, "num_classes": None}
    wanted = config.model.num_queries
    queries = max(10, task.num_classes) if wanted == "auto" else wanted
    if queries < task.num_classes:
        raise ConfigError(f"model.num_queries is {queries}; {task.num_classes} classes need at least as many queries.")
    return loss, decoder | {"num_mask_tokens": queries, "num_classes": task.num_classes}


def _loss_for(head: str, stats: DataStats) -> tuple[str, str, str]:
    """Choose the loss by how the pixels spread over the classes; return it with the name and reason to note."""
    loss, why = USUAL_LOSS[head], "measured on small data: benchmarks/RESULTS.md"
    shares = [each for each in stats.classes if each.share > 0]
    if head == "binary" and len(stats.classes) == 2:
        why = f"{stats.classes[1].share:.1%} foreground; its IoU part counts the same in every image, however little"
    if head == "class_tokens" and shares:
        rarest = min(shares, key=lambda each: each.share)
        told = f"{rarest.name} has {rarest.share:.1%} of the pixels, an even share were {1 / len(shares):.1%}"
        if rarest.share * len(shares) < UNEVEN:
            loss, why = "balanced_ce_dice", f"{told}: rare classes weigh more"
        else:
            why = told
    return loss, "loss", why


UNEVEN = 0.2  # of an even share


def _budget(
    config: Config, stats: DataStats, encoder: EncoderFacts, time_limit: float | None, reasons: dict[str, str]
) -> tuple[int, int, int]:
    """Choose batch size, views per epoch and epochs."""
    batch, why = (4, "as the paper has it") if encoder.family == "sam" else (8, "measured on small data")
    batch_size = resolve(config.env.batch_size, min(batch, stats.rows), "batch_size", why, reasons)
    views = max(1, math.ceil(MIN_STEPS_PER_EPOCH * batch_size / stats.rows))
    if views > 1:
        reasons["views"] = f"{stats.rows} images make short epochs: validate every {MIN_STEPS_PER_EPOCH} steps or so"
    if config.optim.max_epochs == "auto":
        if time_limit is not None:
            reasons["max_epochs"] = "the time limit ends training; the learning rate falls with the clock"
            return batch_size, views, UNLIMITED
        reasons["max_epochs"] = f"about {AUTO_STEPS} steps"
        return batch_size, views, max(10, round(AUTO_STEPS * batch_size / (stats.rows * views)))
    reasons["max_epochs"] = "as asked"
    return batch_size, views, config.optim.max_epochs


def _sampling(config: Config, task: SegmentationTask, stats: DataStats, reasons: dict[str, str]) -> str:
    """Show images of rare classes more often where some class is in far fewer images than the median class."""
    shares = np.array([each.images for each in stats.classes]) / max(1, len(stats.sizes))
    if task.kind == "binary" or not shares.any():
        auto, why = "uniform", "two classes" if task.kind == "binary" else "nobody has counted the classes"
    else:
        repeats = class_repeats(shares)
        rare = int(repeats.argmax())
        auto = "repeat_factor" if repeats[rare] >= RARE_REPEATS else "uniform"
        why = f"{stats.classes[rare].name} is in {shares[rare]:.0%} of the images"
        why += f", shown {repeats[rare]:.1f} times as often" if auto != "uniform" else ": not rare among the classes"
    sampling: str = resolve(config.data.sampling, auto, "sampling", why, reasons)
    return sampling


RARE_REPEATS = 1.5  # below that next to nothing changes


def _patience(config: Config, time_limit: float | None, reasons: dict[str, str]) -> int:
    """Stop early after ten validations; not under a clock, where scores rise as the learning rate falls at the end."""
    why = (
        "as the paper has it" if time_limit is None else "the clock ends training; the last steps bring the best scores"
    )
    patience: int = resolve(config.optim.patience, 10 if time_limit is None else UNLIMITED, "patience", why, reasons)
    return patience


UNLIMITED = 10_000
MIN_STEPS_PER_EPOCH = 25
AUTO_STEPS = 1000


def _augmentation(config: Config, stats: DataStats, reasons: dict[str, str]) -> str:
    auto = "medium"
    name: str = resolve(config.data.augmentation, auto, "augmentation", f"{stats.rows} images need variety", reasons)
    return name
