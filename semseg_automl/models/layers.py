"""Small layers that encoders and decoders share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

PLAIN_ATTENTION_TOKENS = 512


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over ``(B, heads, N, d)``, by whichever of torch's ways is faster here.

    On CPUs with bfloat16 instructions, the fused kernel is beaten by plain matrix products up to about 512 tokens
    (2 times at 256, forward and backward, 2 cores: ``python -m benchmarks.attention``); elsewhere it wins.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= PLAIN_ATTENTION_TOKENS:
        attended: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return attended
    return F.scaled_dot_product_attention(q, k, v)


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of ``(B, C, H, W)``."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel's channel vector."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)
