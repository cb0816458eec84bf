"""What reading costs: ``python -m benchmarks.loader --data DATA [--train] [--enlarge TIMES]``.

DATA holds folders with a ``train.csv``. Our training loader, with horizontal flips as the only augmentation, takes
turns with the loader one writes first: Pillow opens, converts and resizes, torchvision flips and makes tensors, in
PyTorch's `DataLoader` with as many processes. The check of all rows takes turns with opening every file in Pillow and
counting the mask's values. As in a fit, the check comes before the first epoch, and what it decoded is kept for it: the
check has a column of its own, and one together with the first epoch. Later epochs find decoded images in memory. What
passes until the first batch is there, processes started and what the check kept moved, is "start"; "first" has it too.

The files can be enlarged to the sides that cameras give; benchmark sets are often made smaller.

An epoch has a thousand rows at least: a folder of fewer is there several times under other names, for both sides.

Medians over rounds whose order alternates. Other programs on the machine slow both sides, so the ratios are what
counts; threads, which ours uses where there are no loader processes, only help where a core is free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch.utils.data import DataLoader

from benchmarks.check_speed import enlarged
from benchmarks.plain_reading import BATCH, SIZE, exhaust, plain_check, plain_loader
from semseg_automl import SemanticSegmentor
from semseg_automl.data.cache import ImageCache
from semseg_automl.data.checks import check_rows
from semseg_automl.data.dataset import MaskDataModule, MaskDataset
from semseg_automl.data.images import ImageSource
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.hardware import usable_cores
from semseg_automl.task import SegmentationTask, infer_task

CACHE_BYTES = 2**30

Result = TypeVar("Result")
Seconds = tuple[float, float]
"""Of the clock, and of this process's processors, all threads together."""
Speed = tuple[float, float]
"""Images per second of the clock, and processor milliseconds per image, those of other processes left out."""


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


def at_least(rows: int, table: MaskTable, folder: Path) -> MaskTable:
    """Return a table of so many rows: links to its files, each of them as often as need be."""
    images: list[ImageSource] = []
    masks: list[ImageSource] = []
    for position in range(-(-rows // len(table)) * len(table)):
        row = position % len(table)
        for sources, found in ((table.images, images), (table.masks or (), masks)):
            source = Path(str(sources[row])).resolve()
            link = folder / f"{position}_{source.name}"
            link.symlink_to(source)
            found.append(str(link))
    return replace(table, images=tuple(images), masks=tuple(masks), index=pd.RangeIndex(len(images)))


def our_loader(table: MaskTable, task: SegmentationTask, workers: int, kept: DecodedFiles) -> DataLoader[Any]:
    """Return the training loader of a new cache, with what a check kept in it."""
    data = MaskDataset(table, task, SIZE, "flip", cache=ImageCache(len(table), CACHE_BYTES, shared=workers > 0))
    data.adopt(kept)
    kept.clear()
    return MaskDataModule(data, data, batch_size=BATCH, views=1, num_workers=workers, seed=0).train_dataloader()


def begun(make: Callable[[], DataLoader[Any]]) -> tuple[DataLoader[Any], Iterator[object]]:
    """Make a loader and take the first batch of its first epoch."""
    loader = make()
    batches = iter(loader)
    next(batches)
    return loader, batches


def measure_loader(table: MaskTable, task: SegmentationTask, workers: int, rounds: int) -> dict[str, Speed]:
    """Time the check, the first epoch after it, with making the loader and starting its processes, and the second."""
    kept = DecodedFiles(CACHE_BYTES)
    check: dict[str, Callable[[], object]] = {
        "ours": partial(check_rows, table, keep=kept),
        "plain": partial(plain_check, [table]),
    }
    make = {
        "ours": partial(our_loader, table, task, workers, kept),
        "plain": partial(plain_loader, [table], workers, drop_last=True),
    }
    seconds: dict[str, list[Seconds]] = defaultdict(list)
    for turn in range(rounds + 1):
        for side in make if turn % 2 else reversed(make):
            checked, _ = timed(check[side])
            start, (loader, batches) = timed(partial(begun, make[side]))
            rest, _ = timed(partial(exhaust, batches))
            later, _ = timed(partial(exhaust, loader))
            del loader, batches  # and its processes, beside which all that the next check writes to is copied first
            first = start[0] + rest[0], start[1] + rest[1]
            both = checked[0] + first[0], checked[1] + first[1]
            if turn:  # the one before fills the system's file cache
                spans = {"check": checked, "start": start, "first": first, "check + first": both, "later": later}
                for what, taken in spans.items():
                    seconds[f"{side}, {what}"].append(taken)
    return speeds(seconds, len(table) // BATCH * BATCH)


def measure_training(folder: Path, workers: int) -> float:
    """Train the built-in encoder from scratch and return the median seconds of an epoch after the first."""
    asked = {"env.num_workers": workers, "optim.max_epochs": 4, "env.micro_batch_size": BATCH, "env.batch_size": BATCH}
    with tempfile.TemporaryDirectory() as path:
        segmentor = SemanticSegmentor(path=path, hyperparameters=asked, verbosity=0)
        segmentor.fit(folder / "train.csv", folder / "val.csv")
    ends = segmentor.history_["seconds"].tolist()
    return float(statistics.median(after - before for before, after in pairwise(ends)))


def main() -> None:
    """Measure and print a line of JSON per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["kvasir_polyp", "camvid"])
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1000, help="of an epoch at least")
    parser.add_argument("--enlarge", type=int, default=1, help="times the sides that the files have")
    parser.add_argument("--train", action="store_true", help="also train with each number of processes")
    options = parser.parse_args()
    print(json.dumps({"cores": usable_cores(), "torch_threads": torch.get_num_threads()}))
    for name in options.sets:
        with tempfile.TemporaryDirectory() as place:
            measure_set(name, options, Path(place))


def measure_set(name: str, options: argparse.Namespace, place: Path) -> None:
    """Measure one data set; `place` is for links."""
    once = read_table(options.data / name / "train.csv")
    if options.enlarge > 1:
        once = enlarged(once, options.enlarge, place / "large")
    table = at_least(options.rows, once, place)
    checks = check_rows(table)
    task = infer_task([check.value_counts for check in checks], encodings=[check.encoding for check in checks])
    for workers in options.workers:
        report(name, f"loader, {workers} processes", measure_loader(table, task, workers, options.rounds))
    if options.train:
        for workers in options.workers:
            seconds = measure_training(options.data / name, workers)
            print(json.dumps({"set": name, "epoch_seconds": round(seconds, 2), "processes": workers}), flush=True)


def report(name: str, what: str, measured: Mapping[str, Speed]) -> None:
    """Print how fast each side is, and how many times the plain side ours is."""
    times = {}
    for side, (per_second, milliseconds) in measured.items():
        if side.startswith("ours"):
            plain = measured[side.replace("ours", "plain")]
            times[side] = {"clock": round(per_second / plain[0], 2), "processor": round(plain[1] / milliseconds, 2)}
    figures = {side: [round(speed[0]), round(speed[1], 2)] for side, speed in measured.items()}
    print(json.dumps({"set": name, "what": what, "per_second_and_ms": figures, "times_plain": times}), flush=True)


if __name__ == "__main__":
    main()
