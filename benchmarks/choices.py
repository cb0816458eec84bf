"""What a plan chooses from the data, one choice at a time: ``python -m benchmarks.choices CELL ... --data DATA``.

A cell is ``set/choice/steps/seed``, as ``camvid/ce_dice/80/0``: the folder DATA/set with its train.csv, val.csv and
test.csv, fitted with one of `CHOICES` over the preset "fast" and ``--checkpoint`` in exactly so many steps of
``--batch`` images, without cached features, and scored on test.csv. Equal steps compare losses and sampling; for input
sizes, which cost more per step, give steps in proportion to the processor seconds per step that earlier rows tell.
Each cell is a row of ``--out``, written when it is done, and skipped where it is there already.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from semseg_automl import SemanticSegmentor
from semseg_automl.losses import CRITERIA, Criterion, Seeds
from semseg_automl.models.mask_decoder import SegmentationOutput
from semseg_automl.task import IGNORE_INDEX

CHOICES: dict[str, dict[str, Any]] = {
    "usual": {},
    **{
        loss: {"optim.loss": loss}
        for loss in ("structure", "structure_weighted", "balanced_bce", "ce_dice", "balanced_ce_dice")
    },
    **{loss: {"optim.loss": loss} for loss in ("batch_dice", "lovasz", "focal_dice")},  # of CANDIDATES
    **{sampling: {"data.sampling": sampling} for sampling in ("uniform", "repeat_factor")},
    **{f"{side[0]}x{side[1]}": {"model.input_size": side} for side in ((320, 480), (320, 432), (384, 384))},
}
"""Name to hyperparameters over the preset "fast"."""

FIELDS = ("cell", "batch", "seconds", "processor_seconds", "input_size", "best_validation", "metric", "value")


def _resized(output: SegmentationOutput, mask: Tensor) -> Tensor:
    return F.interpolate(output.mask_logits.float(), size=mask.shape[-2:], mode="bilinear", align_corners=False)


def batch_dice(output: SegmentationOutput, mask: Tensor, _: Seeds) -> Tensor:
    """Return `losses.ce_dice` as it was: normalised over all images of the batch together."""
    logits = _resized(output, mask)
    valid = mask != IGNORE_INDEX
    known = torch.where(valid, mask, 0)
    cross_entropy = (F.cross_entropy(logits, known, reduction="none") * valid).sum() / valid.sum().clamp(min=1)
    target = F.one_hot(known, logits.shape[1]).permute(0, 3, 1, 2).float() * valid[:, None]
    probability = logits.softmax(dim=1) * valid[:, None]
    dims = (0, 2, 3)
    dice = 1 - (2 * (probability * target).sum(dims) + 1) / ((probability + target).sum(dims) + 1)
    present = target.sum(dims) > 0
    return cross_entropy + (dice * present).sum() / present.sum().clamp(min=1)


def lovasz(output: SegmentationOutput, mask: Tensor, _: Seeds) -> Tensor:
    """Return cross entropy plus Lovasz-softmax over the classes of each image (Berman et al., 2018, equation 9)."""
    logits = _resized(output, mask)
    losses = []
    for image, truth in zip(logits, mask, strict=True):
        known = truth != IGNORE_INDEX
        if not known.any():
            losses.append(image[:, :0].sum())
            continue
        scores, labels = image[:, known], truth[known]
        probability = scores.softmax(0)
        present = torch.unique(labels)
        target = (labels[None] == present[:, None]).float()
        errors, order = (target - probability[present]).abs().sort(dim=1, descending=True)
        target = target.gather(1, order)
        total = target.sum(1, keepdim=True)
        jaccard = 1 - (total - target.cumsum(1)) / (total + (1 - target).cumsum(1))
        gradient = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
        losses.append(F.cross_entropy(scores.t(), labels) + (errors * gradient).sum(1).mean())
    return torch.stack(losses).mean()


def focal_dice(output: SegmentationOutput, mask: Tensor, _: Seeds) -> Tensor:
    """Return 20 parts of focal loss and one of Dice, as SAM was trained (Kirillov et al., 2023, appendix A)."""
    logits = _resized(output, mask)[:, 0]
    valid = (mask != IGNORE_INDEX).float()
    target = (mask == 1).float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    wrong = target * (1 - probability) + (1 - target) * probability
    weight = 0.25 * target + 0.75 * (1 - target)
    focal = (weight * wrong**2 * entropy * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    overlap = (probability * target * valid).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (((probability + target) * valid).sum((1, 2)) + 1)
    return (20 * focal + dice).mean()


CANDIDATES = {
    "batch_dice": Criterion("class_tokens", batch_dice),
    "lovasz": Criterion("class_tokens", lovasz),
    "focal_dice": Criterion("binary", focal_dice),
}
"""Losses that are compared with those of the package."""


def run_cell(cell: str, options: argparse.Namespace) -> list[list[Any]]:
    """Fit and score one cell; return its rows."""
    name, choice, steps, seed = cell.split("/")
    folder: Path = options.data / name
    settings = {
        "model.checkpoint": str(options.checkpoint),
        "env.batch_size": options.batch,
        "env.micro_batch_size": options.batch,
        "env.feature_cache": "off",
        "optim.max_epochs": int(steps),
        **CHOICES[choice],
    }
    start, before = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as bundle:
        segmentor = SemanticSegmentor(path=bundle, verbosity=0)
        segmentor.fit(
            folder / "train.csv",
            folder / "val.csv",
            hyperparameters=settings,
            seed=int(seed),
            max_steps=int(steps),
            val_check_interval=int(steps),
            check_val_every_n_epoch=None,
            logger=False,
            enable_progress_bar=False,
        )
        seconds, processor = time.monotonic() - start, time.process_time() - before
        figures = segmentor.evaluate(folder / "test.csv")
    size = "x".join(str(side) for side in segmentor.plan_.input_size)
    best = segmentor.fit_summary()["best_score"]
    told = [cell, options.batch, round(seconds, 1), round(processor, 1), size, round(best, 4)]
    return [[*told, metric, round(float(value), 4)] for metric, value in figures.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", help="set/choice/steps/seed")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/choices.csv"))
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args(arguments)
    CRITERIA.update(CANDIDATES)
    for cell in options.cells:
        fresh = not options.out.exists()
        if not fresh:
            with options.out.open(newline="") as file:
                if any(row["cell"] == cell and int(row["batch"]) == options.batch for row in csv.DictReader(file)):
                    print(f"{cell}: done before", flush=True)
                    continue
        rows = run_cell(cell, options)
        with options.out.open("a", newline="") as file:
            if fresh:
                csv.writer(file).writerow(FIELDS)
            csv.writer(file).writerows(rows)
        print(f"{cell}: {os.times().user:.0f} s of processor so far", flush=True)


if __name__ == "__main__":
    main()
