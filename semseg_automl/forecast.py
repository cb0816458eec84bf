"""How long a fit will take and how much memory, before it begins; and what it took, afterwards.

What a step takes is :mod:`semseg_automl.probing`'s; here steps become epochs, and epochs a time of day.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import torch

from semseg_automl.build import build_model
from semseg_automl.data.cache import ImageCache
from semseg_automl.data.crops import CropRule
from semseg_automl.data.dataset import MaskDataset
from semseg_automl.data.table import MaskTable
from semseg_automl.hardware import detect_hardware
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.plan import UNLIMITED, Plan
from semseg_automl.probing import STEPS_TRIED, Probe, probe, probing_seconds, rough_forward_seconds
from semseg_automl.rehearsal import Size, Surroundings
from semseg_automl.task import SegmentationTask

LOADED_ROWS = 8
"""Rows that loading is timed on, at most."""
LOADING_SHARE = 0.2
"""Of the time for probing, after which no further row is loaded."""
ROOM_FOR_PIXELS = 2**30
"""Bytes of the decoded rows that loading is timed on."""


class Loading(NamedTuple):
    """Seconds of loading a row and making a sample of it, with all cores."""

    first: float
    """The first time, when its files are decoded."""
    again: float
    """Later; the same where decoded images are not kept."""


@dataclass(frozen=True)
class Forecast:
    """What a fit will take.

    Attributes:
        peak_bytes: at most: of the accelerator, or of this process in RAM.
        memory_bytes: there are.
        epoch_seconds: of an epoch with its validation; None where nobody knows.
        steps: of the optimizer per epoch.
        epochs: at most; None where the time limit ends training and nobody knows when that is.
        seconds: of the fit; None where nobody knows.
        finish: when it will be over, in local time, if begun now; None where nobody knows.
        note: what was not measured, and why.
    """

    peak_bytes: int
    memory_bytes: int
    epoch_seconds: float | None
    steps: int
    epochs: int | None
    seconds: float | None
    finish: datetime | None
    note: str = ""

    def __str__(self) -> str:
        """Return one line."""
        parts = [f"peak memory {_gib(self.peak_bytes)} of {self.memory_bytes / 2**30:.3g}"]
        if self.epoch_seconds is not None:
            parts.append(f"{duration(self.epoch_seconds)} per epoch of {self.steps} steps")
        if self.epochs is not None:
            parts.append(f"{self.epochs} epoch{'' if self.epochs == 1 else 's'} at most")
        if self.seconds is not None and self.finish is not None:
            parts.append(f"done in about {duration(self.seconds)}, at {self.finish:%H:%M}")
        return f"predicted: {', '.join(parts)}" + (f" ({self.note})" if self.note else "")

    def plain(self) -> dict[str, Any]:
        """Return what can be compared with `taken`, as plain values."""
        return {"peak_bytes": self.peak_bytes, "epoch_seconds": self.epoch_seconds, "seconds": self.seconds}


def duration(seconds: float) -> str:
    """Write seconds as one would say them.

    >>> [duration(s) for s in (0.42, 34.4, 612, 9000)]
    ['0.4 s', '34 s', '10 min', '2.5 h']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2g} GiB"


