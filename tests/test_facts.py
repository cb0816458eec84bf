"""Encoders looked up by name, before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from semseg_automl.errors import CheckpointError, ConfigError
from semseg_automl.models.facts import OFFICIAL, encoder_facts
from semseg_automl.models.sam import SAM_ENCODERS


@pytest.mark.parametrize("name", SAM_ENCODERS)
def test_encoder_facts__sam__takes_the_published_weights_unless_told_otherwise(name: str) -> None:
    assert encoder_facts(name).checkpoint == OFFICIAL
    assert encoder_facts(name, checkpoint="my.pth").checkpoint == "my.pth"
    random = encoder_facts(name, pretrained=False)
    assert not random.pretrained
    assert random.stride == 16


def test_encoder_facts__tiny_vit_file__gives_its_architecture(shared: Callable[[str], Path]) -> None:
    facts = encoder_facts("tiny_vit", checkpoint=str(shared("weights/deit_tiny_patch16_224.fp16.safetensors")))
    assert (facts.embed_dim, facts.depth, facts.stride) == (192, 12, 16)
    assert facts.options["neck_taps"] == [2, 5, 8, 11]
    assert facts.options["window_size"] == 0


def test_encoder_facts__windows_asked_for__leave_the_tapped_blocks_global(shared: Callable[[str], Path]) -> None:
    file = str(shared("weights/deit_tiny_patch16_224.fp16.safetensors"))
    options = encoder_facts("tiny_vit", checkpoint=file, window_size=8).options
    assert options["window_size"] == 8
    assert options["global_blocks"] == options["neck_taps"] == [2, 5, 8, 11]
    for name, checkpoint in (("tiny_vit", None), ("sam_vit_b", "x.pth")):
        with pytest.raises(ConfigError, match=r"model\.window_size"):
            encoder_facts(name, checkpoint=checkpoint, window_size=8)


def test_encoder_facts__tiny_vit_without_file__is_random() -> None:
    assert not encoder_facts("tiny_vit").pretrained


def test_encoder_facts__unknown_name__suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'sam_vitb'.*sam_vit_b"):
        encoder_facts("sam_vitb")


def test_encoder_facts__settings_that_exclude_each_other__are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained is false"):
        encoder_facts("sam_vit_b", checkpoint="x.pth", pretrained=False)
    with pytest.raises(ConfigError, match="needs none"):
        encoder_facts("sam_vit_b", accept_license="mine")
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        encoder_facts("tiny_vit", checkpoint="absent.pth")
