"""Two processes that each see half of the images agree with one that sees all, for every metric."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from semseg_automl.metrics import METRICS, SegmentationMetric, build_metrics
from semseg_automl.task import IGNORE_INDEX

CASES = [(name, kind) for name in METRICS for kind in sorted(METRICS[name](2).tasks)]
CLASSES = {"binary": 2, "multiclass": 3}
WORLD = 2


def built() -> dict[str, SegmentationMetric]:
    """Every metric under every kind of task it is for, empty."""
    return {f"{name} {kind}": build_metrics([name], kind=kind, num_classes=CLASSES[kind])[name] for name, kind in CASES}


def feed(metrics: dict[str, SegmentationMetric], rank: int, world: int) -> dict[str, Tensor]:
    """Give each metric every `world`-th of five images, from number `rank` on, and compute."""
    for index in range(rank, 5, world):
        generator = torch.Generator().manual_seed(index)
        size = (9 + index, 12)
        target, labels = (torch.randint(2, size, generator=generator) for _ in range(2))
        target[0] = IGNORE_INDEX
        scores = torch.rand(3, *size, generator=generator)
        for name, metric in metrics.items():
            metric.update(scores[:1] if name.endswith(" binary") else scores, labels, target)
    return {name: metric.compute() for name, metric in metrics.items()}


def work(rank: int, folder: str) -> None:
    """Compute in one of two processes, which compute() makes exchange their states, and save the values."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        metrics = built()
        values = feed(metrics, rank, WORLD)
        again = {name: metric.compute() for name, metric in metrics.items()}
        torch.save({"values": values, "again": again}, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_metrics__two_processes__equal_one(tmp_path: Path) -> None:
    spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    expected = feed(built(), 0, 1)
    assert len(expected) == len(CASES) >= len(METRICS)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for values in (found["values"], found["again"]):
            assert set(values) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(
                    values[name], value, rtol=1e-13, atol=0, equal_nan=True, msg=f"{name} of rank {rank}"
                )
