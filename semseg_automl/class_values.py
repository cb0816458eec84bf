"""Which of the values found in a set of masks are classes, which are void, and why: numbers and colours.

Not here: what a task does with the classes (:mod:`semseg_automl.task`), smoothed masks
(:mod:`semseg_automl.data.modes`). Nothing in this module touches files or the network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from semseg_automl.data.colours import spell
from semseg_automl.errors import DataError

VOID_NAMES = frozenset({"void", "ignore", "ignored", "unlabeled", "unlabelled"})
"""Names in a colour map, whatever their case, of pixels that belong to no class."""

# Masks that passed through JPEG or a smoothing resize have grey levels by the dozen; label sets inferred
# without the user naming a number of classes rarely have as many.
MAX_INFERRED = 64
_MAX_SMALL_ID = 127
_SHOWN = 12
_BLACK = 0


@dataclass(frozen=True)
class Classes:
    """What a set of masks distinguishes."""

    values: tuple[int, ...]
    """The value of each class; a colour is packed."""
    names: tuple[str, ...]
    """The name of each class."""
    ignored: tuple[int, ...]
    """Values of pixels that belong to no class, increasing."""
    reasons: tuple[str, ...]
    """Why, as sentences."""


def number_classes(
    pixels: Mapping[int, int],
    *,
    expected: int | None,
    names: Sequence[str] | Mapping[int, str] | None,
    ignored: Collection[int],
    reasons: Sequence[str],
) -> Classes:
    """Return the classes of masks that store numbers.

    Args:
        pixels: Each value and its pixels.
        expected: The number of classes, if it was given.
        names: Of the classes by value, or in the order of the values.
        ignored: What :func:`ignored_values` found.
        reasons: What is known so far.

    Raises:
        DataError: The values contradict what was given, or cannot be classes.
    """
    by_value = dict(names) if isinstance(names, Mapping) else None
    found = [value for value in sorted(pixels) if value not in ignored]
    _check_found(found, pixels, expected, set(ignored))
    values, why = _class_values(found, expected, by_value)
    if by_value is None:
        given: Sequence[str] = _default_names(values) if names is None else [*names]
        by_value = dict(zip(values, given, strict=True))
    return Classes(tuple(values), tuple(str(by_value[v]) for v in values), tuple(sorted(ignored)), (*reasons, why))


def colour_classes(
    pixels: Mapping[int, int],
    *,
    expected: int | None,
    names: Sequence[str] | Mapping[int, str] | None,
    ignored: Collection[int],
    reasons: Sequence[str],
) -> Classes:
    """Return the classes of masks that store colours, background first, then in the order of the numbers.

    The background is the colour named so, else black, else the colour of most pixels.

    Args:
        pixels: Each packed colour and its pixels.
        expected: The number of classes, if it was given.
        names: A colour map, or names in the order of the classes.
        ignored: Colours of pixels that belong to no class.
        reasons: What is known so far.

    Raises:
        DataError: The colours contradict what was given, or are too many to be classes.
    """
    found = [colour for colour in sorted(pixels) if colour not in ignored]
    _check_colours(found, pixels, expected, names)
    by_colour = dict(names) if isinstance(names, Mapping) else None
    values = sorted(found if by_colour is None else set(by_colour) - set(ignored))
    named = [] if by_colour is None else [v for v in values if by_colour[v].strip().lower() == "background"]
    if named:
        background, why = named[0], "the background by name"
    elif _BLACK in values:
        background, why = _BLACK, "the background because it is black"
    else:
        background = max(values, key=lambda value: pixels.get(value, 0))
        why = "the background because most pixels have it, and none is black"
    values = [background, *(value for value in values if value != background)]
    if by_colour is None:
        plain = ["background", "foreground"] if len(values) == 2 else [spell(value) for value in values]
        given = plain if names is None else [str(name) for name in names]
        by_colour = dict(zip(values, given, strict=True))
        how = f"the masks hold {len(values)} colours, each is a class"
    else:
        how = f"the color_map names {len(values)} classes, of which the masks hold {len(found)}"
    return Classes(
        tuple(values),
        tuple(str(by_colour[value]) for value in values),
        tuple(sorted(ignored)),
        (*reasons, f"{how}, and {spell(background)} is {why}"),
    )


def _check_colours(
    found: list[int], pixels: Mapping[int, int], expected: int | None, names: Sequence[str] | Mapping[int, str] | None
) -> None:
    listed = shorten([f"{spell(c)} ({pixels[c]} pixels)" for c in sorted(found, key=lambda c: -pixels[c])])
    if len(found) < 2:
        raise DataError(
            f"one class only: all masks together hold nothing but {listed or 'ignored colours'}; add masks that hold "
            "another class (check that label= names the masks and that they are not empty)"
        )
    if isinstance(names, Mapping):
        unnamed = [colour for colour in found if colour not in names]
        if unnamed:
            listed = shorten([f"{spell(c)} ({pixels[c]} pixels)" for c in unnamed])
            raise DataError(
                f"the masks hold {listed}, which the color_map does not name; name every colour (as 'void' where it is "
                "no class), or give the one to leave out as ignore_label="
            )
        return
    if expected is None and len(found) > MAX_INFERRED:
        raise DataError(
            f"the masks hold {len(found)} different colours, most often {listed}; label masks have few: these look "
            "like photographs, or like masks that were smoothed too much to tell. Save masks as PNG without "
            "smoothing, or name the classes with color_map="
        )
    if expected is not None and len(found) != expected:
        raise DataError(
            f"the masks hold {len(found)} colours, {listed}, but {expected} classes were given (the background "
            "counts); name the classes by colour with color_map=, or the colour to leave out with ignore_label="
        )


def ignored_values(
    found: list[int],
    expected: int | None,
    names: Mapping[int, str] | None,
    ignore_label: int | None,
    *,
    colours: bool = False,
) -> tuple[set[int], list[str]]:
    """Return the values to leave out and why: what the user said, -1, and 255 beside small ids.

    Of colours, only what the user said is left out.

    Raises:
        DataError: The user named a value and said to ignore it.
    """
    ignored: set[int] = set()
    reasons: list[str] = []
    if ignore_label is not None:
        spelled = spell(ignore_label) if colours else str(ignore_label)
        if names is not None and ignore_label in names:
            given = "the color_map" if colours else "class_names"
            raise DataError(f"ignore_label={spelled} is also named in {given}; remove one of the two")
        ignored.add(ignore_label)
        where = "" if ignore_label in found else ", though no mask holds it"
        reasons.append(f"{spelled} is ignored because ignore_label says so{where}")
    if colours:
        return ignored, reasons
    if -1 in found and -1 not in ignored:
        ignored.add(-1)
        reasons.append("-1 is ignored because no class can have a negative number")
    classes = [value for value in found if value not in ignored]
    others = [value for value in classes if value != 255]
    if (
        ignore_label is None
        and 255 in classes
        and len(others) >= 2
        and max(others) <= _MAX_SMALL_ID
        and not _are_grey_levels(classes)
        and not _needs_255(len(classes), max(others), expected, names)
    ):
        ignored.add(255)
        reasons.append(
            f"255 is ignored because the other {len(others)} values are small numbers up to {max(others)} "
            "(name it in class_names={value: name} to make it a class)"
        )
    return ignored, reasons


def _needs_255(found: int, top: int, expected: int | None, names: Mapping[int, str] | None) -> bool:
    """Whether what the user gave can only be met with 255 as a class, `top` being the largest other value.

    A number of classes means 0 to that number where the other values allow it: of 21 classes a small data set may
    well lack one, and 255 does not become the 21st.
    """
    if names is not None:
        return 255 in names
    return expected is not None and expected >= found and top >= expected


def _are_grey_levels(values: list[int]) -> bool:
    """Whether the values divide 0 to 255 evenly, as 0, 127, 255 do: classes painted as greys, none void."""
    ladder = np.linspace(0, 255, len(values))
    return bool(np.abs(ladder - values).max() <= 1)


def _check_found(found: list[int], pixels: Mapping[int, int], expected: int | None, ignored: set[int]) -> None:
    if any(value < 0 for value in found):
        raise DataError(
            f"mask values {shorten([v for v in found if v < 0])} are negative; number the classes from 0 "
            "on, or name the one that is no class with ignore_label="
        )
    if len(found) < 2:
        what = f"the value {found[0]}" if found else "ignored values"
        beside = f" beside the ignored {shorten(sorted(ignored))}" if ignored and found else ""
        raise DataError(
            f"one class only: all masks together hold nothing but {what}{beside}; add masks that hold "
            "another class (check that label= names the masks and that they are not empty)"
        )
    if expected is not None and len(found) > expected:
        rarest = sorted(found, key=lambda value: pixels[value])[: len(found) - expected]
        raise DataError(
            f"the masks hold {len(found)} values, {shorten(found)}, but {expected} classes were given (the "
            f"background counts); the rarest are {shorten([f'{v} ({pixels[v]} pixels)' for v in rarest])}: "
            "correct the masks, raise num_classes, or name the value to leave out with ignore_label="
        )
    if expected is None and len(found) > MAX_INFERRED:
        raise DataError(
            f"the masks hold {len(found)} different values, from {found[0]} to {found[-1]}; label masks "
            "have few: these look like anti-aliased or JPEG masks, or like photographs. Save masks as PNG "
            "without smoothing, name the classes with class_names={value: name} so that other values become the "
            "nearest, or give num_classes= if there are really so many"
        )


def _class_values(found: list[int], expected: int | None, names: Mapping[int, str] | None) -> tuple[list[int], str]:
    """Return the value of each class, those known only by name or number included, and why."""
    if names is not None:
        odd = [value for value in names if isinstance(value, bool) or not isinstance(value, int)]
        if odd:
            raise DataError(f"class_names has the keys {odd}; name each class by its number in the masks")
        unnamed = [value for value in found if value not in names]
        if unnamed:
            raise DataError(
                f"the masks hold {shorten(unnamed)}, which class_names does not name; name every class, "
                "or give the value to leave out as ignore_label="
            )
        return sorted(names), f"class_names names {len(names)} classes, of which the masks hold {len(found)}"
    if expected is not None and expected > len(found):
        if found[-1] >= expected:
            raise DataError(
                f"{expected} classes were given, but the masks hold only {len(found)}, {shorten(found)}, "
                "and their numbers have gaps; name the others with class_names={value: name}"
            )
        why = f"{expected} classes were given, numbered from 0 on; {len(found)} are in the masks"
        return list(range(expected)), why
    if len(found) == 2:
        return found, f"the masks hold two values, {found[0]} and {found[1]}; the lower is the background"
    gaps = "" if found[-1] - found[0] == len(found) - 1 else ", and gaps in their numbers are kept"
    return found, f"the masks hold {len(found)} values, each is a class{gaps}"


def _default_names(values: list[int]) -> list[str]:
    return ["background", "foreground"] if len(values) == 2 else [f"class_{value}" for value in values]


def shorten(items: Sequence[object]) -> str:
    """Return the first items, separated by commas, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
