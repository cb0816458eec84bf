"""What the machine decides: micro-batch, recomputed activations, cached features."""

from __future__ import annotations

from typing import Any

import pytest

from semseg_automl.capacity import Capacity, fit_to_machine, step_bytes
from semseg_automl.config import load_config
from semseg_automl.errors import UnsupportedCombination
from semseg_automl.hardware import Device, Hardware
from semseg_automl.models.facts import EncoderFacts, encoder_facts

GIB = 2**30
SAM = encoder_facts("sam_vit_b")
PYRAMID = EncoderFacts("timm/resnet18", "timm", {}, 16, 512, 0, "official", "a convolutional one")


def decide(
    settings: dict[str, Any] | None = None,
    *,
    memory: int = 24 * GIB,
    device: Device = "cpu",
    free_ram: int | None = None,
    loading_seconds: float | None = None,
    encoder: EncoderFacts = SAM,
    frozen_prefix: bool = False,
    rows: int = 100,
    side: int = 1024,
) -> tuple[Capacity, dict[str, str]]:
    reasons: dict[str, str] = {}
    capacity = fit_to_machine(
        load_config("fast", settings),
        Hardware(device, "CPU", memory, 2 if device == "cpu" else 16, bf16=False, free_ram=free_ram),
        encoder,
        batch_size=4,
        input_size=(side, side),
        rows=rows,
        frozen_prefix=frozen_prefix,
        grids_read=encoder.taps,
        image_bytes=rows * 4 * side * side,
        loading_seconds=loading_seconds,
        reasons=reasons,
    )
    return capacity, reasons


def test_fit_to_machine__less_memory__shrinks_the_micro_batch_then_recomputes() -> None:
    sizes = [decide(memory=n * GIB)[0] for n in (64, 16, 8, 2)]
    assert [c.micro_batch_size for c in sizes] == sorted((c.micro_batch_size for c in sizes), reverse=True)
    assert sizes[0].micro_batch_size == 4
    assert not sizes[0].checkpointing
    assert sizes[-1].checkpointing


def test_step_bytes__recomputing__is_much_less() -> None:
    whole, recomputed = (step_bytes(SAM, (1024, 1024), checkpointing=c) for c in (False, True))
    assert recomputed < 0.6 * whole


def test_fit_to_machine__recomputing_without_blocks__is_refused() -> None:
    assert not decide(encoder=PYRAMID, memory=1)[0].checkpointing
    with pytest.raises(UnsupportedCombination, match="resnet18"):
        decide({"env.checkpointing": True}, encoder=PYRAMID)


def test_fit_to_machine__frozen_blocks_first__are_cached_where_they_fit() -> None:
    assert decide(frozen_prefix=True, rows=50)[0].feature_cache == "memory"
    assert decide(frozen_prefix=True, rows=300)[0].feature_cache == "disk"
    nowhere, reasons = decide(frozen_prefix=True, rows=10**6)
    assert nowhere.feature_cache == "off"
    assert "more than fits" in reasons["feature_cache"]
    assert {decide(frozen_prefix=True, rows=n)[0].cached_views for n in (50, 300, 10**6)} == {4}


def test_fit_to_machine__nothing_frozen_first__caches_nothing_and_refuses_to() -> None:
    capacity, _ = decide()
    assert (capacity.feature_cache, capacity.cached_views) == ("off", 0)
    with pytest.raises(UnsupportedCombination, match="last_blocks"):
        decide({"env.feature_cache": "disk"})


def test_fit_to_machine__cache_as_asked__is_kept() -> None:
    asked = decide({"env.feature_cache": "disk", "data.cached_views": 2}, frozen_prefix=True)[0]
    assert (asked.feature_cache, asked.cached_views) == ("disk", 2)
    off = decide({"env.feature_cache": "off"}, frozen_prefix=True)[0]
    assert (off.feature_cache, off.cached_views) == ("off", 0)


def test_fit_to_machine__decoded_images_that_fit__get_what_they_take() -> None:
    capacity, reasons = decide(rows=10, side=512)
    assert capacity.image_cache == 10 * 4 * 512 * 512
    assert reasons["image_cache"] == "bytes; decoded images take 0.01 GB, 26 GB are free"


def test_fit_to_machine__more_decoded_images_than_fit__get_a_quarter_of_what_is_free() -> None:
    capacity, reasons = decide(rows=2000, free_ram=4 * GIB)
    assert capacity.image_cache == GIB
    assert "4.3 GB are free, so 87% are decoded every time" in reasons["image_cache"]
    assert decide(rows=2000, memory=2 * GIB, free_ram=4 * GIB)[0].image_cache == GIB // 2


@pytest.mark.parametrize(("asked", "got"), [("off", 0), (0, 0), (12345, 12345), ("2GB", 2 * 10**9)])
def test_fit_to_machine__image_cache_asked_for__is_kept_and_marked(asked: Any, got: int) -> None:
    capacity, reasons = decide({"env.image_cache": asked}, free_ram=GIB)
    assert (capacity.image_cache, reasons["image_cache"]) == (got, "as asked")


@pytest.mark.parametrize(("seconds", "processes"), [(None, 8), (0.0001, 1), (0.008, 2), (0.02, 4), (1.0, 8)])
def test_fit_to_machine__accelerator__gets_as_many_processes_as_loading_takes(
    seconds: float | None, processes: int
) -> None:
    capacity, reasons = decide(device="cuda", loading_seconds=seconds)
    assert capacity.num_workers == processes
    assert reasons["num_workers"] == "half the cores" or f"{1000 * (seconds or 0):.1f} ms" in reasons["num_workers"]
    assert decide({"env.num_workers": 3}, device="cuda", loading_seconds=seconds)[0].num_workers == 3


def test_fit_to_machine__processor_that_trains__loads_itself() -> None:
    assert decide(loading_seconds=1.0)[0].num_workers == 0
