"""The part of the plan that decides with how many pixels images are seen, and whether whole or in tiles. Pure.

Where tiles lie is :mod:`semseg_automl.tiling`'s, how training crops are drawn :mod:`semseg_automl.data.crops`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from semseg_automl.config import Config, resolve
from semseg_automl.errors import UnsupportedCombination
from semseg_automl.models.facts import EncoderFacts

LARGEST_SHRINK = 4.0
"""How much smaller an image may become, on its shorter side, before it is cut into tiles instead."""
LARGE_SIDE = 1024
"""Shorter side in pixels up to which images are seen whole all the same: on photographs of usual size, the whole
scene tells more than its finest detail."""


USUAL_SIDE = 256
LARGER_SIDES = (320, 384)
SCRATCH_SIDE = 128
"""Roots of the pixels of the input: what is usual, what thin objects may ask for, and what is enough where all is
trained from scratch, as steps teach more than pixels (benchmarks/RESULTS.md)."""
THIN = 4.0
"""Pixels of the input; scores are computed on every fourth, so narrower objects are less than one of them wide."""
LONG_FIT = 300.0
"""Seconds that a fit must have, if it has a limit, for more pixels to pay: in a shorter one steps teach more
(benchmarks/LOG.md)."""


class Framing(NamedTuple):
    """What of an image the network sees at once; names as in `Plan`."""

    input_size: tuple[int, int]
    tile_scale: float | None
    balanced_crops: bool


def auto_area(encoder: EncoderFacts, object_width: float | None, time_limit: float | None) -> tuple[int, str]:
    """Decide how many pixels the input has at most, and say why; more than is usual where objects are thin.

    Args:
        encoder: one with random weights gets fewer.
        object_width: how wide objects typically are, relative to the root of their image's pixels; None if unknown.
        time_limit: seconds for the whole fit, or None.
    """
    if not encoder.pretrained:
        return SCRATCH_SIDE**2, " from scratch"
    if object_width is None or object_width * USUAL_SIDE >= THIN:
        return USUAL_SIDE**2, ""
    thin = f"objects are typically {object_width * USUAL_SIDE:.1f} px wide in {USUAL_SIDE} x {USUAL_SIDE}"
    if time_limit is not None and time_limit < LONG_FIT:
        return USUAL_SIDE**2, f" ({thin}, but {time_limit:.0f} s are too short for more)"
    side = next((side for side in LARGER_SIDES if object_width * side >= THIN), LARGER_SIDES[-1])
    return side**2, f" ({thin}: {side} x {side})"


def choose_framing(
    config: Config,
    sizes: Sequence[tuple[int, int]],
    whole_size: tuple[int, int],
    encoder: EncoderFacts,
    reasons: dict[str, str],
) -> Framing:
    """Decide between whole images and tiles.

    Args:
        config: what was asked.
        sizes: ``(height, width)`` of each image in pixels.
        whole_size: height and width of the input for whole images. For tiles, which need not have the shape of the
            images, an automatic one becomes a square of as many pixels.
        encoder: says whether another input is possible.
        reasons: added to.

    Raises:
        UnsupportedCombination: a scale, or balanced crops, are asked for without tiles.
    """
    scale = _tile_scale(config, sizes, whole_size, reasons)
    if scale is None:
        return Framing(whole_size, None, False)
    size = whole_size
    if config.model.input_size == "auto" and encoder.fixed_size is None:
        side = max(encoder.stride, round(math.sqrt(math.prod(size)) / encoder.stride) * encoder.stride)
        size = side, side
        reasons["input_size"] += ", as a square: of tiles"
    why = "crops laid by chance would miss rare classes"
    balanced: bool = resolve(config.data.balanced_crops, True, "balanced_crops", why, reasons)
    return Framing(size, scale, balanced)


def _tile_scale(
    config: Config, sizes: Sequence[tuple[int, int]], input_size: tuple[int, int], reasons: dict[str, str]
) -> float | None:
    """Decide on pixels of the input per pixel of an image, None for whole images squashed to the input.

    Images are cut only where the median one is large (`LARGE_SIDE`) and would be shrunk more than `LARGEST_SHRINK`.
    The scale is then the one at which it is shrunk exactly so much, so nothing jumps where tiling sets in.
    """
    asked, scale = config.data.tiling, config.data.tile_scale
    if asked == "off":
        _refuse_without_tiles(config)
        reasons["tile_scale"] = "as asked: whole images"
        return None
    height, width = (sorted(size[axis] for size in sizes)[len(sizes) // 2] for axis in (0, 1))
    shorter = 0 if height <= width else 1
    side, shrink = (height, width)[shorter], (height, width)[shorter] / input_size[shorter]
    large = side > LARGE_SIDE and shrink > LARGEST_SHRINK
    median = f"median image {height} x {width}, whole it would shrink {shrink:.1f} times"
    if asked == "auto" and scale == "auto" and not large:
        if config.data.balanced_crops is True:
            _refuse_without_tiles(config)
        reasons["tile_scale"] = f"{median}: not above {LARGEST_SHRINK:g}, or not above {LARGE_SIDE} pixels a side"
        return None
    auto = max(1 / LARGEST_SHRINK, 1 / shrink)
    chosen: float = resolve(scale, auto, "tile_scale", f"{median}; at most {LARGEST_SHRINK:g} are allowed", reasons)
    return chosen


def unrepeated_views(config: Config, framing: Framing, reasons: dict[str, str]) -> dict[str, Any]:
    """Return what of the capacity tiles change: a few repeated crops would show little of a large image.

    Raises:
        UnsupportedCombination: a cache of features is asked for, beside tiles.
    """
    if framing.tile_scale is None:
        return {}
    if config.env.feature_cache not in ("auto", "off"):
        raise UnsupportedCombination(
            f"env.feature_cache is '{config.env.feature_cache}', but training crops are new ones every time and are "
            "never seen again. Use env.feature_cache='off', or data.tiling='off'."
        )
    reasons["feature_cache"] = "training crops are new ones every time"
    return {"feature_cache": "off", "cached_views": 0}


def _refuse_without_tiles(config: Config) -> None:
    data = config.data
    for name, value in (("tile_scale", data.tile_scale), ("balanced_crops", data.balanced_crops)):
        if value not in ("auto", False):
            raise UnsupportedCombination(
                f"data.{name} is {value}, which belongs to tiles, but images are seen whole. Leave it out, or set "
                "data.tiling='on'."
            )
