"""Annotation formats as tables: COCO, YOLO, LabelMe, and pairs of folders, recognised by what is in them.

Nothing is converted: the masks of the first three are drawn one at a time, whenever one is read.

Not here: the formats themselves (``coco``, ``yolo``, ``labelme`` and ``pairs`` beside this module).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from semseg_automl.data.annotated import Annotated, Classes, class_values, read_json
from semseg_automl.data.coco import is_coco, read_coco
from semseg_automl.data.labelme import is_labelme, read_labelme
from semseg_automl.data.listing import files_of, image_files
from semseg_automl.data.pairs import MASK_FOLDERS, mask_folders, read_pairs
from semseg_automl.data.yolo import find_yaml, read_yolo
from semseg_automl.errors import ConfigError, DataError

AnnotationFormat = Literal["coco", "yolo", "labelme", "pairs"]

_FORMS = (
    "a JSON file of COCO, a data.yaml of YOLO, a folder of images/ and labels/ with YOLO's text files, a folder of "
    f"LabelMe's JSON files, or a folder of images/ and one of {', '.join(f'{name}/' for name in MASK_FOLDERS)}"
)


def read_annotations(
    source: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    format: AnnotationFormat | None = None,
    split: str | Sequence[str] = "train",
    classes: Classes | None = None,
) -> pd.DataFrame:
    """Read annotations as a table to fit on; every file and shape is checked, and no mask is drawn yet.

    Values: COCO's are the category ids (plus one if an id is 0), YOLO's the class indices plus one, LabelMe's the
    sorted names numbered from 1; 0 is the background. Where objects overlap, COCO's and YOLO's smaller ones stay
    visible, of LabelMe's the later ones. Images without annotations are all background, except that LabelMe's without a
    JSON file are left out with a warning.

    Args:
        source: A JSON file of COCO or LabelMe, a ``data.yaml`` of YOLO, or a folder: of YOLO's ``images`` and
            ``labels``, of LabelMe's JSON files, or of ``images`` and one of ``masks``, ``labels``, ``annotations`` and
            ``gt`` (paired by name, an ending such as ``_mask`` left aside).
        images: The folder that image names start from; for a ``data.yaml`` the folder of the data set. Names that lead
            out of it are refused. None finds it beside the annotations.
        format: ``coco``, ``yolo``, ``labelme`` or ``pairs``; None recognises it.
        split: The part of a ``data.yaml``, or of folders such as ``images/train``; or several, of which the first one
            that is there is read.
        classes: The numbers of the names, where the format's own will not do: a list in the order of values, from 1
            on, or ``{name: value}``.

    Returns:
        The columns ``image``, absolute paths, and ``label``, a `DrawnMask` or a path. ``attrs["class_names"]`` has the
        name of each value (not for pairs), ``attrs["notes"]`` what was decided, as sentences.

    Raises:
        DataError: The format is not recognised, or images or annotations cannot be used; all are listed.
        ConfigError: `format` is unknown.
    """
    if format is not None and format not in get_args(AnnotationFormat):
        raise ConfigError(f"format is {format!r}; allowed: {', '.join(get_args(AnnotationFormat))}.")
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"annotations of type {type(source).__name__}; give {_FORMS}")
    path = Path(os.path.abspath(source))
    folder = None if images is None else Path(os.path.abspath(images))
    if not path.exists():
        raise DataError(f"{source}: no such file or folder; check the path")
    if folder is not None and not folder.is_dir():
        raise DataError(f"images={images}: no such folder; check the path")
    parts = (split,) if isinstance(split, str) else tuple(split)
    found = _read(path, folder, format, parts, classes)
    table = pd.DataFrame({"image": found.images, "label": pd.Series(found.labels, dtype=object)})
    if found.class_names:
        table.attrs["class_names"] = dict(sorted(found.class_names.items()))
    table.attrs["notes"] = found.notes
    return table


def are_annotations(source: str | os.PathLike[str]) -> bool:
    """Whether a path is to be read by :func:`read_annotations`: a folder, or a JSON or YAML file."""
    path = Path(source)
    return path.suffix.lower() in (".json", ".yaml", ".yml") or path.is_dir()


def annotation_format(source: str | os.PathLike[str]) -> AnnotationFormat:
    """Recognise the format of a file or folder by what is in it.

    Raises:
        DataError: It is none, or may be several.
    """
    return _recognised(Path(source))[0]


def _read(
    path: Path, images: Path | None, format: AnnotationFormat | None, split: Sequence[str], classes: Classes | None
) -> Annotated:
    document: Any = None
    if format is None:
        format, path, document = _recognised(path)
    values = class_values(classes)
    if format == "coco":
        if path.is_dir():
            path = _only_json(path)
        document = read_json(path) if document is None else document
        if not is_coco(document):
            raise DataError(f"{path}: not COCO's annotations, which have the lists images and annotations")
        return read_coco(path, document, images=images, classes=values)
    if format == "yolo":
        return read_yolo(path, split=split, images=images, classes=values)
    if format == "labelme":
        return read_labelme(path, images=images, classes=values)
    if values is not None:
        raise DataError(f"{path}: classes= is given, but masks have no names; give class_names= when fitting")
    return read_pairs(path, split=split, images=images)


def _recognised(path: Path) -> tuple[AnnotationFormat, Path, Any]:
    """Return the format, the file or folder to read, and the content of a JSON file, if it had to be read."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _recognised_folder(path)
    if suffix in (".yaml", ".yml"):
        return "yolo", path, None
    if suffix != ".json":
        raise DataError(f"{path}: annotations of this kind are not read; give {_FORMS}")
    document = read_json(path)
    if is_coco(document):
        return "coco", path, document
    if is_labelme(document):
        return "labelme", path, document
    has = ", ".join(map(str, list(document)[:5])) if isinstance(document, dict) else type(document).__name__
    raise DataError(f"{path}: JSON of neither COCO (images, annotations) nor LabelMe (shapes, imagePath); it has {has}")


