"""What the adapted qkv layer costs beside the frozen one: ``python -m benchmarks.layers``; forward and backward.

The three layers take turns within each round, so that a drift of the machine's speed hits all of them; medians.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from semseg_automl.peft.conv_lora import ConvLoraLinear
from semseg_automl.peft.lora import LoraLinear

SHAPES = [(8, 16, 16, 192), (8, 24, 24, 192), (1, 64, 64, 768), (25, 14, 14, 768)]
ROUNDS = 15


def seconds(layer: nn.Module, x: Tensor) -> float:
    """Time one forward and backward pass."""
    start = time.perf_counter()
    layer(x).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print one row per shape ``(B, H, W, C)``."""
    print(f"{'shape':>20} {'frozen ms':>10} {'LoRA/frozen':>12} {'Conv-LoRA/LoRA':>15}")
    for shape in SHAPES:
        width = shape[-1]
        x = torch.randn(*shape, requires_grad=True)
        frozen = nn.Linear(width, 3 * width).requires_grad_(False)
        layers = [frozen, LoraLinear(frozen), ConvLoraLinear(frozen)]
        times: list[list[float]] = [[], [], []]
        for turn in range(ROUNDS + 3):
            for layer, spent in zip(layers, times, strict=True):
                took = seconds(layer, x)
                if turn >= 3:
                    spent.append(took)
        base, lora, conv = (statistics.median(spent) for spent in times)
        print(f"{shape!s:>20} {1000 * base:10.1f} {lora / base:12.2f} {conv / lora:15.2f}")


if __name__ == "__main__":
    main()
