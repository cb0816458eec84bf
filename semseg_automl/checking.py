"""`check_data`: every file of a data set opened once, and what is wrong with it, looks wrong, or is good to know.

Not here: the rules (:mod:`semseg_automl.findings`), the page (:mod:`semseg_automl.check_page`), and what `fit` itself
refuses (:mod:`semseg_automl.data.checks`).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from semseg_automl.check_page import Card, Page, PageTable, View, plain_text, write_page
from semseg_automl.config import load_config
from semseg_automl.data.channels import as_channels
from semseg_automl.data.colours import Colour, read_color_map
from semseg_automl.data.counting import Values
from semseg_automl.data.images import read_mask
from semseg_automl.data.objects import extents
from semseg_automl.data.parallel import each_row
from semseg_automl.data.survey import FileNotes, survey_tables
from semseg_automl.data.table import MaskTable, TableSource, read_table
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.findings import (
    LEVELS,
    Finding,
    LabelledRow,
    Place,
    Split,
    class_findings,
    duplicates,
    flaws,
    labelled_rows,
    mask_copies,
    mask_findings,
    object_classes,
    small_objects,
    unknown_values,
)
from semseg_automl.hardware import detect_hardware
from semseg_automl.models.downloads import cache_folder
from semseg_automl.models.facts import encoder_facts
from semseg_automl.plan import DataStats, make_plan
from semseg_automl.task import SegmentationTask, infer_task

LISTED_IN_TEXT = 5
"""Findings of one kind that the terminal shows; `problems` and the page have them all."""

LISTED_ON_PAGE = 200
"""Findings of one kind that the page shows."""

MAX_PICTURES = 40
"""Pictures on the page, so that it stays below some 500 kB."""

LISTED_SIZES = 8


@dataclass(frozen=True, eq=False)
class DataReport:
    """What `check_data` found.

    Attributes:
        problems: one row per finding: ``split``; ``row``, the caller's index value, None for a split as a whole;
            ``image``; ``level``, error, warning or note; ``kind``; ``message``. Errors first.
        classes: one row per split and class: ``value``, ``name``, ``pixels``, ``pixel_share`` of the labelled pixels,
            ``images``, ``image_share``, ``objects`` and ``small_objects``, below 4 pixels at the input size.
        sizes: one row per split and image size in pixels: ``height``, ``width``, ``images``; the most frequent first.
        rows: rows and usable rows of each split.
        task: what the masks hold, as `fit` would understand it; None where it cannot be told.
        input_size: ``(height, width)`` that images are resized to for the model; None where it cannot be told.
        notes: how the check itself went.
    """

    problems: pd.DataFrame
    classes: pd.DataFrame
    sizes: pd.DataFrame
    rows: dict[str, tuple[int, int]]
    task: SegmentationTask | None
    input_size: tuple[int, int] | None
    notes: tuple[str, ...] = ()
    _findings: tuple[Finding, ...] = field(default=(), repr=False)
    _tables: dict[str, MaskTable] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings and notes may be there."""
        return not (self.problems["level"] == "error").any()

    def __str__(self) -> str:
        """Return the report for a terminal."""
        parts = [self._head(), *self.notes]
        if len(self.classes):
            parts += ["", _text_table(_shown_classes(self.classes))]
        if len(self.sizes):
            parts += ["", _text_table(self.sizes.head(LISTED_SIZES))]
            more = len(self.sizes) - LISTED_SIZES
            parts += [f"... and {more} more sizes"] if more > 0 else []
        for (level, kind), messages in self._by_kind().items():
            parts += ["", f"{level}: {kind}, {len(messages)} of them" if len(messages) > 1 else f"{level}: {kind}"]
            parts += [f"  {message}" for message in messages[:LISTED_IN_TEXT]]
            more = len(messages) - LISTED_IN_TEXT
            parts += [f"  ... and {more} more"] if more > 0 else []
        return plain_text("\n".join([*parts, "", self._verdict()]))

    def write_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one HTML page with pictures of the rows in question; it needs no network.

        Pictures are read again from the files, 40 at most.

        Args:
            path: of the page; missing folders are made.

        Returns:
            The path.

        Raises:
            DataError: the page cannot be written.
        """
        tables = [PageTable("Rows", _rows_table(self.rows))]
        if len(self.classes):
            tables.append(PageTable("Classes", _shown_classes(self.classes)))
        if len(self.sizes):
            tables.append(PageTable("Image sizes in pixels", self.sizes.head(20)))
        for (level, kind), messages in self._by_kind().items():
            shown = pd.DataFrame({"what was found": messages[:LISTED_ON_PAGE]})
            more = len(messages) - LISTED_ON_PAGE
            title = f"{level}: {kind} ({len(messages)})" + (f", the first {LISTED_ON_PAGE}" if more > 0 else "")
            tables.append(PageTable(title, shown, level=level))
        page = Page(
            title="Data check",
            verdict=self._verdict(),
            level=next((level for level in LEVELS if (self.problems["level"] == level).any()), "ok"),
            lines=(*self._head().splitlines(), *self.notes),
            tables=tuple(tables),
            cards=tuple(self._cards()),
        )
        return write_page(page, path, self.task)

    def _head(self) -> str:
        counted = [
            f"{name}: {total} rows" + ("" if usable == total else f", {usable} usable")
            for name, (total, usable) in self.rows.items()
        ]
        lines = ["; ".join(counted)]
        if self.task is not None:
            lines.append(str(self.task))
        if self.input_size is not None:
            lines.append(f"input:   {self.input_size[0]} x {self.input_size[1]} pixels (height x width)")
        return "\n".join(lines)

    def _verdict(self) -> str:
        counts = Counter(self.problems["level"])
        told = [f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in LEVELS]
        return ", ".join(told) + ("" if self.ok else "; correct the errors before fitting or scoring")

    def _by_kind(self) -> dict[tuple[str, str], list[str]]:
        """Return messages, each with its row, by level and kind, errors first."""
        found: dict[tuple[str, str], list[str]] = {}
        for finding in self._findings:
            found.setdefault((finding.level, finding.kind), []).append(self._told(finding))
        return found

    def _told(self, finding: Finding) -> str:
        if finding.place.row is None:
            return f"{finding.place.split}: {finding.message}"
        name = self._tables[finding.place.split].row_name(finding.place.row)
        start = f"{finding.place.split} {name}"
        # Messages about files name the row themselves, as errors of fit do.
        return f"{finding.place.split} {finding.message}" if name in finding.message else f"{start}: {finding.message}"

    def _cards(self) -> list[Card]:
        """Choose the findings to show, of every kind in turn, errors first, until there are enough pictures."""
        waiting: dict[tuple[str, str], list[Finding]] = {}
        for finding in self._findings:
            if finding.place.row is not None and finding.kind != "missing file":
                waiting.setdefault((finding.level, finding.kind), []).append(finding)
        chosen: list[Finding] = []
        pictures = 0
        for depth in range(MAX_PICTURES):
            for findings in waiting.values():
                if depth < len(findings):
                    wanted = 1 if findings[depth].other is None else 2
                    if pictures + wanted <= MAX_PICTURES:
                        chosen.append(findings[depth])
                        pictures += wanted
        order = {finding: position for position, finding in enumerate(self._findings)}
        return [
            Card(
                level=finding.level,
                kind=finding.kind,
                text=self._told(finding),
                views=tuple(self._view(place) for place in (finding.place, finding.other) if place is not None),
            )
            for finding in sorted(chosen, key=lambda each: order[each])
        ]

    def _view(self, place: Place) -> View:
        table, row = self._tables[place.split], place.row or 0
        mask = None if table.masks is None else table.masks[row]
        return View(f"{place.split} {table.row_name(row)}", table.images[row], mask, table.channels)


def check_data(
    train: TableSource,
    val: TableSource | None = None,
    test: TableSource | None = None,
    *,
    image: str = "image",
    label: str = "label",
    base_dir: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    color_map: Mapping[Any, str] | str | os.PathLike[str] | None = None,
    ignore_label: int | Colour | None = None,
    channels: Sequence[int] | None = None,
    input_size: tuple[int, int] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> DataReport:
    """Check a data set before anything is fitted: files, classes, duplicates, leaks between splits, small objects.

    Every file is opened once; what was in it is remembered under ``SEMSEG_AUTOML_CACHE`` (default
    ``~/.cache/semseg_automl``) until it changes. Smoothed masks are opened again to measure their objects. On Linux
    forked processes help where no other thread is alive; elsewhere it is threads.

    Args:
        train: table of training rows, or CSV file; or annotations, as for ``SemanticSegmentor.fit``.
        val: validation rows.
        test: test rows.
        image: column of the image paths.
        label: column of the mask paths.
        base_dir: folder that relative paths start from; None for the CSV's own, else the current one.
        num_classes: as for ``SemanticSegmentor``, like the next four.
        class_names: names by value, or in the order of the values.
        color_map: names by colour, or a file of them.
        ignore_label: value, or colour, of pixels without a label.
        channels: which channels of the images are read.
        input_size: ``(height, width)`` in pixels that the model will see; None for what ``fit`` would plan with the
            preset "fast" and no checkpoint.
        path: of an HTML page to write, too.

    Raises:
        DataError: a table or the color_map cannot be read; files that cannot be used, and masks that contradict what
            was said of their classes, are findings instead.
        ConfigError: `input_size` is no pair of positive numbers, or `channels` are not one or three.
    """
    if input_size is not None and (len(input_size) != 2 or min(input_size) < 1):
        raise ConfigError(f"input_size is {input_size}; give height and width in pixels, such as (256, 256)")
    said = _Said(num_classes, class_names, None if color_map is None else read_color_map(color_map), ignore_label)
    about: dict[str, Any] = {"image_column": image, "label_column": label, "base_dir": base_dir}
    about["channels"] = as_channels(channels)
    tables: dict[str, MaskTable] = {}
    for name, data, split in (("train", train, ("train",)), ("val", val, ("val",)), ("test", test, ("test", "val"))):
        if data is not None:
            known = tables["train"].class_names if tables else {}
            tables[name] = read_table(data, split=split, known=known, **about)
    shown = sys.stdout.isatty()
    notes = FileNotes(cache_folder() / "checks")
    seen = survey_tables(list(tables.values()), notes, progress=shown)
    splits = [Split(name, tables[name], rows) for name, rows in zip(tables, seen, strict=True)]
    notes.close()
    report = _judged(splits, said, input_size, (notes.trouble,) if notes.trouble else ())
    if path is not None:
        report.write_html(path)
    return report


@dataclass(frozen=True)
class _Said:
    """What the user said of the classes; arguments of `infer_task`."""

    num_classes: int | None
    class_names: Sequence[str] | Mapping[int, str] | None
    color_map: Mapping[int, str] | None
    ignore_label: int | Colour | None


def _judged(
    splits: Sequence[Split], said: _Said, input_size: tuple[int, int] | None, notes: tuple[str, ...]
) -> DataReport:
    found = flaws(splits)
    task, told = _understood(splits, said)
    found += told
    rows: list[LabelledRow] = []
    counts: dict[str, list[tuple[int, int, int]]] = {}
    if task is not None:
        sizes = tuple(seen.check.size for split in splits for seen in split.rows if seen.check is not None)
        input_size = input_size or _planned_size(task, sizes)
        rows = _with_objects(task, splits, labelled_rows(task, splits))
        found += unknown_values(task, splits)
        found += class_findings(task, rows, [split.name for split in splits])
        found += mask_findings(task, rows)
        small, counts = small_objects(task, rows, input_size)
        found += small
    found += mask_copies(splits, rows)
    found += duplicates(splits)
    found.sort(key=lambda finding: LEVELS.index(finding.level))  # stable: rules in order within a level
    tables = {split.name: split.table for split in splits}
    usable = {split.name: sum(seen.check is not None for seen in split.rows) for split in splits}
    return DataReport(
        problems=_problems(found, tables),
        classes=_classes(task, rows, counts),
        sizes=_sizes(splits),
        rows={split.name: (len(split.table), usable[split.name]) for split in splits},
        task=task,
        input_size=input_size,
        notes=notes,
        _findings=tuple(found),
        _tables=tables,
    )


def _understood(splits: Sequence[Split], said: _Said) -> tuple[SegmentationTask | None, list[Finding]]:
    """Infer the task as `fit` does, from training and validation rows; None, and why, where that fails."""
    fitted = [split for split in splits if split.name != "test"]
    checks = [seen.check for split in fitted for seen in split.rows if seen.check is not None]
    place = Place(fitted[0].name, None)
    if not checks:
        return None, [Finding(place, "error", "no usable row", "no row can be used, so nothing is known of the masks")]
    names = said.class_names
    if names is None and said.color_map is None and fitted[0].table.class_names:
        names = {value: name for value, name in fitted[0].table.class_names.items() if value != said.ignore_label}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            task = infer_task(
                [check.value_counts for check in checks],
                encodings=[check.encoding for check in checks],
                num_classes=said.num_classes,
                class_names=names,
                color_map=said.color_map,
                ignore_label=said.ignore_label,
            )
    except DataError as error:
        return None, [Finding(place, "error", "classes not understood", str(error))]
    return task, [Finding(place, "warning", "smoothed masks", str(warning.message)) for warning in caught]


def _planned_size(task: SegmentationTask, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Ask the plan of a default fit for its input size."""
    config = load_config()
    stats = DataStats(rows=len(sizes), sizes=sizes)
    return make_plan(config, task, stats, detect_hardware(), encoder_facts(config.model.encoder)).input_size


