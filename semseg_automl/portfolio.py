"""Which configurations race: the plan's own, a cheap baseline, and changes of one thing at a time that often pay.

A configuration is a point of a space of choices; a sampler draws further points of it. The first points come from
experience with what helps on small data (benchmarks/LOG.md). Pure: nothing is read, built or timed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from semseg_automl.config import known_keys
from semseg_automl.errors import ConfigError, nearest
from semseg_automl.losses import CRITERIA
from semseg_automl.models.facts import EncoderFacts
from semseg_automl.plan import Plan

OWN = "plan"
"""The configuration that would be fitted without a search."""
BASELINE = "baseline"
SMALL_CNN: dict[str, Any] = {
    "model.encoder": "timm/resnet18.a1_in1k",
    "model.checkpoint": None,
    "model.pretrained": False,
    "model.adapter": None,
    "optim.peft": "full",
}
"""A small convolutional network, trained from scratch: the baseline where nothing is pretrained."""

LR_FACTOR = "lr_factor"
INPUT_SCALE = "input_scale"
ENCODER = "encoder"
USUAL, CNN = "usual", "small_cnn"
"""Choices of `ENCODER`: as the plan has it, and `SMALL_CNN`."""

METHODS_TRIED = ("conv_lora", "lora", "full", "bitfit", "vpt")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn evenly, or evenly in the logarithm."""

    low: float
    high: float
    log: bool = False


Space = dict[str, list[Any] | Range]
"""Choices by name: of a setting, or one of `LR_FACTOR` (times the plan's rate), `INPUT_SCALE`, `ENCODER`."""


@dataclass(frozen=True)
class Point:
    """One configuration.

    Attributes:
        name: what it is called, in tables and as a folder.
        choices: one of each choice of the space.
    """

    name: str
    choices: dict[str, Any]


@dataclass(frozen=True)
class Portfolio:
    """What may be tried.

    Attributes:
        space: to draw further configurations from.
        points: to begin with, the most promising first.
        encoders: settings by the choice of an encoder.
    """

    space: Space
    points: list[Point]
    encoders: Mapping[str, Mapping[str, Any]]


def make_portfolio(
    plan: Plan,
    encoder: EncoderFacts,
    *,
    fixed: Sequence[str],
    asked: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
) -> Portfolio:
    """Say what to try beside a plan.

    Args:
        plan: what would be fitted without a search.
        encoder: its encoder.
        fixed: settings that the user decided; the search leaves them alone.
        asked: choices by setting, see `read_space`; empty for the usual ones.
        encoders: settings by name of other encoders at hand.

    Raises:
        ConfigError: a choice that was asked for is none.
    """
    space = read_space(asked) if asked else _usual_space(plan, encoder, fixed, encoders)
    simple = {"optim.peft": "decoder_only"} if encoder.pretrained and encoder.depth else {ENCODER: CNN}
    for name, choice in simple.items():
        kept = [plan.peft] if name == "optim.peft" else [USUAL]
        known = space.get(name, kept)
        space[name] = [*known, choice] if isinstance(known, list) and choice not in known else known
    own = {name: _own_choice(name, choices) for name, choices in space.items()}
    points = [Point(OWN, own), Point(BASELINE, own | simple)]
    if not asked:
        points += [Point(name, own | change) for name, change in _changes(plan, encoder, space)]
    return Portfolio(space, points, {**encoders, CNN: SMALL_CNN})


def _own_choice(name: str, choices: list[Any] | Range) -> Any:
    """Return the plan's own choice; of a range that was asked for the middle, of a list the first."""
    if isinstance(choices, Range):
        if name == LR_FACTOR:
            return 1.0
        return math.sqrt(choices.low * choices.high) if choices.log else (choices.low + choices.high) / 2
    return 1.0 if name == INPUT_SCALE else choices[0]


def _usual_space(
    plan: Plan, encoder: EncoderFacts, fixed: Sequence[str], encoders: Mapping[str, Mapping[str, Any]]
) -> Space:
    """Return the choices that exist for this encoder and head, without those that the user made."""
    space: Space = {}
    if encoder.pretrained and encoder.depth:
        space["optim.peft"] = [plan.peft, *(name for name in METHODS_TRIED if name != plan.peft)]
    space[LR_FACTOR] = Range(0.2, 5.0, log=True)
    if encoder.fixed_size is None and plan.tile_scale is None:
        space[INPUT_SCALE] = [0.75, 1.0, 1.25, 1.5]
    strengths = ("medium", "light", "strong")
    space["data.augmentation"] = [plan.augmentation, *(name for name in strengths if name != plan.augmentation)]
    head = CRITERIA[plan.loss].head
    losses = [name for name, criterion in CRITERIA.items() if criterion.head == head and name != plan.loss]
    if losses:
        space["optim.loss"] = [plan.loss, *losses]
    if encoders:
        space[ENCODER] = [USUAL, *encoders]
    settings = {LR_FACTOR: "optim.lr", INPUT_SCALE: "model.input_size", ENCODER: "model.encoder"}
    return {name: choices for name, choices in space.items() if settings.get(name, name) not in fixed}