def forecast(
    plan: Plan,
    found: Probe,
    loading: Loading,
    *,
    rows: int,
    validation_rows: int,
    memory_bytes: int,
    now: datetime,
) -> Forecast:
    """Add up what a fit will take.

    Args:
        plan: the decisions.
        found: what a step takes.
        loading: what a row takes.
        rows: of training.
        validation_rows: of validation.
        memory_bytes: there are.
        now: when it begins.
    """
    micro = min(plan.micro_batch_size, rows * plan.views)
    images = rows * plan.views // micro * micro
    steps = max(1, images // plan.batch_size)
    if found.image_seconds is None or found.validation_seconds is None:
        epochs = None if plan.max_epochs >= UNLIMITED else plan.max_epochs
        limit = plan.time_limit
        finish = None if limit is None else now + timedelta(seconds=limit)
        return Forecast(found.peak_bytes, memory_bytes, None, steps, epochs, limit, finish, found.note)
    if plan.num_workers:  # they load while the device computes
        training = max(found.image_seconds, loading.again / plan.num_workers)
        validating = max(found.validation_seconds, loading.again / plan.num_workers)
    else:
        training, validating = found.image_seconds + loading.again, found.validation_seconds + loading.again
    validating = max(validating - found.frozen_seconds, 0.1 * validating)
    epoch = images * training + validation_rows * validating
    once = (rows + validation_rows) * (loading.first - loading.again) / max(1, plan.num_workers)
    once += found.frozen_seconds * (rows * plan.cached_views + validation_rows)
    epochs, seconds = plan.max_epochs, once + plan.max_epochs * epoch
    if plan.time_limit is not None and seconds > plan.time_limit:
        epochs, seconds = max(1, int((plan.time_limit - once) / epoch)), plan.time_limit
    finish = now + timedelta(seconds=seconds)
    return Forecast(found.peak_bytes, memory_bytes, epoch, steps, epochs, seconds, finish, found.note)


def loading_cost(table: MaskTable, task: SegmentationTask, plan: Plan, seconds: float) -> Loading:
    """Time the loading of the first few rows, as training does it.

    Args:
        table: training rows.
        task: encodes the masks.
        plan: input size, tiles, augmentation; whether decoded images are kept.
        seconds: after which no further row is loaded.
    """
    table = table.take(range(min(len(table), LOADED_ROWS)))
    cache = ImageCache(len(table), ROOM_FOR_PIXELS, shared=False) if plan.image_cache else None
    crops = None if plan.tile is None else CropRule(plan.tile, plan.balanced_crops)
    data = MaskDataset(table, task, plan.input_size, plan.augmentation, plan.seed, crops, cache)
    start = time.perf_counter()
    data[0]
    one = time.perf_counter() - start
    loaded = range(1, max(2, min(len(table), int(seconds / max(one, 1e-6)))))
    if len(table) == 1:
        loaded = range(1)
    start = time.perf_counter()
    data.__getitems__(list(loaded))
    first = (time.perf_counter() - start) / len(loaded)
    if cache is None:
        return Loading(first, first)
    start = time.perf_counter()
    data.__getitems__(list(loaded))
    return Loading(first, (time.perf_counter() - start) / len(loaded))


def look_ahead(
    plan: Plan,
    task: SegmentationTask,
    table: MaskTable,
    validation: MaskTable,
    *,
    largest: Size,
    device: torch.device,
    model: SegmentationModel | None = None,
    may_change: bool = True,
) -> tuple[Plan, Forecast]:
    """Find the micro-batch that fits, and say what the fit will take.

    Args:
        plan: the decisions.
        task: what the masks hold.
        table: training rows.
        validation: validation rows.
        largest: height and width of the largest image.
        device: that trains.
        model: that will be trained; None for one of random weights, which reads no checkpoint.
        may_change: False for a plan that stands as it is.

    Returns:
        The plan, changed where need be, and the forecast.
    """
    hardware = detect_hardware()
    seconds = probing_seconds(plan.time_limit)
    loading = loading_cost(table, task, plan, LOADING_SHARE * seconds)
    around = Surroundings(device, hardware, largest, 0 if device.type == "cuda" else plan.image_cache, seconds)
    if model is None:
        model = _stand_in(plan, around)
    plan, found = probe(model, plan, task, around, may_change=may_change)
    counts = {"rows": len(table), "validation_rows": len(validation), "memory_bytes": hardware.memory}
    return plan, forecast(plan, found, loading, now=datetime.now(), **counts)


def _stand_in(plan: Plan, around: Surroundings) -> SegmentationModel:
    """Return a network of random weights or, where it would be too slow to be run, one without any."""
    with torch.device("meta"):
        empty = build_model(plan, pretrained=False)
    if rough_forward_seconds(empty, plan, around.device) * STEPS_TRIED > around.seconds:
        return empty
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        return build_model(plan, pretrained=False)


def compared(record: object) -> str:
    """Say what a fit took beside what was predicted; empty where nothing was, or it cannot be read.

    Args:
        record: ``predicted`` and ``actual``, each as `Forecast.plain`; out of a file, so perhaps something else.

    >>> compared({"predicted": {"epoch_seconds": 30.0}, "actual": {"peak_bytes": 5, "epoch_seconds": 41.0}})
    '41 s per epoch (30 s predicted)'
    """
    found = [record.get(part) if isinstance(record, Mapping) else None for part in ("actual", "predicted")]
    parts = []
    for name, unit, write in (
        ("peak_bytes", " of memory", _gib),
        ("epoch_seconds", " per epoch", duration),
        ("seconds", " in all", duration),
    ):
        took, predicted = (each.get(name) if isinstance(each, Mapping) else None for each in found)
        if isinstance(took, (int, float)) and isinstance(predicted, (int, float)):
            parts.append(f"{write(took)}{unit} ({write(predicted)} predicted)")
    return ", ".join(parts)


def taken(history: Sequence[Mapping[str, float]], peak_bytes: int | None) -> dict[str, Any]:
    """Return what a fit took, in the entries of `Forecast.plain`.

    Args:
        history: its validations, with the seconds at which each ended; of a fit in one go.
        peak_bytes: that it held at most; None where nobody knows.
    """
    ends = [entry["seconds"] for entry in history]
    each = sorted(after - before for before, after in zip([0.0, *ends], ends, strict=False))
    # The first epoch also decodes and warms up; the middle one is what an epoch takes.
    epoch = each[len(each) // 2] if each else None
    return {"peak_bytes": peak_bytes, "epoch_seconds": epoch, "seconds": ends[-1] if ends else None}
