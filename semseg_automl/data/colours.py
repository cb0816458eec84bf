"""Colours as class values: one number for each, its spelling, and colour maps that name them.

A colour is the number ``r << 16 | g << 8 | b`` inside the package, ``"#rrggbb"`` where people read it.

Not here: what a file stores (:mod:`semseg_automl.data.encodings`), which colours are classes
(:mod:`semseg_automl.class_values`).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from semseg_automl.errors import DataError

Colour: TypeAlias = str | tuple[int, int, int]
"""``"#rrggbb"`` or ``(r, g, b)``, each from 0 to 255."""

_HEX = re.compile(r"#[0-9a-fA-F]{6}")
_MAX_FILE_BYTES = 2**20
_FORMS = "write '#rrggbb' or (r, g, b) with numbers from 0 to 255"


def pack(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return RGB ``(H, W, 3)`` as one number per pixel, ``(H, W)``.

    >>> pack(np.array([[[255, 0, 1]]], np.uint8)).tolist() == [[0xFF0001]]
    True
    """
    four = np.zeros((*pixels.shape[:2], 4), dtype=np.uint8)  # blue, green, red, 0: a number of four bytes, lowest first
    for channel in range(3):  # one by one, NumPy copies them five times as fast
        four[:, :, channel] = pixels[:, :, 2 - channel]
    packed: NDArray[np.int32] = four.view("<i4")[:, :, 0].astype(np.int32, copy=False)
    return packed


def unpack(colours: Sequence[int] | NDArray[Any]) -> NDArray[np.uint8]:
    """Return the red, green and blue of packed colours, ``(..., 3)``.

    >>> unpack([0xFF0001]).tolist()
    [[255, 0, 1]]
    """
    packed = np.asarray(colours, dtype=np.int64)
    return np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], axis=-1).astype(np.uint8)


def spell(colour: int) -> str:
    """Return a packed colour as people write it.

    >>> spell(0xFF0001)
    '#ff0001'
    """
    return f"#{colour:06x}"


def parse_colour(colour: object) -> int:
    """Return ``"#rrggbb"`` or ``(r, g, b)`` as a number.

    Raises:
        DataError: It is neither.

    >>> parse_colour("#ff0001") == parse_colour((255, 0, 1)) == 0xFF0001
    True
    """
    if isinstance(colour, str) and _HEX.fullmatch(colour.strip()):
        return int(colour.strip()[1:], 16)
    if isinstance(colour, (tuple, list)) and len(colour) == 3:
        whole = all(isinstance(part, (int, np.integer)) and not isinstance(part, bool) for part in colour)
        if whole and all(0 <= part <= 255 for part in colour):
            return int(colour[0]) << 16 | int(colour[1]) << 8 | int(colour[2])
    raise DataError(f"{colour!r} is no colour; {_FORMS}")


def read_color_map(source: Mapping[Any, str] | str | os.PathLike[str]) -> dict[int, str]:
    """Return the name of each colour.

    Args:
        source: ``{colour: name}``, or the path of a text file with a line ``name, r, g, b`` (CamVid's
            ``class_dict.csv``; a header may order the columns) or ``name:r,g,b::`` (the ``labelmap.txt`` of
            CVAT) for each colour; lines that start with ``#`` are comments.

    Raises:
        DataError: The file cannot be read, a line or key is no colour, or a colour is named twice.

    >>> read_color_map({(0, 0, 0): "ground", "#ff0000": "roof"})
    {0: 'ground', 16711680: 'roof'}
    """
    if isinstance(source, Mapping):
        return _collected([(parse_colour(colour), str(name), "color_map") for colour, name in source.items()])
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"a color_map of type {type(source).__name__}; give {{colour: name}} or the path of a file")
    path = os.fspath(source)
    try:
        if Path(path).stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{path}: more than {_MAX_FILE_BYTES:,} bytes; a color_map has one short line per class")
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the color_map cannot be read ({error}); check the path, and save it as UTF-8"
        ) from error
    entries: list[tuple[int, str, str]] = []
    columns = {"name": 0, "r": 1, "g": 2, "b": 3}
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        cells = _cells(line)
        if {"r", "g", "b"} <= {cell.lower() for cell in cells} and not entries:
            columns = _columns([cell.lower() for cell in cells], where)
            continue
        entries.append((*_entry(cells, columns, where), where))
    return _collected(entries)


def _cells(line: str) -> list[str]:
    """Split a line of either kind into name, red, green, blue; what CVAT writes behind them is for videos."""
    if ":" in line:
        name, colour = line.split(":")[:2]
        return [name.strip(), *(part.strip() for part in colour.split(","))]
    return [cell.strip() for cell in next(csv.reader([line]))]


def _columns(header: list[str], where: str) -> dict[str, int]:
    others = [position for position, cell in enumerate(header) if cell not in ("r", "g", "b")]
    named = [position for position in others if header[position] in ("name", "class", "label")] or others
    if len(named) != 1:
        raise DataError(f"{where}: which column has the names is not clear; write the header name,r,g,b")
    return {"name": named[0], **{channel: header.index(channel) for channel in "rgb"}}


def _entry(cells: list[str], columns: Mapping[str, int], where: str) -> tuple[int, str]:
    message = f"{where}: {cells} is not a name and three numbers from 0 to 255; write name,r,g,b or name:r,g,b::"
    if len(cells) <= max(columns.values()):
        raise DataError(message)
    channels = [cells[columns[channel]] for channel in "rgb"]
    if not cells[columns["name"]] or not all(channel.isdecimal() and int(channel) <= 255 for channel in channels):
        raise DataError(message)
    return parse_colour(tuple(int(channel) for channel in channels)), cells[columns["name"]]


def _collected(entries: Sequence[tuple[int, str, str]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for colour, name, where in entries:
        if colour in names:
            raise DataError(f"{where}: {spell(colour)} is named twice, {names[colour]} and {name}; keep one")
        names[colour] = name
    if not names:
        raise DataError("a color_map without a colour; give one line or key for each class")
    return names
