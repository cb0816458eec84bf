"""A step of the network in one piece or in several: the same loss and the same gradient, as the plan promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.build import seeded_model
from semseg_automl.data.dataset import Batch
from semseg_automl.data.images import read_mask, write_png
from semseg_automl.data.table import read_table
from semseg_automl.training import FineTuneModule, data_module

BATCH = 4
KINDS = {"structure": "binary", "balanced_ce_dice": "multiclass", "set_criterion": "multiclass"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Draw a binary set and one of classes, in whose masks a corner of the first rows is ignored."""
    found = {}
    for kind in ("binary", "multiclass"):
        place = tmp_path_factory.mktemp(kind) / "set"
        folder = draw_dataset(place, kind=kind, train=BATCH, val=2, test=1, size=(40, 48))
        for row, label in enumerate(pd.read_csv(folder / "train.csv")["label"][:2]):
            mask = np.array(read_mask(folder / label, name=label))
            mask[: 12 + 20 * row, :30] = 100
            write_png(folder / label, mask.astype(np.uint8))
        found[kind] = folder
    return found


def parts_of(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into pieces of so many images."""
    rows = [slice(at, at + size) for at in range(0, len(batch), size)]
    return [Batch(batch.image[each], batch.mask[each], batch.geometry[each], [], batch.index[each]) for each in rows]


def step_of(module: FineTuneModule, pieces: Sequence[Batch]) -> tuple[float, Tensor]:
    """Accumulate the loss and the gradient of the pieces, as Lightning does; the gradient is one long vector."""
    module.zero_grad()
    total = 0.0
    for number, piece in enumerate(pieces):
        loss = module.training_step(piece, number) / len(pieces)
        loss.backward()
        total += float(loss.detach().double())
    return total, torch.cat([weight.grad.flatten() for weight in module.parameters() if weight.grad is not None])


@pytest.mark.parametrize("loss", KINDS)
def test_training_step__any_micro_batch__has_the_same_loss_and_gradient(loss: str, folders: dict[str, Path]) -> None:
    folder = folders[KINDS[loss]]
    settings = {"model.input_size": 32, "model.decoder_dim": 32, "env.batch_size": BATCH, "optim.loss": loss}
    segmentor = SemanticSegmentor(ignore_label=100, verbosity=0, hyperparameters=settings)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True)
    plan, task = segmentor.plan_, segmentor.task_
    table = read_table(folder / "train.csv")
    (batch, *_) = data_module(plan, task, table, table).train_dataloader()
    assert len(batch) == BATCH
    assert (batch.mask == 255).any()
    module = FineTuneModule(seeded_model(plan).train(), plan, task)
    module.trainer = cast(Any, SimpleNamespace(world_size=1, global_step=3))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    whole, gradient = step_of(module, [batch])
    assert len(gradient) > 10_000
    for size in (2, 1):
        pieces, accumulated = step_of(module, parts_of(batch, size))
        assert pieces == pytest.approx(whole, rel=1e-6)
        assert float((accumulated - gradient).norm() / gradient.norm()) < 1e-5, "float32 rounds in other places"
