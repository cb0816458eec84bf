"""What the user asked for: a preset plus overrides, typed and checked. "auto" is left for the plan to decide.

Keys are dotted (``optim.lr``) or nested; AutoGluon's names are accepted as aliases. An unknown key is an error that
names the nearest known one. Nothing here looks at data or hardware.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from semseg_automl.errors import ConfigError, nearest

Auto = Literal["auto"]
Hyperparameters = Mapping[str, Any]

ALIASES: dict[str, str] = {
    "optim.lora.r": "optim.lora.rank",
    "optim.lora.conv_lora_expert_num": "optim.lora.experts",
    "optim.learning_rate": "optim.lr",
    "optim.loss_func": "optim.loss",
    "optim.gradient_clip_val": "optim.gradient_clip",
    "optimization.max_epochs": "optim.max_epochs",
    "optimization.learning_rate": "optim.lr",
    "env.per_gpu_batch_size": "env.micro_batch_size",
}
"""Dotted keys of AutoGluon MultiModal and what they are called here."""

SAM_NAME_KEY = "model.sam.checkpoint_name"
SAM_NAMES = {f"facebook/sam-vit-{size}": f"sam_vit_{size[0]}" for size in ("base", "large", "huge")}
"""Values of AutoGluon's `SAM_NAME_KEY`, and the ``model.encoder`` each stands for."""


_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", re.IGNORECASE)
_UNITS = {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGT", 1)}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Which network."""

    encoder: str = Field("tiny_vit", description="Image encoder: tiny_vit, sam_vit_b, sam_vit_l, sam_vit_h, timm/NAME.")
    checkpoint: str | None = Field(
        None,
        description="File of pretrained weights; None: the published ones of SAM or timm, from scratch for tiny_vit.",
    )
    pretrained: bool = Field(True, description="False: random weights, for encoders with published ones too.")
    accept_license: str | None = Field(None, description="Licence of published weights that restrict their use.")
    adapter: str | None = Field(
        None, description="Adapter to start from: AutoGluon's checkpoint, or the folder of a LoRA of Hugging Face PEFT."
    )
    input_size: Auto | int | tuple[int, int] = Field(
        "auto", description="Side or (height, width) in pixels that images are resized to; divisible by the stride."
    )
    window_size: NonNegativeInt = Field(
        0, description="Side in tokens of attention windows in tiny_vit with a checkpoint; 0: global attention."
    )
    multiclass_head: Auto | Literal["class_tokens", "queries"] = Field(
        "auto", description="One mask token per class, or queries with a classification layer."
    )
    num_queries: Auto | PositiveInt = Field(
        "auto", description="Mask tokens of the queries head, no fewer than classes."
    )
    decoder_dim: Auto | int = Field("auto", description="Channels of embeddings and decoder; divisible by 16.")
    detail: Auto | bool = Field("auto", description="Add convolutions on the image to the decoder's upscaled maps.")

    @field_validator("decoder_dim")
    @classmethod
    def _divisible(cls, value: str | int) -> str | int:
        if isinstance(value, int) and (value % 16 or value < 32):
            raise ValueError("must be 32 or more and divisible by 16")
        return value


class LoraConfig(_Section):
    """Options of LoRA and Conv-LoRA."""

    rank: Auto | PositiveInt = Field("auto", description="Width of the bottleneck.")
    alpha: Auto | PositiveFloat = Field("auto", description="Scale of the correction, divided by the rank.")
    experts: int = Field(8, ge=1, description="Convolution experts, of scales 1 to this number (Conv-LoRA).")
    activation: Literal["gelu", "none"] = Field("gelu", description="After the experts' convolution.")
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="Of the experts' resizing.")
    gate: Literal["balanced", "learned"] = Field("balanced", description="What trains the router of the experts.")
    windowed: bool = Field(
        True, description="Experts see each attention window alone; false: the whole grid (Conv-LoRA)."
    )
    scaling: Literal["rank", "sqrt_rank"] = Field(
        "rank", description="Divide alpha by the rank, or by its root (rsLoRA)."
    )
    dora: bool = Field(False, description="Train length and direction of the weights apart (DoRA).")
    decoder_rank: NonNegativeInt = Field(0, description="Rank of corrections on the decoder's attention; 0 for none.")
    b_lr_ratio: PositiveFloat = Field(1.0, description="Learning rate of matrix B over that of the rest (LoRA+).")
    last_blocks: PositiveInt | None = Field(None, description="Adapt only the last blocks, this many; None: all.")


class AdapterConfig(_Section):
    """Options of the Adapter."""

    width: PositiveInt = Field(2, description="Of the bottlenecks behind attention and MLP.")