def _changes(plan: Plan, encoder: EncoderFacts, space: Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield changes of the plan's own choices, the most promising first, with a name for each."""
    others: list[tuple[str, dict[str, Any]]] = []
    for name in (each for each in _choices(space, ENCODER)[1:] if each != CNN):
        others.append((f"encoder_{_plain(name)}", {ENCODER: name}))
    methods = _choices(space, "optim.peft")[1:]
    for name in ("lora", "conv_lora"):
        if name in methods:
            others.append((name, {"optim.peft": name}))
    if 1.5 in _choices(space, INPUT_SCALE):
        others.append(("larger_input", {INPUT_SCALE: 1.5}))
    if LR_FACTOR in space:
        others.append(("faster_rate", {LR_FACTOR: 3.0}))
    if "full" in methods and encoder.family != "sam":  # of SAM it takes more memory than the plan counted with
        others.append(("full", {"optim.peft": "full"}))
    for name in _choices(space, "data.augmentation")[1:]:
        others.append((f"{name}_augmentation", {"data.augmentation": name}))
    for name in _choices(space, "optim.loss")[1:]:
        others.append((f"loss_{name}", {"optim.loss": name}))
    if LR_FACTOR in space:
        others.append(("slower_rate", {LR_FACTOR: 1 / 3}))
    if plan.tile_scale is None and 0.75 in _choices(space, INPUT_SCALE):
        others.append(("smaller_input", {INPUT_SCALE: 0.75}))
    yield from others


def _choices(space: Space, name: str) -> list[Any]:
    choices = space.get(name, [])
    return [] if isinstance(choices, Range) else choices


def _plain(name: str) -> str:
    """Return a name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]


def settings_of(choices: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that choices stand for, without those that need a plan (`relative_settings`)."""
    settings = {name: value for name, value in choices.items() if name not in (LR_FACTOR, INPUT_SCALE, ENCODER)}
    encoder = choices.get(ENCODER, USUAL)
    return settings if encoder == USUAL else {**settings, **encoders[encoder]}


def relative_settings(choices: Mapping[str, Any], plan: Plan, stride: int) -> dict[str, Any]:
    """Return the settings that choices relative to a plan stand for.

    Args:
        choices: of a point.
        plan: of the same choices without these.
        stride: both sides of the input are divisible by it.
    """
    settings: dict[str, Any] = {}
    factor, scale = choices.get(LR_FACTOR, 1.0), choices.get(INPUT_SCALE, 1.0)
    if factor != 1:
        settings["optim.lr"] = float(f"{plan.lr * factor:.3g}")
    if scale != 1:
        settings["model.input_size"] = [max(stride, round(side * scale / stride) * stride) for side in plan.input_size]
    return settings


def read_space(asked: Mapping[str, Any]) -> Space:
    """Read choices as a user writes them: ``{"optim.lora.rank": [3, 8], "optim.lr": {"low": 1e-4, "high": 1e-2}}``.

    A list holds the values to choose from, its first the plan's own; ``low`` and ``high`` bound a number, with
    ``"log": true`` drawn evenly in the logarithm.

    Raises:
        ConfigError: a setting is unknown, or what it may be is neither.
    """
    known = [key for key in known_keys() if not key.startswith("search.")]
    space: Space = {}
    for name, choices in asked.items():
        if name not in known:
            raise ConfigError(f"search.space has an unknown setting '{name}'{nearest(name, known)}.")
        if isinstance(choices, Mapping):
            space[name] = _range(name, choices)
        elif isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 0:
            space[name] = list(choices)
        else:
            raise ConfigError(f"search.space of '{name}' is {choices!r}; give a list of values, or low and high.")
    return space


def _range(name: str, bounds: Mapping[str, Any]) -> Range:
    low, high, log = bounds.get("low"), bounds.get("high"), bounds.get("log", False)
    numbers = all(isinstance(each, int | float) and math.isfinite(each) for each in (low, high))
    if set(bounds) - {"low", "high", "log"} or not numbers or not low < high or (log and low <= 0):  # type: ignore[operator]
        raise ConfigError(
            f"search.space of '{name}' is {dict(bounds)}; give low and high, low below high (above 0 with log: true)."
        )
    return Range(float(low), float(high), bool(log))  # type: ignore[arg-type]
