"""The rows of the study: their files, the learning rate they choose, and the Markdown table they make.

Nothing is fitted here, and nothing is random but the bootstrap, whose seed is fixed.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from semseg_automl.errors import DataError

BASELINES = ("lora", "conv_lora")
"""Methods that the table compares every other one with."""
RESAMPLES = 10_000

Budget: TypeAlias = tuple[int, int, int]
"""Optimizer steps, images per step, side of the input in pixels."""


@dataclass(frozen=True)
class Cell:
    """One run to do: set, method, learning rate, seed, and ``search`` or ``final``."""

    set: str
    method: str
    lr: float
    seed: int
    phase: str


@dataclass(frozen=True)
class Row:
    """One run, a line of the study's file.

    Attributes:
        set: name of the data's folder.
        method: name of the study's ``METHODS``.
        lr: peak learning rate.
        seed: of weights, order and augmentation.
        phase: ``search`` (validation only), ``final`` (test scores too) or ``failed``.
        steps: optimizer steps.
        batch: images per step.
        size: side of the input in pixels.
        seconds: wall clock of the fit.
        trainable: parameters that train, of encoder and decoder.
        validation: best validation score.
        iou: mean over test images, as are the next five.
        torch: version.
        commit: of this repository, empty outside git.
        time: UTC.
        message: why it failed.
    """

    set: str
    method: str
    lr: float
    seed: int
    phase: str
    steps: int
    batch: int
    size: int
    seconds: float = math.nan
    trainable: int = 0
    validation: float = math.nan
    iou: float = math.nan
    dice: float = math.nan
    s_measure: float = math.nan
    e_measure: float = math.nan
    ber: float = math.nan
    mae: float = math.nan
    torch: str = ""
    commit: str = ""
    time: str = ""
    message: str = ""

    @property
    def budget(self) -> Budget:
        """What has to be equal for two runs to be comparable."""
        return self.steps, self.batch, self.size

    @property
    def cell(self) -> Cell:
        """Which run this is."""
        return Cell(self.set, self.method, self.lr, self.seed, self.phase)


@dataclass(frozen=True)
class ImageRow:
    """The IoU of one test image in a final run; `image` is a path relative to the set's folder."""

    set: str
    method: str
    lr: float
    seed: int
    steps: int
    batch: int
    size: int
    image: str
    iou: float

    @property
    def budget(self) -> Budget:
        """As `Row.budget`."""
        return self.steps, self.batch, self.size


AnyRow = TypeVar("AnyRow", Row, ImageRow)
PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": lambda text: float(text) if text else math.nan,
}


def images_file(out: Path) -> Path:
    """Return where the scores of single images lie, beside the file of runs."""
    return out.with_name(f"{out.stem}_images{out.suffix}")


def append_rows(path: Path, rows: Sequence[Row] | Sequence[ImageRow]) -> None:
    """Append rows, the header first in a new file, in one unbuffered write that reaches the disk.

    Raises:
        OSError: the rows could not be written whole.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size == 0:
        writer.writerow([field.name for field in fields(rows[0])])
    for row in rows:
        values = [getattr(row, field.name) for field in fields(row)]
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in values])
    content = text.getvalue().encode()
    with path.open("ab", buffering=0) as file:
        written = file.write(content)
        os.fsync(file.fileno())
    if written != len(content):
        raise OSError(f"{written} of {len(content)} bytes went into '{path}'. Make space, and delete its last line.")


def read_rows(path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    """Read what `append_rows` wrote; a missing or empty file holds no rows.

    Raises:
        DataError: the header is another one, or a line is damaged.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    names = [field.name for field in fields(kind)]
    parsers = [PARSERS[str(field.type)] for field in fields(kind)]
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader)
        if header != names:
            raise DataError(f"'{path}' has the columns {header}; {names} are needed. Use another --out.")
        for line in reader:
            try:
                cells = [parse(text) for parse, text in zip(parsers, line, strict=True)]
                rows.append(kind(**dict(zip(names, cells, strict=True))))
            except ValueError as error:
                raise DataError(f"line {reader.line_num} of '{path}' is damaged ({error}). Delete it.") from error
    return rows


def chosen_rate(rows: Iterable[Row], name: str, method: str, budget: Budget) -> float | None:
    """Return the learning rate of the best validation score in the search, or None before any search has finished.

    Of equal scores the first in the file wins. Test scores play no part.
    """
    searched = [row for row in _searches(rows, name, method, budget) if not math.isnan(row.validation)]
    return max(searched, key=lambda row: row.validation).lr if searched else None


def rate_at_edge(rows: Iterable[Row], name: str, method: str, budget: Budget) -> bool:
    """Return whether the chosen rate is the lowest or highest that finished, so that a better one may lie beyond."""
    rows = list(rows)
    rates = [row.lr for row in _searches(rows, name, method, budget)]
    return chosen_rate(rows, name, method, budget) in (min(rates), max(rates))


