"""YOLO's segmentation labels: a text file beside each image, a polygon per line, ``class x y x y ...`` from 0 to 1.

The value of a class is its index + 1, because 0 is the background. Larger objects are drawn first, so that smaller ones
stay visible. Images without a text file, or with an empty one, are all background. Layout and keys of ``data.yaml``:
docs.ultralytics.com/datasets/segment. The folders that a ``data.yaml`` names have to lie inside its own, or inside the
one that the caller gives.

Not here: filling polygons (:mod:`semseg_automl.data.drawn`), the search for formats
(:mod:`semseg_automl.data.annotations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from semseg_automl.data.annotated import Annotated, Problems, named, read_text
from semseg_automl.data.drawn import DrawnMask, Polygons, larger_first, polygons
from semseg_automl.data.images import SUFFIXES, image_size
from semseg_automl.data.listing import SPLITS, files_of, image_files, inside, part_of
from semseg_automl.errors import DataError

_MAX_YAML_BYTES = 2**20
_MAX_LABEL_BYTES = 2**26
_MAX_CLASSES = 10_000
_NO_LABELS = ("classes.txt", "labels.txt", "notes.txt", "readme.txt")
_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


def find_yaml(folder: Path) -> Path | None:
    """Return the ``data.yaml`` of a folder, None if there is none."""
    return next((folder / name for name in _YAML_NAMES if (folder / name).is_file()), None)


def read_yolo(
    source: Path,
    *,
    split: Sequence[str] = ("train",),
    images: Path | None = None,
    classes: Mapping[str, int] | None = None,
) -> Annotated:
    """Read YOLO's labels.

    Args:
        source: A ``data.yaml``, or a folder of ``images`` and ``labels``, or of images with text files beside them.
        split: The parts of the data set, of which the first one that is there is read.
        images: For a ``data.yaml`` the folder of the data set, otherwise the folder of images.
        classes: The value of each class by name, instead of index + 1.

    Raises:
        DataError: Images or labels cannot be used; all are listed.
    """
    problems = Problems(str(source))
    if source.is_dir():
        names = _names_of_folder(source)
        files, folders, notes = _folder_images(source, split, images)
    else:
        document = _document(source)
        names = _names(document.get("names"), str(source))
        files, notes = _split_images(document, source, split, source.parent if images is None else images, problems)
        folders = {folder: _mirrored(folder) for folder in {file.parent for file in files}}
    if classes is not None and names is None:
        raise DataError(f"{source}: classes= is given, but no data.yaml or classes.txt names the classes")
    found = Annotated(notes=notes)
    used: set[int] = set()
    labelled = 0
    for image in files:
        label = folders[image.parent] / f"{image.stem}.txt"
        shapes = []
        try:
            size = image_size(image)
            if label.is_file():
                labelled += 1
                shapes = _shapes(label, size, names, classes, problems)
        except DataError as error:
            problems.add(image.name, error)
            continue
        used.update(shape.value for shape in shapes)
        found.images.append(str(image))
        found.labels.append(DrawnMask(size, larger_first(shapes), f"labels of {image.name}"))
    for label in _orphans(folders):
        problems.add(label.name, "labels without an image; add the image, or remove the file")
    problems.raise_any()
    if not labelled:
        looked = ", ".join(str(folder) for folder in list(folders.values())[:3])
        raise DataError(f"{source}: none of {len(files)} images has a text file of labels; looked in {looked}")
    if names is None:
        found.class_names = named({value: f"class_{value - 1}" for value in used})
    elif classes is None:
        found.class_names = named({index + 1: name for index, name in names.items()})
    else:
        found.class_names = named({classes[name]: name for name in names.values() if name in classes})
    return found


def _document(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(read_text(path, _MAX_YAML_BYTES))
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: no YAML ({error}); correct it") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: no data.yaml of YOLO; it needs the keys names and train, val or test")
    return document


def _names(listed: object, called: str) -> dict[int, str]:
    """Return the name of each class index, from a list or a mapping."""
    names = dict(enumerate(listed)) if isinstance(listed, list) else listed
    if not isinstance(names, dict) or not names:
        raise DataError(f"{called}: names is {str(listed)[:80]!r}; list the names of the classes in it")
    if len(names) > _MAX_CLASSES:
        raise DataError(f"{called}: {len(names)} names; at most {_MAX_CLASSES:,} are read")
    for index, name in names.items():
        if type(index) is not int or index < 0 or not isinstance(name, (str, int, float)):
            raise DataError(f"{called}: names has {index!r}: {str(name)[:80]!r}; give each index from 0 on one name")
    return {index: str(name) for index, name in sorted(names.items())}


def _names_of_folder(folder: Path) -> dict[int, str] | None:
    """Return the names from a file of the folder, or of the one above; None where there is no file."""
    for place in (folder, folder.parent):
        found = find_yaml(place)
        if found is not None:
            return _names(_document(found).get("names"), str(found))
        listed = place / "classes.txt"
        if listed.is_file():
            lines = read_text(listed, _MAX_YAML_BYTES).splitlines()
            return _names([line.strip() for line in lines if line.strip()], str(listed))
    return None


def _folder_images(
    folder: Path, split: Sequence[str], images: Path | None
) -> tuple[list[Path], dict[Path, Path], list[str]]:
    """Return the images of a folder or of the part of them that is asked for, where their labels are, and notes."""
    start = images if images is not None else folder / "images" if (folder / "images").is_dir() else folder
    labels = folder / "labels" if (folder / "labels").is_dir() else folder
    files = image_files(start)
    if files:
        return files, {start: labels}, []
    for name in split:
        part = part_of(start, name)
        files = [] if part is None else image_files(part)
        if part is not None and files:
            return files, {part: part_of(labels, part.name) or labels}, [f"these are the images of {part}"]
    raise DataError(f"{start}: no images here, nor in a subfolder {' or '.join(split)}; give images= or split=")


def _split_images(
    document: Mapping[str, Any], path: Path, split: Sequence[str], root: Path, problems: Problems
) -> tuple[list[Path], list[str]]:
    """Return the images of the first part that a ``data.yaml`` has, and notes."""
    keys = [key for name in split for key in SPLITS.get(name, (name,)) if document.get(key)]
    if not keys:
        has = ", ".join(key for keys in SPLITS.values() for key in keys if document.get(key)) or "none"
        raise DataError(f"{path}: no {' or '.join(split)}; it has {has}. Choose one with read_annotations(..., split=)")
    entries = document[keys[0]]
    files: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _place(str(entry), str(document.get("path") or "."), root)
        if place is None:
            problems.add(f"{keys[0]}: {entry}", f"not inside {root}, or not there; give the right folder as images=")
        elif place.is_dir():
            files += image_files(place)
        elif place.suffix.lower() in SUFFIXES:
            files.append(place)
        else:
            files += _listed(place, root, problems)
    problems.raise_any()
    if not files:
        raise DataError(f"{path}: no images in {keys[0]}, {entries}; check the folder")
    return list(dict.fromkeys(files)), [f"these are the images of {keys[0]} in {path.name}"]


def _place(entry: str, base: str, root: Path) -> Path | None:
    """Return a folder or file named in a ``data.yaml``, None unless it is inside `root` and there.

    Exported files often say where the data set lay once: a `base` that is not here is left out, and so are leading
    ``../``.
    """
    bases = [inside(root, base), root]
    short = entry
    while short.startswith(("../", "..\\")):
        short = short[3:]
    places = [inside(root, name, start=start) for start in bases if start is not None for name in (entry, short)]
    return next((place for place in places if place is not None and place.exists()), None)


def _listed(path: Path, root: Path, problems: Problems) -> list[Path]:
    """Return the images in a text file of paths."""
    files: list[Path] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        places = [inside(root, line.strip(), start=start) for start in (path.parent, root)]
        place = next((place for place in places if place is not None and place.is_file()), None)
        if place is None:
            problems.add(f"{path.name}, line {number}", f"{line.strip()!r} is not inside {root}, or not there")
        else:
            files.append(place)
    return files


def _mirrored(folder: Path) -> Path:
    """Return where the labels of a folder of images are: under ``labels`` instead of the last ``images``, or beside."""
    parts = folder.parts
    for position in reversed(range(len(parts))):
        if parts[position] == "images":
            mirrored = Path(*parts[:position], "labels", *parts[position + 1 :])
            return mirrored if mirrored.is_dir() else folder
    return folder


def _orphans(folders: Mapping[Path, Path]) -> list[Path]:
    """Return the text files in folders of labels without an image; beside images any text may lie."""
    return [
        path
        for images, labels in folders.items()
        if labels != images
        for stems in [{image.stem for image in image_files(images)}]
        for path in files_of(labels, {".txt"})
        if path.stem not in stems and path.name.lower() not in _NO_LABELS
    ]


def _shapes(
    path: Path,
    size: tuple[int, int],
    names: Mapping[int, str] | None,
    classes: Mapping[str, int] | None,
    problems: Problems,
) -> list[Polygons]:
    """Return the objects in a text file of labels."""
    found: list[Polygons] = []
    try:
        lines = read_text(path, _MAX_LABEL_BYTES).splitlines()
    except DataError as error:
        problems.add(path.name, error)
        return found
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_shape(line.split(), size, names, classes))
        except DataError as error:
            problems.add(f"{path.name}, line {number}", error)
    return found


def _shape(
    cells: Sequence[str], size: tuple[int, int], names: Mapping[int, str] | None, classes: Mapping[str, int] | None
) -> Polygons:
    index = int(cells[0]) if cells[0].isdecimal() and len(cells[0]) < 10 else None
    if index is None:
        raise DataError(f"the class {cells[0]!r}; begin each line with the index of a class, from 0 on")
    if names is not None and index not in names:
        raise DataError(f"the class {index}, and the names go from {min(names)} to {max(names)}")
    value = index + 1
    if classes is not None and names is not None:
        if names[index] not in classes:
            raise DataError(f"the class {names[index]!r}, which classes= does not name")
        value = classes[names[index]]
    if len(cells) == 5:
        raise DataError("5 numbers, which is a box; a polygon has a class and 3 points at least")
    try:
        numbers = [float(cell) for cell in cells[1:]]
    except ValueError as error:
        raise DataError(f"{error}; write numbers from 0 to 1") from error
    scaled = [number * size[1 - position % 2] for position, number in enumerate(numbers)]
    return polygons(value, [scaled], size)
