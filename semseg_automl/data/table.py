"""Tables of images and masks: the only reader of DataFrames.

A :class:`MaskTable` is what the rest of the package knows of a user's table: sources in order, and the
user's own index to name rows by. Nothing is dropped or reordered on the way.

Not here: decoding files (:mod:`semseg_automl.data.images`), the check of every row
(:mod:`semseg_automl.data.checks`), splitting (:mod:`semseg_automl.data.splits`), what mask values mean
(:mod:`semseg_automl.task`).
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.annotated import BACKGROUND, check_names
from semseg_automl.data.annotations import annotation_format, are_annotations, read_annotations
from semseg_automl.data.channels import Channels
from semseg_automl.data.drawn import DrawnMask
from semseg_automl.data.images import SUFFIXES, ImageSource
from semseg_automl.data.listing import image_files
from semseg_automl.errors import DataError, nearest

TableSource: TypeAlias = pd.DataFrame | str | os.PathLike[str]
"""A DataFrame, or the path of a CSV file or of annotations (:mod:`semseg_automl.data.annotations`)."""

PREDICTED_SPLITS = ("test", "val", "train")
"""The parts of annotations, of which the first one that is there is predicted."""

_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class MaskTable:
    """Images, their masks if known, and the index of the caller's table, all in the caller's order."""

    images: tuple[ImageSource, ...]
    masks: tuple[ImageSource, ...] | None
    index: pd.Index[Any]
    """The caller's index, of any kind; duplicates are allowed, rows are told apart by position."""
    groups: tuple[Hashable, ...] | None = None
    """What rows belong together by, such as the patient; None where nobody has asked."""
    class_names: Mapping[int, str] = field(default_factory=dict)
    """The name of each value, where annotations came with names."""
    notes: tuple[str, ...] = ()
    """What was decided about annotations, as sentences."""
    channels: Channels | None = None
    """Which channels of the images are read, as :func:`semseg_automl.data.images.read_image` takes them."""

    def __post_init__(self) -> None:
        if len(self.index) != len(self.images) or (self.masks is not None and len(self.masks) != len(self.images)):
            raise DataError(
                f"{len(self.images)} images, {len(self.index)} index values and "
                f"{'no' if self.masks is None else len(self.masks)} masks; give one of each for every row"
            )

    def __len__(self) -> int:
        return len(self.images)

    def row_name(self, position: int) -> str:
        """Return how errors call the row at `position`: its index value and the path of its image."""
        return f"row {self.index[position]} ({_source_name(self.images[position])})"

    def image_name(self, position: int) -> str:
        """Return the path of the image at `position`, or what it is in memory."""
        return _source_name(self.images[position])

    def mask_name(self, position: int) -> str:
        """Return how errors call the mask of the row at `position`."""
        return "no mask" if self.masks is None else _source_name(self.masks[position])

    def take(self, positions: Sequence[int] | NDArray[np.integer[Any]]) -> MaskTable:
        """Return the rows at `positions`, in that order, with their index values."""
        chosen = [int(position) for position in positions]
        return MaskTable(
            images=tuple(self.images[i] for i in chosen),
            masks=None if self.masks is None else tuple(self.masks[i] for i in chosen),
            index=self.index.take(chosen),
            groups=None if self.groups is None else tuple(self.groups[i] for i in chosen),
            class_names=self.class_names,
            notes=self.notes,
            channels=self.channels,
        )


