"""Fused against plain attention on this processor, forward and backward: ``python -m benchmarks.attention``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as three matrix operations."""
    attended: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return attended


def milliseconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, dtype: torch.dtype) -> float:
    """Time forward and backward of a batch of 8 with 3 heads of width 64; median of 15 after 3."""
    qkv = torch.randn(8, tokens, 3, 3, 64, dtype=dtype, requires_grad=True)
    times = []
    for _ in range(18):
        start = time.perf_counter()
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention(q, k, v).transpose(1, 2).reshape(8, tokens, 192).sum().backward()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main() -> None:
    """Print one row per number format and number of tokens."""
    print(f"{'dtype':10} {'tokens':>6} {'fused ms':>9} {'plain ms':>9} {'fused/plain':>11}")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (64, 256, 400, 576, 1024):
            fused = milliseconds(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), tokens, dtype)
            other = milliseconds(plain, tokens, dtype)
            print(f"{str(dtype)[6:]:10} {tokens:6} {fused:9.1f} {other:9.1f} {fused / other:11.2f}")


if __name__ == "__main__":
    main()
