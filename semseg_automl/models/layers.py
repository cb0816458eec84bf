"""Small layers that encoders and decoders share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

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


def window_partition(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut ``(B, H, W, C)`` into ``(B * windows, window, window, C)``, zero-padded below and right to whole windows."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(-1, window, window, channels), (rows * window, columns * window)


def window_unpartition(windows: Tensor, window: int, padded: tuple[int, int], size: Sequence[int]) -> Tensor:
    """Put windows back into ``(B, H, W, C)`` and drop the padding; the inverse of `window_partition`."""
    rows, columns = padded[0] // window, padded[1] // window
    x = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, *padded, windows.shape[-1])[:, : size[0], : size[1]]


def interpolate_position(embedding: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a position embedding ``(1, g, g, C)`` to ``(1, *size, C)``, bicubic; exact when the sizes agree."""
    if tuple(embedding.shape[1:3]) == tuple(size):
        return embedding
    resized = F.interpolate(embedding.permute(0, 3, 1, 2), size=tuple(size), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return by name what a network's batch normalisation counts while it trains: no gradient, but not frozen.

    >>> sorted(running_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2))))
    ['0.num_batches_tracked', '0.running_mean', '0.running_var']
    """
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for key, buffer in module.named_buffers(recurse=False)
    }