def read_table(
    data: TableSource,
    *,
    image_column: str = "image",
    label_column: str = "label",
    base_dir: str | os.PathLike[str] | None = None,
    require_masks: bool = True,
    group_column: str | None = None,
    split: Sequence[str] = ("train",),
    known: Mapping[int, str] | None = None,
    channels: Channels | None = None,
) -> MaskTable:
    """Read a table of images and masks; no image is opened.

    Args:
        data: A DataFrame whose cells are paths, arrays or Pillow images, or the path of a CSV file; or of annotations,
            whose masks are drawn when they are read.
        image_column: The column of images.
        label_column: The column of masks.
        base_dir: Where relative paths start; by default the folder of the CSV file, or for a DataFrame the
            current folder.
        require_masks: Whether a missing `label_column` is an error; if not, the table has no masks then.
        group_column: The column that names the group of each row; None for no groups.
        split: The parts of annotations that have some, of which the first one that is there is read.
        known: The names by value that annotations have to agree with, and by which LabelMe's are numbered.
        channels: Which channels of the images are read.

    Raises:
        DataError: The CSV file or the annotations cannot be read, a column is missing, there are no rows, cells are
            empty, or the names of annotations contradict `known`.

    >>> frame = pd.DataFrame({"image": ["a.jpg"], "label": ["a.png"]}, index=[7])
    >>> read_table(frame, base_dir="data").row_name(0)
    'row 7 (data/a.jpg)'
    """
    frame, called, base_dir = _frame_of(data, (image_column, label_column), base_dir, split, known)
    images = _column(frame, image_column, called, base_dir)
    masks = None
    if require_masks or label_column in frame.columns:
        masks = _column(frame, label_column, called, base_dir, masks=True)
    groups = None if group_column is None else _groups(frame, group_column, called)
    names, notes = _class_names(frame, called), tuple(map(str, frame.attrs.get("notes", ())))
    check_names(known or {}, names, called)
    about: dict[str, Any] = {"groups": groups, "class_names": names, "notes": notes, "channels": channels}
    return MaskTable(images, masks, frame.index, **about)