def _with_objects(
    task: SegmentationTask, splits: Sequence[Split], rows: Sequence[LabelledRow]
) -> list[LabelledRow]:
    """Measure the objects of masks whose stored values are not the classes, which only the task can tell."""
    tables = {split.name: split.table for split in splits}
    as_they_are = {index: index for index in range(task.num_classes)}

    def measured(position: int) -> LabelledRow:
        row = rows[position]
        table, index = tables[row.place.split], row.place.row or 0
        if row.objects is not None or table.masks is None:
            return row
        name = table.row_name(index)
        try:
            mask = read_mask(table.masks[index], name=name, colours=task.colours)
            objects = extents(Values(task.encode(mask, name=name)))
            return replace(row, objects=objects, classes=as_they_are)
        except DataError:
            return row  # not of this task: `unknown_values` tells of it

    return each_row(measured, len(rows), workers=None, progress=False) if task.snapped else list(rows)


def _problems(found: Sequence[Finding], tables: dict[str, MaskTable]) -> pd.DataFrame:
    rows = []
    for finding in found:
        split, row = finding.place
        image = None if row is None else tables[split].image_name(row)
        index = None if row is None else tables[split].index[row]
        rows.append((split, index, image, finding.level, finding.kind, finding.message))
    return pd.DataFrame(rows, columns=["split", "row", "image", "level", "kind", "message"], dtype=object)


