"""The values of all masks of a set put together: whether numbers or colours are the classes, and which palette.

Not here: which of the values are classes (:mod:`semseg_automl.class_values`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from semseg_automl.data.colours import Colour, parse_colour, spell
from semseg_automl.data.encodings import MaskEncoding
from semseg_automl.data.forms import OPAQUE
from semseg_automl.errors import DataError


@dataclass(frozen=True)
class PooledMasks:
    """What a set of masks holds."""

    pixels: dict[int, int]
    """Each value of any mask and its pixels."""
    areas: dict[int, int] | None
    """As in :class:`MaskEncoding`, summed; None where a mask was not looked at."""
    colours: bool
    """Whether the values are packed colours."""
    palette: tuple[int, ...]
    """The palette that the masks share; empty without one."""
    unlisted: int
    """Pixels of colours that were not counted one by one."""
    reasons: tuple[str, ...]
    """Why colours or numbers, as sentences."""
    form: str
    """The form that the masks share; empty where they differ."""
    alpha: int
    """Of every pixel of the masks; 255 where they differ."""


def pool_masks(
    value_counts: Sequence[Mapping[int, int]], encodings: Sequence[MaskEncoding], *, colours_named: bool
) -> PooledMasks:
    """Sum over all masks, and decide whether their numbers or their colours tell classes apart.

    Args:
        value_counts: For each mask, its values and how many pixels have them.
        encodings: For each mask, how it stores them.
        colours_named: Whether the user gave a colour map.

    Raises:
        DataError: There is not one encoding for each mask, or masks of numbers are mixed with colour masks.
    """
    if len(encodings) != len(value_counts):
        raise DataError(f"{len(encodings)} encodings for {len(value_counts)} masks; give one for each")
    palette, agree = _shared_palette(value_counts, encodings)
    coloured = sum(encoding.colours for encoding in encodings)
    reasons: tuple[str, ...] = ()
    if coloured:
        reasons = (f"{coloured} of {len(encodings)} masks store colours, so colours are the classes",)
    elif not agree:
        reasons = ("one index has different colours in different masks, so colours are the classes, not indices",)
    elif colours_named and not palette:
        reasons = ("the color_map is given, so colours are the classes",)
    elif palette:
        reasons = (f"palette indices are the classes, and the palette of {len(palette)} colours is kept",)
    by_colour = bool(coloured) or not agree or (colours_named and not palette)
    if coloured and not colours_named:
        _check_greys(value_counts, encodings)
    pixels: Counter[int] = Counter()
    areas: Counter[int] = Counter()
    for position, (counts, encoding) in enumerate(zip(value_counts, encodings, strict=True)):
        held = {int(value): int(count) for value, count in counts.items() if count > 0}
        name = f"mask {position} of the table"
        pixels.update(encoding.as_colours(held, name) if by_colour else held)
        inside = encoding.areas or {}
        areas.update(encoding.as_colours(inside, name) if by_colour else inside)
    forms, alphas = {encoding.form for encoding in encodings}, {encoding.alpha for encoding in encodings}
    return PooledMasks(
        pixels=dict(pixels),
        areas=None if any(encoding.areas is None for encoding in encodings) else dict(areas),
        colours=by_colour,
        palette=() if by_colour else palette,
        unlisted=sum(encoding.unlisted for encoding in encodings),
        reasons=reasons,
        form=forms.pop() if len(forms) == 1 else "",
        alpha=alphas.pop() if len(alphas) == 1 else OPAQUE,
    )


def _check_greys(value_counts: Sequence[Mapping[int, int]], encodings: Sequence[MaskEncoding]) -> None:
    """Refuse masks of numbers that got among colour masks; black, white and greys that colour masks hold are fine."""
    usual = {0x000000, 0xFFFFFF}
    for counts, encoding in zip(value_counts, encodings, strict=True):
        if encoding.colours or encoding.palette:
            usual |= encoding.as_colours(counts).keys()
    for position, (counts, encoding) in enumerate(zip(value_counts, encodings, strict=True)):
        if encoding.colours or encoding.palette:
            continue
        # Values that fill no area are not judged: smoothing and JPEG make greys between black and white.
        filled = [v for v, n in counts.items() if encoding.areas is None or 2 * encoding.areas.get(v, 0) > n]
        strange = [value for value in filled if not 0 <= value <= 255 or value * 0x010101 not in usual]
        if strange:
            raise DataError(
                f"mask {position} of the table holds the numbers {', '.join(map(str, sorted(strange)[:12]))}, but "
                f"{sum(e.colours for e in encodings)} of {len(encodings)} masks store colours, and these greys are "
                "not among them; write all masks in one way, or name the colours with color_map="
            )


def names_by_index(color_map: Mapping[int, str], pooled: PooledMasks) -> dict[int, str]:
    """Return the names in a colour map by the palette index of each colour, one that masks hold before others.

    Raises:
        DataError: The palette lacks a colour.
    """
    index_of: dict[int, int] = {}
    for index in (*sorted(pooled.pixels), *range(len(pooled.palette))):
        if 0 <= index < len(pooled.palette):
            index_of.setdefault(pooled.palette[index], index)
    missing = [spell(colour) for colour in color_map if colour not in index_of]
    if missing:
        raise DataError(
            f"the palette of the masks lacks {', '.join(missing)} of the color_map; remove them from the map"
        )
    return {index_of[colour]: name for colour, name in color_map.items()}


def ignored_value(ignore_label: int | Colour | None, pooled: PooledMasks) -> int | None:
    """Return `ignore_label` in the values of the masks: a packed colour, a palette index, or the number it is.

    Raises:
        DataError: It is a number where masks have colours, or a colour that they do not have.
    """
    if ignore_label is None or (type(ignore_label) is int and not pooled.colours):
        return ignore_label
    if isinstance(ignore_label, int):
        raise DataError(f"ignore_label={ignore_label}, but colours are the classes; give a colour, such as '#ffffff'")
    colour = parse_colour(ignore_label)
    if pooled.colours:
        return colour
    if colour not in pooled.palette:
        raise DataError(f"ignore_label={ignore_label!r} is a colour that no palette of the masks has; give a number")
    held = [value for value in sorted(pooled.pixels) if value < len(pooled.palette) and pooled.palette[value] == colour]
    return held[0] if held else pooled.palette.index(colour)


def _shared_palette(
    value_counts: Sequence[Mapping[int, int]], encodings: Sequence[MaskEncoding]
) -> tuple[tuple[int, ...], bool]:
    """Return the palette of all masks, and whether they agree on the colour of every index that they use."""
    used: dict[int, int] = {}
    longest: tuple[int, ...] = ()
    for counts, encoding in zip(value_counts, encodings, strict=True):
        for index, count in counts.items():
            if count > 0 and 0 <= index < len(encoding.palette):
                colour = encoding.palette[index]
                if used.setdefault(index, colour) != colour:
                    return (), False
        if len(encoding.palette) > len(longest):
            longest = encoding.palette
    return tuple(used.get(index, colour) for index, colour in enumerate(longest)), True
