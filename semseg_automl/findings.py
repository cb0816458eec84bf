"""The rules by which a set of images and masks is judged: what is wrong, what looks wrong, what one should know.

Each rule gets what :mod:`semseg_automl.data.survey` saw and gives findings. ``error``: training or the score would be
wrong. ``warning``: it looks wrong, a person has to look. ``note``: nothing has to be done.

Not here: opening files, printing (:mod:`semseg_automl.checking`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.duplicates import THUMBNAIL, find_copies
from semseg_automl.data.objects import NUMBER, VALUE, are_small
from semseg_automl.data.survey import MaskFacts, RowSurvey
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import DataError
from semseg_automl.task import IGNORE_INDEX, SegmentationTask

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")

ALIKE = 0.2
"""Share of all pairs of images that are similar from which on a set is taken to be alike by nature, as pictures of a
fixed camera are: similarity tells nothing about copies then."""

FEW = 20
"""Rows below which shares and quartiles of a set are not judged."""

FAR_OUT = 3.0
"""Interquartile ranges beyond the quartiles from which a value is far out (Tukey, "Exploratory Data Analysis", 1977,
2D)."""

MANY_SMALL = 0.1
"""Share of small objects from which on the input size deserves a warning."""

SPECK = 16
"""Pixels of foreground up to which two equal masks may be chance."""


class Place(NamedTuple):
    """A row of a split, or with row None the split as a whole."""

    split: str
    row: int | None


@dataclass(frozen=True)
class Finding:
    """Something to know about a row or a split."""

    place: Place
    level: Level
    kind: str
    message: str
    other: Place | None = None
    """The row it is like, if any."""


@dataclass(frozen=True)
class Split:
    """A table and what is in its files."""

    name: str
    table: MaskTable
    rows: Sequence[RowSurvey]

    def spot(self, row: int) -> str:
        """Return how messages call a row."""
        return f"{self.name} {self.table.row_name(row)}"


@dataclass(frozen=True)
class LabelledRow:
    """A usable row in the classes of the task."""

    place: Place
    mask: MaskFacts
    pixels: tuple[int, ...]
    """Of each class."""
    ignored: int
    """Pixels without a label."""
    objects: NDArray[np.int32] | None
    """As :func:`semseg_automl.data.objects.extents` has them; None where nobody has looked."""
    classes: Mapping[int, int]
    """The class of each value that the objects have; others are of no class."""

    @cached_property
    def foreground(self) -> float:
        """Share of the labelled pixels that are not of the first class; nan without any."""
        labelled = sum(self.pixels)
        return 1 - self.pixels[0] / labelled if labelled else float("nan")


def labelled_rows(task: SegmentationTask, splits: Sequence[Split]) -> list[LabelledRow]:
    """Return every usable row in the classes of the task; values that it does not know count nowhere."""
    found = []
    # Most masks of a set hold the same values.
    alike: dict[tuple[tuple[int, ...], bool, tuple[int, ...]], dict[int, int]] = {}
    for split in splits:
        for row, seen in enumerate(split.rows):
            if seen.mask is None or seen.check is None:
                continue
            mask = seen.mask
            kind = tuple(mask.counts), mask.encoding.colours, mask.encoding.palette
            if kind not in alike:
                alike[kind] = class_of_values(task, mask)
            classes = alike[kind]
            pixels = [0] * task.num_classes
            ignored = 0
            for value, count in mask.counts.items():
                index = classes.get(value)
                if index == IGNORE_INDEX:
                    ignored += count
                elif index is not None:
                    pixels[index] += count
            objects = None if task.snapped else mask.objects
            found.append(LabelledRow(Place(split.name, row), mask, tuple(pixels), ignored, objects, classes))
    return found


def class_of_values(task: SegmentationTask, mask: MaskFacts) -> dict[int, int]:
    """Return the class index of each value that a mask stores and the task knows, also of ignored ones."""
    meant = {value: value for value in mask.counts}
    if task.colours:
        try:
            meant = {value: next(iter(mask.encoding.as_colours({value: 1}))) for value in mask.counts}
        except DataError:
            return {}  # a number that is no colour: `unknown_values` tells of it
    elif mask.encoding.colours:
        return {}
    known = {*task.values, *task.ignore_values}
    kept = {value: colour for value, colour in meant.items() if task.snapped or colour in known}
    if task.snapped and not task.colours:
        kept = {value: number for value, number in kept.items() if 0 <= number <= 255}
    if not kept:
        return {}
    indices = task.encode(np.array([list(kept.values())], dtype=np.int64))[0].tolist()
    return dict(zip(kept, indices, strict=True))


def flaws(splits: Sequence[Split]) -> list[Finding]:
    """Rows whose files cannot be used."""
    return [
        Finding(Place(split.name, row), "error", kind, message)
        for split in splits
        for row, seen in enumerate(split.rows)
        for kind, message in seen.flaws
    ]


def unknown_values(task: SegmentationTask, splits: Sequence[Split]) -> list[Finding]:
    """Masks with values that the task does not know, which `evaluate` will refuse."""
    found = []
    for split in splits:
        for row, seen in enumerate(split.rows):
            if seen.mask is None or seen.check is None:
                continue
            place = Place(split.name, row)
            try:
                unknown = task.unknown_values(seen.mask.counts, seen.mask.encoding)
            except DataError as error:
                found.append(Finding(place, "error", "unknown value", str(error)))
                continue
            if unknown:
                listed = ", ".join(f"{value} ({pixels} pixels)" for value, pixels in list(unknown.items())[:8])
                more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
                message = f"the mask holds {listed}{more}, which no class has; known are {task.known_text()}"
                found.append(Finding(place, "error", "unknown value", message))
    return found


def class_findings(task: SegmentationTask, rows: Sequence[LabelledRow], splits: Sequence[str]) -> list[Finding]:
    """Classes that the training rows lack, or hardly have."""
    found = []
    first = splits[0]
    images = {name: [0] * task.num_classes for name in splits}
    for row in rows:
        for index, pixels in enumerate(row.pixels):
            images[row.place.split][index] += pixels > 0
    for index, name in enumerate(task.class_names):
        called = f"class {name} (value {task.labels[index]})"
        elsewhere = [f"{images[split][index]} of {split}" for split in splits[1:] if images[split][index]]
        if not images[first][index]:
            if elsewhere:
                text = f"{called} is in no mask of {first}, but in {' and '.join(elsewhere)}; it cannot be learned"
                found.append(Finding(Place(first, None), "error", "class not trained", text))
        elif images[first][index] == 1 and index:
            text = f"{called} is in one image of {first} only; it will hardly be learned"
            found.append(Finding(Place(first, None), "note", "rare class", text))
    return found


def mask_findings(task: SegmentationTask, rows: Sequence[LabelledRow]) -> list[Finding]:
    """Masks without a label, and of binary tasks those that are empty, full, or far from all others."""
    found = []
    for row in rows:
        if not sum(row.pixels):
            text = "every pixel of the mask is without a label; the row teaches nothing and is not scored"
            found.append(Finding(row.place, "warning", "no label", text))
    if task.kind != "binary":
        return found
    judged = [row for row in rows if sum(row.pixels)]
    full = [row for row in judged if row.foreground == 1]
    for row in judged:
        if row.foreground == 0:
            text = f"the mask holds no {task.class_names[1]}; right if there is none in the image"
            found.append(Finding(row.place, "note", "empty mask", text))
    if 10 * len(full) < len(judged):
        text = f"the whole mask is {task.class_names[1]}, which {len(full)} of {len(judged)} masks are"
        found += [Finding(row.place, "warning", "full mask", text) for row in full]
    return found + _far_out(task, [row for row in judged if 0 < row.foreground < 1])


def _far_out(task: SegmentationTask, rows: Sequence[LabelledRow]) -> list[Finding]:
    """Masks whose share of foreground is far out, on the scale of log odds, where both ends have room."""
    if len(rows) < FEW:
        return []
    odds = np.array([np.log(row.foreground / (1 - row.foreground)) for row in rows])
    low, high = np.percentile(odds, [25, 75])
    reach = FAR_OUT * (high - low)
    found = []
    for row, value in zip(rows, odds.tolist(), strict=True):
        if not low - reach <= value <= high + reach:
            usual = " to ".join(f"{1 / (1 + np.exp(-edge)):.2%}" for edge in (low, high))
            text = f"{row.foreground:.2%} of the mask is {task.class_names[1]}, far from the others (mostly {usual})"
            found.append(Finding(row.place, "note", "unusual share", text))
    return found


def mask_copies(splits: Sequence[Split], rows: Sequence[LabelledRow]) -> list[Finding]:
    """Masks that are their own image, and masks that several different images share."""
    found = []
    surveys = {(split.name, row): seen for split in splits for row, seen in enumerate(split.rows)}
    spots = {split.name: split for split in splits}
    for place, seen in surveys.items():
        if seen.image is not None and seen.mask is not None and seen.image.digest == seen.mask.digest:
            text = "the mask has the pixels of its image; the wrong file is paired"
            found.append(Finding(Place(*place), "error", "mask is image", text))
    same: dict[str, list[LabelledRow]] = defaultdict(list)
    for row in rows:
        drawn = sum(row.pixels) - max(row.pixels)
        if drawn > SPECK:
            same[row.mask.digest].append(row)
    for group in same.values():
        if len(group) < 2:
            continue
        pictures = np.stack([_picture(surveys[row.place.split, row.place.row or 0]) for row in group])
        likes = {(copy.later, copy.earlier) for copy in find_copies(pictures, np.zeros(len(group), np.int64))[0]}
        copied = {later for later, _ in likes}
        different = [row for position, row in enumerate(group) if position not in copied]
        for first, row in pairwise(different):
            where = spots[first.place.split].spot(first.place.row or 0)
            text = f"the mask equals that of {where}, whose image is another; {len(different)} images share it"
            found.append(Finding(row.place, "warning", "repeated mask", text, first.place))
    return found


def duplicates(splits: Sequence[Split]) -> list[Finding]:
    """Images that are there twice, and images that look like copies: across splits they leak what is to be judged."""
    where = [(split, row) for split in splits for row, seen in enumerate(split.rows) if seen.image is not None]
    return [*_equal_images(where), *_similar_images(where)]


def _equal_images(where: Sequence[tuple[Split, int]]) -> list[Finding]:
    found = []
    first: dict[str, list[tuple[Split, int]]] = defaultdict(list)
    for split, row in where:
        seen = split.rows[row]
        if seen.image is None:
            continue
        earlier = first[seen.image.digest]
        reported: set[bool] = set()
        for other, position in earlier:
            crosses = other.name != split.name
            if crosses in reported:
                continue
            reported.add(crosses)
            twin = other.rows[position]
            differ = seen.mask is not None and twin.mask is not None and seen.mask.digest != twin.mask.digest
            but = ", with another mask" if differ else ""
            kind = "leak" if crosses else ("conflicting masks" if differ else "duplicate")
            text = f"the same image as {other.spot(position)}{but}"
            level: Level = "error" if crosses else "warning"
            place = Place(split.name, row)
            found.append(Finding(place, level, kind, text, Place(other.name, position)))
        # One row of each split is enough to compare later ones with.
        if all(other.name != split.name for other, _ in earlier):
            earlier.append((split, row))
    return found


def _similar_images(where: Sequence[tuple[Split, int]]) -> list[Finding]:
    names = list(dict.fromkeys(split.name for split, _ in where))
    groups = np.array([names.index(split.name) for split, _ in where], dtype=np.int64)
    if not where:
        return []
    copies, pairs = find_copies(np.stack([_picture(split.rows[row]) for split, row in where]), groups)
    possible = len(where) * (len(where) - 1) // 2
    if len(where) >= FEW and pairs > ALIKE * possible:
        text = f"{pairs / possible:.0%} of all pairs of images look alike, so copies of an image cannot be told"
        return [Finding(Place(names[0], None), "note", "alike images", text)]
    found = []
    for copy in copies:
        split, row = where[copy.later]
        other, position = where[copy.earlier]
        one, two = split.rows[row].image, other.rows[position].image
        if one is None or two is None or one.digest == two.digest:
            continue
        how = ", mirrored or turned" if copy.turned else ""
        text = f"looks like a copy of {other.spot(position)}{how} (similarity {copy.similarity:.3f})"
        crosses = other.name != split.name
        level: Level = "error" if crosses else "note"
        kind = "leak of a copy" if crosses else "near duplicate"
        found.append(Finding(Place(split.name, row), level, kind, text, Place(other.name, position)))
    return found


def small_objects(
    task: SegmentationTask, rows: Sequence[LabelledRow], input_size: tuple[int, int]
) -> tuple[list[Finding], dict[str, list[tuple[int, int, int]]]]:
    """Count objects that are smaller than four pixels at the model's input.

    Returns:
        Findings, and for each split and class: small objects, all objects, images with small ones.
    """
    counts = {
        split: _count_small([row for row in rows if row.place.split == split], task.num_classes, input_size)
        for split in dict.fromkeys(row.place.split for row in rows)
    }
    found = []
    for split, by_class in counts.items():
        own = [row for row in rows if row.place.split == split]
        wanted = object_classes(task)
        small, total = (sum(by_class[index][which] for index in wanted) for which in (0, 1))
        if not small:
            continue
        worst = sorted(wanted, key=lambda index: by_class[index][0], reverse=True)[:3]
        listed = ", ".join(
            f"{task.class_names[index]} {by_class[index][0]} of {by_class[index][1]} in {by_class[index][2]} images"
            for index in worst
            if by_class[index][0]
        )
        text = (
            f"{small / total:.0%} of the {total} objects in {len(own)} images are smaller than 4 pixels at the input "
            f"size {input_size[0]} x {input_size[1]}, most of them {listed}; a larger model.input_size keeps them"
        )
        level: Level = "warning" if small >= MANY_SMALL * total else "note"
        found.append(Finding(Place(split, None), level, "small objects", text))
    return found, counts


def _count_small(
    rows: Sequence[LabelledRow], classes: int, input_size: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """Count for each class small objects, all objects, and images with small ones."""
    counts = np.zeros((classes, 3), np.int64)
    groups: dict[tuple[bool, bool, tuple[int, ...]], list[tuple[LabelledRow, NDArray[np.int32]]]] = defaultdict(list)
    for row in rows:
        if row.objects is not None:  # in a group, a value means the same everywhere
            stored = row.mask.encoding
            groups[bool(row.classes), stored.colours, stored.palette].append((row, row.objects))
    for group in groups.values():
        objects = np.concatenate([own for _, own in group])
        image = np.repeat(np.arange(len(group)), [len(own) for _, own in group])
        sizes = np.array([row.mask.size for row, _ in group])[image]
        meant = {value: index for row, _ in group for value, index in row.classes.items()} or {0: IGNORE_INDEX}
        values, indices = np.array(sorted(meant.items())).T
        at = np.searchsorted(values, objects[:, VALUE]).clip(max=len(values) - 1)
        index = np.where(values[at] == objects[:, VALUE], indices[at], IGNORE_INDEX)
        labelled = index < classes
        small = labelled & are_small(objects, sizes, input_size)
        for column, chosen in enumerate((small, labelled)):
            counts[:, column] += np.bincount(index[chosen], objects[chosen, NUMBER], classes).astype(np.int64)
        counts[:, 2] += np.bincount(np.unique(image[small] * classes + index[small]) % classes, minlength=classes)
    return [(few, total, images) for few, total, images in counts.tolist()]


def object_classes(task: SegmentationTask) -> range:
    """Return the class indices that are objects: all but a background."""
    background = task.kind == "binary" or task.class_names[0].lower() == "background"
    return range(1 if background else 0, task.num_classes)


def _picture(seen: RowSurvey) -> NDArray[np.uint8]:
    picture = seen.image.picture if seen.image is not None else bytes(THUMBNAIL**2)
    return np.frombuffer(picture, dtype=np.uint8).reshape(THUMBNAIL, THUMBNAIL)