def _classes(
    task: SegmentationTask | None, rows: Sequence[LabelledRow], counts: dict[str, list[tuple[int, int, int]]]
) -> pd.DataFrame:
    columns = ["split", "value", "name", "pixels", "pixel_share", "images", "image_share", "objects", "small_objects"]
    lines = []
    for split in dict.fromkeys(row.place.split for row in rows):
        own = [row for row in rows if row.place.split == split]
        labelled = sum(sum(row.pixels) for row in own)
        for index, name in enumerate(task.class_names if task is not None else ()):
            pixels, images = sum(row.pixels[index] for row in own), sum(row.pixels[index] > 0 for row in own)
            small, objects, _ = counts[split][index]
            is_object = task is not None and index in object_classes(task)
            lines.append(
                (
                    split,
                    task.labels[index] if task is not None else None,
                    name,
                    pixels,
                    pixels / max(1, labelled),
                    images,
                    images / len(own),
                    objects if is_object else None,
                    small if is_object else None,
                )
            )
    frame = pd.DataFrame(lines, columns=columns)
    return frame.astype({"objects": "Int64", "small_objects": "Int64"})


def _sizes(splits: Sequence[Split]) -> pd.DataFrame:
    lines = []
    for split in splits:
        counted = Counter(seen.image.size for seen in split.rows if seen.image is not None)
        lines += [(split.name, *size, images) for size, images in counted.most_common()]
    return pd.DataFrame(lines, columns=["split", "height", "width", "images"])


def _rows_table(rows: dict[str, tuple[int, int]]) -> pd.DataFrame:
    return pd.DataFrame([(name, *numbers) for name, numbers in rows.items()], columns=["split", "rows", "usable"])


def _shown_classes(classes: pd.DataFrame) -> pd.DataFrame:
    """Return the table of classes as text: shares in per cent, nothing for what was not counted."""
    shown = classes.astype(object).where(classes.notna(), "")
    for column in ("pixel_share", "image_share"):
        shown[column] = [f"{share:.2%}" for share in classes[column]]
    return shown.rename(columns=lambda name: str(name).replace("_", " "))


def _text_table(frame: pd.DataFrame) -> str:
    return str(frame.to_string(index=False))
