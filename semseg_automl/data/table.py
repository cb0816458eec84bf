"""Tables of images and masks: the only reader of DataFrames, the check of every row, and the hold-out split.

A :class:`MaskTable` is what the rest of the package knows of a user's table: sources in order, and the
user's own index to name rows by. Nothing is dropped or reordered on the way.

Not here: decoding files (:mod:`semseg_automl.data.images`), what mask values mean
(:mod:`semseg_automl.task`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from semseg_automl.data.encodings import NUMBERS, MaskEncoding
from semseg_automl.data.images import SUFFIXES, ImageSource, read_image, read_stored_mask
from semseg_automl.errors import ConfigError, DataError, nearest

TableSource: TypeAlias = pd.DataFrame | str | os.PathLike[str]
"""A DataFrame, or the path of a CSV file."""

_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class MaskTable:
    """Images, their masks if known, and the index of the caller's table, all in the caller's order."""

    images: tuple[ImageSource, ...]
    masks: tuple[ImageSource, ...] | None
    index: pd.Index[Any]
    """The caller's index, of any kind; duplicates are allowed, rows are told apart by position."""

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

    def take(self, positions: Sequence[int] | NDArray[np.integer[Any]]) -> MaskTable:
        """Return the rows at `positions`, in that order, with their index values."""
        chosen = [int(position) for position in positions]
        return MaskTable(
            images=tuple(self.images[i] for i in chosen),
            masks=None if self.masks is None else tuple(self.masks[i] for i in chosen),
            index=self.index.take(chosen),
        )


@dataclass(frozen=True)
class RowCheck:
    """What the check of a row found."""

    size: tuple[int, int]
    """Height and width in pixels."""
    value_counts: dict[int, int]
    """Each value of the mask, packed where it stores colours, and how many pixels have it; empty without a mask."""
    encoding: MaskEncoding = NUMBERS
    """How the mask stores its values."""


def read_table(
    data: TableSource,
    *,
    image_column: str = "image",
    label_column: str = "label",
    base_dir: str | os.PathLike[str] | None = None,
    require_masks: bool = True,
) -> MaskTable:
    """Read a table of images and masks; no image is opened.

    Args:
        data: A DataFrame whose cells are paths, arrays or Pillow images, or the path of a CSV file.
        image_column: The column of images.
        label_column: The column of masks.
        base_dir: Where relative paths start; by default the folder of the CSV file, or for a DataFrame the
            current folder.
        require_masks: Whether a missing `label_column` is an error; if not, the table has no masks then.

    Raises:
        DataError: The CSV file cannot be read, a column is missing, there are no rows, or cells are empty.

    >>> frame = pd.DataFrame({"image": ["a.jpg"], "label": ["a.png"]}, index=[7])
    >>> read_table(frame, base_dir="data").row_name(0)
    'row 7 (data/a.jpg)'
    """
    if isinstance(data, pd.DataFrame):
        frame, called = data, "the DataFrame"
    elif isinstance(data, (str, os.PathLike)):
        frame, called = _read_csv(data, (image_column, label_column)), os.fspath(data)
        base_dir = Path(data).parent if base_dir is None else base_dir
    else:
        raise DataError(f"a table of type {type(data).__name__}; pass a pandas DataFrame or the path of a CSV file")
    if frame.empty:
        raise DataError(f"{called} has no rows; give at least one image")
    images = _column(frame, image_column, called, base_dir)
    masks = None
    if require_masks or label_column in frame.columns:
        masks = _column(frame, label_column, called, base_dir)
    return MaskTable(images=images, masks=masks, index=frame.index)


def read_images(
    source: object, *, image_column: str = "image", base_dir: str | os.PathLike[str] | None = None
) -> MaskTable:
    """Read images to predict on, in any form, as a table without masks; no image is opened.

    Args:
        source: A DataFrame or CSV file with `image_column`, a folder (its images by name, no subfolders), one
            path, array or Pillow image, or a list or Series of them.
        image_column: The column of images of a DataFrame or CSV file.
        base_dir: Where relative paths start, as in :func:`read_table`.

    Raises:
        DataError: There are no images, or `source` is none of these. Files are looked at later, one by one.

    >>> len(read_images(["a.jpg", np.zeros((4, 6, 3), np.uint8)]))
    2
    """
    items: list[Any]
    index: pd.Index[Any] | None = None
    if isinstance(source, pd.DataFrame):
        return _without_masks(read_table(source, image_column=image_column, base_dir=base_dir, require_masks=False))
    if isinstance(source, (str, os.PathLike)):
        path = Path(_resolved(source, base_dir))
        if path.is_dir():
            return _of_folder(path)
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


def check_rows(table: MaskTable, *, workers: int | None = None, progress: bool = False) -> list[RowCheck]:
    """Open every image and mask once and return what is in them, in the order of the table.

    Args:
        table: What to check; without masks only the images are opened.
        workers: Threads; by default one for each processor this program may use.
        progress: Whether to show a progress bar on the terminal.

    Raises:
        DataError: Rows cannot be used: a file is missing, unreadable or truncated, or a mask has another size
            than its image. One error lists them all, the first 20 in full.
    """
    results: list[RowCheck | str] = []
    with ThreadPoolExecutor(workers or _processors()) as pool, _progress_bar(len(table), progress) as advance:
        for result in pool.map(lambda position: _check_row(table, position), range(len(table))):
            results.append(result)
            advance()
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        more = len(problems) - _LISTED_PROBLEMS
        rest = [f"... and {more} more rows"] if more > 0 else []
        count = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
        raise DataError(
            "\n- ".join(
                [
                    f"{count} of {len(table)} cannot be used; correct or remove:",
                    *problems[:_LISTED_PROBLEMS],
                    *rest,
                ]
            )
        )
    return [result for result in results if isinstance(result, RowCheck)]


