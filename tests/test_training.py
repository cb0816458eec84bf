"""Training as a whole: what is optimised at which rate, averaged weights, when it stops, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from semseg_automl import draw_dataset
from semseg_automl.build import seeded_model
from semseg_automl.callbacks import TrainingResult
from semseg_automl.data.checks import check_rows
from semseg_automl.data.dataset import MaskDataModule
from semseg_automl.data.table import read_table
from semseg_automl.errors import ConfigError
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.models import encoder as encoder_module
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft import METHODS, PeftMethod, trainable_parameters
from semseg_automl.peft.usage import expert_layers
from semseg_automl.plan import Plan
from semseg_automl.soup import Weights
from semseg_automl.task import SegmentationTask
from semseg_automl.trainer_options import check_trainer_options
from semseg_automl.training import FineTuneModule, data_module, train

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "none",
}
CONV_LORA: dict[str, Any] = {"peft": "conv_lora", "peft_options": {"rank": 2, "experts": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set."""
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=8, val=3, test=1, size=(32, 32))


@dataclass
class Run:
    """A training of two epochs: what it was given, and what it left."""

    plan: Plan
    task: SegmentationTask
    model: SegmentationModel
    data: MaskDataModule
    result: TrainingResult = field(default_factory=TrainingResult)
    best: list[Weights] = field(default_factory=list)


def prepared(folder: Path, **updates: Any) -> Run:
    """Plan two epochs, with changes to the plan, and build the network."""
    segmentor = SemanticSegmentor(hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True, max_epochs=2)
    plan: Plan = segmentor.plan_.model_copy(update={"views": 1, "num_workers": 0, **updates})
    train_table, validation_table = (read_table(folder / f"{split}.csv") for split in ("train", "val"))
    assert len(check_rows(train_table)) == 8
    data = data_module(plan, segmentor.task_, train_table, validation_table)
    return Run(plan, segmentor.task_, seeded_model(plan), data)


def run(folder: Path, **updates: Any) -> Run:
    """Train two epochs with changes to the plan."""
    run = prepared(folder, **updates)
    train(
        run.model,
        run.plan,
        run.task,
        run.data,
        result=run.result,
        on_best=run.best.append,
        on_epoch=lambda _: None,
        on_notice=pytest.fail,
        progress_bar=False,
    )
    return run


def trained(folder: Path, **updates: Any) -> tuple[dict[str, torch.Tensor], TrainingResult, list[Weights]]:
    """Train two epochs with changes to the plan; return final weights, result and every best state."""
    done = run(folder, **updates)
    return {name: p.detach() for name, p in trainable_parameters(done.model).items()}, done.result, done.best


def learn_b_at(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every fine-tuning method ask for `ratio` times the learning rate for its matrices B."""

    def learning_rate_ratio(self: PeftMethod, parameter_name: str) -> float:
        return ratio if parameter_name.endswith("lora_B") else 1.0

    for method in METHODS.values():
        monkeypatch.setattr(method, "learning_rate_ratio", learning_rate_ratio)


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


@pytest.mark.parametrize(
    "updates",
    [
        {},
        {"checkpointing": True, "micro_batch_size": 2},
        {"feature_cache": "memory", "peft_options": {"rank": 2, "experts": 3, "last_blocks": 1}, "max_epochs": 3},
    ],
    ids=["plain", "checkpointing", "cached"],
)
def test_train__experts__are_counted_once_per_validation_image(folder: Path, updates: dict[str, Any]) -> None:
    done = run(folder, **{**CONV_LORA, **updates})
    layers = expert_layers(done.model)
    recount = {name: torch.zeros(3, dtype=torch.int64) for name in layers}
    done.data.setup("fit")
    with torch.no_grad():
        for batch in done.data.val_dataloader():
            done.model.eval()(batch.image)
            for name, layer in layers.items():
                recount[name] += torch.bincount(layer.chosen_expert, minlength=3)
    assert recount
    assert done.result.expert_usage == {name: counts.tolist() for name, counts in recount.items()}
    assert {sum(counts) % 3 for counts in done.result.expert_usage.values()} == {0}, "three images, or their windows"


def test_train__no_experts__leaves_no_usage(folder: Path) -> None:
    assert run(folder).result.expert_usage == {}


def test_configure_optimizers__ratio_of_a_method__makes_groups_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn_b_at(16.0, monkeypatch)
    given = prepared(folder, **CONV_LORA)
    optimizer = FineTuneModule(given.model, given.plan, given.task).configure_optimizers()
    names = {id(p): name for name, p in trainable_parameters(given.model).items()}
    grouped = [names.pop(id(p)) for group in optimizer.param_groups for p in group["params"]]
    assert names == {}, "every trainable parameter is in a group"
    assert sum(name.endswith("lora_B") for name in grouped) > 0
    for group in optimizer.param_groups:
        is_b = {any(p is q for n, q in given.model.named_parameters() if n.endswith("lora_B")) for p in group["params"]}
        assert is_b == {group["lr_ratio"] == 16.0}
        assert group["lr"] == pytest.approx(given.plan.lr * group["lr_ratio"])
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    assert sorted((g["lr_ratio"], g["weight_decay"] > 0) for g in optimizer.param_groups) == [
        (1.0, False),
        (1.0, True),
        (16.0, True),
    ]


def test_train__ratio_of_a_method__moves_its_parameters_farther_and_leaves_the_history(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size_of_b(done: Run) -> float:
        return sum(float(p.detach().norm()) for name, p in done.model.named_parameters() if name.endswith("lora_B"))

    learn_b_at(1.0, monkeypatch)
    plain = run(folder, **CONV_LORA, ema=0.0)
    learn_b_at(8.0, monkeypatch)
    faster = run(folder, **CONV_LORA, ema=0.0)
    assert size_of_b(faster) > 4 * size_of_b(plain) > 0  # lora_B starts at zero, and Adam steps by the rate
    rates = [[entry["lr"] for entry in done.result.history] for done in (plain, faster)]
    assert rates[0] == pytest.approx(rates[1])
    assert 0 < max(rates[0]) <= plain.plan.lr


def test_data_module__plan__decides_everything(folder: Path) -> None:
    segmentor = SemanticSegmentor(hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True, seed=5)
    changes = {"micro_batch_size": 2, "views": 3, "cached_views": 2, "augmentation": "strong", "num_workers": 1}
    plan: Plan = segmentor.plan_.model_copy(update=changes)
    train_table, validation_table = (read_table(folder / f"{split}.csv") for split in ("train", "val"))
    data = data_module(plan, segmentor.task_, train_table, validation_table)
    assert (data.batch_size, data.views, data.cached_views, data.num_workers, data.seed) == (2, 3, 2, 1, 5)
    assert (len(data.train), data.train.augmentation, data.train.seed) == (8, "strong", 5)
    assert (len(data.validation), data.validation.augmentation) == (3, "none")
    assert data.train.input_size == data.validation.input_size == (32, 32)


def test_check_trainer_options__unknown_name__names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'accelerator'"):
        check_trainer_options({"acelerator": "cpu"})
    assert check_trainer_options({"callbacks": None}) == {"callbacks": []}
