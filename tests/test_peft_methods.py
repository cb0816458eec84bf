"""The contract every fine-tuning method keeps, over METHODS x encoders; a new entry is tested at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.build import build_method
from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.models.encoder import Encoder
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels, semantic_scores
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import METHODS, count_parameters, trainable_parameters

ENCODERS: dict[str, dict[str, Any]] = {
    "global": {"embed_dim": 32, "depth": 3, "num_heads": 2, "grid": 4, "neck_taps": (0, 2)},
    "windowed": {
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "grid": 4,
        "window_size": 3,
        "global_blocks": (2,),
        "patch_size": 8,
    },
    "conv_stem": {"embed_dim": 48, "depth": 2, "num_heads": 2, "grid": 4, "conv_stem": True},
}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {"conv_lora": {"rank": 4}, "lora": {"rank": 4}}
# What a method adds to one fused qkv of width C, from its paper; C = embed_dim, r = 4, M = 8.
ADDED_PER_BLOCK: dict[str, Callable[[int], int]] = {
    "decoder_only": lambda width: 0,
    "full": lambda width: 0,
    "lora": lambda width: 4 * (width + 3 * width),
    "conv_lora": lambda width: 4 * (width + 3 * width) + 8 * (4 * 4 * 9 + 4) + 2 * 4 * 8,
}


def pretrained_encoder(kind: str) -> TinyViT:
    """Build an encoder that counts as pretrained, its neck fresh."""
    encoder = TinyViT(out_channels=32, **ENCODERS[kind])
    encoder.mark_pretrained()
    return encoder


def adapted_model(method: str, kind: str, classes: int = 1) -> SegmentationModel:
    """Build a small model with the method applied."""
    encoder = pretrained_encoder(kind)
    build_method(method, METHOD_OPTIONS.get(method, {})).apply(encoder)
    return SegmentationModel(encoder, MaskDecoder(32, mlp_dim=64, num_mask_tokens=classes, detail=kind == "global"))


def pictures() -> tuple[Tensor, Tensor]:
    """Draw two images with a bright square and its mask."""
    generator = torch.Generator().manual_seed(0)
    images = 90 + 20 * torch.rand(2, 3, 48, 64, generator=generator)
    masks = torch.zeros(2, 48, 64, dtype=torch.int64)
    masks[0, 8:30, 10:30] = 1
    masks[1, 20:40, 30:60] = 1
    return images + 120 * masks[:, None], masks


every_pair = pytest.mark.parametrize(("method", "kind"), [(m, k) for m in METHODS for k in ENCODERS])


@every_pair
def test_method__before_the_first_step__computes_what_the_frozen_encoder_did(method: str, kind: str) -> None:
    encoder = pretrained_encoder(kind).eval()
    images = torch.randn(2, 3, 48, 64)
    frozen = encoder(images)
    build_method(method, METHOD_OPTIONS.get(method, {})).apply(encoder)
    assert METHODS[method].identity_at_init
    assert torch.equal(encoder(images), frozen)


@every_pair
def test_method__parameters__are_exactly_the_declared_ones(method: str, kind: str) -> None:
    before = pretrained_encoder(kind)
    base = sum(p.numel() for p in before.parameters())
    neck = sum(p.numel() for p in before.neck.parameters())
    encoder = pretrained_encoder(kind)
    build_method(method, METHOD_OPTIONS.get(method, {})).apply(encoder)
    added = len(encoder.blocks) * ADDED_PER_BLOCK[method](encoder.embed_dim)
    trainable, total = count_parameters(encoder)
    assert total == base + added
    assert trainable == (base if method == "full" else neck + added)


@every_pair
def test_method__one_step__moves_all_that_train_and_nothing_else(method: str, kind: str) -> None:
    model = adapted_model(method, kind).train()
    images, masks = pictures()
    trainable = trainable_parameters(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    touched: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in trainable.items()}
    for _ in range(3):  # A moves only once B has left zero
        optimizer.zero_grad()
        logits = F.interpolate(model(images).mask_logits, masks.shape[-2:])[:, 0]
        (F.binary_cross_entropy_with_logits(logits, masks.float()) + model.aux_loss()).backward()
        for name, parameter in trainable.items():
            assert parameter.grad is not None or name.endswith("w_gate"), f"no gradient reaches {name}"
            touched[name] += 0 if parameter.grad is None else parameter.grad.abs()
        optimizer.step()
    # Experts the gate did not choose have no gradient yet; and a gate that only balancing trains may rest.
    resting = ("expert_weight", "expert_bias", "w_gate", "w_noise")
    # The iou token meets the masks only through self-attention, its key's bias not at all: softmax ignores a constant.
    still = [n for n, t in touched.items() if not t.any() and not n.endswith((*resting, "k_proj.bias"))]
    assert not still, f"no gradient reaches {still}"
    for name, tensor in model.state_dict().items():
        if name not in trainable:
            assert torch.equal(tensor, before[name]), f"frozen {name} moved"


@every_pair
def test_method__evaluation__is_deterministic_and_independent_of_the_batch(method: str, kind: str) -> None:
    model = adapted_model(method, kind).eval()
    images, _ = pictures()
    with torch.no_grad():
        both = model(images).mask_logits
        assert torch.equal(both, model(images).mask_logits)
        torch.testing.assert_close(model(images[1:]).mask_logits, both[1:], rtol=1e-4, atol=1e-5)


@every_pair
def test_method__half_precision_autocast__is_finite(method: str, kind: str) -> None:
    model = adapted_model(method, kind).train()
    images, _ = pictures()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            output = model(images)
        assert torch.isfinite(output.mask_logits).all()
        assert torch.isfinite(model.aux_loss())


@every_pair
def test_method__handful_of_images__is_overfitted(method: str, kind: str) -> None:
    model = adapted_model(method, kind).train()
    images, masks = pictures()
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=4e-3)
    for _ in range(80):
        optimizer.zero_grad()
        logits = F.interpolate(model(images).mask_logits, masks.shape[-2:], mode="bilinear")[:, 0]
        (F.binary_cross_entropy_with_logits(logits, masks.float()) + model.aux_loss()).backward()
        nn.utils.clip_grad_norm_(trainable_parameters(model).values(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = semantic_scores(model(images), (48, 64))
    predicted = torch.stack([hard_labels(s) for s in scores]).bool()
    iou = (predicted & masks.bool()).sum() / (predicted | masks.bool()).sum()
    assert iou > 0.9


class NoBlocks(Encoder):
    """An encoder without transformer blocks."""

    def __init__(self) -> None:
        super().__init__((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.blocks = nn.ModuleList()

    def forward(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def load_pretrained(self, state: dict[str, Tensor], *, source: str) -> None:
        """Need nothing."""

    def mark_pretrained(self) -> None:
        """Have nothing fresh."""


@pytest.mark.parametrize("method", ["lora", "conv_lora"])
def test_method__encoder_without_attention__names_the_methods_that_work(method: str) -> None:
    with pytest.raises(UnsupportedCombination, match="decoder_only, full"):
        build_method(method, {}).apply(NoBlocks())


def test_build_method__unknown_name_or_option__is_refused() -> None:
    with pytest.raises(ConfigError, match="conv_lora"):
        build_method("lorra", {})
    with pytest.raises(ConfigError, match="rank"):
        build_method("lora", {"ranks": 3})


def test_conv_lora__overhead__matches_the_formula_of_the_paper() -> None:
    # ViT-H: width 1280, 32 blocks, r = 3: 491,520 of LoRA and 32 x (8 x (9*9 + 3) + 2*3*8) of experts and gate.
    with torch.device("meta"):
        encoder = TinyViT(embed_dim=1280, depth=32, num_heads=16)
        encoder.mark_pretrained()
        plain = sum(p.numel() for p in encoder.parameters())
        build_method("conv_lora", {}).apply(encoder)
    assert sum(p.numel() for p in encoder.parameters()) - plain == 514_560
