"""VPT: prompts before timm's sequences, and how they are drawn; the kernels' part is tested in test_attention.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semseg_automl.build import build_method
from semseg_automl.models.timm_encoder import TimmViT
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft.vpt import PrependedAttention, PromptedAttention
from semseg_automl.third_party import timm

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}
VITS = {
    "deit": "deit_tiny_patch16_224",  # a class token, no rotary positions
    "dinov3": "vit_small_patch16_dinov3",  # four registers too
    "eva02": "eva02_tiny_patch14_224",
    "rope_mixed": "vit_small_patch16_rope_mixed_224",  # other rotary positions in every block and head
}


def prompted_vit(kind: str) -> tuple[TimmViT, TimmViT]:
    """Build a timm encoder in float64 without zeros, and the same with prompts."""
    plain = TimmViT(VITS[kind], out_channels=16, **TINY).double().eval()
    plain.mark_pretrained()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    prompted = copy.deepcopy(plain)
    build_method("vpt", {"tokens": 5}).apply(prompted)
    prompted.double().eval()
    with torch.no_grad():
        for attn in attentions(prompted):
            nn.init.normal_(attn.prompts)
    return plain, prompted


def attentions(encoder: TimmViT) -> list[Any]:
    """Return the attention of each block."""
    blocks: list[Any] = [block.block for block in encoder.blocks]
    return [block.attn for block in blocks]


def heads_of(attn: Any, x: Tensor) -> list[Tensor]:
    """Return queries, keys and values ``(B, heads, N, d)`` of a timm attention."""
    projected = attn.qkv(x)
    if getattr(attn, "q_bias", None) is not None:
        projected = projected + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = projected.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return [attn.q_norm(q), attn.k_norm(k), v]


@pytest.mark.parametrize("kind", VITS)
def test_prepended_attention__timm_s_sequence__turns_the_grid_s_tokens_alone(kind: str) -> None:
    plain, prompted = prompted_vit(kind)
    grid = (3, 4)
    prefix = plain.prefix_tokens
    assert prefix >= 1
    layers: Any = timm.layers
    for attn, wrapped, rotary in zip(attentions(plain), attentions(prompted), plain._rotary(grid), strict=True):
        assert isinstance(wrapped, PrependedAttention)
        x = torch.randn(2, prefix + 12, 32, dtype=torch.float64)
        (q, k, v), (_, k_prompts, v_prompts) = heads_of(attn, x), heads_of(attn, wrapped.prompts[None])
        if rotary is not None:
            half = getattr(attn, "rotate_half", False)
            q, k = (
                torch.cat([y[:, :, :prefix], layers.apply_rot_embed_cat(y[:, :, prefix:], rotary, half=half)], dim=2)
                for y in (q, k)
            )
        # Prompts are keys and values, unturned, and never queries.
        k = torch.cat([k_prompts.expand(2, -1, -1, -1), k], dim=2)
        v = torch.cat([v_prompts.expand(2, -1, -1, -1), v], dim=2)
        attended = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        expected = attn.proj(attn.norm(attended.transpose(1, 2).flatten(2)))
        positions = {} if rotary is None else {"rope": rotary}
        torch.testing.assert_close(wrapped(x, **positions), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", VITS)
def test_vpt__timm_s_encoder__keeps_its_token_order_and_its_stages(kind: str) -> None:
    plain, prompted = prompted_vit(kind)
    images = torch.randn(2, 3, 3 * plain.stride, 4 * plain.stride, dtype=torch.float64)
    with torch.no_grad():
        embeddings = prompted(images)
        shapes = [[tuple(part.shape) for part in encoder.begin(images, 1)] for encoder in (plain, prompted)]
        assert shapes[0] == shapes[1]
        for stage in range(prompted.last_stage + 1):
            torch.testing.assert_close(prompted.finish(prompted.begin(images, stage), stage), embeddings)
        assert not torch.allclose(embeddings, plain(images), atol=1e-2)
        # Prompts that no query can see: nothing else of the encoder was changed.
        for original, wrapped in zip(attentions(plain), attentions(prompted), strict=True):
            assert type(wrapped.attn) is type(original)
            wrapped.prompts = nn.Parameter(torch.zeros(0, 32, dtype=torch.float64))
            if hasattr(original, "num_prefix_tokens"):
                assert wrapped.attn.num_prefix_tokens == original.num_prefix_tokens + 5
                wrapped.attn.num_prefix_tokens -= 5
        assert torch.equal(prompted(images), plain(images))


def test_vpt__prompts__are_drawn_as_published_one_set_per_block() -> None:
    encoder = TinyViT(embed_dim=32, depth=3, num_heads=2, patch_size=8)
    encoder.mark_pretrained()
    build_method("vpt", {"tokens": 400}).apply(encoder)
    found = [module for module in encoder.modules() if isinstance(module, PromptedAttention)]
    prompts = [attn.prompts.detach() for attn in found]
    assert len(prompts) == 3
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    for drawn in prompts:
        assert drawn.shape == (400, 32)
        assert drawn.abs().max() <= bound
        assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(prompts[0], prompts[1])