def split_holdout(
    table: MaskTable, checks: Sequence[RowCheck], *, frac: float, seed: int
) -> tuple[MaskTable, MaskTable]:
    """Split a table into training and validation rows, the share of foreground alike in both.

    Rows are ordered by the share of pixels that do not have the data set's most frequent value, cut into as
    many runs as rows are held out, and one row of each run is drawn. So images without foreground, with
    little and with much are all held out in proportion.

    Args:
        table: The rows to split.
        checks: The result of :func:`check_rows` for them.
        frac: The fraction to hold out, between 0 and 1; at least one row stays on either side.
        seed: Of the drawing; equal seeds give equal splits.

    Returns:
        Training and validation table, each in the order of `table`.

    Raises:
        DataError: The table has fewer than two rows.
        ConfigError: `frac` is not between 0 and 1.
    """
    if not 0 < frac < 1:
        raise ConfigError(f"holdout_frac is {frac}; use a fraction above 0 and below 1")
    if len(table) < 2:
        raise DataError(
            f"a table of {len(table)} row cannot be split into training and validation; add rows, "
            "or give validation rows of their own as tuning_data="
        )
    if len(checks) != len(table):
        raise DataError(f"{len(checks)} checks for {len(table)} rows; pass the result of check_rows for this table")
    rng = np.random.default_rng(seed)
    tiebreak = rng.permutation(len(table))
    order = np.lexsort((tiebreak, _foreground_share(table, checks)))
    held = min(max(1, round(frac * len(table))), len(table) - 1)
    chosen = np.array([rng.choice(run) for run in np.array_split(order, held)])
    kept = np.setdiff1d(np.arange(len(table)), chosen)
    return table.take(kept), table.take(np.sort(chosen))


def _source_name(source: ImageSource) -> str:
    if isinstance(source, np.ndarray):
        return "array in memory"
    if isinstance(source, Image.Image):
        return "Pillow image in memory"
    return os.fspath(source)


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


def _column(
    frame: pd.DataFrame, column: str, called: str, base_dir: str | os.PathLike[str] | None
) -> tuple[ImageSource, ...]:
    if column not in frame.columns:
        present = [str(name) for name in frame.columns]
        raise DataError(
            f"{called} has no column {column!r}{nearest(column, present)}; its columns are {', '.join(present)}"
        )
    cells = frame[column]
    if isinstance(cells, pd.DataFrame):
        raise DataError(f"{called} has {cells.shape[1]} columns named {column!r}; rename all but one")
    return _sources(list(cells), frame.index, f"column {column!r} of {called}", base_dir)


def _sources(
    cells: list[Any], index: pd.Index[Any], called: str, base_dir: str | os.PathLike[str] | None
) -> tuple[ImageSource, ...]:
    sources: list[ImageSource] = []
    empty: list[str] = []
    foreign: list[str] = []
    for row, cell in zip(index, cells, strict=True):
        if isinstance(cell, (np.ndarray, Image.Image)):
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
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.is_dir())
    if not found:
        raise DataError(
            f"{folder}: no images in this folder (subfolders are not searched); the suffixes looked for are "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return MaskTable(images=tuple(map(str, found)), masks=None, index=pd.RangeIndex(len(found)))


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("checking images", total=total)
        yield lambda: bar.advance(task)


def _check_row(table: MaskTable, position: int) -> RowCheck | str:
    """Return what is in a row, or why it cannot be used."""
    name = table.row_name(position)
    try:
        image = read_image(table.images[position], name=name)
        size = image.shape[0], image.shape[1]
        del image
        if table.masks is None:
            return RowCheck(size=size, value_counts={})
        source = table.masks[position]
        mask = read_stored_mask(source, name=name)
    except DataError as error:
        return str(error)
    height, width = mask.pixels.shape[:2]
    if (height, width) != size:
        turned = " (turned: see the EXIF orientation of both)" if (width, height) == size else ""
        return (
            f"{name}, {_source_name(source)}: the mask is {height} x {width} pixels "
            f"but the image {size[0]} x {size[1]} (height x width){turned}; make the sizes equal, or pair "
            "the right files"
        )
    counts, encoding = mask.survey()
    return RowCheck(size=size, value_counts=counts, encoding=encoding)


def _foreground_share(table: MaskTable, checks: Sequence[RowCheck]) -> NDArray[np.float64]:
    """Return for each row the share of pixels without the most frequent value of all rows, ``(N,)``."""
    counts: list[Mapping[int, int]] = [check.value_counts for check in checks]
    if any(check.encoding.colours for check in checks):
        counts = [
            check.encoding.as_colours(check.value_counts, table.row_name(row)) for row, check in enumerate(checks)
        ]
    pixels: Counter[int] = Counter()
    for count in counts:
        pixels.update(count)
    common = pixels.most_common(1)[0][0] if pixels else 0
    return np.array([1 - count.get(common, 0) / max(1, sum(count.values())) for count in counts])
