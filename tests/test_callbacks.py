"""What happens around the training steps: learning rates over time, experts counted, and the epoch that is kept."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from semseg_automl.callbacks import (
    Clock,
    ExpertUsage,
    TrainingResult,
    WeightKeeper,
    learning_rate_factor,
)
from semseg_automl.peft.conv_lora import ConvLoraLinear
from semseg_automl.plan import Plan
from semseg_automl.soup import Weights

PLAN = cast(Plan, SimpleNamespace(lr=0.01, warmup=0.1, schedule="cosine", ema=0.0, soup=1, validation_metric="iou"))
Entry = dict[str, float]


def optimizer_of(*ratios: float) -> torch.optim.Optimizer:
    """Build an optimizer with one group per ratio, as `FineTuneModule` does."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": PLAN.lr * ratio, "lr_ratio": ratio} for ratio in ratios]
    return torch.optim.AdamW(groups, lr=PLAN.lr)


def trainer_of(**attributes: Any) -> Any:
    """Stand in for Lightning's trainer: what the callbacks read of it."""
    start = {"global_step": 0, "current_epoch": 0, "estimated_stepping_batches": 100, "should_stop": False}
    return SimpleNamespace(**{**start, "optimizers": [optimizer_of(1.0)], "callback_metrics": {}, **attributes})


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_factor__over_training__rises_then_falls_to_zero(schedule: str) -> None:
    factors = [learning_rate_factor(p / 100, warmup=0.1, schedule=schedule) for p in range(101)]
    assert factors[0] == 0
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0)
    assert learning_rate_factor(1.3, warmup=0.0, schedule=schedule) == pytest.approx(0)


def test_clock__groups_of_several_ratios__keep_them_at_every_step() -> None:
    optimizer = optimizer_of(16.0, 1.0, 0.5)
    trainer = trainer_of(optimizers=[optimizer])
    clock = Clock(PLAN, None)
    clock.on_train_start(trainer, cast(Any, None))
    base = []
    for step in range(0, 101, 10):
        trainer.global_step = step
        clock.on_train_batch_start(trainer, cast(Any, None), None, step)
        high, middle, low = (group["lr"] for group in optimizer.param_groups)
        assert (high, low) == pytest.approx((16 * middle, 0.5 * middle))
        base.append(middle)
    assert max(base) == pytest.approx(PLAN.lr, rel=1e-2)
    assert base[-1] == pytest.approx(0, abs=1e-6)


def test_clock__time_is_up__stops_before_the_steps_are_done() -> None:
    trainer = trainer_of()
    clock = Clock(PLAN, time.monotonic() + 0.01)
    clock.on_train_start(trainer, cast(Any, None))
    time.sleep(0.02)
    clock.on_train_batch_end(trainer, cast(Any, None), None, None, 0)
    assert trainer.should_stop
    assert clock.out_of_time


class Router(nn.Module):
    """Two experts; a sample goes to the first where its mean is positive, to the other where it is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ConvLoraLinear(nn.Linear(1, 1), rank=1, experts=2)
        with torch.no_grad():
            self.layer.lora_A.fill_(1.0)
            self.layer.w_gate.copy_(torch.tensor([[1.0, -1.0]]))

    def send(self, *signs: float) -> None:
        self.layer(torch.tensor(signs)[:, None, None, None].expand(-1, 3, 3, 1))


def validate(usage: ExpertUsage, model: Router, *batches: tuple[float, ...]) -> None:
    """Run one epoch of validation in Lightning's order of hooks and modes, a training step before it."""
    trainer, module = trainer_of(), cast(Any, None)
    model.train().send(1.0, 1.0, 1.0, 1.0)
    model.eval()
    with torch.inference_mode():
        usage.on_validation_epoch_start(trainer, module)
        for index, batch in enumerate(batches):
            model.send(*batch)
            usage.on_validation_batch_end(trainer, module, None, None, index)
        usage.on_validation_epoch_end(trainer, module)


def test_expert_usage__two_validations__each_counts_its_own_images_and_no_training() -> None:
    model = Router()
    usage = ExpertUsage(model)
    assert usage.latest == {}
    validate(usage, model, (1.0, -1.0, -1.0), (-1.0,))
    first = usage.latest
    assert first == {"layer": [1, 3]}
    validate(usage, model, (1.0, 1.0))
    assert usage.latest == {"layer": [2, 0]}
    assert first == {"layer": [1, 3]}, "what was kept of an epoch stays"


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 1), (False, 0)])
def test_weight_keeper__best_epoch__keeps_its_weights_and_its_usage(higher_is_better: bool, best: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    usage = ExpertUsage(model)
    result, saved = TrainingResult(), list[tuple[Weights, dict[str, list[int]]]]()
    keeper = WeightKeeper(
        model, PLAN, result, usage, lambda weights: saved.append((weights, result.expert_usage)), lambda _: None
    )
    module = cast(Any, SimpleNamespace(metric=SimpleNamespace(higher_is_better=higher_is_better)))
    trainer = trainer_of(optimizers=[optimizer_of(4.0, 1.0)])
    keeper.on_train_start(trainer, module)
    for epoch, score in enumerate((0.5, 0.7, 0.6)):
        model.weight.data.fill_(epoch)
        trainer.global_step, trainer.current_epoch = epoch + 1, epoch
        trainer.callback_metrics = {"iou": torch.tensor(score)}
        keeper.on_train_batch_end(trainer, module, None, None, 0)
        keeper.on_validation_start(trainer, module)
        usage.latest = {"layer": [epoch, 9]}
        keeper.on_validation_end(trainer, module)
    keeper.restore()
    assert result.best_epoch == best
    assert result.expert_usage == {"layer": [best, 9]}
    assert model.weight.item() == best
    assert saved[-1] == ({"weight": model.weight}, {"layer": [best, 9]}), "what is saved is of one epoch"
    assert [entry["lr"] for entry in result.history] == pytest.approx([PLAN.lr] * 3)
