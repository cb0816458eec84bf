"""The main job from end to end on one folder: fit, evaluate, predict, save, and a picture to look at."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from semseg_automl.data.images import read_image, read_mask, write_png
from semseg_automl.data.synthetic import draw_dataset
from semseg_automl.data.table import read_table
from semseg_automl.errors import DataError
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.report import overlay_grid

PICTURES = 6


def run_demo(
    data: Path | None,
    *,
    out: Path,
    time_limit: float,
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run the main job and print a table of scores.

    Args:
        data: folder with ``train.csv``, ``val.csv``, ``test.csv``; None draws a binary and a 4-class set.
        out: folder for bundles, masks and pictures, one folder per data set.
        time_limit: seconds of fitting per data set.
        hyperparameters: settings over the default preset's.
        seed: of drawing and fitting.

    Returns:
        Test scores per data set.

    Raises:
        DataError: `data` lacks one of the tables.
    """
    console = Console()
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as drawn:
        if data is None:
            folders = {
                kind: draw_dataset(Path(drawn) / kind, kind=kind, seed=seed) for kind in ("binary", "multiclass")
            }
        else:
            folders = {data.resolve().name: data}
        for name, folder in folders.items():
            console.rule(f"{name}: fit, evaluate, predict")
            scores[name] = _main_job(folder, out / name, time_limit, hyperparameters, seed)
    for name, figures in scores.items():
        table = Table("metric", "test", title=f"{name}: {out / name}")
        for metric, value in figures.items():
            table.add_row(escape(metric), f"{value:.4f}")  # a class name in brackets is not markup
        console.print(table)
    return scores


def _main_job(
    folder: Path, out: Path, time_limit: float, hyperparameters: Mapping[str, Any] | None, seed: int
) -> dict[str, float]:
    """Fit on a folder's tables, then judge the saved bundle, loaded again, on its test rows."""
    tables = {split: folder / f"{split}.csv" for split in ("train", "val", "test")}
    missing = [path.name for path in tables.values() if not path.is_file()]
    if missing:
        raise DataError(f"'{folder}' lacks {', '.join(missing)}. A demo folder holds train.csv, val.csv and test.csv.")
    start = time.monotonic()
    bundle = out / "bundle"
    segmentor = SemanticSegmentor(path=bundle, hyperparameters=hyperparameters, verbosity=1)
    segmentor.fit(tables["train"], tables["val"], time_limit=time_limit, seed=seed)
    loaded = SemanticSegmentor.load(bundle)
    figures: dict[str, float] = loaded.evaluate(tables["test"])
    saved = loaded.predict(tables["test"], save_to=out / "masks")
    picture = out / "overlay.png"
    write_png(picture, _picture(loaded, tables["test"], list(saved["mask"])))
    print(f"bundle {bundle}, masks {out / 'masks'}, picture {picture}; {time.monotonic() - start:.0f} s in all")
    return figures


def _picture(segmentor: SemanticSegmentor, test: Path, masks: list[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw test images evenly spread over the table beside truth and prediction."""
    table = read_table(test)
    task = segmentor.task_
    rows = []
    for row in np.linspace(0, len(table) - 1, min(PICTURES, len(table))).astype(int):
        pair = (cast(tuple[Any, ...], table.masks)[row], masks[row])
        truth, predicted = (task.encode(read_mask(source, colours=task.colours)) for source in pair)
        rows.append((read_image(table.images[row]), truth, predicted))
    return overlay_grid(rows, binary=task.kind == "binary", class_names=task.class_names)