def _searches(rows: Iterable[Row], name: str, method: str, budget: Budget) -> list[Row]:
    return [r for r in rows if (r.set, r.method, r.phase, r.budget) == (name, method, "search", budget)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


Scores: TypeAlias = Mapping[int, Mapping[str, float]]
"""IoU by seed and image."""


@dataclass(frozen=True)
class Comparison:
    """A method's mean IoU less a baseline's over the same images, with its 95 % interval and p-value."""

    difference: float
    low: float
    high: float
    p: float


def compare(ours: Scores, theirs: Scores) -> Comparison | None:
    """Compare two methods image by image, over the seeds that both have; None where they share none.

    An image's difference is its mean over seeds: images are the sample, seeds are not. The interval is a percentile
    bootstrap over images, the p-value Wilcoxon's signed-rank test, images without a difference left out.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    images = sorted(set.intersection(*(set(scores[seed]) for scores in (ours, theirs) for seed in seeds)))
    if not images:
        return None
    per_seed = [[ours[seed][image] - theirs[seed][image] for image in images] for seed in seeds]
    differences: NDArray[np.float64] = np.mean(per_seed, axis=0).round(9)  # scores have 6 digits: ties stay ties
    picks = np.random.default_rng(0).integers(len(images), size=(RESAMPLES, len(images)))
    low, high = np.quantile(differences[picks].mean(axis=1), [0.025, 0.975])
    moved = differences[differences != 0]
    p = float(wilcoxon(moved).pvalue) if len(moved) else 1.0
    return Comparison(float(differences.mean()), float(low), float(high), p)


def mean_and_error(values: Sequence[float]) -> str:
    """Write a mean and its standard error, which takes two values or more.

    >>> mean_and_error([0.7, 0.8]), mean_and_error([0.7])
    ('0.750 ± 0.050', '0.700')
    """
    mean = f"{np.mean(values):.3f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


NOTE = """Test IoU and S-measure: mean ± standard error over seeds. † the best learning rate on validation is at the
edge of those tried. Differences in IoU: of the mean over images and the seeds that both methods have, with the 95 %
bootstrap interval over images and Wilcoxon's signed-rank p, corrected by Holm's method for the methods in the column.
Seconds: mean of the fits."""


def study_table(rows: Sequence[Row], images: Sequence[ImageRow]) -> str:
    """Write a Markdown table per set and budget, of the final runs at each method's chosen learning rate."""
    groups = dict.fromkeys((row.set, row.budget) for row in rows)
    return "\n\n".join([NOTE, *(_group_table(name, budget, rows, images) for name, budget in groups)])


def _group_table(name: str, budget: Budget, rows: Sequence[Row], images: Sequence[ImageRow]) -> str:
    """Write the table of one set and budget; methods stand in the order in which they first ran."""
    group = [row for row in rows if (row.set, row.budget) == (name, budget)]
    finals = _finals(group)
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for score in images:
        rate_used = {row.lr for row in finals.get(score.method, []) if row.seed == score.seed}
        if (score.set, score.budget) == (name, budget) and score.lr in rate_used:
            scores.setdefault(score.method, {}).setdefault(score.seed, {})[score.image] = score.iou
    against = {baseline: _against(baseline, scores) for baseline in BASELINES}
    heads = ["method", "trained (M)", "lr", "seeds", "IoU", "S", "seconds", *(f"IoU - {b}" for b in BASELINES)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, runs in finals.items():
        dagger = " †" if rate_at_edge(group, name, method, budget) else ""
        cells = [
            method,
            f"{runs[0].trainable / 1e6:.2f}",
            f"{runs[0].lr:g}{dagger}",
            " ".join(str(seed) for seed in sorted(run.seed for run in runs)),
            mean_and_error([run.iou for run in runs]),
            mean_and_error([run.s_measure for run in runs]),
            f"{np.mean([run.seconds for run in runs]):.0f}",
            *(against[baseline].get(method, "") for baseline in BASELINES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    steps, batch, size = budget
    title = f"### {name}: {steps} steps, batch {batch}, {size} px"
    return "\n".join([title, "", *(lines if finals else ["No final run yet."]), *_footnotes(group)])


def _finals(group: Sequence[Row]) -> dict[str, list[Row]]:
    """Return each method's final runs at its chosen rate, of one set and budget; methods without any are left out."""
    finals = {}
    for name, method, budget in dict.fromkeys((row.set, row.method, row.budget) for row in group):
        lr = chosen_rate(group, name, method, budget)
        runs = [row for row in group if (row.method, row.phase, row.lr) == (method, "final", lr)]
        if runs:
            finals[method] = runs
    return finals


def _against(baseline: str, scores: Mapping[str, Scores]) -> dict[str, str]:
    """Compare every method with one, and write each comparison by the method's name."""
    found = {m: compare(own, scores[baseline]) for m, own in scores.items() if baseline in scores and m != baseline}
    known = {method: comparison for method, comparison in found.items() if comparison is not None}
    corrected = holm([comparison.p for comparison in known.values()])
    return {
        method: f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}], p {p:.3f}".replace("p 0.000", "p < 0.001")
        for (method, c), p in zip(known.items(), corrected, strict=True)
    }


def _footnotes(group: Sequence[Row]) -> list[str]:
    """Say which code the rows come from, and which runs failed and have not been made up for."""
    finals = [row for row in group if row.phase == "final"]
    notes = []
    if finals:
        commits = ", ".join(dict.fromkeys(row.commit or "unknown" for row in finals))
        notes.append(f"torch {', '.join(dict.fromkeys(row.torch for row in finals))}; commit {commits}.")
    failed: dict[Cell, str] = {}
    for row in group:
        run = replace(row.cell, phase="")
        if row.phase == "failed":
            failed[run] = row.message
        else:
            failed.pop(run, None)
    notes += [f"Failed: {run.method}, lr {run.lr:g}, seed {run.seed}: {message}" for run, message in failed.items()]
    return ["", "  \n".join(notes)] if notes else []
