"""What the readers of annotation formats share: their result, the list of everything wrong, names and numbers.

Not here: the formats themselves (:mod:`semseg_automl.data.annotations` knows them all).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from semseg_automl.data.drawn import DrawnMask
from semseg_automl.data.images import MAX_PIXELS, image_size
from semseg_automl.errors import DataError

Classes: TypeAlias = Sequence[str] | Mapping[str, int]
"""Names in the order of their values, from 1 on (from 0 if the first is the background), or the value of each name."""

BACKGROUND = "background"

MAX_FILE_BYTES = 2 * 2**30
"""Annotation files of more bytes are refused: parsed, they take several times as much memory."""

_LISTED = 20


@dataclass
class Annotated:
    """Images with their masks, as a reader found them."""

    images: list[str] = field(default_factory=list)
    """Absolute paths."""
    labels: list[DrawnMask | str] = field(default_factory=list)
    """For each image its mask: drawn when it is read, or the path of a file."""
    class_names: dict[int, str] = field(default_factory=dict)
    """The name of each value; empty where the format has none."""
    notes: list[str] = field(default_factory=list)
    """What was decided, as sentences."""


class Problems:
    """Everything wrong in one source, raised together; only the first are kept."""

    def __init__(self, called: str) -> None:
        self.called = called
        self.number = 0
        self._first: list[str] = []

    def add(self, where: str, what: object) -> None:
        """Note a problem."""
        self.number += 1
        if len(self._first) < _LISTED:
            self._first.append(f"{where}: {what}")

    def raise_any(self) -> None:
        """Raise all problems as one error.

        Raises:
            DataError: There are some; the message lists the first 20.
        """
        if self.number:
            rest = [f"... and {self.number - _LISTED} more"] if self.number > _LISTED else []
            count = "1 problem" if self.number == 1 else f"{self.number} problems"
            head = f"{self.called} cannot be used, {count}; correct or remove:"
            raise DataError("\n- ".join([head, *self._first, *rest]))


def read_text(path: Path, limit: int = MAX_FILE_BYTES) -> str:
    """Return a text file of at most `limit` bytes.

    Raises:
        DataError: It is missing, too large, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the path")
        if path.stat().st_size > limit:
            raise DataError(f"{path}: more than {limit:,} bytes, which are not read; split the file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({error}); check the path and its permissions") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: It cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no JSON ({error}); copy or export the file again") from error


def stated_size(height: object, width: object, image: Path) -> tuple[int, int]:
    """Return height and width as a file states them; from the image's header where it does not.

    Raises:
        DataError: They are no positive whole numbers, too many pixels, or the image cannot be opened.
    """
    if height is None and width is None:
        height, width = image_size(image)
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise DataError(f"height {height!r} and width {width!r}; give both as positive whole numbers")
    if height * width > MAX_PIXELS:
        raise DataError(f"{height} x {width} pixels (height x width) are more than the {MAX_PIXELS:,} that are opened")
    return height, width


def class_values(classes: Classes | None) -> dict[str, int] | None:
    """Return the value of each name that a user gave.

    Raises:
        DataError: A name is given twice or is no text, or a value is no whole number from 0 on.

    >>> class_values(["cat", "dog"])
    {'cat': 1, 'dog': 2}
    """
    if classes is None:
        return None
    if isinstance(classes, str) or not isinstance(classes, (Sequence, Mapping)) or not classes:
        raise DataError(f"classes is {classes!r}; give a list of names or {{name: value}}")
    if isinstance(classes, Mapping):
        values = dict(classes)
    else:
        names = list(classes)
        if len(set(map(str, names))) < len(names):
            raise DataError(f"classes names a class twice: {', '.join(map(str, names))}; name each once")
        values = {name: value for value, name in enumerate(names, start=0 if names[0] == BACKGROUND else 1)}
    for name, value in values.items():
        if not isinstance(name, str) or type(value) is not int or not 0 <= value < 2**31:
            raise DataError(f"classes has {name!r}: {value!r}; give each name, a text, a whole number from 0 on")
    return values


def named(values: Mapping[int, str]) -> dict[int, str]:
    """Return the names by value, the background first, made different where a file gives one name twice.

    >>> named({2: "cell", 1: "cell"})
    {0: 'background', 1: 'cell', 2: 'cell (2)'}
    """
    names = {0: values.get(0, BACKGROUND)}
    for value in sorted(values):
        name, taken = values[value], {known for other, known in names.items() if other != value}
        while name in taken:
            name = f"{name} ({value})"
        names[value] = name
    return names


def check_names(known: Mapping[int, str], found: Mapping[int, str], called: str) -> None:
    """See that a table numbers its classes as those that are known.

    Args:
        known: The names by value of what was fitted.
        found: The names by value of the table; empty where nobody has named them.
        called: What messages call the table.

    Raises:
        DataError: A known name stands for another value. A value with a name that nobody knows is warned about.
    """
    values = {name: value for value, name in known.items()}
    moved = [f"{n} is {v} instead of {values[n]}" for v, n in found.items() if n in values and values[n] != v]
    if moved:
        raise DataError(
            f"{called} numbers its classes otherwise: {', '.join(moved[:_LISTED])}. Read it with "
            "read_annotations(..., classes={name: value}) and the values of the first"
        )
    others = [f"{v} is {n} instead of {known[v]}" for v, n in found.items() if v in known and n not in values and v]
    if others:
        warnings.warn(
            f"{called} has other class names, and values decide: {', '.join(others[:_LISTED])}", stacklevel=4
        )