class VptConfig(_Section):
    """Options of visual prompt tuning."""

    tokens: PositiveInt = Field(12, description="Prompts per block.")


class LstConfig(_Section):
    """Options of ladder side tuning."""

    width: Auto | PositiveInt = Field("auto", description="Of the side blocks, divisible by 8.")


class SamAdapterConfig(_Section):
    """Options of SAM-Adapter."""

    width: Auto | PositiveInt = Field("auto", description="Of the prompt generator's features.")


class OptimConfig(_Section):
    """How it is trained."""

    peft: str = Field("auto", description="Fine-tuning method: auto, or a name of peft.METHODS.")
    lora: LoraConfig = Field(default_factory=LoraConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    vpt: VptConfig = Field(default_factory=VptConfig)
    lst: LstConfig = Field(default_factory=LstConfig)
    sam_adapter: SamAdapterConfig = Field(default_factory=SamAdapterConfig)
    loss: str = Field("auto", description="Training loss: auto, or a name of losses.CRITERIA.")
    lr: Auto | PositiveFloat = Field("auto", description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Of matrices; biases, norms and vectors have none.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of training over which the learning rate rises.")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="How the learning rate falls to zero.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    ema: float = Field(0.98, ge=0, lt=1, description="Decay of the averaged weights that are kept; 0 for none.")
    soup: PositiveInt = Field(
        1, description="States of the weights, the best ones, that are averaged if that scores higher; 1: the best one."
    )
    max_epochs: Auto | PositiveInt = Field("auto", description="Passes over the data at most.")
    patience: Auto | PositiveInt = Field("auto", description="Validations without improvement before training stops.")


class DataConfig(_Section):
    """How images are shown."""

    augmentation: Auto | Literal["none", "flip", "light", "medium", "strong"] = Field(
        "auto", description="Strength of the joint augmentation of image and mask."
    )
    sampling: Auto | Literal["uniform", "repeat_factor"] = Field(
        "auto", description="Images shown alike, or those with classes that few images have more often (LVIS)."
    )
    holdout_frac: Auto | float = Field("auto", description="Share of the rows kept for validation if none are given.")
    mirrored: bool = Field(
        False, description="Average predictions with those of the mirrored image, in twice the time."
    )
    cached_views: PositiveInt = Field(
        4, description="Augmented views per image that repeat, where features are cached; fresh ones every time if not."
    )
    tiling: Auto | Literal["off", "on"] = Field(
        "auto", description="Train on crops and predict in tiles; auto: where images are large (plan.py says when)."
    )
    tile_scale: Auto | float = Field("auto", description="Pixels of the input per pixel of an image, with tiling.")
    balanced_crops: Auto | bool = Field(
        "auto", description="Lay half of the crops around a class of the image, each class as often, with tiling."
    )

    @field_validator("tile_scale")
    @classmethod
    def _usable_scale(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not 0.01 <= value <= 16:
            raise ValueError("must be from 0.01 to 16")
        return value


class SearchConfig(_Section):
    """Whether configurations race, and what is done with the winner; one of them is the plan's own."""

    candidates: NonNegativeInt = Field(
        0, description="Configurations that race for the first part of the time, the plan's and a baseline; 0: none."
    )
    share: float = Field(0.4, gt=0, le=0.9, description="Of the time limit, or of the steps, that a race may take.")
    searcher: Literal["tpe", "random"] = Field(
        "tpe", description="Draws configurations once the portfolio is used up: Optuna's TPE, or evenly."
    )
    space: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings to draw from instead of the usual ones: lists of values, or low, high and log.",
    )
    storage: str | None = Field(
        None, description="Where Optuna keeps the race: URL of a database that machines share; None: a file of the fit."
    )
    study: str = Field("semseg_automl", min_length=1, description="Name of the race in a storage that is shared.")
    calibrate: bool = Field(
        True, description="After a race, choose threshold and mirroring of predictions by validation scores."
    )
    latency: PositiveFloat | None = Field(
        None, description="Milliseconds per image that predictions may take at most with mirroring; None: any."
    )

    @field_validator("candidates")
    @classmethod
    def _a_race(cls, value: int) -> int:
        if value == 1:
            raise ValueError("must be 0 for no search, or 2 and more: the plan's own and the baseline")
        return value


class EnvConfig(_Section):
    """Batch and machine."""

    batch_size: Auto | PositiveInt = Field("auto", description="Images per optimizer step, whatever the hardware.")
    micro_batch_size: Auto | PositiveInt = Field("auto", description="Images per forward pass; the rest accumulates.")
    num_workers: Auto | NonNegativeInt = Field("auto", description="Loader processes.")
    checkpointing: Auto | bool = Field("auto", description="Recompute activations in the backward pass: less memory.")
    feature_cache: Auto | Literal["off", "memory", "disk"] = Field(
        "auto", description="Keep what the frozen blocks before the first trained one compute, per image and view."
    )
    image_cache: Auto | Literal["off"] | NonNegativeInt = Field(
        "auto", description="Memory for decoded images: bytes, or such as 2GB; auto: a quarter of what is free."
    )
    state_seconds: Auto | NonNegativeFloat = Field(
        "auto", description="Between two states that fit(resume=True) can go on with; auto: 2 % of the time at most."
    )
    precision: Auto | Literal["32-true", "bf16-mixed", "16-mixed"] = Field("auto", description="Lightning's name.")

    @field_validator("image_cache", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        if isinstance(value, bool):  # YAML makes False of a bare off
            if value:
                raise ValueError("must be auto, off or an amount of memory such as 2GB")
            return "off"
        amount = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
        return round(float(amount[1]) * _UNITS[amount[2].upper()]) if amount else value


class Config(_Section):
    """All settings of one run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    env: EnvConfig = Field(default_factory=EnvConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)


def resolve(asked: Any, auto: Any, name: str, why: str, reasons: dict[str, str]) -> Any:
    """Return what was asked or, for "auto", the value decided on; the reason is noted under `name`."""
    if asked == "auto":
        reasons[name] = why
        return auto
    reasons[name] = "as asked"
    return asked


def presets_folder() -> Path:
    """Return the folder of preset files: inside an installed package, or beside a checkout's package."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "presets"


def list_presets() -> dict[str, str]:
    """Return every preset's name and its file's header (source, command, hardware, expected score)."""
    headers = {}
    for path in sorted(presets_folder().glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        headers[path.stem] = "\n".join(line[1:].strip() for line in lines if line.startswith("#"))
    return headers


def load_config(preset: str = "fast", *overrides: Hyperparameters | None) -> Config:
    """Read a preset and lay `overrides` over it, later ones winning.

    Args:
        preset: name of a file in ``presets/``, without its ending.
        overrides: nested or dotted settings; None counts as empty.

    Raises:
        ConfigError: the preset or a key is unknown, or a value is not allowed.

    >>> load_config("fast", {"optim.lora.r": 4}).optim.lora.rank
    4
    """
    presets = {path.stem: path for path in presets_folder().glob("*.yaml")}
    if preset not in presets:
        raise ConfigError(
            f"unknown preset '{preset}'{nearest(preset, presets)}. Known presets: {', '.join(sorted(presets))}."
        )
    settings = _read_preset(presets[preset])
    for override in overrides:
        settings.update(flatten(override or {}))
    try:
        return Config.model_validate(_nest(settings))
    except ValidationError as error:
        problems = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise ConfigError("settings out of range: " + "; ".join(problems)) from error


def _read_preset(path: Path) -> dict[str, Any]:
    """Read a preset over the one that it extends, if it does."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    extended = content.pop("extends", None)
    below = {} if extended is None else _read_preset(path.with_name(f"{extended}.yaml"))
    return below | flatten(content)


def flatten(settings: Hyperparameters, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys, aliases replaced by our names.

    Raises:
        ConfigError: a key is unknown; the nearest known one is named.
    """
    known = known_keys()
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        dotted = ALIASES.get(dotted, dotted)
        if dotted == SAM_NAME_KEY:
            if value not in SAM_NAMES:
                raise ConfigError(
                    f"{SAM_NAME_KEY} is '{value}'; known: {', '.join(SAM_NAMES)}. "
                    "For a file of SAM weights set model.encoder and model.checkpoint."
                )
            dotted, value = "model.encoder", SAM_NAMES[value]
        if isinstance(value, Mapping) and dotted not in known:
            flat.update(flatten(value, dotted + "."))
        elif dotted in known:
            flat[dotted] = list(value) if isinstance(value, tuple) else value
        else:
            names = [*known, *ALIASES, SAM_NAME_KEY]
            raise ConfigError(f"unknown setting '{dotted}'{nearest(dotted, names)}.")
    return flat


def known_keys() -> dict[str, str]:
    """Return every dotted setting with its description."""
    return dict(_keys_of(Config, ""))


def _keys_of(section: type[BaseModel], prefix: str) -> Sequence[tuple[str, str]]:
    keys: list[tuple[str, str]] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys.extend(_keys_of(inner, f"{prefix}{name}."))
        else:
            keys.append((f"{prefix}{name}", field.description or ""))
    return keys


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *sections, last = dotted.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return nested
