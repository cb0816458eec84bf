"""Methods inside attention windows, SAM's and TinyViT's: VPT's prompts and Conv-LoRA's experts against plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.build import build_method
from semseg_automl.models.attention import RelativeAttention
from semseg_automl.models.sam import SamViT
from semseg_automl.models.tiny_vit import Attention, TinyViT
from semseg_automl.peft.conv_lora import ConvLoraLinear
from semseg_automl.peft.vpt import PromptedAttention

DIM, HEADS, WIDTH = 8, 2, 4
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "out_channels": 16, "grid": 4}
ENCODERS: dict[str, Any] = {"sam": SamViT, "tiny": TinyViT}


def attention(kind: str, window: int) -> Any:
    """Build an attention in float64, its parameters random; `window` 0: over a grid of 4 x 4."""
    attn: nn.Module = Attention(DIM, HEADS, window)
    if kind == "sam":
        tables = [nn.Parameter(torch.zeros(2 * (window or 4) - 1, WIDTH)) for _ in range(2)]
        attn = RelativeAttention(
            nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), *tables, num_heads=HEADS, window_size=window
        )
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attn.double()


def plain_window(q: Tensor, k: Tensor, v: Tensor, attn: Any, side: int, further: Tensor | None) -> Tensor:
    """Attend in one window ``(side * side, d)`` of one head; ``further (P, 2, d)`` are keys and values of prompts."""
    scores = q @ k.T * WIDTH**-0.5
    if isinstance(attn, RelativeAttention):
        row, column = (index.flatten() for index in torch.meshgrid([torch.arange(side)] * 2, indexing="ij"))
        vertical = attn.rel_pos_h[row[:, None] - row + side - 1]
        horizontal = attn.rel_pos_w[column[:, None] - column + side - 1]
        scores = scores + torch.einsum("id,ijd->ij", q, vertical + horizontal)
    if further is not None:
        scores = torch.cat([q @ further[:, 0].T * WIDTH**-0.5, scores], dim=1)
        v = torch.cat([further[:, 1], v])
    attended: Tensor = scores.softmax(dim=1) @ v
    return attended


def plain_attention(attn: Any, qkv: Tensor, empty: Tensor, prompts: Tensor | None = None) -> Tensor:
    """Attend as SAM does, window by window and head by head.

    Args:
        attn: has windows, relative positions and the last projection.
        qkv: of the tokens, ``(B, H, W, 3 C)``.
        empty: of a token of zeros ``(3 C,)``, which fill the last windows up.
        prompts: of the prompts, ``(P, 3 C)``.
    """
    batch, height, width, _ = qkv.shape
    side = attn.window_size or height
    full = empty.expand(batch, height + -height % side, width + -width % side, -1).clone()
    full[:, :height, :width] = qkv
    out = torch.zeros(*full.shape[:3], DIM, dtype=qkv.dtype)
    for b, r, c in itertools.product(range(batch), range(0, full.shape[1], side), range(0, full.shape[2], side)):
        window = full[b, r : r + side, c : c + side].reshape(side * side, 3, HEADS, WIDTH)
        for head in range(HEADS):
            further = None if prompts is None else prompts.view(-1, 3, HEADS, WIDTH)[:, 1:, head]
            q, k, v = window[:, :, head].unbind(1)
            attended = plain_window(q, k, v, attn, side, further)
            channels = slice(head * WIDTH, (head + 1) * WIDTH)
            out[b, r : r + side, c : c + side, channels] = attended.view(side, side, WIDTH)
    projected: Tensor = attn.proj(out[:, :height, :width])
    return projected


@pytest.mark.parametrize(("window", "grid"), [(0, (4, 4)), (3, (4, 5)), (3, (3, 6)), (4, (2, 3))])
@pytest.mark.parametrize("kind", ENCODERS)
def test_prompted_attention__float64__equals_prompts_prepended_in_every_window(
    kind: str, window: int, grid: tuple[int, int]
) -> None:
    attn = attention(kind, window)
    prompted = PromptedAttention(attn, torch.randn(5, DIM, dtype=torch.float64))
    x = torch.randn(2, *grid, DIM, dtype=torch.float64, requires_grad=True)
    expected = plain_attention(attn, attn.qkv(x), attn.qkv.bias, attn.qkv(prompted.prompts))
    got = prompted(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    cotangent = torch.randn_like(expected)
    inputs = [x, *prompted.parameters()]
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    assert wanted[1].shape == (5, DIM), "the prompts' gradient is among them"
    for found, right in zip(torch.autograd.grad(got, inputs, cotangent), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-10)
    assert not torch.allclose(attn(x), expected, atol=1e-2)


def conv_lora_qkv(base: nn.Linear, *, windowed: bool) -> ConvLoraLinear:
    """Put Conv-LoRA beside a projection, in float64 and without zeros."""
    layer = ConvLoraLinear(base.requires_grad_(False), rank=2, alpha=1.0, experts=4, windowed=windowed).double().eval()
    for name, parameter in layer.named_parameters():
        if not name.startswith("base."):
            nn.init.normal_(parameter, std=0.7)
    return layer


def plain_conv_lora(layer: ConvLoraLinear, x: Tensor) -> Tensor:
    """Compute the layer on whole grids ``(B, H, W, in)`` from its definition, image by image."""
    z = x @ layer.lora_A.T
    mixed = []
    for one in z:
        expert = int((one.mean(dim=(0, 1)) @ layer.w_gate).argmax())
        maps = one.permute(2, 0, 1)[None]
        up = F.interpolate(maps, scale_factor=float(expert + 1), mode="bicubic") if expert else maps
        activated = F.gelu(F.conv2d(up, layer.expert_weight[expert], layer.expert_bias[expert], padding=1))
        down = F.interpolate(activated, size=maps.shape[2:], mode="bicubic") if expert else activated
        mixed.append((maps + down)[0].permute(1, 2, 0))
    base: Tensor = layer.base(x)
    return base + layer.scaling * torch.stack(mixed) @ layer.lora_B.T


@pytest.mark.parametrize(("window", "grid"), [(0, (4, 4)), (3, (4, 5)), (3, (6, 3)), (4, (2, 3))])
@pytest.mark.parametrize("kind", ENCODERS)
def test_conv_lora__not_windowed__convolves_the_whole_grid_before_windows_are_cut(
    kind: str, window: int, grid: tuple[int, int]
) -> None:
    attn = attention(kind, window)
    layer = attn.qkv = conv_lora_qkv(attn.qkv, windowed=False)
    x = torch.randn(6, *grid, DIM, dtype=torch.float64, requires_grad=True)
    # Zeros that fill windows up have no bottleneck: the bias is all that comes of them.
    expected = plain_attention(attn, plain_conv_lora(layer, x), layer.base.bias)
    got = attn(x)
    assert len(layer.chosen_expert) == 6, "one choice per image"
    assert len(layer.chosen_expert.unique()) >= 2
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    cotangent = torch.randn_like(expected)
    inputs = [x, layer.lora_A, layer.lora_B, layer.expert_weight, layer.expert_bias]
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for found, right in zip(torch.autograd.grad(got, inputs, cotangent), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "window"), [("sam", 3), ("tiny", 3)])
def test_conv_lora__windowed__convolves_each_window_filled_up_with_zeros(kind: str, window: int) -> None:
    attn = attention(kind, window)
    layer = attn.qkv = conv_lora_qkv(attn.qkv, windowed=True)
    x = torch.randn(2, 4, 5, DIM, dtype=torch.float64)
    full = F.pad(x, (0, 0, 0, 1, 0, 2))
    projected = torch.zeros(2, 6, 6, 3 * DIM, dtype=torch.float64)
    for r, c in itertools.product((0, 3), (0, 3)):
        projected[:, r : r + 3, c : c + 3] = plain_conv_lora(layer, full[:, r : r + 3, c : c + 3])
    # In filled-up windows the experts' convolution reaches into the filling: what it leaves there is a key.
    expected = plain_attention(attn, projected, layer.base.bias)[:, :4, :5]
    torch.testing.assert_close(attn(x), expected, rtol=0, atol=1e-10)
    assert len(layer.chosen_expert) == 2 * 4, "one choice per window"


@pytest.mark.parametrize("kind", ENCODERS)
def test_conv_lora__not_windowed__differs_from_windowed_in_windowed_blocks_alone(kind: str) -> None:
    encoder = ENCODERS[kind](**SMALL, window_size=3, global_blocks=(1,))
    build_method("conv_lora", {"windowed": False}).apply(encoder)
    encoder.eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(2, 4, 4, 32)
        for index, block in enumerate(encoder.blocks):
            layer = block.attn.qkv
            assert not layer.windowed
            whole = block(x)
            assert len(layer.chosen_expert) == 2
            layer.windowed = True
            assert torch.equal(block(x), whole) == (index == 1)


@pytest.mark.parametrize("window", [3, 0])
def test_tiny_vit_attention__one_image_one_row_of_windows__runs_with_memory_in_any_order(window: int) -> None:
    attn = attention("tiny", window)
    x = torch.randn(2, 3, 6, DIM, dtype=torch.float64)
    torch.testing.assert_close(attn(x[:1]), attn(x)[:1], rtol=0, atol=1e-12)
    turned = x.transpose(1, 2)
    torch.testing.assert_close(attn(turned), attn(turned.contiguous()), rtol=0, atol=1e-12)
