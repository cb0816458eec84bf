"""COCO's instance annotations (cocodataset.org/#format-data) as masks that are drawn when they are read.

Category ids are the values, gaps and all. Larger objects are drawn first, so that smaller ones stay visible. Crowds
(``iscrowd``) are pixels of their category like any other. Images without an annotation are all background.

Not here: filling polygons (:mod:`semseg_automl.data.drawn`), the search for formats
(:mod:`semseg_automl.data.annotations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semseg_automl.data.annotated import Annotated, Problems, named, stated_size
from semseg_automl.data.drawn import MAX_VALUE, DrawnMask, Shape, larger_first, polygons, runs
from semseg_automl.data.listing import inside
from semseg_automl.errors import DataError

_LOOKED_AT = 20  # images by which the folder of all is found


@dataclass
class _Image:
    """An image, of no size where it cannot be used."""

    path: Path
    name: str
    size: tuple[int, int]
    shapes: list[Shape] = field(default_factory=list)


def is_coco(document: object) -> bool:
    """Whether a JSON document is COCO's."""
    return isinstance(document, dict) and all(isinstance(document.get(key), list) for key in ("images", "annotations"))


def read_coco(
    path: Path, document: Mapping[str, Any], *, images: Path | None = None, classes: Mapping[str, int] | None = None
) -> Annotated:
    """Read COCO annotations.

    Args:
        path: Of the JSON file.
        document: Its content.
        images: The folder that file names start from; None looks beside the JSON file.
        classes: The value of each category by name, instead of the ids.

    Raises:
        DataError: Images or annotations cannot be used; all are listed.
    """
    problems = Problems(str(path))
    categories, notes = _categories(document, classes, problems)
    records = list(_records(document, "images", problems))
    root = images if images is not None else _image_folder(path, [str(r.get("file_name", "")) for _, r in records])
    found = _images(records, root, problems)
    for where, record in _records(document, "annotations", problems):
        try:
            _add_shape(record, found, categories)
        except DataError as error:
            problems.add(where, error)
    problems.raise_any()
    if not found:
        raise DataError(f"{path} names no image; export it again with its images")
    called = path.name
    return Annotated(
        images=[str(image.path) for image in found.values()],
        labels=[
            DrawnMask(image.size, larger_first(image.shapes), f"{called}, {image.name}") for image in found.values()
        ],
        class_names=named({value: name for value, name in categories.values() if value is not None}),
        notes=notes,
    )


def _records(document: Mapping[str, Any], key: str, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the entries of a list, each with what errors call it."""
    for position, record in enumerate(document[key]):
        what = key[:-1]
        if isinstance(record, dict):
            yield f"{what} {record.get('id', f'at position {position}')}", record
        else:
            problems.add(f"{what} at position {position}", f"a {type(record).__name__} instead of an object")


def _categories(
    document: Mapping[str, Any], classes: Mapping[str, int] | None, problems: Problems
) -> tuple[dict[int, tuple[int | None, str]], list[str]]:
    """Return the value, None where `classes` does not name it, and name of each category id, and notes."""
    listed = document.get("categories")
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{problems.called}: no list of categories; export it again with its categories")
    names: dict[int, str] = {}
    for position, record in enumerate(listed):
        number = record.get("id") if isinstance(record, dict) else None
        if type(number) is not int or not 0 <= number < MAX_VALUE:
            problems.add(f"category at position {position}", f"the id {number!r}; give each a whole number from 0 on")
        elif number in names:
            problems.add(f"category at position {position}", f"the id {number} is also {names[number]}'s")
        else:
            names[number] = str(record.get("name") or f"category {number}")
    if classes is not None:
        return {number: (classes.get(name), name) for number, name in names.items()}, []
    if 0 not in names:
        return {number: (number, name) for number, name in names.items()}, []
    note = f"one is added to the category ids of {Path(problems.called).name}, because 0 is the background"
    return {number: (number + 1, name) for number, name in names.items()}, [note]


def _image_folder(path: Path, names: Iterable[str]) -> Path:
    """Return the folder beside a JSON file in which its images are, as COCO and its users lay them out."""
    folder, part = path.parent, path.stem.rpartition("_")[2]
    candidates = [folder, folder / "images", folder / part, folder / "images" / part]
    candidates += [folder.parent / name for name in ("images", part, f"images/{part}", ".")]
    first = [name for name in names if name][:_LOOKED_AT]
    for candidate in candidates:
        places = (inside(candidate, name) for name in first)
        if any(place is not None and place.is_file() for place in places):
            return candidate
    if not first:
        return folder
    looked = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    outside = " (names that lead out of these folders are not followed)" * any(
        inside(folder, name) is None for name in first
    )
    raise DataError(
        f"{path}: none of its first images, such as {first[0]!r}, is on disk; looked in {looked}{outside}. Give their "
        "folder as images="
    )


def _images(
    records: Iterable[tuple[str, Mapping[str, Any]]], root: Path, problems: Problems
) -> dict[int | str, _Image]:
    """Return the images by id, in the order of the file."""
    found: dict[int | str, _Image] = {}
    seen: dict[Path, object] = {}
    for where, record in records:
        number, name = record.get("id"), record.get("file_name")
        if not isinstance(number, (int, str)) or isinstance(number, bool) or not isinstance(name, str):
            problems.add(where, f"the id {number!r} and the file_name {name!r}; give each image both")
            continue
        path = inside(root, name)
        size = (0, 0)
        if path is None:
            problems.add(where, f"the file_name {name!r} leads out of the folder of images, {root}")
        elif number in found or path in seen:
            problems.add(where, f"{name!r} or its id is there twice, also as image {seen.get(path, number)}")
        elif not path.is_file():
            problems.add(where, f"{path} is not on disk; give the folder of the images as images=")
        else:
            try:
                size = stated_size(record.get("height"), record.get("width"), path)
            except DataError as error:
                problems.add(where, f"{name!r}: {error}")
            seen[path] = number
        found.setdefault(number, _Image(path or root, name, size))
    return found


def _add_shape(
    record: Mapping[str, Any], images: Mapping[int | str, _Image], categories: Mapping[int, tuple[int | None, str]]
) -> None:
    image = images.get(record["image_id"]) if type(record.get("image_id")) in (int, str) else None
    if image is None:
        raise DataError(f"the image_id {record.get('image_id')!r}, which no image has")
    if image.size == (0, 0):
        return  # the image is on the list of problems already
    category = record.get("category_id")
    if type(category) is not int or category not in categories:
        raise DataError(f"the category_id {category!r}, which no category has")
    value, name = categories[category]
    if value is None:
        raise DataError(f"the category {name!r}, which classes= does not name")
    outline = record.get("segmentation")
    if isinstance(outline, dict):
        if outline.get("size") != [*image.size]:
            raise DataError(f"run lengths of the size {outline.get('size')!r}, but the image is {[*image.size]}")
        image.shapes.append(runs(value, outline.get("counts"), image.size))
    elif isinstance(outline, list) and outline:
        image.shapes.append(polygons(value, outline, image.size))
    else:
        raise DataError("no segmentation, as of a box or key points; outline the object, or remove the annotation")
