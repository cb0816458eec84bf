"""What the numbers in a set of masks mean: classes, the values they have on disk, and what to leave out.

:func:`infer_task` decides from the values found in all masks together, so a single image that is all
foreground changes nothing, and it writes down why. A :class:`SegmentationTask` turns mask values into class
indices for the network and class indices back into exactly the user's values.

Not here: reading masks (:mod:`semseg_automl.data.images`), counting their values
(:mod:`semseg_automl.data.table`), the rules for what is a class and what is void
(:mod:`semseg_automl.class_values`). Nothing in this module touches files or the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semseg_automl.class_values import (
    MAX_INFERRED,
    VOID_NAMES,
    Classes,
    colour_classes,
    ignored_values,
    number_classes,
    shorten,
)
from semseg_automl.data.colours import Colour, pack, spell, unpack
from semseg_automl.data.encodings import NUMBERS, MaskEncoding
from semseg_automl.data.forms import FORMS, OPAQUE, form_to_write
from semseg_automl.data.modes import Modes, find_modes, snap
from semseg_automl.data.pooling import PooledMasks, ignored_value, names_by_index, pool_masks
from semseg_automl.errors import DataError, nearest

IGNORE_INDEX = 255
"""The class index of pixels that neither losses nor metrics look at."""

MAX_CLASSES = 254
"""Class indices are uint8, where 255 is :data:`IGNORE_INDEX` and 254 marks unknown values while encoding."""

_UNKNOWN = 254


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
    """The value on disk of each class, increasing; of colours ``r << 16 | g << 8 | b``, background first."""
    class_names: tuple[str, ...]
    """One name for each class."""
    ignore_values: tuple[int, ...] = ()
    """Values on disk of pixels that belong to no class."""
    reasons: tuple[str, ...] = ()
    """Why this was inferred, as sentences."""
    colours: bool = False
    """Whether masks store colours, and predictions are written as RGB."""
    palette: tuple[int, ...] = ()
    """The packed colour of each index where masks are palette images; predictions are written with it."""
    form: str = ""
    """Of the PNG that predictions are written as, one of :data:`semseg_automl.data.forms.FORMS`; empty for a palette,
    for colours, and for the fewest of 8 and 16 bits that hold all values."""
    alpha: int = OPAQUE
    """Of every pixel of a prediction, in the forms that have it."""
    snapped: bool = False
    """Whether other values in a mask become the nearest known one: masks were smoothed, or saved as JPEG."""

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "multiclass"):
            raise DataError(f"kind {self.kind!r} of a segmentation task; use 'binary' or 'multiclass'")
        if len(self.values) < 2 or (self.kind == "binary" and len(self.values) != 2):
            raise DataError(f"a {self.kind} task with values {self.values}; binary has two, multiclass at least two")
        if len(self.values) > MAX_CLASSES:
            raise DataError(f"{len(self.values)} classes; at most {MAX_CLASSES} fit into the class indices")
        ordered = self.values[1:] if self.colours else self.values
        if list(ordered) != sorted(set(ordered)) or len(set(self.values)) != len(self.values) or min(self.values) < 0:
            raise DataError(f"class values {self.values}; use different numbers from 0 on, in increasing order")
        if len(self.class_names) != len(self.values) or len(set(self.class_names)) != len(self.class_names):
            raise DataError(
                f"{len(self.class_names)} class names {shorten(self.class_names)} for {len(self.values)} "
                "classes; give each class one name, all different"
            )
        both = sorted(set(self.values) & set(self.ignore_values))
        if both:
            raise DataError(f"values {both} are classes and ignored at the same time; choose one")
        known = (*self.palette, *(self.values if self.colours else ()))
        if any(not 0 <= colour <= 0xFFFFFF for colour in known) or len(self.palette) > 256:
            raise DataError(
                f"colours {shorten(known)} of a task; each is r << 16 | g << 8 | b, a palette has 256 at most"
            )
        if self.palette and (self.colours or max(self.values) >= len(self.palette)):
            raise DataError(
                f"a palette of {len(self.palette)} colours for {shorten(self.labels)}; each index needs one"
            )

        fitting = form_to_write(self.form, top=max(self.values), colours=self.colours)
        if self.form != fitting or not 0 <= self.alpha <= OPAQUE:
            raise DataError(
                f"the form {self.form!r} with alpha {self.alpha} of a task's masks cannot hold {shorten(self.labels)}; "
                f"use another of {', '.join(FORMS)}, or none, and alpha from 0 to 255"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes, the background included; 2 for a binary task."""
        return len(self.values)

    @property
    def num_scores(self) -> int:
        """The number of score maps of the network: one for a binary task, else one per class."""
        return 1 if self.kind == "binary" else self.num_classes

    @property
    def labels(self) -> tuple[int | str, ...]:
        """The value of each class as people write it: a number, or a colour such as ``'#ff0000'``."""
        return tuple(self._spelled(value) for value in self.values)

    def encode(self, mask: NDArray[Any], *, name: str = "mask") -> NDArray[np.uint8]:
        """Return class indices ``(H, W)``, :data:`IGNORE_INDEX` where the mask holds an ignored value.

        Args:
            mask: ``(H, W)`` of whole numbers as stored; where the task has colours, packed, or RGB ``(H, W, 3)``.
            name: What errors call the mask.

        Raises:
            DataError: A value belongs to no class and is not ignored; the message counts its pixels.
        """
        if mask.ndim == 3 and self.colours:
            mask = pack(mask)
        if mask.ndim != 2:
            raise DataError(f"{name}: a mask of shape {mask.shape}; pass (H, W){' or (H, W, 3)' * self.colours}")
        if mask.dtype == np.bool_ or (self.snapped and not self.colours and _is_grey(mask)):
            mask = mask.astype(np.uint8)
        if mask.dtype == np.uint8 and not self.colours:
            encoded: NDArray[np.uint8] = self._encoding.take(mask)  # half the time of [mask]
        else:
            encoded = self._looked_up(mask)
        unknown = encoded == _UNKNOWN
        if unknown.any():
            found, pixels = np.unique(mask[unknown], return_counts=True)
            pairs = zip(found.tolist(), pixels.tolist(), strict=True)
            listed = shorten([f"{self._spelled(v)} ({n} pixels)" for v, n in pairs])
            naming = "color_map" if self.colours else "class_names"
            raise DataError(
                f"{name}: the mask holds {listed}, which no class has; known are {self.known_text()}; correct "
                f"the mask, or fit with {naming}= or ignore_label= naming these values"
            )
        return encoded

    def unknown_values(self, counts: Mapping[int, int], encoding: MaskEncoding) -> dict[str, int]:
        """Return what a mask holds that the task does not know, as people write it, and the pixels of each.

        Args:
            counts: The mask's values and how many pixels have them.
            encoding: How the mask stores them.

        Raises:
            DataError: The task has colours, and a value of the mask is none.
        """
        if self.colours:
            known = {*self.values, *self.ignore_values}
            colours = {} if self.snapped else encoding.as_colours(counts)
            unknown = {spell(colour): n for colour, n in sorted(colours.items()) if colour not in known}
            if encoding.unlisted and not self.snapped:
                unknown["other colours"] = encoding.unlisted
            return unknown
        if encoding.colours:
            return {spell(colour): n for colour, n in sorted(counts.items())}
        known = {*self.values, *self.ignore_values, *(range(256) if self.snapped else ())}
        return {str(value): n for value, n in sorted(counts.items()) if value not in known}

    def decode(self, indices: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
        """Return class indices ``(H, W)`` as the user's own values, in the smallest unsigned type for all.

        Colours are returned as RGB ``(H, W, 3)`` uint8.
        :data:`IGNORE_INDEX` becomes the first ignored value that an unsigned number can be.

        Raises:
            DataError: An index is no class.
        """
        table, allowed = self._decoding
        top = int(indices.max()) if indices.size else 0
        if indices.size and (indices.min() < 0 or top > IGNORE_INDEX or not allowed[indices].all()):
            wrong = sorted({int(i) for i in np.unique(indices)} - set(np.flatnonzero(allowed).tolist()))
            raise DataError(
                f"class indices {shorten(wrong)} cannot be written; there are {self.num_classes} classes, "
                f"0 to {self.num_classes - 1}"
            )
        decoded: NDArray[np.unsignedinteger[Any]] = table[indices]
        return decoded

    def written_as(self) -> dict[str, Any]:
        """Return what :func:`semseg_automl.data.images.write_png` needs to write predictions as the masks are."""
        return {"palette": self.palette, "form": self.form, "alpha": self.alpha}

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
        types = {"values": int, "class_names": str, "ignore_values": int, "reasons": str, "palette": int}
        lists: dict[str, tuple[Any, ...]] = {}
        for key, kind in types.items():
            items = data.get(key, [])
            if not isinstance(items, (list, tuple)) or not all(type(item) is kind for item in items):
                raise DataError(f"{key} of a task is {items!r}; give a list of {kind.__name__}")
            lists[key] = tuple(items)
        colours, snapped = data.get("colours", False), data.get("snapped", False)
        if not isinstance(colours, bool) or not isinstance(snapped, bool):
            raise DataError(f"colours and snapped of a task are {colours!r} and {snapped!r}; give true or false")
        form, alpha = data.get("form", ""), data.get("alpha", OPAQUE)
        if not isinstance(form, str) or type(alpha) is not int:
            raise DataError(f"form and alpha of a task are {form!r} and {alpha!r}; give a text and a whole number")
        return cls(kind=data["kind"], colours=colours, snapped=snapped, form=form, alpha=alpha, **lists)

    def __str__(self) -> str:
        pairs = [f"{value} = {name}" for value, name in zip(self.labels, self.class_names, strict=True)]
        scores = "1 (foreground)" if self.kind == "binary" else f"{self.num_scores} (one per class)"
        return "\n".join(
            (
                f"task:    {self.kind} segmentation, {self.num_classes} classes",
                f"values:  {shorten(pairs)}",
                f"ignored: {self._ignored_text() or 'nothing'}",
                f"scores:  {scores}",
                f"because: {'; '.join(self.reasons) if self.reasons else 'it was given'}",
            )
        )

    def _spelled(self, value: int) -> int | str:
        return spell(value) if self.colours else value

    def known_text(self) -> str:
        """Return the known values as errors list them."""
        return shorten(self.labels) + (f", and {self._ignored_text()} ignored" if self.ignore_values else "")

    def _ignored_text(self) -> str:
        return shorten([self._spelled(value) for value in self.ignore_values])

    def _looked_up(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        """Return class indices of numbers of any size, `_UNKNOWN` where there is none."""
        known, indices = self._known
        if self.colours and self.snapped:
            found, where = np.unique(mask, return_inverse=True)
            nearest_known = snap(found, known.tolist(), colours=True)[0]
            return indices[np.searchsorted(known, nearest_known)][where].reshape(mask.shape)
        position = np.searchsorted(known, mask).clip(max=len(known) - 1)
        return np.where(known[position] == mask, indices[position], np.uint8(_UNKNOWN))

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
        if self.snapped:
            return table[snap(range(256), known[in_range].tolist(), colours=False)[0]]
        return table

    @cached_property
    def _decoding(self) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.bool_]]:
        writable = [value for value in self.ignore_values if value >= 0]
        table: NDArray[np.unsignedinteger[Any]] = np.zeros(256, np.min_scalar_type(max(*self.values, *writable)))
        allowed = np.zeros(256, dtype=np.bool_)
        table[: self.num_classes] = self.values
        allowed[: self.num_classes] = True
        if writable:
            table[IGNORE_INDEX] = writable[0]
            allowed[IGNORE_INDEX] = True
        return unpack(table) if self.colours else table, allowed


