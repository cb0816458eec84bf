"""Steps taken to see what they take: within simulated devices, counted without computing, and nothing left behind."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from semseg_automl.build import seeded_model
from semseg_automl.config import load_config
from semseg_automl.hardware import Hardware
from semseg_automl.models.facts import encoder_facts
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.probing import largest_that_fits
from semseg_automl.rehearsal import Surroundings, Trial, counted_bytes, undisturbed
from semseg_automl.task import SegmentationTask, infer_task

BINARY = infer_task([{0: 5, 255: 5}])
MACHINE = Hardware("cpu", "CPU", 2**36, 1, bf16=False)
SMALL: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.precision": "32-true",
    "env.batch_size": 8,
}


def plan_of(settings: dict[str, Any] | None = None, task: SegmentationTask = BINARY) -> Plan:
    config = load_config("fast", {**SMALL, **(settings or {})})
    return make_plan(config, task, DataStats(40, ((48, 64),) * 40), MACHINE, encoder_facts("tiny_vit"))


def around(largest: tuple[int, int] = (48, 64)) -> Surroundings:
    return Surroundings(torch.device("cpu"), MACHINE, largest, 0, 60.0)


def peak_within(trial: Trial, limit: int, images: int) -> int:
    return trial.peak(images, limit)[0]


def test_trial__simulated_devices__each_runs_what_was_chosen_and_not_the_next_larger() -> None:
    plan = plan_of()
    model = seeded_model(plan)
    with undisturbed(model):
        trial = Trial(model, plan, BINARY, around())
        trial.train(1)  # the gradients are there then
        whole, one = trial.peak(8)[0], trial.peak(1)[0]
        found = []
        for limit in (one, (one + whole) // 2, whole, 20 * whole):
            micro, _ = largest_that_fits(partial(peak_within, trial, limit), [8, 4, 2, 1], limit) or (0, 0)
            found.append(micro)
            assert trial.peak(micro, limit)[0] <= limit
            if micro < 8:
                with pytest.raises(torch.OutOfMemoryError):
                    trial.peak(2 * micro, limit)
    assert found[0] == 1
    assert found == sorted(found)
    assert found[1] in (2, 4)
    assert found[2:] == [8, 8]


def test_counted_bytes__same_step_on_real_tensors__agrees() -> None:
    plan = plan_of()
    model = seeded_model(plan)
    counted = counted_bytes(model, plan, BINARY, 2)
    with undisturbed(model):
        trial = Trial(model, plan, BINARY, around(largest=plan.input_size))
        trial.train(1)
        real = trial.peak(2)[0]
    assert counted == pytest.approx(real, rel=0.05)


def test_counted_bytes__recomputed_activations__are_less() -> None:
    plan = plan_of({"model.input_size": 256})
    model = seeded_model(plan)
    whole, recomputed = (
        counted_bytes(model, plan.model_copy(update={"checkpointing": each}), BINARY, 1) for each in (False, True)
    )
    assert recomputed < 0.9 * whole


def test_counted_bytes__loss_that_looks_at_values__cannot() -> None:
    task = infer_task([{0: 5, 1: 5, 2: 5}])
    plan = plan_of({"optim.loss": "set_criterion"}, task=task)
    with pytest.raises(NotImplementedError, match="set_criterion"):
        counted_bytes(seeded_model(plan), plan, task, 1)


def test_undisturbed__gradients_from_before__come_back() -> None:
    model = seeded_model(plan_of())
    parameter = next(p for p in model.parameters() if p.requires_grad)
    before = parameter.grad = torch.ones_like(parameter)
    with undisturbed(model):
        parameter.grad = torch.zeros_like(parameter)
    assert parameter.grad is before
