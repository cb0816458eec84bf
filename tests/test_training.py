"""What happens around the training steps: schedule, averaged weights, the clock, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from semseg_automl import draw_dataset
from semseg_automl.build import seeded_model
from semseg_automl.data.table import check_rows, read_table
from semseg_automl.errors import ConfigError
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.models import encoder as encoder_module
from semseg_automl.peft import trainable_parameters
from semseg_automl.plan import Plan
from semseg_automl.training import (
    TrainingResult,
    Weights,
    check_trainer_options,
    data_module,
    learning_rate_factor,
    train,
)

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set."""
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=8, val=3, test=1, size=(32, 32))


def trained(folder: Path, **updates: Any) -> tuple[dict[str, torch.Tensor], TrainingResult, list[Weights]]:
    """Train two epochs with changes to the plan; return final weights, result and every best state."""
    segmentor = SemanticSegmentor(hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True, max_epochs=2)
    plan: Plan = segmentor.plan_.model_copy(update={"views": 1, "num_workers": 0, **updates})
    model = seeded_model(plan)
    train_table, validation_table = (read_table(folder / f"{split}.csv") for split in ("train", "val"))
    assert len(check_rows(train_table)) == 8
    result = TrainingResult()
    best: list[Weights] = []
    train(
        model,
        plan,
        segmentor.task_,
        data_module(plan, segmentor.task_, train_table, validation_table),
        result=result,
        on_best=best.append,
        on_epoch=lambda _: None,
        on_notice=pytest.fail,
        progress_bar=False,
    )
    return {name: p.detach() for name, p in trainable_parameters(model).items()}, result, best


def test_train__best_weights__are_the_ones_left_in_the_model(folder: Path) -> None:
    final, result, best = trained(folder)
    scores = [entry["iou"] for entry in result.history]
    assert result.best_score == max(scores)
    assert all(torch.equal(final[name], best[-1][name]) for name in final)
    assert [entry["step"] for entry in result.history] == [2, 4]
    assert all(entry["train_loss"] > 0 for entry in result.history)


def test_train__micro_batches__give_the_same_weights_as_the_whole_batch(folder: Path) -> None:
    # The criterion averages over a batch, so accumulated halves agree to rounding for a loss that averages per image.
    whole, _, _ = trained(folder, loss="structure", ema=0.0)
    halves, _, _ = trained(folder, loss="structure", ema=0.0, micro_batch_size=2)
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name], rtol=1e-3, atol=1e-4)


def test_train__averaged_weights__differ_from_the_optimised_ones(folder: Path) -> None:
    plain, _, _ = trained(folder, ema=0.0)
    averaged, _, _ = trained(folder, ema=0.98)
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)


def test_train__no_improvement__stops_by_patience(folder: Path) -> None:
    _, result, _ = trained(folder, lr=1e-12, ema=0.0, max_epochs=9, patience=1)
    assert result.stopped_by == "patience"
    assert len(result.history) == 2


def test_train__activations_recomputed__gives_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _, _ = trained(folder)
    recomputed_blocks: list[Any] = []

    def noting_checkpoint(block: Any, tokens: torch.Tensor, *, use_reentrant: bool) -> Any:
        recomputed_blocks.append(block)
        return checkpoint(block, tokens, use_reentrant=use_reentrant)

    monkeypatch.setattr(encoder_module, "checkpoint", noting_checkpoint)
    recomputed, _, _ = trained(folder, checkpointing=True)
    assert recomputed_blocks
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_data_module__plan__decides_everything(folder: Path) -> None:
    segmentor = SemanticSegmentor(hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True, seed=5)
    changes = {"micro_batch_size": 2, "views": 3, "cached_views": 2, "augmentation": "strong", "num_workers": 1}
    plan: Plan = segmentor.plan_.model_copy(update=changes)
    tables = [read_table(folder / f"{split}.csv") for split in ("train", "val")]
    data = data_module(plan, segmentor.task_, *tables)
    assert (data.batch_size, data.views, data.cached_views, data.num_workers, data.seed) == (2, 3, 2, 1, 5)
    assert (len(data.train), data.train.augmentation, data.train.seed) == (8, "strong", 5)
    assert (len(data.validation), data.validation.augmentation) == (3, "none")
    assert data.train.input_size == data.validation.input_size == (32, 32)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_factor__over_training__rises_then_falls_to_zero(schedule: str) -> None:
    factors = [learning_rate_factor(p / 100, warmup=0.1, schedule=schedule) for p in range(101)]
    assert factors[0] == 0
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0)
    assert learning_rate_factor(1.3, warmup=0.0, schedule=schedule) == pytest.approx(0)


def test_check_trainer_options__unknown_name__names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'accelerator'"):
        check_trainer_options({"acelerator": "cpu"})
    assert check_trainer_options({"callbacks": None}) == {"callbacks": []}
