"""Counting tensors: what is made counts until it is freed, what was there before does not, and a limit is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from semseg_automl import meters
from semseg_automl.meters import TensorMeter, forget_peak, peak_bytes, resident_bytes

CPU = torch.device("cpu")


def test_tensor_meter__freed_tensors__leave_the_count() -> None:
    with TensorMeter() as meter:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
    assert meter.live == 8000
    assert meter.peak == 8000
    del b, c
    assert meter.live == 0


def test_tensor_meter__views_and_changes_in_place__count_once() -> None:
    with TensorMeter() as meter:
        a = torch.zeros(10, 100)
        rows = a.view(100, 10)[3:]
        a.add_(1)
        a.t()
    assert meter.peak == 4000
    assert len(rows) == 97


def test_tensor_meter__known_tensors__do_not_count() -> None:
    weight = torch.ones(500, 500)
    with TensorMeter(known=[weight]) as meter:
        weight.t()
        weight.mul_(2)
    assert meter.peak == 0
    with TensorMeter() as meter:
        weight.t()
    assert meter.peak == weight.nbytes


def test_tensor_meter__backward_pass__counts_kept_activations_and_gradients() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(6)))
    parameters = list(layers.parameters())
    x = torch.ones(1000, 64)
    with TensorMeter(known=[x, *parameters]) as whole:
        layers(x).sum().backward()
    gradients = sum(p.nbytes for p in parameters)
    assert whole.live == gradients
    assert whole.peak >= 6 * x.nbytes
    with torch.no_grad(), TensorMeter(known=[x, *parameters]) as forward:
        layers(x)
    assert forward.peak < 0.5 * whole.peak


def test_tensor_meter__limit__raises_at_the_first_byte_above() -> None:
    def work() -> torch.Tensor:
        return torch.zeros(1000) + torch.ones(1000)

    with TensorMeter(limit=12_000) as meter:
        work()
    assert meter.peak == 12_000
    with pytest.raises(torch.OutOfMemoryError, match="GiB of tensors are more than"), TensorMeter(limit=11_999):
        work()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_peak_bytes__memory_taken_and_given_back__is_remembered_until_forgotten() -> None:
    if not forget_peak(CPU):
        pytest.skip("this system does not let a process forget its peak")
    before = resident_bytes()
    assert before is not None
    block = torch.ones(16 * 2**20)  # 64 MiB
    del block
    peak = peak_bytes(CPU)
    assert peak is not None
    assert peak - before > 60 * 2**20
    assert forget_peak(CPU)
    now = peak_bytes(CPU)
    assert now is not None
    assert now < peak - 30 * 2**20


def test_resident_bytes__system_that_does_not_tell__is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_STATUS", tmp_path / "absent")
    monkeypatch.setattr(meters, "_CLEAR", tmp_path / "absent")
    assert resident_bytes() is None
    assert peak_bytes(CPU) is None
    assert not forget_peak(CPU)
    assert not forget_peak(torch.device("mps"))
