"""The check of every row of a table: each file opened once, in threads, and everything that cannot be used listed.

Not here: decoding files (:mod:`semseg_automl.data.images`), what else may be wrong with a data set
(:mod:`semseg_automl.checking`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from semseg_automl.data.encodings import NUMBERS, MaskEncoding
from semseg_automl.data.images import read_image, read_stored_mask
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.parallel import each_row
from semseg_automl.data.table import MaskTable
from semseg_automl.data.widths import typical_widths
from semseg_automl.errors import DataError

LISTED_PROBLEMS = 20
"""Rows that an error names in full."""

MOST_VALUES = 40
"""Masks of more values were smoothed or saved as JPEG; areas of one value tell nothing then."""

MEASURED_ROWS = 100
"""Masks of a table, evenly spread, in which widths are measured; more would hardly move the median."""


@dataclass(frozen=True)
class RowCheck:
    """What the check of a row found."""

    size: tuple[int, int]
    """Height and width in pixels."""
    value_counts: dict[int, int]
    """Each value of the mask, packed where it stores colours, and how many pixels have it; empty without a mask."""
    encoding: MaskEncoding = NUMBERS
    """How the mask stores its values."""
    widths: Mapping[int, float] = field(default_factory=dict)
    """How wide the areas of each value are, as :func:`semseg_automl.data.objects.typical_widths` has it; empty where
    that was not asked, in most rows of a large table, and of masks of very many values."""


def check_rows(
    table: MaskTable,
    *,
    workers: int | None = None,
    progress: bool = False,
    keep: DecodedFiles | None = None,
    widths: bool = False,
) -> list[RowCheck]:
    """Open every image and mask once and return what is in them, in the order of the table.

    Args:
        table: What to check; without masks only the images are opened.
        workers: Threads; by default one for each processor this program may use.
        progress: Whether to show a progress bar on the terminal.
        keep: Takes in what is decoded of usable rows, in order as long as there is room; None keeps nothing.
        widths: Whether to measure how wide objects are, in `MEASURED_ROWS` masks.

    Raises:
        DataError: Rows cannot be used: a file is missing, unreadable or truncated, or a mask has another size
            than its image. One error lists them all, the first 20 in full.
    """
    results = _checked(table, workers=workers, progress=progress, keep=keep, widths=widths)
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        count = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
        raise DataError(listed(f"{count} of {len(table)} cannot be used; correct or remove:", problems))
    return [result for result in results if isinstance(result, RowCheck)]


def usable_rows(
    table: MaskTable,
    *,
    workers: int | None = None,
    progress: bool = False,
    keep: DecodedFiles | None = None,
    widths: bool = False,
) -> tuple[MaskTable, list[RowCheck], list[str]]:
    """Leave the rows out that :func:`check_rows` would refuse.

    Args:
        table: As for :func:`check_rows`.
        workers: As for :func:`check_rows`.
        progress: As for :func:`check_rows`.
        keep: As for :func:`check_rows`.
        widths: As for :func:`check_rows`.

    Returns:
        The usable rows in the order of `table`, what is in each, and for each row left out its name and why.

    Raises:
        DataError: Fewer than two rows can be used; the error lists why the others cannot.
    """
    results = _checked(table, workers=workers, progress=progress, keep=keep, widths=widths)
    dropped = [result for result in results if isinstance(result, str)]
    kept = [position for position, result in enumerate(results) if isinstance(result, RowCheck)]
    if dropped and len(kept) < 2:
        raise DataError(
            listed(f"{len(kept)} of {len(table)} rows can be used, and two are needed; correct:", dropped)
        )
    usable = table.take(kept) if dropped else table
    return usable, [result for result in results if isinstance(result, RowCheck)], dropped


def has_areas(counts: Mapping[int, int], encoding: MaskEncoding) -> bool:
    """Return whether a mask of these values, as counted, has areas worth measuring."""
    return len(counts) <= MOST_VALUES and not encoding.unlisted


def listed(head: str, problems: Sequence[str]) -> str:
    """Return a heading and a line for each problem, the first 20 in full."""
    more = len(problems) - LISTED_PROBLEMS
    rest = [f"... and {more} more rows"] if more > 0 else []
    return "\n- ".join([head, *problems[:LISTED_PROBLEMS], *rest])


def size_mismatch(table: MaskTable, position: int, image: tuple[int, int], mask: tuple[int, int]) -> str | None:
    """Return what is wrong where image and mask of a row have two sizes (height, width), else None."""
    if image == mask:
        return None
    turned = " (turned: see the EXIF orientation of both)" if mask[::-1] == image else ""
    return (
        f"{table.row_name(position)}, {table.mask_name(position)}: the mask is {mask[0]} x {mask[1]} pixels "
        f"but the image {image[0]} x {image[1]} (height x width){turned}; make the sizes equal, or pair "
        "the right files"
    )


def _checked(
    table: MaskTable, *, workers: int | None, progress: bool, keep: DecodedFiles | None, widths: bool
) -> list[RowCheck | str]:
    measured = range(0, len(table) if widths else 0, math.ceil(len(table) / MEASURED_ROWS) or 1)

    def check(position: int) -> RowCheck | str:
        return _check_row(table, position, keep, measure=position in measured)

    return each_row(check, len(table), workers=workers, progress=progress)


def _check_row(table: MaskTable, position: int, keep: DecodedFiles | None, *, measure: bool) -> RowCheck | str:
    """Return what is in a row, or why it cannot be used."""
    name = table.row_name(position)
    try:
        image = read_image(table.images[position], name=name, channels=table.channels)
        size = image.shape[0], image.shape[1]
        if table.masks is None:
            if keep is not None:
                keep.keep(table, position, image, None)
            return RowCheck(size=size, value_counts={})
        mask = read_stored_mask(table.masks[position], name=name)
    except DataError as error:
        return str(error)
    wrong = size_mismatch(table, position, size, (mask.pixels.shape[0], mask.pixels.shape[1]))
    if wrong is not None:
        return wrong
    if keep is not None:
        keep.keep(table, position, image, mask)
    values = mask.values()
    counts, encoding = mask.survey(values)
    widths = typical_widths(values.array) if measure and has_areas(counts, encoding) else {}
    return RowCheck(size=size, value_counts=counts, encoding=encoding, widths=widths)
