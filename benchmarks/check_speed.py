"""What checking takes: ``python -m benchmarks.check_speed --data DATA [--loader] [--enlarge TIMES]``.

DATA holds folders with a ``train.csv``, ``val.csv`` and ``test.csv``. `check_data` of all splits, without its notes on
files and with its rules, takes turns with opening every file in Pillow and counting the mask's values, one after
another, on which nothing else is done; with ``--loader``, also with an epoch of the loader one writes first, in this
process: Pillow opens and converts, torchvision resizes to 256 x 256, flips and makes tensors, PyTorch batches of eight.

The files can be enlarged to the sides that cameras give; benchmark sets are often made smaller.

Medians over rounds whose order alternates. Other programs on the machine slow both sides, so the ratios are what
counts; ours works on all cores, which only helps where they are free.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from PIL import Image

from benchmarks.plain_reading import exhaust, plain_check, plain_loader
from semseg_automl import check_data
from semseg_automl.data.images import ImageSource
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.hardware import usable_cores

SPLITS = ("train", "val", "test")


def enlarged(table: MaskTable, times: int, folder: Path) -> MaskTable:
    """Return a table of copies of its files, of so many times the sides: photographs in JPEG, masks in PNG."""
    folder.mkdir()
    images: list[ImageSource] = []
    masks: list[ImageSource] = []
    for row, (image_path, mask_path) in enumerate(zip(table.images, table.masks or (), strict=True)):
        with Image.open(str(image_path)) as image, Image.open(str(mask_path)) as mask:
            size = image.width * times, image.height * times
            images.append(str(folder / f"{row}.jpg"))
            masks.append(str(folder / f"{row}.png"))
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(str(images[-1]), quality=90)
            mask.resize(size, Image.Resampling.NEAREST).save(str(masks[-1]))
    return replace(table, images=tuple(images), masks=tuple(masks))


def our_check(frames: Sequence[pd.DataFrame], folder: Path) -> None:
    """Check without what earlier checks found in the files."""
    shutil.rmtree(folder / "checks", ignore_errors=True)
    check_data(*frames)


def measure(tables: Sequence[MaskTable], folder: Path, rounds: int, *, loader: bool) -> dict[str, float]:
    """Return the seconds that `check_data` of all splits takes, and those of the plain ways."""
    frames = [pd.DataFrame({"image": table.images, "label": table.masks}) for table in tables]
    sides: dict[str, Callable[[], object]] = {
        "check_data": partial(our_check, frames, folder),
        "plain": partial(plain_check, tables),
    }
    if loader:
        sides["plain loader"] = partial(exhaust, plain_loader(tables, workers=0, drop_last=False))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides if turn % 2 else reversed(sides):
            begin = time.perf_counter()
            sides[side]()
            if turn:  # the one before fills the system's file cache
                seconds[side].append(time.perf_counter() - begin)
    return {side: statistics.median(taken) for side, taken in seconds.items()}


def report(name: str, rows: int, seconds: Mapping[str, float]) -> None:
    """Print how long each side takes, and how many times ours the others take."""
    times = {side: round(taken / seconds["check_data"], 2) for side, taken in seconds.items() if side != "check_data"}
    taken = {side: round(taken, 3) for side, taken in seconds.items()}
    print(json.dumps({"set": name, "rows": rows, "seconds": taken, "times": times}), flush=True)


def main() -> None:
    """Measure and print a line of JSON per data set, and one for all together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["kvasir_polyp", "camvid"])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loader", action="store_true", help="also against an epoch of a plain loader")
    parser.add_argument("--enlarge", type=int, default=1, help="times the sides that the files have")
    options = parser.parse_args()
    print(json.dumps({"cores": usable_cores()}))
    rows = 0
    total: dict[str, float] = defaultdict(float)
    for name in options.sets:
        with tempfile.TemporaryDirectory() as path:
            place = Path(path)
            os.environ["SEMSEG_AUTOML_CACHE"] = path
            splits = [read_table(options.data / name / f"{split}.csv") for split in options.splits]
            if options.enlarge > 1:
                splits = [enlarged(split, options.enlarge, place / str(number)) for number, split in enumerate(splits)]
            seconds = measure(splits, place, options.rounds, loader=options.loader)
        own = sum(map(len, splits))
        report(name, own, seconds)
        rows += own
        for side, taken in seconds.items():
            total[side] += taken
    report("all", rows, total)


if __name__ == "__main__":
    main()
