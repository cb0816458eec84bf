"""Ways to compute attention on this processor, forward and backward: ``python -m benchmarks.attention [--choose]``.

First plain against fused attention without positions (`attend`), then SAM's attention with relative positions: the
formula as written, torch's fused attention with the bias as a mask, the bias as further dimensions of queries and keys,
and in chunks, with different numbers of scores at a time. The last two are `semseg_automl.models.attention`. With
--choose only what choosing between those two takes, once per process: SAM ViT-B at 1024 pixels, before a prediction and
before a fit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from semseg_automl.hardware import detect_hardware
from semseg_automl.models import attention
from semseg_automl.models.attention_choice import choose_attention
from semseg_automl.models.sam import SAM_ENCODERS


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as three matrix operations."""
    attended: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return attended


def milliseconds(form: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, dtype: torch.dtype) -> float:
    """Time forward and backward of a batch of 8 with 3 heads of width 64; median of 15 after 3."""
    qkv = torch.randn(8, tokens, 3, 3, 64, dtype=dtype, requires_grad=True)
    times = []
    for _ in range(18):
        start = time.perf_counter()
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        form(q, k, v).transpose(1, 2).reshape(8, tokens, 192).sum().backward()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def relative_plain(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """SAM's attention as it is written."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    scores = scores.unflatten(2, (bias_h.shape[-1], bias_w.shape[-1])) + bias_h[..., None] + bias_w[..., None, :]
    attended: Tensor = scores.flatten(2).softmax(dim=-1) @ v
    return attended


def relative_masked(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """SAM's attention by torch's fused one, the bias as its mask."""
    mask = (bias_h[..., None] + bias_w[..., None, :]).flatten(2)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None])[0]


def compare_relative(sequences: int, side: int, dtype: torch.dtype) -> None:
    """Print one row: milliseconds of each form on `sequences` square grids, forward and with backward; best of 3."""
    tokens = side * side
    shapes = [64, 64, 64, side, side]
    tensors = [torch.randn(sequences, tokens, width, dtype=dtype, requires_grad=True) for width in shapes]
    forms: dict[str, tuple[Callable[..., Tensor], int]] = {
        "plain": (relative_plain, 0),
        "masked": (relative_masked, 0),
        "augmented": (attention.augmented_attention, 0),
        **{f"2^{power}": (attention.relative_attention, 2**power) for power in (16, 18, 20, 22)},
    }
    cells = []
    usual = attention.CACHED_SCORES
    for form, scores in forms.values():
        attention.CACHED_SCORES = scores or usual
        times = []
        for _ in range(4):
            start = time.perf_counter()
            out = form(*tensors)
            middle = time.perf_counter()
            out.sum().backward()
            times.append((middle - start, time.perf_counter() - start))
        forward, both = (1000 * min(column) for column in zip(*times[1:], strict=True))
        cells.append(f"{forward:6.0f}/{both:6.0f}")
    attention.CACHED_SCORES = usual
    row = " ".join(f"{cell:>13}" for cell in cells)
    print(f"{str(dtype)[6:]:9} {sequences:4} x {side:2} x {side:2} {row}", flush=True)


def choose() -> None:
    """Print what is chosen before a prediction and before a fit, and the seconds that takes."""
    with torch.device("meta"):
        encoder = SAM_ENCODERS["sam_vit_b"]()
    about: dict[str, Any] = {"batch": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    for training in (False, True):
        start = time.perf_counter()
        said = choose_attention(encoder, (1024, 1024), training=training, **about)
        print(f"{'fit' if training else 'prediction':10} {time.perf_counter() - start:.2f} s, {said}")


def main() -> None:
    """Print one row per number format and number of tokens, then one per number format and grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="time the choice alone")
    if parser.parse_args().choose:
        choose()
        return
    print(f"{'dtype':10} {'tokens':>6} {'fused ms':>9} {'plain ms':>9} {'fused/plain':>11}")
    # Without its instructions bfloat16 is emulated, which takes minutes and which no plan asks for.
    for dtype in (torch.float32, torch.bfloat16) if detect_hardware().bf16 else (torch.float32,):
        for tokens in (64, 256, 400, 576, 1024):
            fused = milliseconds(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), tokens, dtype)
            other = milliseconds(plain, tokens, dtype)
            print(f"{str(dtype)[6:]:10} {tokens:6} {fused:9.1f} {other:9.1f} {fused / other:11.2f}")
    names = ["plain", "masked", "augmented", "2^16", "2^18", "2^20", "2^22"]
    print("\nrelative positions, ms forward / with backward\n" + " " * 22 + " ".join(f"{name:>13}" for name in names))
    for sequences, side in ((300, 14), (12, 32), (12, 64)):
        compare_relative(sequences, side, torch.float32)


if __name__ == "__main__":
    main()
