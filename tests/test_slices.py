"""A fit in slices: the same training as in one go, whatever the moments at which it stops."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.fitting import Part, fit_bundle
from semseg_automl.resume import FOLDER, state_files
from semseg_automl.third_party import lightning

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.micro_batch_size": 2,
    "env.precision": "32-true",
    "data.augmentation": "medium",
    "optim.lr": 0.01,
    "optim.max_epochs": 2,
}
STEPS = 6  # three an epoch, of two batches each


class Weights(lightning.Callback):
    """Copies the weights after every optimizer step that is kept: a step done again replaces the one before."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Copy."""
        state = pl_module.model.state_dict()
        self.after[trainer.global_step] = {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[SemanticSegmentor, MaskTable, MaskTable]:
    """Plan a fit of two epochs, and read its tables."""
    folder = draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=12, val=2, test=2, size=(40, 40))
    segmentor = SemanticSegmentor(verbosity=0, presets="fast", hyperparameters=SETTINGS)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True)
    segmentor.plan_ = segmentor.plan_.model_copy(update={"views": 1})
    return segmentor, read_table(folder / "train.csv"), read_table(folder / "val.csv")


def carry_out(planned: tuple[SemanticSegmentor, MaskTable, MaskTable], path: Path, **options: Any) -> Any:
    """Fit, or carry out a part of it."""
    segmentor, table, validation = planned
    rest: dict[str, Any] = {"settings": {}, "say": lambda _: None, "progress_bar": False, **options}
    return fit_bundle(segmentor.plan_, segmentor.task_, table, validation, path, **rest)


@pytest.mark.parametrize("seconds", [(0.0,), (0.0, 3600.0), (0.3, 0.0)])
def test_slices__at_any_moments__train_the_same_weights_as_one_go(
    planned: tuple[SemanticSegmentor, MaskTable, MaskTable], tmp_path: Path, seconds: tuple[float, ...]
) -> None:
    whole, sliced = Weights(), Weights()
    carry_out(planned, tmp_path / "whole", trainer_options={"callbacks": [whole], "logger": False})
    parts = itertools.cycle(seconds)
    ends: list[str] = []
    while not ends or ends[-1] == "slice":
        part = Part(next(parts), None)
        done = carry_out(
            planned, tmp_path / "parts", resume=True, part=part,
            trainer_options={"callbacks": [sliced], "logger": False},
        )  # fmt: skip
        ends.append(done.record["stopped_by"])
        assert len(ends) <= 2 * STEPS
    assert len(ends) > 1
    assert ends[-1] == "max_epochs"
    assert max(whole.after) == max(sliced.after) == STEPS
    for step, weights in whole.after.items():
        assert all(torch.equal(tensor, sliced.after[step][name]) for name, tensor in weights.items()), step
    assert not (tmp_path / "parts" / FOLDER).exists()


def test_slice__ended__leaves_a_saved_segmentor_and_a_state(
    planned: tuple[SemanticSegmentor, MaskTable, MaskTable], tmp_path: Path
) -> None:
    bundle = carry_out(planned, tmp_path, part=Part(0.0, None), trainer_options={"logger": False})
    assert bundle.record["stopped_by"] == "slice"
    assert [entry["step"] for entry in bundle.record["history"]] == [1]
    assert len(state_files(tmp_path / FOLDER)) == 1
    assert SemanticSegmentor.load(tmp_path).fit_summary()["best_score"] == bundle.record["best_score"]


def test_part__with_a_deadline__keeps_it_whatever_the_parts_before_took(
    planned: tuple[SemanticSegmentor, MaskTable, MaskTable], tmp_path: Path
) -> None:
    segmentor, table, validation = planned
    endless = segmentor.plan_.model_copy(update={"max_epochs": 10_000, "patience": 10_000, "time_limit": 9.0})
    changed = SemanticSegmentor(verbosity=0)
    changed.task_, changed.plan_ = segmentor.task_, endless
    start = time.monotonic()
    options: dict[str, Any] = {"resume": True, "deadline": start + 9, "trainer_options": {"logger": False}}
    first = carry_out((changed, table, validation), tmp_path, part=Part(3.0, None), **options)
    last = carry_out((changed, table, validation), tmp_path, part=Part(None, None), **options)
    assert first.record["stopped_by"] == "slice"
    assert last.record["stopped_by"] == "time_limit"
    # Counted from the beginning of the first part, the last one trains as long as there is time, and not 3 s less.
    assert last.record["history"][-1]["seconds"] > 3.5
    assert time.monotonic() - start < 12
