"""The picture that papers compare methods by: images in rows, truth and methods side by side, as PNG or PDF."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from semseg_automl.data.checks import check_rows
from semseg_automl.data.images import read_image, read_mask, write_png
from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.evaluation import check_values
from semseg_automl.files import replaced
from semseg_automl.fitted import Table
from semseg_automl.inference import FailedPrediction
from semseg_automl.report import overlay_grid

MAX_ROWS = 100
PDF_DPI = 200
SUFFIXES = (".png", ".pdf")


def comparison_grid(
    data: Table, segmentors: Mapping[str, SemanticSegmentor], path: str | PathLike[str], *, rows: int = 6
) -> Path:
    """Draw ``image | truth | method | method ...`` for some labelled images.

    Args:
        data: table, or CSV file, with an image and a label column, read as the first segmentor reads it.
        segmentors: fitted ones by the title of their column, all for masks of the same values.
        path: of the picture; its suffix, ``.png`` or ``.pdf``, says what is written.
        rows: images at most, spread evenly over the table.

    Returns:
        The path.

    Raises:
        ConfigError: no segmentor is given, the suffix is another one, or `rows` is not 1 to 100.
        UnsupportedCombination: the segmentors were fitted to masks of different values.
        DataError: rows cannot be used, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"'{path}' is to hold a picture; give a file name that ends in {' or '.join(SUFFIXES)}.")
    if not segmentors:
        raise ConfigError("segmentors is empty; give at least one fitted segmentor by its title.")
    if isinstance(rows, bool) or not 1 <= rows <= MAX_ROWS:
        raise ConfigError(f"rows is {rows!r}; a whole number from 1 to {MAX_ROWS} is needed.")
    for segmentor in segmentors.values():
        segmentor._fitted()
    (title, first), *others = segmentors.items()
    task = first.task_
    for other, segmentor in others:
        if (segmentor.task_.kind, segmentor.task_.values) != (task.kind, task.values):
            raise UnsupportedCombination(
                f"'{title}' was fitted to {task.kind} masks of the values {list(task.values)}, '{other}' to "
                f"{segmentor.task_.kind} masks of {list(segmentor.task_.values)}. Give segmentors for the same masks."
            )
    table = first._read(data)
    table = table.take(np.linspace(0, len(table) - 1, min(rows, len(table))).round().astype(int))
    if table.masks is None:
        raise DataError("a grid needs masks; give a table with a label column")
    check_values(task, table, check_rows(table))
    drawn = []
    for row in range(len(table)):
        name, one = table.row_name(row), table.take([row])
        truth = task.encode(read_mask(table.masks[row], name=name, colours=task.colours), name=name)
        found = [next(each._fitted().labels(one, threshold=each.threshold_)) for each in segmentors.values()]
        labels = [each for each in found if not isinstance(each, FailedPrediction)]  # an unreadable image has raised
        image = read_image(table.images[row], name=name, channels=table.channels)
        drawn.append((image, truth, *labels))
    titles = ("image", "truth", *segmentors)
    picture = overlay_grid(drawn, binary=task.kind == "binary", class_names=task.class_names, titles=titles)
    if target.suffix.lower() == ".png":
        write_png(target, picture)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as temporary:
            Image.fromarray(picture).save(temporary, format="PDF", resolution=PDF_DPI, quality=95)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); check the folder and its free space") from error
    return target