def read_frame(
    data: TableSource,
    *,
    image_column: str = "image",
    label_column: str = "label",
    base_dir: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Return a table as a DataFrame with all its columns, to take rows from.

    Relative paths of a CSV file are joined to its folder, which a DataFrame does not remember; with `base_dir`, which
    its reader has to be told again, they stay as they are. A DataFrame is returned itself.

    Raises:
        DataError: As in :func:`read_table`; a missing column is found there.
    """
    frame, _, start = _frame_of(data, (image_column, label_column), base_dir)
    if isinstance(data, pd.DataFrame) or base_dir is not None or start is None:
        return frame
    joined = frame.copy()
    for column in {image_column, label_column} & set(frame.columns):
        joined[column] = [cell if pd.isna(cell) else _resolved(cell, start) for cell in frame[column]]
    return joined


def read_images(
    source: object,
    *,
    image_column: str = "image",
    base_dir: str | os.PathLike[str] | None = None,
    channels: Channels | None = None,
) -> MaskTable:
    """Read images to predict on, in any form, as a table without masks; no image is opened.

    Args:
        source: A DataFrame or CSV file with `image_column`, a folder (its images by name, no subfolders but
            ``images``), annotations, one path, array or Pillow image, or a list or Series of them.
        image_column: The column of images of a DataFrame or CSV file.
        base_dir: Where relative paths start, as in :func:`read_table`.
        channels: Which channels of the images are read.

    Raises:
        DataError: There are no images, or `source` is none of these. Files are looked at later, one by one.

    >>> len(read_images(["a.jpg", np.zeros((4, 6, 3), np.uint8)]))
    2
    """
    return replace(_images_of(source, image_column, base_dir), channels=channels)


def _images_of(source: object, image_column: str, base_dir: str | os.PathLike[str] | None) -> MaskTable:
    items: list[Any]
    index: pd.Index[Any] | None = None
    if isinstance(source, pd.DataFrame):
        return _without_masks(read_table(source, image_column=image_column, base_dir=base_dir, require_masks=False))
    if isinstance(source, (str, os.PathLike)):
        path = Path(_resolved(source, base_dir))
        if path.is_dir():
            return _of_folder(path)
        if are_annotations(path):
            return _without_masks(read_table(path, split=PREDICTED_SPLITS))
        if path.suffix.lower() == ".csv":
            inner = path.parent if base_dir is None else base_dir
            return _without_masks(read_table(path, image_column=image_column, base_dir=inner, require_masks=False))
        items = [source]
    elif isinstance(source, (np.ndarray, Image.Image)):
        items = [source]
    elif isinstance(source, pd.Series):
        items, index = list(source), source.index
    elif isinstance(source, (list, tuple)):
        items = list(source)
    else:
        raise DataError(
            f"images of type {type(source).__name__}; pass a DataFrame, a CSV file, a folder, a path, "
            "an array, a Pillow image, or a list of the last three"
        )
    if not items:
        raise DataError("an empty list of images; give at least one")
    if index is None:
        index = pd.RangeIndex(len(items))
    return MaskTable(images=_sources(items, index, "the list", base_dir), masks=None, index=index)


def stream_images(
    images: Iterator[ImageSource],
    size: int,
    *,
    base_dir: str | os.PathLike[str] | None = None,
    channels: Channels | None = None,
) -> Iterator[MaskTable]:
    """Read images to predict from an iterator as tables of at most `size` rows, whose index counts on.

    Args:
        images: Where they come from.
        size: Rows of a table.
        base_dir: Where relative paths start.
        channels: Which channels of the images are read.

    Raises:
        DataError: An item is no path, array or Pillow image.

    >>> [list(table.index) for table in stream_images(iter(["a.jpg", "b.jpg", "c.jpg"]), 2)]
    [[0, 1], [2]]
    """
    start = 0
    while items := list(islice(images, size)):
        index = pd.RangeIndex(start, start + len(items))
        sources = _sources(items, index, "the stream", base_dir)
        yield MaskTable(images=sources, masks=None, index=index, channels=channels)
        start += len(items)


def _source_name(source: ImageSource) -> str:
    if isinstance(source, np.ndarray):
        return "array in memory"
    if isinstance(source, Image.Image):
        return "Pillow image in memory"
    return source.name if isinstance(source, DrawnMask) else os.fspath(source)


def _resolved(path: str | os.PathLike[str], base_dir: str | os.PathLike[str] | None) -> str:
    return os.fspath(path) if base_dir is None else os.path.join(base_dir, path)


def _read_csv(path: str | os.PathLike[str], text_columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        # As text: file names such as 007 or 1e5 are no numbers.
        return pd.read_csv(path, dtype=dict.fromkeys(text_columns, str))
    except FileNotFoundError as error:
        raise DataError(f"{os.fspath(path)}: no such file; check the path of the CSV file") from error
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(
            f"{os.fspath(path)}: cannot be read as a CSV file ({error}); write a header line with the "
            "columns and one line per image, separated by commas, in UTF-8"
        ) from error


def _frame_of(
    data: TableSource,
    text_columns: tuple[str, str],
    base_dir: str | os.PathLike[str] | None,
    split: Sequence[str] = ("train",),
    known: Mapping[int, str] | None = None,
) -> tuple[pd.DataFrame, str, str | os.PathLike[str] | None]:
    """Return a table as a DataFrame, how errors call it, and where its relative paths start."""
    if isinstance(data, pd.DataFrame):
        frame, called = data, "the DataFrame"
    elif isinstance(data, (str, os.PathLike)) and are_annotations(data):
        classes = None
        if known and annotation_format(data) == "labelme":
            classes = {name: value for value, name in known.items() if name != BACKGROUND}
        frame, called = read_annotations(data, split=split, classes=classes), os.fspath(data)
        frame, base_dir = frame.rename(columns=dict(zip(("image", "label"), text_columns, strict=True))), None
    elif isinstance(data, (str, os.PathLike)):
        frame, called = _read_csv(data, text_columns), os.fspath(data)
        base_dir = Path(data).parent if base_dir is None else base_dir
    else:
        raise DataError(
            f"a table of type {type(data).__name__}; pass a pandas DataFrame, or the path of a CSV file or annotations"
        )
    if frame.empty:
        raise DataError(f"{called} has no rows; give at least one image")
    return frame, called, base_dir


def _class_names(frame: pd.DataFrame, called: str) -> dict[int, str]:
    names = frame.attrs.get("class_names", {})
    if not isinstance(names, Mapping) or not all(type(v) is int and isinstance(n, str) for v, n in names.items()):
        raise DataError(
            f"attrs['class_names'] of {called} is {str(names)[:80]}; read_annotations puts {{value: name}} there: "
            "correct or remove it"
        )
    return dict(names)


def _groups(frame: pd.DataFrame, column: str, called: str) -> tuple[Hashable, ...]:
    cells = _cells(frame, column, called)
    missing = cells.isna()
    if missing.any():
        rows = _rows([str(row) for row in frame.index[missing]])
        raise DataError(
            f"column {column!r} of {called} names no group in {rows}; give each row one, or leave out groups="
        )
    odd = [str(row) for row, cell in zip(frame.index, cells, strict=True) if not isinstance(cell, Hashable)]
    if odd:
        raise DataError(f"column {column!r} of {called} names no group in {_rows(odd)}; use texts or numbers")
    return tuple(cells)


def _column(
    frame: pd.DataFrame, column: str, called: str, base_dir: str | os.PathLike[str] | None, *, masks: bool = False
) -> tuple[ImageSource, ...]:
    cells = list(_cells(frame, column, called))
    return _sources(cells, frame.index, f"column {column!r} of {called}", base_dir, masks=masks)


def _cells(frame: pd.DataFrame, column: str, called: str) -> pd.Series[Any]:
    if column not in frame.columns:
        present = [str(name) for name in frame.columns]
        raise DataError(
            f"{called} has no column {column!r}{nearest(column, present)}; its columns are {', '.join(present)}"
        )
    cells = frame[column]
    if isinstance(cells, pd.DataFrame):
        raise DataError(f"{called} has {cells.shape[1]} columns named {column!r}; rename all but one")
    return cells


def _sources(
    cells: list[Any],
    index: pd.Index[Any],
    called: str,
    base_dir: str | os.PathLike[str] | None,
    *,
    masks: bool = False,
) -> tuple[ImageSource, ...]:
    sources: list[ImageSource] = []
    empty: list[str] = []
    foreign: list[str] = []
    for row, cell in zip(index, cells, strict=True):
        if isinstance(cell, (np.ndarray, Image.Image)) or (masks and isinstance(cell, DrawnMask)):
            sources.append(cell)
        elif isinstance(cell, (str, os.PathLike)) and os.fspath(cell).strip():
            sources.append(_resolved(cell, base_dir))
        elif isinstance(cell, str) or bool(np.all(pd.isna(cell))):
            empty.append(str(row))
        else:
            foreign.append(f"{row} ({type(cell).__name__})")
    if empty:
        raise DataError(f"{called} is empty in {_rows(empty)}; fill in the path or remove the row")
    if foreign:
        raise DataError(f"{called} holds no image in {_rows(foreign)}; use paths, NumPy arrays or Pillow images")
    return tuple(sources)


def _rows(names: list[str]) -> str:
    more = len(names) - _LISTED_PROBLEMS
    rest = f" and {more} more" if more > 0 else ""
    return f"row{'s' if len(names) > 1 else ''} {', '.join(names[:_LISTED_PROBLEMS])}{rest}"


def _without_masks(table: MaskTable) -> MaskTable:
    return MaskTable(images=table.images, masks=None, index=table.index)


def _of_folder(folder: Path) -> MaskTable:
    found = image_files(folder)
    if not found and (folder / "images").is_dir():
        found = image_files(folder / "images")
        if not found:
            return _without_masks(read_table(folder, split=PREDICTED_SPLITS))
    if not found:
        raise DataError(
            f"{folder}: no images in this folder (subfolders are not searched); the suffixes looked for are "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return MaskTable(images=tuple(map(str, found)), masks=None, index=pd.RangeIndex(len(found)))
