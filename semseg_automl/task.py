"""What the numbers in a set of masks mean: classes, the values they have on disk, and what to leave out.

:func:`infer_task` decides from the values found in all masks together, so a single image that is all
foreground changes nothing, and it writes down why. A :class:`SegmentationTask` turns mask values into class
indices for the network and class indices back into exactly the user's values.

Not here: reading masks (:mod:`semseg_automl.data.images`), counting their values
(:mod:`semseg_automl.data.table`). Nothing in this module touches files or the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semseg_automl.errors import DataError, nearest

IGNORE_INDEX = 255
"""The class index of pixels that neither losses nor metrics look at."""

MAX_CLASSES = 254
"""Class indices are uint8, where 255 is :data:`IGNORE_INDEX` and 254 marks unknown values while encoding."""

_UNKNOWN = 254
# Masks that passed through JPEG or a smoothing resize have grey levels by the dozen; label sets inferred
# without the user naming a number of classes rarely have as many.
_MAX_INFERRED = 64
_MAX_SMALL_ID = 127
_SHOWN = 12


@dataclass(frozen=True)
class SegmentationTask:
    """The classes of a data set and their values in its masks.

    Class index i is written as ``values[i]``. A binary task has two classes, background first.

    >>> task = SegmentationTask("binary", values=(0, 255), class_names=("background", "polyp"))
    >>> task.encode(np.array([[0, 255]]))
    array([[0, 1]], dtype=uint8)
    >>> task.decode(np.array([[0, 1]]))
    array([[  0, 255]], dtype=uint8)
    """

    kind: Literal["binary", "multiclass"]
    values: tuple[int, ...]
    """The value on disk of each class, increasing."""
    class_names: tuple[str, ...]
    """One name for each class."""
    ignore_values: tuple[int, ...] = ()
    """Values on disk of pixels that belong to no class."""
    reasons: tuple[str, ...] = ()
    """Why this was inferred, as sentences."""

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "multiclass"):
            raise DataError(f"kind {self.kind!r} of a segmentation task; use 'binary' or 'multiclass'")
        if len(self.values) < 2 or (self.kind == "binary" and len(self.values) != 2):
            raise DataError(f"a {self.kind} task with values {self.values}; binary has two, multiclass at least two")
        if len(self.values) > MAX_CLASSES:
            raise DataError(f"{len(self.values)} classes; at most {MAX_CLASSES} fit into the class indices")
        if list(self.values) != sorted(set(self.values)) or self.values[0] < 0:
            raise DataError(f"class values {self.values}; use different numbers from 0 on, in increasing order")
        if len(self.class_names) != len(self.values) or len(set(self.class_names)) != len(self.class_names):
            raise DataError(
                f"{len(self.class_names)} class names {_shorten(self.class_names)} for {len(self.values)} "
                "classes; give each class one name, all different"
            )
        both = sorted(set(self.values) & set(self.ignore_values))
        if both:
            raise DataError(f"values {both} are classes and ignored at the same time; choose one")

    @property
    def num_classes(self) -> int:
        """The number of classes, the background included; 2 for a binary task."""
        return len(self.values)

    @property
    def num_scores(self) -> int:
        """The number of score maps of the network: one for a binary task, else one per class."""
        return 1 if self.kind == "binary" else self.num_classes

    def encode(self, mask: NDArray[Any], *, name: str = "mask") -> NDArray[np.uint8]:
        """Return class indices ``(H, W)``, :data:`IGNORE_INDEX` where the mask holds an ignored value.

        Args:
            mask: ``(H, W)`` of whole numbers as stored.
            name: What errors call the mask.

        Raises:
            DataError: A value belongs to no class and is not ignored; the message counts its pixels.
        """
        if mask.dtype == np.bool_:
            mask = mask.astype(np.uint8)
        if mask.dtype == np.uint8:
            encoded: NDArray[np.uint8] = self._encoding[mask]
        else:
            known, indices = self._known
            position = np.searchsorted(known, mask).clip(max=len(known) - 1)
            encoded = np.where(known[position] == mask, indices[position], np.uint8(_UNKNOWN))
        unknown = encoded == _UNKNOWN
        if unknown.any():
            found, pixels = np.unique(mask[unknown], return_counts=True)
            listed = _shorten([f"{v} ({n} pixels)" for v, n in zip(found.tolist(), pixels.tolist(), strict=True)])
            ignored = f", and {_shorten(self.ignore_values)} ignored" if self.ignore_values else ""
            raise DataError(
                f"{name}: the mask holds {listed}, which no class has; known are "
                f"{_shorten(self.values)}{ignored}; correct the mask, or fit with class_names= or "
                "ignore_label= naming these values"
            )
        return encoded

    def decode(self, indices: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
        """Return class indices ``(H, W)`` as the user's own values, in the smallest unsigned type for all.

        :data:`IGNORE_INDEX` becomes the first ignored value that an unsigned number can be.

        Raises:
            DataError: An index is no class.
        """
        table, allowed = self._decoding
        top = int(indices.max()) if indices.size else 0
        if indices.size and (indices.min() < 0 or top > IGNORE_INDEX or not allowed[indices].all()):
            wrong = sorted({int(i) for i in np.unique(indices)} - set(np.flatnonzero(allowed).tolist()))
            raise DataError(
                f"class indices {_shorten(wrong)} cannot be written; there are {self.num_classes} classes, "
                f"0 to {self.num_classes - 1}"
            )
        decoded: NDArray[np.unsignedinteger[Any]] = table[indices]
        return decoded

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, as YAML can hold."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SegmentationTask:
        """Rebuild a task from :meth:`to_dict`.

        Raises:
            DataError: A key is missing or unknown, or a value has another type or contradicts another.
        """
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise DataError(f"unknown key {key!r} of a task{nearest(str(key), known)}; known are {known}")
        missing = [key for key in ("kind", "values", "class_names") if key not in data]
        if missing:
            raise DataError(f"a task without {missing}; needed are kind, values and class_names")
        types = {"values": int, "class_names": str, "ignore_values": int, "reasons": str}
        lists: dict[str, tuple[Any, ...]] = {}
        for key, kind in types.items():
            items = data.get(key, [])
            if not isinstance(items, (list, tuple)) or not all(type(item) is kind for item in items):
                raise DataError(f"{key} of a task is {items!r}; give a list of {kind.__name__}")
            lists[key] = tuple(items)
        return cls(kind=data["kind"], **lists)

    def __str__(self) -> str:
        pairs = [f"{value} = {name}" for value, name in zip(self.values, self.class_names, strict=True)]
        scores = "1 (foreground)" if self.kind == "binary" else f"{self.num_scores} (one per class)"
        return "\n".join(
            (
                f"task:    {self.kind} segmentation, {self.num_classes} classes",
                f"values:  {_shorten(pairs)}",
                f"ignored: {_shorten(self.ignore_values) if self.ignore_values else 'nothing'}",
                f"scores:  {scores}",
                f"because: {'; '.join(self.reasons) if self.reasons else 'it was given'}",
            )
        )

    @cached_property
    def _known(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        pairs = [(value, index) for index, value in enumerate(self.values)]
        pairs += [(value, IGNORE_INDEX) for value in self.ignore_values]
        table = np.array(sorted(pairs), dtype=np.int64)
        return table[:, 0], table[:, 1].astype(np.uint8)

    @cached_property
    def _encoding(self) -> NDArray[np.uint8]:
        table = np.full(256, _UNKNOWN, dtype=np.uint8)
        known, indices = self._known
        in_range = (known >= 0) & (known <= 255)
        table[known[in_range]] = indices[in_range]
        return table

    @cached_property
    def _decoding(self) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.bool_]]:
        writable = [value for value in self.ignore_values if value >= 0]
        table = np.zeros(256, dtype=np.min_scalar_type(max(*self.values, *writable)))
        allowed = np.zeros(256, dtype=np.bool_)
        table[: self.num_classes] = self.values
        allowed[: self.num_classes] = True
        if writable:
            table[IGNORE_INDEX] = writable[0]
            allowed[IGNORE_INDEX] = True
        return table, allowed


def infer_task(
    value_counts: Sequence[Mapping[int, int]],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    ignore_label: int | None = None,
) -> SegmentationTask:
    """Infer the task from the values of all masks together.

    Args:
        value_counts: For each mask, its values and how many pixels have them.
        num_classes: The number of classes, background included, where some may be absent from these masks or
            where 255 is a class.
        class_names: Names in the order of the values, or a name for each value; values named here are classes
            even when no mask holds them.
        ignore_label: The value of pixels that belong to no class.

    Raises:
        DataError: There are no masks, only one class, more values than `num_classes` or `class_names` allow,
            or so many that these are no label masks.

    >>> print(infer_task([{0: 50, 255: 14}, {0: 64}, {255: 64}]))
    task:    binary segmentation, 2 classes
    values:  0 = background, 255 = foreground
    ignored: nothing
    scores:  1 (foreground)
    because: the masks hold two values, 0 and 255; the lower is the background
    """
    pixels: Counter[int] = Counter()
    for counts in value_counts:
        pixels.update({int(value): int(count) for value, count in counts.items() if count > 0})
    if isinstance(class_names, str):
        raise DataError(f"class_names is the text {class_names!r}; give a list of names or {{value: name}}")
    if not pixels:
        raise DataError(f"{len(value_counts)} masks without a pixel; give at least one mask with two classes")
    if class_names is not None and num_classes not in (None, len(class_names)):
        raise DataError(f"num_classes={num_classes} but {len(class_names)} class_names; make them agree or give one")
    names = dict(class_names) if isinstance(class_names, Mapping) else None
    expected = len(class_names) if class_names is not None else num_classes
    ignored, reasons = _ignored_values(sorted(pixels), expected, names, ignore_label)
    found = [value for value in sorted(pixels) if value not in ignored]
    _check_found(found, pixels, expected, ignored)
    values, why = _class_values(found, expected, names)
    reasons.append(why)
    if names is None:
        given: Sequence[str] = _default_names(values) if class_names is None else [*class_names]
        names = dict(zip(values, given, strict=True))
    return SegmentationTask(
        kind="binary" if len(values) == 2 else "multiclass",
        values=tuple(values),
        class_names=tuple(str(names[value]) for value in values),
        ignore_values=tuple(sorted(ignored)),
        reasons=tuple(reasons),
    )


def _ignored_values(
    found: list[int], expected: int | None, names: dict[int, str] | None, ignore_label: int | None
) -> tuple[set[int], list[str]]:
    """Return the values to leave out and why: what the user said, -1, and 255 beside small ids."""
    ignored: set[int] = set()
    reasons: list[str] = []
    if ignore_label is not None:
        if names is not None and ignore_label in names:
            raise DataError(f"ignore_label={ignore_label} is also named in class_names; remove one of the two")
        ignored.add(ignore_label)
        where = "" if ignore_label in found else ", though no mask holds it"
        reasons.append(f"{ignore_label} is ignored because ignore_label says so{where}")
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


def _needs_255(found: int, top: int, expected: int | None, names: dict[int, str] | None) -> bool:
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
            f"mask values {_shorten([v for v in found if v < 0])} are negative; number the classes from 0 "
            "on, or name the one that is no class with ignore_label="
        )
    if len(found) < 2:
        what = f"the value {found[0]}" if found else "ignored values"
        beside = f" beside the ignored {_shorten(sorted(ignored))}" if ignored and found else ""
        raise DataError(
            f"one class only: all masks together hold nothing but {what}{beside}; add masks that hold "
            "another class (check that label= names the masks and that they are not empty)"
        )
    if expected is not None and len(found) > expected:
        rarest = sorted(found, key=lambda value: pixels[value])[: len(found) - expected]
        raise DataError(
            f"the masks hold {len(found)} values, {_shorten(found)}, but {expected} classes were given (the "
            f"background counts); the rarest are {_shorten([f'{v} ({pixels[v]} pixels)' for v in rarest])}: "
            "correct the masks, raise num_classes, or name the value to leave out with ignore_label="
        )
    if expected is None and len(found) > _MAX_INFERRED:
        raise DataError(
            f"the masks hold {len(found)} different values, from {found[0]} to {found[-1]}; label masks "
            "have few: these look like anti-aliased or JPEG masks, or like photographs. Save masks as PNG "
            "without smoothing, threshold them, or give num_classes= if there are really so many"
        )


def _class_values(found: list[int], expected: int | None, names: dict[int, str] | None) -> tuple[list[int], str]:
    """Return the value of each class, those known only by name or number included, and why."""
    if names is not None:
        odd = [value for value in names if isinstance(value, bool) or not isinstance(value, int)]
        if odd:
            raise DataError(f"class_names has the keys {odd}; name each class by its number in the masks")
        unnamed = [value for value in found if value not in names]
        if unnamed:
            raise DataError(
                f"the masks hold {_shorten(unnamed)}, which class_names does not name; name every class, "
                "or give the value to leave out as ignore_label="
            )
        return sorted(names), f"class_names names {len(names)} classes, of which the masks hold {len(found)}"
    if expected is not None and expected > len(found):
        if found[-1] >= expected:
            raise DataError(
                f"{expected} classes were given, but the masks hold only {len(found)}, {_shorten(found)}, "
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


def _shorten(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
