"""What checking takes: ``python -m benchmarks.check_speed --data DATA [--enlarge TIMES]``.

DATA holds folders with a ``train.csv``, ``val.csv`` and ``test.csv``. `check_data` of all splits, without its notes on
files and with its rules, takes turns with opening every file in Pillow and counting the mask's values, one after
another, on which nothing else is done.

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
from typing import TypeVar

import numpy as np
import pandas as pd
from PIL import Image

from semseg_automl import check_data
from semseg_automl.data.images import ImageSource
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.hardware import usable_cores

SPLITS = ("train", "val", "test")

Result = TypeVar("Result")
Seconds = tuple[float, float]
"""Of the clock, and of this process's processors, all threads together."""
Speed = tuple[float, float]
"""Images per second of the clock, and processor milliseconds per image, those of other processes left out."""


def plain_check(tables: Sequence[MaskTable]) -> None:
    """Open every file and look at sizes and values, one after another."""
    paths = [pair for table in tables for pair in zip(table.images, table.masks or (), strict=True)]
    for image_path, mask_path in paths:
        image, mask = np.asarray(Image.open(str(image_path)).convert("RGB")), np.asarray(Image.open(str(mask_path)))
        if image.shape[:2] != mask.shape[:2]:
            raise ValueError(f"{mask_path}: {mask.shape} beside {image.shape}")
        np.unique(mask, return_counts=True)


def timed(work: Callable[[], Result]) -> tuple[Seconds, Result]:
    """Return the seconds that `work` takes, and what it returns."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return (time.perf_counter() - wall, time.process_time() - processor), result


def speeds(seconds: Mapping[str, Sequence[Seconds]], images: int) -> dict[str, Speed]:
    """Return images per second of the clock, and processor milliseconds per image, by the medians of all rounds."""
    found = {}
    for name, rounds in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*rounds, strict=True))
        found[name] = images / wall, 1000 * processor / images
    return found


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


def measure_check(tables: Sequence[MaskTable], folder: Path, rounds: int) -> dict[str, Speed]:
    """Time `check_data` of all splits."""
    frames = [pd.DataFrame({"image": table.images, "label": table.masks}) for table in tables]
    sides: dict[str, Callable[[], object]] = {
        "ours, check_data": partial(our_check, frames, folder),
        "plain, check_data": partial(plain_check, tables),
    }
    seconds: dict[str, list[Seconds]] = defaultdict(list)
    for turn in range(rounds + 1):
        for side in sides if turn % 2 else reversed(sides):
            taken, _ = timed(sides[side])
            if turn:
                seconds[side].append(taken)
    return speeds(seconds, sum(map(len, tables)))


def report(name: str, what: str, measured: Mapping[str, Speed]) -> None:
    """Print how fast each side is, and how many times the plain side ours is."""
    times = {}
    for side, (per_second, milliseconds) in measured.items():
        if side.startswith("ours"):
            plain = measured[side.replace("ours", "plain")]
            times[side] = {"clock": round(per_second / plain[0], 2), "processor": round(plain[1] / milliseconds, 2)}
    figures = {side: [round(speed[0]), round(speed[1], 2)] for side, speed in measured.items()}
    print(json.dumps({"set": name, "what": what, "per_second_and_ms": figures, "times_plain": times}), flush=True)


def main() -> None:
    """Measure and print a line of JSON per data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["kvasir_polyp", "camvid"])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--enlarge", type=int, default=1, help="times the sides that the files have")
    options = parser.parse_args()
    print(json.dumps({"cores": usable_cores()}))
    rows = 0
    seconds: dict[str, float] = defaultdict(float)
    for name in options.sets:
        with tempfile.TemporaryDirectory() as path:
            place = Path(path)
            os.environ["SEMSEG_AUTOML_CACHE"] = path
            splits = [read_table(options.data / name / f"{split}.csv") for split in options.splits]
            if options.enlarge > 1:
                splits = [enlarged(split, options.enlarge, place / str(number)) for number, split in enumerate(splits)]
            own = sum(map(len, splits))
            measured = measure_check(splits, place, options.rounds)
            report(name, f"check_data, {own} rows", measured)
            rows += own
            for side, (per_second, _) in measured.items():
                seconds[side] += own / per_second
    times = seconds["plain, check_data"] / seconds["ours, check_data"]
    print(json.dumps({"set": "all", "what": f"check_data, {rows} rows", "times_plain": round(times, 2)}))


if __name__ == "__main__":
    main()