def _recognised_folder(folder: Path) -> tuple[AnnotationFormat, Path, Any]:
    found = find_yaml(folder)
    if found is not None:
        return "yolo", found, None
    answers: list[tuple[AnnotationFormat, Path, Any]] = []
    if (folder / "images").is_dir():
        texts = _texts(folder / "labels")
        answers += [("yolo", folder, None)] if texts else []
        answers += [("pairs", folder, None) for _ in mask_folders(folder)]
        for name in MASK_FOLDERS:
            inner = files_of(folder / name, {".json"}) if (folder / name).is_dir() else []
            answers += [_recognised_files(inner)] if inner else []
    elif {path.stem for path in files_of(folder, {".txt"})} & {path.stem for path in image_files(folder)}:
        answers.append(("yolo", folder, None))
    jsons = files_of(folder, {".json"})
    if jsons and not answers:
        return _recognised_files(jsons)
    if len(answers) == 1:
        return answers[0]
    if not answers:
        raise DataError(f"{folder}: no annotations that are read here; give {_FORMS}, or a CSV file")
    seen = ", ".join(f"{name} in {place.name}" for name, place, _ in answers)
    raise DataError(f"{folder}: several formats ({seen}); name one with format=, or give its own file or folder")


def _recognised_files(jsons: Sequence[Path]) -> tuple[AnnotationFormat, Path, Any]:
    """Recognise the JSON files of a folder: one of COCO, or any number of LabelMe."""
    name, path, document = _recognised(jsons[0])
    if name == "labelme":
        return name, path.parent, None
    if len(jsons) > 1:
        listed = ", ".join(file.name for file in jsons[:5])
        raise DataError(f"{path.parent}: {len(jsons)} JSON files, {listed}; give the path of one")
    return name, path, document


def _texts(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    parts = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return any(path.name.lower() != "classes.txt" for part in parts for path in files_of(part, {".txt"}))


def _only_json(folder: Path) -> Path:
    jsons = files_of(folder, {".json"})
    if len(jsons) != 1:
        raise DataError(f"{folder}: {len(jsons)} JSON files in this folder; give the path of COCO's")
    return jsons[0]
