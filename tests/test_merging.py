"""Merging: what a method learned, folded into the encoder's own layers, and plans of merged networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semseg_automl.build import build_method, build_model
from semseg_automl.bundle import Bundle, load_bundle, save_bundle
from semseg_automl.config import load_config
from semseg_automl.errors import UnsupportedCombination
from semseg_automl.hardware import Hardware
from semseg_automl.models.encoder import Encoder
from semseg_automl.models.facts import EncoderFacts
from semseg_automl.models.sam import SamViT
from semseg_automl.models.timm_encoder import build_timm_encoder
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import METHODS
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import SegmentationTask

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "out_channels": 16}
KINDS: dict[str, Callable[[], Encoder]] = {
    "windowed": partial(TinyViT, **SMALL, window_size=3, global_blocks=(1,), grid=4),
    "sam": partial(SamViT, **SMALL, window_size=3, global_blocks=(1,), grid=4),
    "deit": partial(build_timm_encoder, "deit_tiny_patch16_224", **SMALL, img_size=64),
    # Here qkv has no bias of its own: EVA adds one behind it, DINOv3 has none.
    "eva": partial(build_timm_encoder, "eva_giant_patch14_224", **SMALL, img_size=64, patch_size=16),
    "dinov3": partial(build_timm_encoder, "vit_small_patch16_dinov3", **SMALL, img_size=64),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder_only": ("decoder_only", {}),
    "bitfit": ("bitfit", {}),
    "full": ("full", {}),
    "ssf": ("ssf", {}),
    "lora": ("lora", {}),
    "rslora": ("lora", {"scaling": "sqrt_rank", "rank": 5}),
    "dora": ("lora", {"dora": True}),
    "dora_rslora": ("lora", {"dora": True, "scaling": "sqrt_rank"}),
    "last_block": ("lora", {"last_blocks": 1}),
}
# A shift needs a bias to go into; a layer without gets one.
NEW_BIASES = {
    ("ssf", "sam"): {"neck.0.bias", "neck.2.bias"},
    ("ssf", "eva"): {f"blocks.{i}.block.attn.qkv.qkv.bias" for i in range(2)},
    ("ssf", "dinov3"): {f"blocks.{i}.block.attn.qkv.qkv.bias" for i in range(2)},
}
MERGEABLE = ["decoder_only", "bitfit", "ssf", "lora", "full"]
BINARY = SegmentationTask("binary", values=(0, 255), class_names=("background", "polyp"))


def jitter(module: nn.Module, spread: float) -> None:
    """Move every parameter off its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_merge__random_parameters__gives_the_same_output_by_the_encoder_s_own_layers(case: str, kind: str) -> None:
    name, options = CASES[case]
    encoder = KINDS[kind]().double()
    types = [type(module) for module in encoder.modules()]
    names = encoder.state_dict().keys()
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    jitter(encoder, 0.1)
    encoder.mark_pretrained()
    method = build_method(name, options)
    method.apply(encoder.eval())
    encoder.double()
    before = encoder(images)
    jitter(encoder, 0.1)
    expected = encoder(images)
    assert not torch.allclose(expected, before, atol=1e-2)
    method.merge(encoder)
    assert [type(module) for module in encoder.modules()] == types
    assert encoder.state_dict().keys() - names == NEW_BIASES.get((case, kind), set())
    assert names <= encoder.state_dict().keys()
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-10)


def test_methods__that_can_be_merged__are_known() -> None:
    assert [name for name, method in METHODS.items() if not method.not_mergeable] == MERGEABLE
    assert {name for name, _ in CASES.values()} == set(MERGEABLE)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("conv_lora", "experts convolve over the grid"),
        ("adapter", "a GELU stands between"),
        ("vpt", "prompts are tokens"),
        ("lst", "network of its own"),
        ("sam_adapter", "depend on the image"),
    ],
)
def test_merge__method_that_cannot__says_why_and_names_those_that_can(method: str, why: str) -> None:
    encoder = KINDS["sam"]()
    built = build_method(method, {})
    built.apply(encoder)
    images = torch.randn(1, 3, 48, 64)
    before = encoder.eval()(images)
    with pytest.raises(UnsupportedCombination, match=rf"'{method}'.*{why}.*can: {', '.join(MERGEABLE)}\."):
        built.merge(encoder)
    assert torch.equal(encoder(images), before)


def test_merge__ssf_behind_norms_without_bias__is_refused_and_changes_nothing() -> None:
    encoder = build_timm_encoder("deit_tiny_patch16_224", **SMALL, img_size=64, norm_layer="rmsnorm")
    method = build_method("ssf", {})
    method.apply(encoder)
    jitter(encoder, 0.1)
    before = encoder.state_dict().keys()
    with pytest.raises(UnsupportedCombination, match="RmsNorm has no bias"):
        method.merge(encoder)
    assert encoder.state_dict().keys() == before


def plan_of(method: str, **settings: Any) -> Plan:
    """Plan a small network, its encoder from a file that does not exist."""
    options: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8, "grid": 4}
    encoder = EncoderFacts("tiny_vit", "tiny_vit", options, 8, 64, 2, "gone/vit.safetensors", "a file")
    config = load_config("fast", {"model.decoder_dim": 32, "model.input_size": 32, "optim.peft": method, **settings})
    stats = DataStats(rows=10, sizes=((40, 50),) * 10)
    return make_plan(config, BINARY, stats, Hardware("cpu", "CPU", 2**33, 2, bf16=False), encoder)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ssf", {}),
        ("bitfit", {}),
        ("decoder_only", {}),
        ("lora", {}),
        ("lora", {"optim.lora.dora": True, "optim.lora.decoder_rank": 2}),
    ],
    ids=["ssf", "bitfit", "decoder_only", "lora", "dora"],
)
def test_build_model__plan_of_a_merged_network__takes_its_weights(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(method, **settings)
    assert not plan.merged
    model = build_model(plan, pretrained=False).eval()
    jitter(model, 0.05)
    images = 255 * torch.rand(2, 3, 32, 32)
    expected = model(images).mask_logits
    build_method(plan.peft, plan.peft_options).merge(model.encoder)
    merged = plan.model_copy(update={"merged": True})
    other = build_model(merged, pretrained=False).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images).mask_logits, model(images).mask_logits)
    torch.testing.assert_close(other(images).mask_logits, expected, rtol=1e-4, atol=1e-5)
    save_bundle(tmp_path, Bundle(model, merged, BINARY))
    loaded = load_bundle(tmp_path)
    assert loaded.plan.merged
    assert torch.equal(loaded.model(images).mask_logits, model(images).mask_logits)


def test_build_model__merged_plan_of_a_method_that_cannot__is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match="cannot be merged"):
        build_model(plan_of("conv_lora").model_copy(update={"merged": True}), pretrained=False)
