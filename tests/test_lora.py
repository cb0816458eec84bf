"""LoRA and its options: rank-stabilised scale, DoRA, LoRA+, corrections of the mask decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semseg_automl.build import build_method
from semseg_automl.errors import ConfigError
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.conv_lora import ConvLoraLinear
from semseg_automl.peft.lora import LoraLinear

DECODER: dict[str, Any] = {"dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 32}


def random_layer(**options: Any) -> LoraLinear:
    """Build a layer in float64 whose corrections are not zero."""
    layer = LoraLinear(nn.Linear(10, 12).requires_grad_(False), **options).double()
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer


def corrected_weight(layer: LoraLinear) -> Tensor:
    """``W0 + s B A`` as it is written."""
    return layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A


@pytest.mark.parametrize(
    ("rule", "rank", "alpha", "scale"),
    [("rank", 3, 32.0, 32 / 3), ("rank", 4, 2.0, 0.5), ("sqrt_rank", 4, 2.0, 1.0), ("sqrt_rank", 9, 6.0, 2.0)],
)
def test_lora__scaling_rule__divides_alpha_by_the_rank_or_its_root(
    rule: Any, rank: int, alpha: float, scale: float
) -> None:
    layer = random_layer(rank=rank, alpha=alpha, scaling_rule=rule)
    assert layer.scaling == pytest.approx(scale)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    expected = layer.base(x) + scale * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(10,), (7, 10), (2, 3, 4, 10)])
@pytest.mark.parametrize("dora", [False, True])
def test_lora__gradients__are_those_of_the_formula(dora: bool, shape: tuple[int, ...]) -> None:
    layer = random_layer(dora=dora)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = corrected_weight(layer)
    if layer.magnitude is not None:
        # The length counts as constant in the backward pass: section 4.3 of DoRA.
        weight = (layer.magnitude / weight.detach().norm(dim=1))[:, None] * weight
    expected = x @ weight.T + layer.base.bias
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(expected)
    got = layer(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(expected, parameters, cotangent)
    for found, right in zip(torch.autograd.grad(got, parameters, cotangent), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


def test_lora__input_that_is_a_view__is_corrected_like_a_copy() -> None:
    layer = random_layer()
    x = torch.randn(4, 6, 10, dtype=torch.float64)
    for view in (x[:, 1:4], x.transpose(0, 1), x[::2]):
        torch.testing.assert_close(layer(view), layer(view.contiguous()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [LoraLinear, ConvLoraLinear])
def test_dora__before_the_first_step__is_bit_equal_to_its_base(kind: type[LoraLinear]) -> None:
    base = nn.Linear(16, 48).requires_grad_(False)
    x = torch.randn(2, 6, 5, 16)
    layer = kind(base, dora=True)
    assert torch.equal(layer(x), base(x))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(layer(x), base(x))


def test_dora__magnitude__starts_as_the_lengths_of_the_weights_and_rescales_them() -> None:
    base = nn.Linear(10, 12).requires_grad_(False)
    layer = LoraLinear(base, dora=True)
    assert layer.magnitude is not None
    torch.testing.assert_close(layer.magnitude.detach(), base.weight.norm(dim=1))
    layer = random_layer(dora=True)
    torch.testing.assert_close(layer._lengths(), corrected_weight(layer).norm(dim=1), rtol=1e-12, atol=0)
    assert not layer._lengths().requires_grad
    assert layer.magnitude is not None
    with torch.no_grad():
        layer.magnitude.copy_(torch.rand(12, dtype=torch.float64) + 0.5)
    folded = layer.folded()
    torch.testing.assert_close(folded.weight.norm(dim=1), layer.magnitude.detach(), rtol=1e-12, atol=0)


def test_dora__length_of_a_weight__comes_from_magnitude_alone() -> None:
    layer = random_layer(dora=True)
    assert layer.magnitude is not None
    with torch.no_grad():
        layer.magnitude.zero_()
    x = torch.randn(5, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base.bias.expand(5, 12), rtol=0, atol=1e-12)
    layer(x).sum().backward()
    assert layer.magnitude.grad is not None
    assert layer.magnitude.grad.abs().min() > 0


@pytest.mark.parametrize("method", ["lora", "conv_lora"])
def test_learning_rate_ratio__lora_plus__is_for_matrix_b_alone(method: str) -> None:
    encoder = TinyViT(embed_dim=32, depth=2, num_heads=2)
    encoder.mark_pretrained()
    built = build_method(method, {"b_lr_ratio": 16.0, "dora": True})
    built.apply(encoder)
    faster = {name for name in trainable_parameters(encoder) if built.learning_rate_ratio(name) != 1}
    assert faster == {f"blocks.{i}.attn.qkv.lora_B" for i in (0, 1)}
    assert {built.learning_rate_ratio(name) for name in faster} == {16.0}
    assert build_method(method, {}).learning_rate_ratio("blocks.0.attn.qkv.lora_B") == 1


@pytest.mark.parametrize("method", ["ssf", "full", "vpt"])
def test_learning_rate_ratio__other_methods__is_one(method: str) -> None:
    assert build_method(method, {}).learning_rate_ratio("encoder.blocks.0.attn.qkv.lora_B") == 1


@pytest.mark.parametrize("pretrained", [True, False])
def test_decoder_rank__decoder__trains_its_attention_whole_only_where_it_starts_fresh(pretrained: bool) -> None:
    decoder = MaskDecoder(**DECODER).eval()
    whole = {name for name, _ in decoder.named_parameters()}
    embeddings, images = torch.randn(2, 32, 3, 4), torch.randn(2, 3, 48, 64)
    before = decoder(embeddings, images).mask_logits
    build_method("lora", {"decoder_rank": 2}).apply_to_decoder(decoder, pretrained=pretrained)
    assert torch.equal(decoder(embeddings, images).mask_logits, before)
    attentions = [
        *("layers.0.self_attn", "layers.0.cross_attn_token_to_image", "layers.0.cross_attn_image_to_token"),
        "final_attn_token_to_image",
    ]
    layers = [f"transformer.{a}.{part}_proj" for a in attentions for part in ("q", "k", "v", "out")]
    added = {f"{layer}.{matrix}" for layer in layers for matrix in ("lora_A", "lora_B")}
    bases = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    moved = {name.replace("_proj.", "_proj.base.") for name in bases}
    assert bases < whole
    expected = (whole - bases) | added | (set() if pretrained else moved)
    assert set(trainable_parameters(decoder)) == expected
    assert {name for name, _ in decoder.named_parameters()} == (whole - bases) | added | moved


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4, "alpha": 8.0}, 2.0),
        ({"rank": 4, "alpha": 8.0, "scaling": "sqrt_rank"}, 4.0),
    ],
)
def test_decoder_rank__corrections__have_the_scale_of_the_encoder_s(options: dict[str, Any], scale: float) -> None:
    decoder, encoder = MaskDecoder(**DECODER), TinyViT(embed_dim=32, depth=1, num_heads=2)
    method = build_method("lora", {**options, "decoder_rank": 2})
    method.apply(encoder)
    method.apply_to_decoder(decoder, pretrained=True)
    layers = [m for part in (encoder, decoder) for m in part.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == 1 + 16
    assert [layer.scaling for layer in layers] == pytest.approx([scale] * 17)
    assert {layer.rank for layer in layers[1:]} == {2}


def test_decoder_rank__left_out__leaves_the_decoder_alone() -> None:
    decoder = MaskDecoder(**DECODER)
    names = [name for name, _ in decoder.named_parameters()]
    build_method("lora", {}).apply_to_decoder(decoder, pretrained=True)
    assert list(trainable_parameters(decoder)) == names


def test_decoder_rank__larger_than_the_decoder_s_layers__is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank is 17; a 32 -> 16 layer allows 1 to 16"):
        build_method("lora", {"decoder_rank": 17}).apply_to_decoder(MaskDecoder(**DECODER), pretrained=True)


def test_lora__large_rank__keeps_its_size_only_by_the_root() -> None:
    spreads: dict[str, list[float]] = {}
    for rule in ("rank", "sqrt_rank"):
        for rank in (4, 64):
            layer = LoraLinear(nn.Linear(256, 256), rank=rank, alpha=1.0, scaling_rule=rule)
            nn.init.normal_(layer.lora_B)
            layer.base.requires_grad_(False).weight.zero_()
            change = layer(torch.randn(100, 256)) - layer.base.bias
            spreads.setdefault(rule, []).append(change.std().item())
    assert spreads["sqrt_rank"][1] / spreads["sqrt_rank"][0] == pytest.approx(1, rel=0.3)
    assert spreads["rank"][1] / spreads["rank"][0] == pytest.approx(math.sqrt(4 / 64), rel=0.3)
