"""What the machine decides: micro-batch, recomputed activations, cached features."""

from __future__ import annotations

from typing import Any

import pytest

from semseg_automl.capacity import Capacity, fit_to_machine, step_bytes
from semseg_automl.config import load_config
from semseg_automl.errors import UnsupportedCombination
from semseg_automl.hardware import Hardware
from semseg_automl.models.facts import EncoderFacts, encoder_facts

GIB = 2**30
SAM = encoder_facts("sam_vit_b")
PYRAMID = EncoderFacts("timm/resnet18", "timm", {}, 16, 512, 0, "official", "a convolutional one")


def decide(
    settings: dict[str, Any] | None = None,
    *,
    memory: int = 24 * GIB,
    encoder: EncoderFacts = SAM,
    frozen_prefix: bool = False,
    rows: int = 100,
    side: int = 1024,
) -> tuple[Capacity, dict[str, str]]:
    reasons: dict[str, str] = {}
    capacity = fit_to_machine(
        load_config("fast", settings),
        Hardware("cpu", "CPU", memory, 2, bf16=False),
        encoder,
        batch_size=4,
        input_size=(side, side),
        rows=rows,
        frozen_prefix=frozen_prefix,
        grids_read=encoder.taps,
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
