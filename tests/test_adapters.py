"""Adapter, SAM-Adapter and SSF: their layers against the formulas of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.build import build_method
from semseg_automl.models.layers import LayerNorm2d
from semseg_automl.models.sam import SamViT
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft.adapters import AdapterLinear, PromptGenerator, high_frequencies
from semseg_automl.peft.ssf import ScaleShift

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "out_channels": 16, "grid": 4}


def jitter(module: nn.Module) -> None:
    """Move every parameter off its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def shifted_high_frequencies(images: Tensor, share: float) -> Tensor:
    """The same with frequency zero in the middle, as Explicit Visual Prompting describes it."""
    height, width = images.shape[-2:]
    half = int((height * width * share) ** 0.5 // 2)
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    middle = height // 2, width // 2
    rows, columns = (slice(max(0, zero - half), zero + half) for zero in middle)
    spectrum[..., rows, columns] = 0
    magnitude: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.abs()
    return magnitude


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (15, 15), (17, 20), (20, 17), (49, 107), (1, 9)])
@pytest.mark.parametrize("share", [0.25, 0.1, 0.5])
def test_high_frequencies__even_and_odd_sizes__equals_the_shifted_spectrum_with_a_hole(
    share: float, size: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(
        high_frequencies(images, share), shifted_high_frequencies(images, share), rtol=0, atol=1e-5
    )


def test_high_frequencies__constant_image__is_nothing() -> None:
    assert high_frequencies(torch.full((1, 3, 32, 48), 7.0)).abs().max() < 1e-5
    slope = torch.arange(32.0).expand(1, 3, 32, 32)
    assert high_frequencies(slope)[..., 4:-4].mean() < 0.1 * (slope - slope.mean()).abs().mean()


def test_high_frequencies__checkerboard__keeps_its_magnitude() -> None:
    board = (torch.arange(32)[:, None] + torch.arange(48)).remainder(2) * 2.0 - 1
    found = high_frequencies(5 * board.expand(1, 3, 32, 48) + 2)
    torch.testing.assert_close(found, torch.full_like(found, 5.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_high_frequencies__autocast__stays_in_single_precision(dtype: torch.dtype) -> None:
    images = torch.randn(1, 3, 24, 24)
    with torch.autocast("cpu", dtype=dtype):
        found = high_frequencies(images)
        of_halves = high_frequencies(images.to(dtype))
    assert torch.equal(found, high_frequencies(images))
    assert torch.equal(of_halves, high_frequencies(images.to(dtype).float()))


def test_prompt_generator__random_parameters__equals_the_formula() -> None:
    generator = PromptGenerator(12, 5, depth=3, stride=4)
    jitter(generator)
    images, tokens = torch.randn(2, 3, 8, 12), torch.randn(2, 2, 3, 12)
    features = generator.prepare(images, tokens)
    for row in range(2):
        for column in range(3):
            patch = high_frequencies(images)[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            expected = generator.patch_embed(patch)[:, :, 0, 0] + generator.embedding(tokens[:, row, column])
            torch.testing.assert_close(features[:, row, column], expected, rtol=1e-4, atol=1e-5)
    for index in range(3):
        expected = generator.shared(F.gelu(generator.tune[index](features)))
        torch.testing.assert_close(generator(index, features), expected)


def test_sam_adapter__random_parameters__prompts_every_block_of_the_encoder() -> None:
    encoder = TinyViT(**SMALL)
    encoder.mark_pretrained()
    build_method("sam_adapter", {"width": 4}).apply(encoder)
    jitter(encoder)
    images = torch.randn(2, 3, 48, 64)
    prompter = encoder.prompter
    assert isinstance(prompter, PromptGenerator)
    tokens = encoder.embed(images)
    features = prompter.prepare(images, tokens)
    for index, block in enumerate(encoder.blocks):
        tokens = block(tokens + prompter(index, features))
    torch.testing.assert_close(encoder(images), encoder.neck([tokens]))


def test_adapter__random_parameters__stands_behind_the_frozen_layer() -> None:
    base = nn.Linear(10, 6)
    layer = AdapterLinear(base, 2)
    jitter(layer)
    x = torch.randn(4, 5, 10)
    h = base(x)
    inner = h @ layer.down.weight.T + layer.down.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(layer(x), h + gelu @ layer.up.weight.T + layer.up.bias)


def test_adapter__block__has_one_behind_attention_and_one_behind_the_mlp() -> None:
    encoder = SamViT(**SMALL, window_size=3, global_blocks=(1,))
    build_method("adapter", {}).apply(encoder)
    found = [name for name, module in encoder.named_modules() if isinstance(module, AdapterLinear)]
    assert found == [f"blocks.{i}.{place}" for i in (0, 1) for place in ("attn.proj", "mlp.lin2")]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 3, 5, 6)),
        (nn.Linear(6, 4, bias=False), (2, 3, 6)),
        (nn.LayerNorm(6), (2, 3, 5, 6)),
        (LayerNorm2d(6), (2, 6, 3, 5)),
        (nn.Conv2d(6, 4, 3), (2, 6, 5, 7)),
        (nn.Conv2d(6, 4, 3, bias=False), (2, 6, 5, 7)),
    ],
    ids=["linear", "linear_without_bias", "norm", "norm_of_maps", "convolution", "convolution_without_bias"],
)
def test_scale_shift__each_layer__corrects_channels_and_folds(layer: nn.Module, shape: tuple[int, ...]) -> None:
    wrapped = ScaleShift(layer)
    x = torch.randn(shape)
    plain = layer(x)
    assert torch.equal(wrapped(x), plain)
    jitter(wrapped)
    plain = layer(x)
    channel = 1 if isinstance(layer, nn.Conv2d | LayerNorm2d) else x.ndim - 1
    parts = [
        part * gamma + beta
        for part, gamma, beta in zip(plain.unbind(channel), wrapped.scale, wrapped.shift, strict=True)
    ]
    expected = torch.stack(parts, dim=channel)
    torch.testing.assert_close(wrapped(x), expected)
    folded = wrapped.folded()
    assert folded is layer
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-6)


def test_ssf__sam__wraps_patch_embedding_blocks_and_neck() -> None:
    encoder = SamViT(**SMALL, window_size=3, global_blocks=(1,))
    build_method("ssf", {}).apply(encoder)
    found = {name for name, module in encoder.named_modules() if isinstance(module, ScaleShift)}
    blocks = {
        f"blocks.{i}.{part}"
        for i in (0, 1)
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.lin1", "mlp.lin2")
    }
    assert found == blocks | {"patch_embed.proj"} | {f"neck.{i}" for i in range(4)}


def test_ssf__windows_filled_up__are_those_of_the_corrected_layer() -> None:
    encoder = SamViT(**SMALL, window_size=3, global_blocks=())
    build_method("ssf", {}).apply(encoder)
    jitter(encoder)
    encoder.eval()
    images = torch.randn(1, 3, 64, 80)  # 4 x 5 tokens
    with torch.no_grad():
        expected = encoder(images)
        build_method("ssf", {}).merge(encoder)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)