def infer_task(
    value_counts: Sequence[Mapping[int, int]],
    *,
    encodings: Sequence[MaskEncoding] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    color_map: Mapping[int, str] | None = None,
    ignore_label: int | Colour | None = None,
) -> SegmentationTask:
    """Infer the task from the values of all masks together.

    Args:
        value_counts: For each mask, its values and how many pixels have them.
        encodings: For each mask, how it stores them; None for numbers of which nothing else is known.
        num_classes: The number of classes, background included, where some may be absent from these masks or
            where 255 is a class.
        class_names: Names in the order of the values, or a name for each value; values named here are classes
            even when no mask holds them.
        color_map: A name for each packed colour (:func:`semseg_automl.data.colours.read_color_map`); those
            called void, ignore or unlabeled are no classes.
        ignore_label: The value, or colour, of pixels that belong to no class.

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
    encodings = [NUMBERS] * len(value_counts) if encodings is None else encodings
    pooled = pool_masks(value_counts, encodings, colours_named=color_map is not None)
    if isinstance(class_names, str):
        raise DataError(f"class_names is the text {class_names!r}; give a list of names or {{value: name}}")
    if not pooled.pixels:
        raise DataError(f"{len(value_counts)} masks without a pixel; give at least one mask with two classes")
    if color_map is not None and class_names is not None:
        raise DataError(
            "class_names and color_map are both given; the color_map has the names, so leave out class_names"
        )
    names = class_names if color_map is None else color_map if pooled.colours else names_by_index(color_map, pooled)
    ignored = ignored_value(ignore_label, pooled)
    void: dict[int, str] = {}
    if color_map is not None and isinstance(names, Mapping):
        void = {value: name for value, name in names.items() if name.strip().lower() in VOID_NAMES}
        names = {value: name for value, name in names.items() if value not in void}
    if names is not None and num_classes not in (None, len(names)):
        given = "class_names" if color_map is None else "classes in the color_map"
        raise DataError(f"num_classes={num_classes} but {len(names)} {given}; make them agree or give one")
    expected = len(names) if names is not None else num_classes
    classes, snapped = _decide(pooled, expected, names, void, ignored)
    reasons, palette = (*pooled.reasons, *classes.reasons), pooled.palette
    if palette and max(classes.values) >= len(palette):
        reasons, palette = (*classes.reasons, "the palette lacks a colour for some class and is left out"), ()
    form = form_to_write(pooled.form, top=max(classes.values), colours=pooled.colours)
    return SegmentationTask(
        kind="binary" if len(classes.values) == 2 else "multiclass",
        values=classes.values,
        class_names=classes.names,
        ignore_values=classes.ignored,
        reasons=reasons if not form else (*reasons, f"predictions are PNG {FORMS[form]}, as the masks are"),
        colours=pooled.colours,
        palette=palette,
        form=form,
        alpha=pooled.alpha if form else OPAQUE,
        snapped=snapped,
    )


def _decide(
    pooled: PooledMasks,
    expected: int | None,
    names: Sequence[str] | Mapping[int, str] | None,
    void: Mapping[int, str],
    ignore_label: int | None,
) -> tuple[Classes, bool]:
    """Return the classes, and whether masks have to be snapped to them."""
    find = colour_classes if pooled.colours else number_classes
    reasons = [
        f"{spell(value) if pooled.colours else value} is ignored because the color_map calls it {name}"
        for value, name in void.items()
    ]
    by_value = dict(names) if isinstance(names, Mapping) else None
    ignored, why = ignored_values(sorted(pooled.pixels), expected, by_value, ignore_label, colours=pooled.colours)
    ignored |= void.keys()
    modes = _smoothed(pooled, ignored, by_value, expected)
    if modes is None:
        decided = find(pooled.pixels, expected=expected, names=names, ignored=ignored, reasons=[*reasons, *why])
        return decided, False
    # Looked at again: among all the levels of smoothed masks the void value was not to be seen.
    ignored, why = ignored_values(sorted(modes.pixels), expected, by_value, ignore_label, colours=pooled.colours)
    ignored |= void.keys()
    listed = shorten([spell(value) if pooled.colours else value for value in modes.values])
    text = f"{modes.moved:.1%} of the pixels lie between the values {listed} and are taken as the nearest"
    warnings.warn(
        f"{text}: these masks were smoothed or saved as JPEG. Save masks as PNG without smoothing, or name every "
        f"value that is a class of its own with {'color_map' if pooled.colours else 'class_names'}=",
        stacklevel=3,
    )
    decided = find(modes.pixels, expected=expected, names=names, ignored=ignored, reasons=[*reasons, text, *why])
    return decided, True


def _smoothed(
    pooled: PooledMasks, ignored: Collection[int], names: Mapping[int, str] | None, expected: int | None
) -> Modes | None:
    """Return the modes of smoothed masks; None where values may all be classes, or are no label masks at all."""
    found = [value for value in pooled.pixels if value not in ignored]
    if pooled.areas is None or pooled.palette or any(type(value) is not int for value in names or ()):
        return None
    extra = len(found) - expected if expected is not None and names is None else len([*set(found) - set(names or ())])
    if extra <= 0:
        return None
    modes = find_modes(
        pooled.pixels,
        pooled.areas,
        colours=pooled.colours,
        given={*ignored, *(names or ())},
        unlisted=pooled.unlisted,
        known=expected is not None,
    )
    if modes is None or (expected is not None and len(set(modes.values) - set(ignored)) != expected):
        return None
    if modes.ambiguous and (expected is not None or len(found) > MAX_INFERRED):
        close = shorten([spell(value) if pooled.colours else value for value in sorted(modes.close)])
        why = f"{close} are too close" if close else f"{modes.far:.0%} of the pixels are far"
        raise DataError(
            f"the masks hold {len(found)} different values, of which {len(modes.values)} fill areas, but {why} to "
            "take every pixel as the nearest of them. Save masks as PNG without smoothing, threshold them, or name the "
            "classes by value"
        )
    return None if modes.ambiguous else modes


def _is_grey(mask: NDArray[Any]) -> bool:
    return mask.size > 0 and bool(mask.min() >= 0) and bool(mask.max() <= 255)
