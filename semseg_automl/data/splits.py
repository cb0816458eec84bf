"""Which rows train and which validate: the hold-out split, and k folds.

Both are drawn alike. Rows of one group (a patient, a scene) stay together. Classes are dealt out one after another,
the rarest first, which is iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
Multi-Label Data", ECML PKDD 2011): what remains to be decided for a class is known while there is still a choice.
Where that paper breaks ties at random, rows are drawn evenly along the share of foreground here.

Not here: reading tables (:mod:`semseg_automl.data.table`), opening files (:mod:`semseg_automl.data.checks`), what
mask values mean (:mod:`semseg_automl.task`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.checks import RowCheck, check_rows
from semseg_automl.data.table import MaskTable, TableSource, read_frame, read_table
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.task import IGNORE_INDEX, SegmentationTask, infer_task

if TYPE_CHECKING:
    import pandas as pd

_LISTED_GROUPS = 5
_DRAWN = 3


def split_holdout(
    table: MaskTable, checks: Sequence[RowCheck], *, frac: float, seed: int, task: SegmentationTask
) -> tuple[MaskTable, MaskTable]:
    """Split a table into training and validation rows alike in classes and in the share of foreground.

    A class of two rows (of two groups, where the table has groups) or more is on both sides wherever that is possible,
    if need be with a few more rows held out than asked; a class of one row is for training. Images without
    foreground, with little and with much are held out in proportion.

    Args:
        table: The rows to split; its groups, if it has any, are not divided.
        checks: The result of :func:`semseg_automl.data.checks.check_rows` for them.
        frac: The fraction of rows to hold out, between 0 and 1; at least one stays on either side.
        seed: Of the drawing; equal seeds give equal splits.
        task: What the values of the masks mean.

    Returns:
        Training and validation table, each in the order of `table`.

    Raises:
        DataError: The table has fewer than two rows, or one group only.
        ConfigError: `frac` is not between 0 and 1.
    """
    if not 0 < frac < 1:
        raise ConfigError(f"holdout_frac is {frac}; use a fraction above 0 and below 1")
    units = _units(table, checks, task, 2, "training and validation")
    rng = np.random.default_rng(seed)
    rows = min(max(1, round(frac * len(table))), len(table) - 1)
    held = _draw(units, rows, parts=2, rng=rng)[units.of_row]
    return table.take(np.flatnonzero(~held)), table.take(np.flatnonzero(held))


def kfold(
    data: TableSource,
    k: int = 5,
    *,
    groups: str | None = None,
    seed: int = 0,
    image: str = "image",
    label: str = "label",
    base_dir: str | os.PathLike[str] | None = None,
    task: SegmentationTask | None = None,
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Divide a table into `k` folds alike in classes and in the share of foreground; every row validates once.

    Every mask is opened to see what it holds. A class of two rows (of two groups) or more is in every training part,
    one of `k` or more in every validation part too, wherever that is possible.

    Args:
        data: DataFrame, or the path of a CSV file.
        k: Number of folds, 2 or more.
        groups: Column that names the group of each row, such as the patient; none is divided.
        seed: Of the drawing; equal seeds give equal folds.
        image: Column of images.
        label: Column of masks.
        base_dir: Where relative paths start, as for `SemanticSegmentor`. Without it those of a CSV file are joined to
            its folder in what is returned.
        task: What the masks hold; None infers it. Where `SemanticSegmentor` needs ``color_map=`` or the like, this is
            its ``task_`` after ``fit(dry_run=True)``.

    Returns:
        For each fold training and validation rows, with all columns, the index and the order of the table.

    Raises:
        DataError: Rows cannot be used, a column is missing, a group is empty, or there are fewer rows, or groups, than
            folds.
        ConfigError: `k` is not a number of folds.

    Example::

        for train, validation in kfold("polyp/train.csv", k=5, groups="patient"):
            SemanticSegmentor().fit(train, validation)
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 2:
        raise ConfigError(f"k is {k!r}; use a whole number of folds, 2 or more")
    frame = read_frame(data, image_column=image, label_column=label, base_dir=base_dir)
    table = read_table(frame, image_column=image, label_column=label, base_dir=base_dir, group_column=groups)
    checks = check_rows(table)
    if task is None:
        task = infer_task([check.value_counts for check in checks], encodings=[check.encoding for check in checks])
    units = _units(table, checks, task, k, f"{k} folds")
    rng = np.random.default_rng(seed)
    fold = np.full(len(units.rows), k - 1)
    for number in range(k - 1):
        left = np.flatnonzero(fold == k - 1)
        rest = units.take(left)
        parts = k - number
        fold[left[_draw(rest, round(rest.rows.sum() / parts), parts=parts, rng=rng)]] = number
    of_row = fold[units.of_row]
    return [(frame.iloc[np.flatnonzero(of_row != f)], frame.iloc[np.flatnonzero(of_row == f)]) for f in range(k)]


def check_groups_apart(train: MaskTable, validation: MaskTable) -> None:
    """Raise `DataError` where a group has rows in both tables."""
    shared = [group for group in dict.fromkeys(train.groups or ()) if group in set(validation.groups or ())]
    if shared:
        listed = ", ".join(repr(group) for group in shared[:_LISTED_GROUPS])
        more = f" and {len(shared) - _LISTED_GROUPS} more" if len(shared) > _LISTED_GROUPS else ""
        raise DataError(
            f"{len(shared)} groups have rows in the training and in the validation table: {listed}{more}; "
            "move each to one of the two, or leave out tuning_data= to have whole groups held out"
        )


@dataclass(frozen=True)
class _Units:
    """What is drawn as a whole: rows, or groups of them. All arrays but `of_row` have one entry per unit."""

    rows: NDArray[np.int64]
    """Number of rows, ``(U,)``."""
    holding: NDArray[np.int64]
    """Rows that hold each class, ``(U, C + 1)``; in the last column all rows."""
    foreground: NDArray[np.float64]
    """Mean share of foreground, ``(U,)``."""
    of_row: NDArray[np.int64]
    """The unit of each row of the table, ``(N,)``."""

    def take(self, chosen: NDArray[np.int64]) -> _Units:
        return _Units(self.rows[chosen], self.holding[chosen], self.foreground[chosen], self.of_row)


def _units(table: MaskTable, checks: Sequence[RowCheck], task: SegmentationTask, parts: int, into: str) -> _Units:
    """Gather the rows into units, of which there must be as many as `parts`."""
    if len(checks) != len(table):
        raise DataError(f"{len(checks)} checks for {len(table)} rows; pass the result of check_rows for this table")
    if len(table) < parts:
        rows = f"{len(table)} row" + "s" * (len(table) != 1)
        instead = ", or give validation rows of their own as tuning_data=" if parts == 2 else ", or use fewer folds"
        raise DataError(f"a table of {rows} cannot be split into {into}; add rows{instead}")
    number = {group: position for position, group in enumerate(dict.fromkeys(table.groups or ()))}
    if table.groups is not None and len(number) < parts:
        groups = f"{len(number)} group" + "s" * (len(number) != 1)
        raise DataError(
            f"a table of {groups} cannot be split into {into}, since no group is divided; add rows of other groups, "
            "or leave out groups="
        )
    of_row = np.arange(len(table)) if table.groups is None else np.array([number[group] for group in table.groups])
    pixels = _class_pixels(table, checks, task)
    labelled = pixels.sum(axis=1)
    foreground = 1 - pixels[:, int(pixels.sum(axis=0).argmax())] / np.maximum(labelled, 1)
    foreground[labelled == 0] = 0.0
    holding = np.column_stack([pixels > 0, np.ones(len(table), np.bool_)])
    unit_rows = np.bincount(of_row)
    gathered = np.zeros((len(unit_rows), holding.shape[1]), np.int64)
    np.add.at(gathered, of_row, holding)
    return _Units(unit_rows, gathered, np.bincount(of_row, weights=foreground) / unit_rows, of_row)


def _class_pixels(table: MaskTable, checks: Sequence[RowCheck], task: SegmentationTask) -> NDArray[np.int64]:
    """Count the pixels of each class in each row, ``(N, C)``."""
    pixels = np.zeros((len(table), task.num_classes), np.int64)
    for row, check in enumerate(checks):
        name = table.row_name(row)
        counts = check.encoding.as_colours(check.value_counts, name) if task.colours else check.value_counts
        classes = task.encode(np.array([list(counts)]), name=name)[0] if counts else np.zeros(0, np.uint8)
        sums: Counter[int] = Counter()
        for index, count in zip(classes.tolist(), counts.values(), strict=True):
            sums[index] += count
        for index in sums.keys() - {IGNORE_INDEX}:
            pixels[row, index] = sums[index]
    return pixels


def _draw(units: _Units, wanted_rows: int, *, parts: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw units of about `wanted_rows` rows, to hold out one of `parts` parts; at least one unit on either side.

    Returns:
        For each unit whether it is held out, ``(U,)``.
    """
    present = units.holding > 0
    share = wanted_rows / units.rows.sum()
    bounds = _Bounds.of(present, parts)
    held = np.zeros(len(units.rows), np.bool_)
    undecided = np.ones(len(units.rows), np.bool_)
    while undecided.any():
        column = _rarest(present[undecided])
        members = np.flatnonzero(undecided & present[:, column])
        wanted = share * units.holding[:, column].sum() - units.holding[held, column].sum()
        number = round(wanted / units.holding[members, column].mean())
        least = bounds.held[column] - present[held, column].sum()
        most = len(members) - max(0, bounds.kept[column] - present[~undecided & ~held, column].sum())
        number = int(min(max(number, least), most))
        if number > 0:
            order = members[np.lexsort((rng.permutation(len(members)), units.foreground[members]))]
            for run in np.array_split(order, number):
                held[_most_alike(present, held, run, rng)] = True
        undecided[members] = False
    _mend(present, held, bounds, rng)
    _near_size(units.rows, wanted_rows, present, held, bounds, rng)
    return held


