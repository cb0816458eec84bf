"""LabelMe's files (github.com/wkentaro/labelme), one JSON per image, as masks that are drawn when they are read.

Names are sorted and numbered from 1, unless the caller numbers them. Shapes are drawn in the order of the file, a later
one over an earlier one. Two names are LabelMe's own: ``_background_`` is 0, ``__ignore__`` is -1, which is no class.
A file without shapes is all background; an image without a file was not labelled and is left out, with a warning.

Not here: filling polygons (:mod:`semseg_automl.data.drawn`), the search for formats
(:mod:`semseg_automl.data.annotations`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semseg_automl.data.annotated import BACKGROUND, Annotated, Problems, read_json, stated_size
from semseg_automl.data.drawn import DrawnMask, Polygons, polygons
from semseg_automl.data.listing import files_of, image_files, inside
from semseg_automl.errors import DataError

_OWN = {"_background_": 0, "__ignore__": -1}
_CIRCLE_CORNERS = 128
_LISTED = 5


def is_labelme(document: object) -> bool:
    """Whether a JSON document is LabelMe's."""
    return isinstance(document, dict) and isinstance(document.get("shapes"), list) and "imagePath" in document


def read_labelme(
    source: Path, *, images: Path | None = None, classes: Mapping[str, int] | None = None
) -> Annotated:
    """Read LabelMe's files.

    Args:
        source: One of them, or their folder.
        images: The folder of the images; None for the one of the files, or ``images`` beside it.
        classes: The value of each name.

    Raises:
        DataError: Files or shapes cannot be used; all are listed.
    """
    problems = Problems(str(source))
    files = files_of(source, {".json"}) if source.is_dir() else [source]
    folder = source if source.is_dir() else source.parent
    root = images if images is not None else folder
    if images is None and not image_files(folder) and (folder.parent / "images").is_dir():
        root = folder.parent / "images"
    drawings: dict[Path, tuple[tuple[int, int], list[tuple[str, Polygons]]]] = {}
    for file in files:
        try:
            document = read_json(file)
            if not is_labelme(document):
                raise DataError("no file of LabelMe, which has shapes and imagePath; move it elsewhere")
            image = _image(document["imagePath"], root, file.parent)
            if image in drawings:
                raise DataError(f"{image.name} has two files; keep one")
            size = stated_size(document.get("imageHeight"), document.get("imageWidth"), image)
            drawings[image] = size, _shapes(document["shapes"], size, file.name, problems)
        except DataError as error:
            problems.add(file.name, error)
    found = {name for _, shapes in drawings.values() for name, _ in shapes}
    values = _OWN | (dict(classes) if classes is not None else _numbered(found))
    for name in sorted(found - set(values)):
        problems.add(f"label {name!r}", f"not among classes=, which are {', '.join(classes or ())}")
    problems.raise_any()
    if not drawings:
        raise DataError(f"{source}: no JSON file of LabelMe in this folder")
    return Annotated(
        images=[str(image) for image in drawings],
        labels=[
            DrawnMask(size, tuple(Polygons(values[name], shape.rings) for name, shape in shapes), f"shapes of {i.name}")
            for i, (size, shapes) in drawings.items()
        ],
        class_names={0: BACKGROUND} | {value: name for name, value in values.items() if name not in _OWN},
        notes=_left_out(source, root, set(drawings)) if source.is_dir() else [],
    )


def _numbered(names: set[str]) -> dict[str, int]:
    return {name: value for value, name in enumerate(sorted(names - set(_OWN)), start=1)}


def _image(name: object, root: Path, folder: Path) -> Path:
    """Return the image of a file in `folder`: its path starts there, or in the folder of images."""
    if not isinstance(name, str):
        raise DataError(f"imagePath is {name!r}; write the name of the image")
    places = [inside(root, name, start=start) for start in (folder, root)]
    if not any(places):
        raise DataError(f"imagePath {name!r} leads out of the folder of images, {root}; give that as images=")
    found = next((place for place in places if place is not None and place.is_file()), None)
    if found is None:
        raise DataError(f"its image {name!r} is not in {root}; give the folder of the images as images=")
    return found


def _shapes(
    shapes: Sequence[Any], size: tuple[int, int], called: str, problems: Problems
) -> list[tuple[str, Polygons]]:
    found: list[tuple[str, Polygons]] = []
    for position, shape in enumerate(shapes):
        try:
            label = shape.get("label") if isinstance(shape, dict) else None
            if not isinstance(label, str) or not label.strip():
                raise DataError(f"the label {label!r}; give each shape a name")
            found.append((label, polygons(0, [_outline(shape)], size)))
        except DataError as error:
            problems.add(f"{called}, shape {position}", error)
    return found


def _outline(shape: Mapping[str, Any]) -> Sequence[Any]:
    """Return the corners of a shape."""
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if not isinstance(points, list):
        raise DataError(f"its points are a {type(points).__name__}; list x and y of each")
    if kind == "polygon" or (kind in ("rectangle", "rotation") and len(points) == 4):
        return points
    if kind not in ("rectangle", "circle"):
        raise DataError(f"the shape_type {kind!r}; polygon, rectangle and circle have an area that is read")
    try:
        (x0, y0), (x1, y1) = np.asarray(points, dtype=np.float64).tolist()
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"a {kind} of {len(points)} points that are not two pairs of numbers") from error
    if kind == "rectangle":
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    radius = float(np.hypot(x1 - x0, y1 - y0))
    angles = np.arange(_CIRCLE_CORNERS) * (2 * np.pi / _CIRCLE_CORNERS)
    return [[x0 + radius * c, y0 + radius * s] for c, s in zip(np.cos(angles), np.sin(angles), strict=True)]


def _left_out(source: Path, root: Path, used: set[Path]) -> list[str]:
    """Return a note, and warn, if there are images that nobody labelled."""
    others = [path.name for path in image_files(root) if Path(inside(root, path.name) or path) not in used]
    if not others:
        return []
    more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    note = f"{len(others)} images of {root} are left out, because no file of LabelMe is about them"
    warnings.warn(
        f"{note}: {', '.join(others[:_LISTED])}{more}. Save them in LabelMe, also without a shape, to train on them as "
        "background",
        stacklevel=5,
    )
    return [note]
