"""The micro-batch that fits: found by real steps that leave no trace, within every limit, on simulated devices too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semseg_automl import hardware as hardware_module
from semseg_automl import probing
from semseg_automl.build import build_model, seeded_model
from semseg_automl.config import load_config
from semseg_automl.hardware import Hardware, detect_hardware
from semseg_automl.models.facts import encoder_facts
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.probing import decide, largest_that_fits, probe, probing_seconds, with_head_room
from semseg_automl.rehearsal import MEMORY_SHARE, Surroundings, Trial, counted_bytes
from semseg_automl.task import SegmentationTask, infer_task

GIB = 2**30
CPU = torch.device("cpu")
BINARY = infer_task([{0: 5, 255: 5}])
MACHINE = Hardware("cpu", "CPU", 64 * GIB, 1, bf16=False)
SMALL: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.precision": "32-true",
    "env.batch_size": 8,
}


def plan_of(
    settings: dict[str, Any] | None = None,
    *,
    task: SegmentationTask = BINARY,
    size: tuple[int, int] = (48, 64),
    encoder: str = "tiny_vit",
    preset: str = "fast",
) -> Plan:
    config = load_config(preset, {**(SMALL if encoder == "tiny_vit" else {}), **(settings or {})})
    return make_plan(config, task, DataStats(40, (size,) * 40), MACHINE, encoder_facts(encoder))


def around(memory: int = 64 * GIB, *, seconds: float = 60.0, largest: tuple[int, int] = (48, 64)) -> Surroundings:
    return Surroundings(CPU, replace(MACHINE, memory=memory), largest, 0, seconds)


def with_batch_norm(plan: Plan) -> SegmentationModel:
    model = seeded_model(plan)
    neck = model.encoder.neck
    assert isinstance(neck, nn.Module)
    model.encoder.neck = nn.Sequential(neck, nn.BatchNorm2d(32))
    return model


# choosing


@pytest.mark.parametrize(
    ("room", "expected"), [(80, (8, 80)), (79, (4, 40)), (45, (4, 40)), (39, (2, 20)), (10, (1, 10)), (9, None)]
)
def test_largest_that_fits__peak_grows_evenly__is_the_largest_divisor_within(room: int, expected: Any) -> None:
    tried: list[int] = []

    def peak(images: int) -> int:
        tried.append(images)
        return 10 * images

    assert largest_that_fits(peak, [8, 4, 2, 1], room) == expected
    assert len(tried) == len(set(tried))
    assert max(tried) <= max(2, (expected or (1, 0))[0])  # what the line excludes is not even tried


def test_largest_that_fits__choice_takes_more_than_the_line_says__is_a_smaller_one() -> None:
    assert largest_that_fits(lambda n: 10 * n if n < 8 else 1000, [8, 4, 2, 1], 100) == (4, 40)


def test_largest_that_fits__memory_runs_out_on_the_way__is_a_smaller_one() -> None:
    def peak(images: int) -> int:
        if images >= 4:
            raise torch.OutOfMemoryError("out of memory")
        return 10 * images

    assert largest_that_fits(peak, [8, 4, 2, 1], 10**6) == (2, 20)


def test_largest_that_fits__no_time_to_try__believes_the_line() -> None:
    tried: list[int] = []

    def peak(images: int) -> int:
        tried.append(images)
        return 5 + 10 * images

    assert largest_that_fits(peak, [8, 4, 2, 1], 90, has_time=lambda images: False) == (8, 85)
    assert tried == [1, 2]


def test_largest_that_fits__other_errors__are_not_swallowed() -> None:
    def peak(images: int) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits(peak, [2, 1], 10)


def test_decide__one_image_does_not_fit__recomputes_only_then() -> None:
    def peak(images: int, recompute: bool) -> int:
        return images * (3 if recompute else 10)

    plan = plan_of()
    with_room, _ = decide(plan, peak, 20, can_recompute=True)
    assert (with_room.micro_batch_size, with_room.checkpointing) == (2, False)
    tight, needed = decide(plan, peak, 7, can_recompute=True)
    assert (tight.micro_batch_size, tight.checkpointing, needed) == (2, True, 6)
    assert tight.reasons["checkpointing"] == "tried: not one image fits without"
    nothing, needed = decide(plan, peak, 2, can_recompute=True)
    assert (nothing.micro_batch_size, nothing.checkpointing, needed) == (1, True, None)
    blockless, needed = decide(plan, peak, 7, can_recompute=False)
    assert (blockless.micro_batch_size, blockless.checkpointing, needed) == (1, False, None)


def test_decide__as_asked__stays() -> None:
    asked = plan_of({"env.micro_batch_size": 4, "env.checkpointing": False})
    plan, needed = decide(asked, lambda images, recompute: 10 * images, 10, can_recompute=True)
    assert (plan, needed) == (asked, None)
    half = plan_of({"env.micro_batch_size": 4})
    plan, needed = decide(half, lambda n, recompute: n * (2 if recompute else 10), 10, can_recompute=True)
    assert (plan.micro_batch_size, plan.checkpointing, needed) == (4, True, 8)
    assert plan.reasons["micro_batch_size"] == "as asked"


# simulated devices


def test_decide__devices_of_4_8_24_80_gb__sam_at_1024_gets_what_each_holds() -> None:
    plan = plan_of({"env.batch_size": 16}, encoder="sam_vit_b", preset="medium_quality", size=(1024, 1024))
    assert plan.input_size == (1024, 1024)
    with torch.device("meta"):
        model = build_model(plan, pretrained=False)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    one = counted_bytes(model, plan, BINARY, 1)
    assert 1.2 * GIB < one < 2.5 * GIB  # 2.5 GiB were measured with the weights: capacity.BLOCK_WIDTHS

    def peak(images: int, recompute: bool) -> int:
        assert not recompute
        return with_head_room(images * one)

    rooms = [round(gb * 10**9 * MEMORY_SHARE) - weights for gb in (4, 8, 24, 80)]
    found = [decide(plan, peak, room, can_recompute=False)[0].micro_batch_size for room in rooms]
    assert found == [1, 2, 8, 16]
    for room, micro in zip(rooms, found, strict=True):
        assert peak(micro, False) <= room
        assert micro == 16 or peak(2 * micro, False) > room


# nothing is left behind


@pytest.mark.parametrize("seconds", [60.0, 15.0, 0.0])
def test_probe__any_way__leaves_the_network_and_the_random_state_as_they_were(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seconds == 15.0:
        monkeypatch.setattr(probing, "rough_forward_seconds", lambda *_: 1e3)  # counted, not run
    adapted = {"peft": "conv_lora", "peft_options": {"experts": 2}}  # notes its choices, and draws noise
    plan = plan_of({"env.batch_size": 2}).model_copy(update=adapted)
    model = with_batch_norm(plan)
    model.mask_decoder.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noted = [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    random = torch.get_rng_state()
    _, found = probe(model, plan, BINARY, around(seconds=seconds))
    assert found.how == {60.0: "measured", 15.0: "counted", 0.0: "by rule"}[seconds]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [{key: id(value) for key, value in vars(module).items()} for module in model.modules()] == noted
    assert not model.mask_decoder.training
    assert model.encoder.training


# probing


def test_probe__enough_memory__takes_the_whole_batch_and_times_it() -> None:
    plan, found = probe(seeded_model(plan_of()), plan_of(), BINARY, around())
    assert (plan.micro_batch_size, plan.checkpointing) == (8, False)
    assert plan.reasons["micro_batch_size"].startswith("tried: a step takes")
    assert found.note == ""
    assert found.image_seconds is not None
    assert found.validation_seconds is not None
    assert 0 < found.image_seconds < 5
    assert 0 < found.validation_seconds < 5
    assert found.frozen_seconds == 0


def test_probe__less_memory__takes_less_of_the_batch_and_stays_within(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surroundings, "held", lambda self: 0)
    monkeypatch.setattr(probing, "OVERHEAD_BYTES", 0)
    model, plan = seeded_model(plan_of()), plan_of()
    found = {}
    for memory in (2**40, 2**26, 2**24):
        changed, result = probe(model, plan, BINARY, around(memory))
        found[memory] = changed.micro_batch_size
        assert changed.micro_batch_size == 1 or result.peak_bytes <= memory
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found[2**40] == 8
    assert found[2**24] < 8


@pytest.mark.parametrize(("above", "expected"), [(4, 4), (2, 2), (1, 1)])
def test_probe__memory_runs_out__takes_a_smaller_micro_batch(
    above: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trial.train

    def hungry(self: Trial, images: int) -> float:
        if images > above:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return real(self, images)

    monkeypatch.setattr(Trial, "train", hungry)
    plan, found = probe(seeded_model(plan_of()), plan_of(), BINARY, around())
    assert (plan.micro_batch_size, plan.checkpointing) == (expected, False)
    assert found.how == "measured"


def test_probe__one_image_runs_out_of_memory__recomputes_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trial.train

    def hungry(self: Trial, images: int) -> float:
        if not self.model.encoder.checkpointing:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, images)

    monkeypatch.setattr(Trial, "train", hungry)
    model = seeded_model(plan_of())
    plan, _ = probe(model, plan_of(), BINARY, around())
    assert (plan.micro_batch_size, plan.checkpointing) == (8, True)
    assert not model.encoder.checkpointing


def test_probe__validation_runs_out_of_memory_at_once__does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(self: Trial, images: int) -> float:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Trial, "validate", hungry)
    plan, found = probe(seeded_model(plan_of()), plan_of(), BINARY, around(seconds=5.0))
    assert plan.micro_batch_size == plan_of().micro_batch_size
    assert found.how == "by rule"


def test_probe__plan_that_stands__is_measured_and_not_changed() -> None:
    given = plan_of({"env.micro_batch_size": 2})
    given = given.model_copy(update={"reasons": {}})
    plan, found = probe(seeded_model(given), given, BINARY, around(), may_change=False)
    assert plan == given
    assert found.image_seconds is not None


def test_probe__large_images_in_validation__count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surroundings, "held", lambda self: 0)
    asked = plan_of({"env.micro_batch_size": 1})
    model = seeded_model(asked)
    small, large = (probe(model, asked, BINARY, around(largest=size))[1] for size in ((48, 64), (2000, 3000)))
    assert large.peak_bytes - small.peak_bytes > 4 * 2000 * 3000


def test_probe__images_in_tiles__are_blended_as_in_validation() -> None:
    plan = plan_of({"data.tiling": "on", "data.tile_scale": 0.5, "env.batch_size": 2}, size=(300, 300))
    assert plan.tile is not None
    model = seeded_model(plan)
    few, many = (probe(model, plan, BINARY, around(largest=(side, side)))[1] for side in (60, 900))
    assert few.validation_seconds is not None
    assert many.validation_seconds is not None
    assert many.validation_seconds > 20 * few.validation_seconds  # 1 and 361 tiles


def test_probe__features_are_cached__times_the_frozen_part_apart() -> None:
    plan = plan_of({"model.pretrained": False, "env.batch_size": 2})
    model = seeded_model(plan)
    for parameter in model.encoder.blocks[:2].parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.encoder.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.2", "blocks.3", "neck")))
    cached = plan.model_copy(update={"feature_cache": "memory", "cached_views": 2})
    _, found = probe(model, cached, BINARY, around())
    assert found.frozen_seconds > 0


@pytest.mark.parametrize(("limit", "seconds"), [(None, 20.0), (60.0, 3.0), (3600.0, 20.0)])
def test_probing_seconds__time_limit__allows_a_twentieth(limit: float | None, seconds: float) -> None:
    assert probing_seconds(limit) == seconds


# room


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Hardware]:
    """Return the machine as it is under a memory limit of a control group."""

    def detect(limit: int) -> Hardware:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{limit // 4}\n")
        monkeypatch.setattr(hardware_module, "_CGROUP", tmp_path)
        monkeypatch.setattr(hardware_module, "_CGROUP_LIMITS", (str(tmp_path / "memory.max"),))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return detect_hardware()

    return detect


def test_room__limit_of_a_control_group__is_kept_to(
    limited: Callable[[int], Hardware], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Surroundings, "held", lambda self: 2**20)
    rooms = [replace(around(), hardware=limited(limit)).room() for limit in (2**26, 2**28)]
    for room, limit in zip(rooms, (2**26, 2**28), strict=True):
        assert room <= min(MEMORY_SHARE * limit - 2**20, limit - limit // 4)
        assert room > 0.5 * limit


def test_probe__tight_control_group__takes_less_than_the_batch(
    limited: Callable[[int], Hardware], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Surroundings, "held", lambda self: 0)
    monkeypatch.setattr(probing, "OVERHEAD_BYTES", 0)
    model = seeded_model(plan_of())
    tight, wide = (
        probe(model, plan_of(), BINARY, replace(around(), hardware=limited(limit)))[0] for limit in (2**25, 2**31)
    )
    assert tight.micro_batch_size < wide.micro_batch_size == 8


def test_room__what_caches_will_take__is_left_out() -> None:
    assert around().room() - replace(around(), cached_bytes=GIB).room() == pytest.approx(GIB, abs=2**27)
    assert replace(around(), cached_bytes=10**15).room() == 0