def _rarest(present: NDArray[np.bool_]) -> int:
    """Return the column of the fewest units that is in any: of all classes, and the last one when all units have it."""
    found = present[:, :-1].sum(axis=0)
    if not found.any() or found[found > 0].min() == len(present):
        column: int = present.shape[1] - 1
        return column
    return int(np.where(found > 0, found, len(present)).argmin())


@dataclass(frozen=True)
class _Bounds:
    """How many units of each column have to be held out, and kept, at least."""

    held: NDArray[np.int64]
    kept: NDArray[np.int64]

    @classmethod
    def of(cls, present: NDArray[np.bool_], parts: int) -> _Bounds:
        """Ask for one in every part where there are so many, else for one in training where there are two."""
        found = present.sum(axis=0)
        return cls(held=(found >= parts).astype(np.int64), kept=np.where(found >= parts, parts - 1, found >= 2))

    def missing(self, held_count: NDArray[np.int64], kept_count: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of each column a side lacks, for counts of units ``(..., C)``."""
        lacking: NDArray[np.int64] = np.maximum(self.held - held_count, 0) + np.maximum(self.kept - kept_count, 0)
        return lacking


def _most_alike(
    present: NDArray[np.bool_], held: NDArray[np.bool_], run: NDArray[np.int64], rng: np.random.Generator
) -> int:
    """Draw a few units of a run and return the one with which the held ones hold the classes most as all do.

    Of a few, not of the whole run: the split would be the same for every seed.
    """
    drawn = rng.choice(run, min(_DRAWN, len(run)), replace=False)
    rate = present.mean(axis=0)
    expected = (held.sum() + 1) * rate
    off = (present[held].sum(axis=0) + present[drawn] - expected) ** 2 / (rate * (1 - rate) + 1 / len(present))
    return int(drawn[off.sum(axis=1).argmin()])


def _mend(present: NDArray[np.bool_], held: NDArray[np.bool_], bounds: _Bounds, rng: np.random.Generator) -> None:
    """Move single units between the sides, in place, while that lets classes be missed less."""
    while True:
        held_count, kept_count = present[held].sum(axis=0), present[~held].sum(axis=0)
        missing = bounds.missing(held_count, kept_count)
        candidates = np.flatnonzero((present & (missing > 0)).any(axis=1))
        if not len(candidates):
            return
        change = np.where(held[candidates, None], -1, 1) * present[candidates]
        after = bounds.missing(held_count + change, kept_count - change).sum(axis=1)
        if after.min() >= missing.sum():
            return
        chosen = rng.choice(candidates[after == after.min()])
        held[chosen] = not held[chosen]


def _near_size(
    rows: NDArray[np.int64],
    wanted: int,
    present: NDArray[np.bool_],
    held: NDArray[np.bool_],
    bounds: _Bounds,
    rng: np.random.Generator,
) -> None:
    """Move single units between the sides, in place, while that brings the held rows nearer to `wanted`.

    None is moved that its side needs for a class.
    """
    while True:
        off = int(rows[held].sum()) - wanted
        after = np.abs(off + np.where(held, -rows, rows))
        held_count, kept_count = present[held].sum(axis=0), present[~held].sum(axis=0)
        last = np.where(held[:, None], held_count <= bounds.held, kept_count <= bounds.kept)
        after[(present & last).any(axis=1)] = np.iinfo(np.int64).max
        if after.min() >= abs(off):
            return
        chosen = rng.choice(np.flatnonzero(after == after.min()))
        held[chosen] = not held[chosen]


