"""A folder of images and one of masks, paired by name: ``a.jpg`` with ``a.png``, ``a_mask.png`` or ``a_gt.png``.

Not here: what the masks hold (:mod:`semseg_automl.data.images`), the search for formats
(:mod:`semseg_automl.data.annotations`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from semseg_automl.data.annotated import Annotated, Problems
from semseg_automl.data.images import SUFFIXES
from semseg_automl.data.listing import files_of, image_files, part_of
from semseg_automl.data.npy import NPY_SUFFIX
from semseg_automl.errors import DataError

MASK_FOLDERS = ("masks", "labels", "annotations", "gt")
"""Folders beside ``images`` that are searched for masks."""

_MASK_SUFFIXES = SUFFIXES | {NPY_SUFFIX}
_ENDING = re.compile(r"[_-](?:masks?|gt|labels?|seg|segmentation|annotation|l)$", re.IGNORECASE)


def mask_folders(folder: Path) -> list[Path]:
    """Return the folders beside ``images`` that hold masks, or parts such as ``train`` that do."""
    places = [folder / name for name in MASK_FOLDERS]
    return [place for place in places if place.is_dir() and any(_masks(part) for part in (place, *_parts(place)))]


def read_pairs(folder: Path, *, split: Sequence[str] = ("train",), images: Path | None = None) -> Annotated:
    """Pair images and masks by name, an ending such as ``_mask`` left aside.

    Args:
        folder: Of a folder ``images`` and one of masks.
        split: Where these have subfolders, their names, of which the first one that is there is read.
        images: The folder of the images, instead of ``images``.

    Raises:
        DataError: An image has no mask or several, or a mask has no image; all are listed.
    """
    found = mask_folders(folder)
    if len(found) != 1:
        listed = ", ".join(place.name for place in found) or "none"
        raise DataError(f"{folder}: one folder of masks is needed beside images; there is {listed}: rename the others")
    start, masks, notes = folder / "images" if images is None else images, found[0], []
    if not image_files(start):
        start, masks = _part(start, masks, split)
        notes = [f"these are the images of {start}"]
    problems = Problems(str(folder))
    result = Annotated(notes=notes)
    by_stem: dict[str, list[Path]] = {}
    for path in image_files(start):
        by_stem.setdefault(path.stem, []).append(path)
    paired = _paired(_masks(masks), set(by_stem), problems)
    for stem, files in by_stem.items():
        if len(files) > 1:
            problems.add(stem, f"{len(files)} images of this name: {', '.join(f.name for f in files)}; keep one")
        own = paired.get(stem, [])
        if not own:
            problems.add(files[0].name, f"no mask of this name in {masks}; add it, or remove the image")
        elif len(own) > 1:
            problems.add(files[0].name, f"{len(own)} masks: {', '.join(path.name for path in own)}; keep one")
        else:
            result.images.append(os.path.abspath(files[0]))
            result.labels.append(os.path.abspath(own[0]))
    problems.raise_any()
    return result


def _masks(folder: Path) -> list[Path]:
    return files_of(folder, _MASK_SUFFIXES)


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _part(images: Path, masks: Path, split: Sequence[str]) -> tuple[Path, Path]:
    for name in split:
        part = part_of(images, name)
        if part is not None and image_files(part):
            other = part_of(masks, part.name)
            if other is None:
                raise DataError(f"{part} has images, and {masks} no subfolder {part.name} of masks; add it")
            return part, other
    raise DataError(f"{images}: no images here, nor in a subfolder {' or '.join(split)}; give split= or images=")


def _paired(masks: Sequence[Path], stems: set[str], problems: Problems) -> dict[str, list[Path]]:
    """Return the masks of each image name."""
    paired: dict[str, list[Path]] = {}
    for path in masks:
        name = path.stem if path.stem in stems else _ENDING.sub("", path.stem)
        if name in stems:
            paired.setdefault(name, []).append(path)
        else:
            problems.add(path.name, "a mask without an image of this name; add the image, or remove the mask")
    return paired
