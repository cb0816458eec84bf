"""Scores on real folders under a clock: ``python -m benchmarks.real_data --data FOLDER --out FILE.csv CELL ...``.

A cell is ``name/recipe/seed``, for example ``kvasir_polyp/pretrained/0``: the folder FOLDER/name with its train.csv,
val.csv and test.csv, fitted within ``--seconds`` by a recipe: ``pretrained`` (preset "fast" with ``--checkpoint``),
``scratch`` (preset "fast" alone) or ``unet`` (a ResNet-18 U-Net of segmentation_models_pytorch without weights, under
the same clock, batch, augmentation, loss, schedule and averaging of weights). Cells already in the file are skipped,
so an interrupted study goes on where it stopped; run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from semseg_automl import SemanticSegmentor
from semseg_automl.callbacks import TrainingResult
from semseg_automl.data.checks import check_rows
from semseg_automl.data.table import read_table
from semseg_automl.evaluation import score_table
from semseg_automl.inference import Predictor
from semseg_automl.metrics import DEFAULT_METRICS
from semseg_automl.models.mask_decoder import SegmentationOutput
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.models.tiny_vit import IMAGENET_MEAN, IMAGENET_STD
from semseg_automl.task import SegmentationTask
from semseg_automl.third_party import make_torchvision_importable
from semseg_automl.training import Course, data_module, train

FIELDS = ("cell", "seconds", "fit_seconds", "steps", "best_validation", "metric", "value")


class Unet(nn.Module):
    """A U-Net with a random ResNet-18, in the shape our trainer and predictor expect; sides divisible by 32."""

    mean: Tensor
    std: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        make_torchvision_importable()
        import segmentation_models_pytorch as smp

        self.net = smp.Unet("resnet18", encoder_weights=None, classes=classes)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Segment ``(B, 3, H, W)`` in 0..255."""
        return SegmentationOutput(self.net((images.float() - self.mean) / self.std), None)

    @property
    def encoder(self) -> nn.Module:
        """The network's encoder, in which the predictor looks for attention to choose a form of."""
        encoder: nn.Module = self.net.encoder
        return encoder

    def aux_loss(self) -> Tensor:
        """Have no auxiliary loss."""
        return torch.zeros(())


def fit_unet(folder: Path, seconds: float, seed: int) -> tuple[Predictor, SegmentationTask, TrainingResult]:
    """Fit the U-Net with everything but the network as our scratch recipe has it."""
    start = time.monotonic()
    planner = SemanticSegmentor(verbosity=0, presets="fast")
    planner.fit(folder / "train.csv", folder / "val.csv", time_limit=seconds, seed=seed, dry_run=True)
    task, plan = planner.task_, planner.plan_
    size = tuple(max(32, round(side / 32) * 32) for side in plan.input_size)
    plan = plan.model_copy(update={"input_size": size})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cast(SegmentationModel, Unet(task.num_scores))
    train_table, validation = read_table(folder / "train.csv"), read_table(folder / "val.csv")
    result = TrainingResult()
    train(
        model,
        plan,
        task,
        data_module(plan, task, train_table, validation),
        result=result,
        on_best=lambda _: None,
        on_epoch=lambda entry: print(entry, flush=True),
        on_notice=print,
        course=Course(deadline=start + seconds),
        progress_bar=False,
    )
    predictor = Predictor(model.eval(), plan.input_size, plan.micro_batch_size, torch.device("cpu"), tile=plan.tile)
    return predictor, task, result


def run_cell(
    cell: str, data: Path, out: Path, seconds: float, checkpoint: Path | None, settings: dict[str, Any]
) -> None:
    """Fit and score one cell and append its figures to the file, all at once."""
    name, recipe, seed = cell.split("/")
    folder = data / name
    start = time.monotonic()
    if recipe == "unet":
        predictor, task, result = fit_unet(folder, seconds, int(seed))
        test = read_table(folder / "test.csv")
        check_rows(test)
        figures = score_table(predictor, test, task, metrics=DEFAULT_METRICS[task.kind], threshold=0.5)
        fit_seconds, history, best = math.nan, result.history, result.best_score
    else:
        hyperparameters = dict(settings)
        if recipe == "pretrained":
            hyperparameters["model.checkpoint"] = str(checkpoint)
        segmentor = SemanticSegmentor(path=out.parent / "runs" / cell, hyperparameters=hyperparameters, verbosity=1)
        segmentor.fit(folder / "train.csv", folder / "val.csv", time_limit=seconds, seed=int(seed))
        fit_seconds = time.monotonic() - start
        figures = segmentor.evaluate(folder / "test.csv")
        summary = segmentor.fit_summary()
        history, best = summary["history"], summary["best_score"]
    steps = history[-1]["step"] if history else 0
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(FIELDS)
        for metric, value in figures.items():
            writer.writerow([cell, seconds, round(fit_seconds, 1), steps, round(best, 4), metric, round(value, 4)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", help="name/recipe/seed")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/real_data.csv"))
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--set", action="append", default=[], help="key=value over the preset")
    options = parser.parse_args(arguments)
    done = set()
    if options.out.exists():
        with options.out.open(newline="") as file:
            done = {(row["cell"], float(row["seconds"])) for row in csv.DictReader(file)}
    settings = dict(pair.split("=", 1) for pair in options.set)
    for cell in options.cells:
        if (cell, options.seconds) in done:
            print(f"{cell}: done before")
            continue
        run_cell(cell, options.data, options.out, options.seconds, options.checkpoint, settings)


if __name__ == "__main__":
    main()
