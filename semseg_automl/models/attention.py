"""SAM's attention with decomposed relative positions, exact, without ever holding a whole attention map.

A query attends with the scores ``scale q.k + b_h[row of k] + b_w[column of k]``, where ``b_h = q.R_h`` and
``b_w = q.R_w`` (Kirillov et al., 2023, after Li et al., "MViTv2", 2022, equation 4). Written plainly that is a map of
``HW x HW`` per head, passed over five times and kept for the backward pass. Here:

- On a CPU, scores are made for a few queries at a time, small enough to stay in the processor's cache, by one matrix
  product accumulated onto the bias; the backward pass makes them again (as in Dao et al., "FlashAttention", 2022).
- Elsewhere, the bias becomes part of the product: ``[scale q, b_h, b_w] . [k, one-hot row, one-hot column]`` is the
  same score, and torch's fused attention needs no bias.

Either form runs on every device; which is the faster for which block is found by running both
(:mod:`semseg_automl.models.attention_choice`), and without that the device's usual one is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, library, nn
from torch.nn import functional as F  # noqa: N812

Form = Literal["chunked", "fused"]
"""The two ways of the module's docstring."""

CACHED_SCORES = 2**20
"""Scores made at a time by the CPU's kernel; chosen by ``python -m benchmarks.attention``."""


def relative_table(table: Tensor, length: int) -> Tensor:
    """Return the embedding of each pair's distance, ``(length, length, d)`` for query and key position.

    Args:
        table: ``(2 L - 1, d)``, entry ``i - j + L - 1`` for query i and key j; resized linearly where L is another.
        length: positions along the axis.
    """
    distances = 2 * length - 1
    if table.shape[0] != distances:
        table = F.interpolate(table.t()[None], size=distances, mode="linear")[0].t()
    position = torch.arange(length, device=table.device)
    return table[position[:, None] - position + length - 1]


def usual_form(device: torch.device) -> Form:
    """Return the form that a device takes where nobody has measured."""
    return "chunked" if device.type == "cpu" else "fused"


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor, form: Form | None = None
) -> Tensor:
    """Attend over a grid with a bias per key row and key column.

    Args:
        q: queries ``(S, N, d)``, S sequences (heads, images, windows), N = H W positions row by row.
        k: keys ``(S, N + P, d)``: of the positions, then of P prompts, which have no place in the grid and no bias.
        v: values ``(S, N + P, d)``.
        bias_h: ``(S, N, H)``, added to the scores of all keys of a row.
        bias_w: ``(S, N, W)``, added to the scores of all keys of a column.
        form: how it is computed; None for the device's usual form.

    Returns:
        ``(S, N, d)``.
    """
    # ONNX has no operator of ours.
    if torch.compiler.is_exporting() or (form or usual_form(q.device)) == "fused":
        return augmented_attention(q, k, v, bias_h, bias_w)
    attended: Tensor = _chunked_attention(q, k, v, bias_h, bias_w)
    return attended


def augmented_attention(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """Compute `relative_attention` by torch's fused attention, the bias as further dimensions of queries and keys.

    The width becomes d + H + W, filled up to a multiple of 8 as the kernels on accelerators want it; the values get
    the same width, because not all of the kernels take another one.
    """
    width, height, columns = q.shape[-1], bias_h.shape[-1], bias_w.shape[-1]
    fill = -(height + columns) % 8
    rows = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(columns, dim=0)
    cells = torch.cat([rows, torch.eye(columns, dtype=k.dtype, device=k.device).repeat(height, 1)], dim=1)
    query = F.pad(torch.cat([q * width**-0.5, bias_h.to(q.dtype), bias_w.to(q.dtype)], dim=-1), (0, fill))
    cells = F.pad(cells, (0, 0, 0, k.shape[1] - cells.shape[0]))  # prompts are in no row and no column
    key = F.pad(torch.cat([k, cells.expand(k.shape[0], -1, -1)], dim=-1), (0, fill))
    value = F.pad(v, (0, height + columns + fill))
    return F.scaled_dot_product_attention(query[None], key[None], value[None], scale=1.0)[0, ..., :width]


def _chunks(sequences: int, length: int) -> list[tuple[slice, slice]]:
    """Cut the score maps of all sequences into pieces of about `CACHED_SCORES`: ``(sequences, queries)`` each."""
    together = min(sequences, max(1, CACHED_SCORES // (length * length)))
    queries = min(length, max(16, CACHED_SCORES // length))
    return [
        (slice(first, first + together), slice(start, start + queries))
        for first in range(0, sequences, together)
        for start in range(0, length, queries)
    ]


def _probabilities(q: Tensor, k: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """Return the attention ``(s, n, N + P)`` of a chunk's queries ``(s, n, d)``."""
    scores = torch.add(bias_h[..., :, None], bias_w[..., None, :]).flatten(2)
    if k.shape[1] > scores.shape[2]:
        scores = F.pad(scores, (0, k.shape[1] - scores.shape[2]))
    scores.baddbmm_(q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(dim=-1)


def _widened(*tensors: Tensor) -> Iterator[Tensor]:
    """Bring half precision to float32.

    Scores keep their digits so, and on a processor without bfloat16 instructions these narrow products would be 20 to
    100 times slower.
    """
    return (x if x.dtype == torch.float64 else x.float() for x in tensors)


# An operator of its own, so that torch.compile takes it as one node and autograd does not look inside.
@library.custom_op("semseg_automl::relative_attention", mutates_args=())
def _chunked_attention(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """Compute `relative_attention` chunk by chunk."""
    dtype = q.dtype
    q, k, v, bias_h, bias_w = _widened(q, k, v, bias_h, bias_w)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for s, n in _chunks(*q.shape[:2]):
        out[s, n] = torch.bmm(_probabilities(q[s, n], k[s], bias_h[s, n], bias_w[s, n]), v[s])
    return out


@library.custom_op("semseg_automl::relative_attention_backward", mutates_args=())
def _chunked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `_chunked_attention`, the probabilities made again."""
    scale = q.shape[-1] ** -0.5
    grid = bias_h.shape[-1], bias_w.shape[-1]
    dtype = q.dtype
    grad_q, grad_h, grad_w = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, bias_h, bias_w))
    grad, q, k, v, bias_h, bias_w = _widened(grad, q, k, v, bias_h, bias_w)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for s, n in _chunks(*q.shape[:2]):
        queries, grads = q[s, n], grad[s, n]
        probabilities = _probabilities(queries, k[s], bias_h[s, n], bias_w[s, n])
        grad_v[s].baddbmm_(probabilities.transpose(1, 2), grads)
        grad_scores = torch._softmax_backward_data(
            torch.bmm(grads, v[s].transpose(1, 2)), probabilities, -1, probabilities.dtype
        )
        grad_q[s, n] = torch.bmm(grad_scores, k[s]).mul_(scale)
        grad_k[s].baddbmm_(grad_scores.transpose(1, 2), queries, alpha=scale)
        cells = grad_scores[..., : grid[0] * grid[1]].unflatten(2, grid)
        grad_h[s, n] = cells.sum(dim=3)
        grad_w[s, n] = cells.sum(dim=2)
    return grad_q, grad_k.to(dtype), grad_v.to(dtype), grad_h, grad_w


@_chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_chunked_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, bias_h, bias_w))


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _chunked_backward(grad, *ctx.saved_tensors)
    return gradients


_chunked_attention.register_autograd(_backward, setup_context=_keep_for_backward)


class RelativeAttention(nn.Module):
    """Multi-head self-attention with decomposed relative positions, over a grid or within its windows.

    Parameters are named as upstream: ``qkv``, ``proj``, ``rel_pos_h (2 H - 1, d)``, ``rel_pos_w (2 W - 1, d)``.

    A grid that windows do not divide is filled up with zeros below and right, as upstream does; what the projections
    make of those is a constant, so only real tokens go through them.

    Args:
        qkv: the fused projection, ``dim -> 3 dim``.
        proj: the projection of the result.
        rel_pos_h: embeddings of vertical distances.
        rel_pos_w: embeddings of horizontal distances.
        num_heads: attention heads.
        window_size: tokens per window side; 0 for attention over the whole grid.
    """

    takes_prompts = True

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        rel_pos_h: nn.Parameter,
        rel_pos_w: nn.Parameter,
        *,
        num_heads: int,
        window_size: int = 0,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.proj = proj
        self.rel_pos_h = rel_pos_h
        self.rel_pos_w = rel_pos_w
        self.num_heads = num_heads
        self.window_size = window_size
        self.form: Form | None = None

    def forward(self, x: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Attend within ``(B, H, W, dim)``, normalised tokens, and to ``prompts (P, dim)`` from every window.

        Prompts have no place in the grid: no relative position, no query. Returns ``(B, H, W, dim)``.
        """
        batch, height, width, _ = x.shape
        window = (self.window_size, self.window_size) if self.window_size else (height, width)
        qkv = project_padded(self.qkv, x, self.window_size) if self.window_size else self.qkv(x)
        q, k, v = _SplitHeads.apply(qkv, window, self.num_heads)  # type: ignore[no-untyped-call]
        cells = q.unflatten(1, window)
        table_h, table_w = relative_table(self.rel_pos_h, window[0]), relative_table(self.rel_pos_w, window[1])
        bias_h = torch.einsum("shwd,hkd->shwk", cells, table_h.to(q.dtype)).flatten(1, 2)
        bias_w = torch.einsum("shwd,wkd->shwk", cells, table_w.to(q.dtype)).flatten(1, 2)
        if prompts is not None:
            _, *further = self.qkv(prompts).view(-1, 3, self.num_heads, q.shape[-1]).permute(1, 2, 0, 3)
            times = q.shape[0] // self.num_heads  # sequences are ordered image, window, head
            k, v = (torch.cat([x, y.repeat(times, 1, 1)], dim=1) for x, y in zip((k, v), further, strict=True))
        attended = relative_attention(q, k, v, bias_h, bias_w, self.form)
        rows, columns = qkv.shape[1] // window[0], qkv.shape[2] // window[1]
        attended = attended.view(batch, rows, columns, self.num_heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
        grid = attended.reshape(batch, rows * window[0], columns * window[1], -1)[:, :height, :width]
        projected: Tensor = self.proj(grid)
        return projected


class _SplitHeads(torch.autograd.Function):
    """From the fused projection of a grid to q, k and v per window and head; each way in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, window: tuple[int, int], heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``(B, H, W, 3 dim)`` into three ``(B * windows * heads, window tokens, dim / heads)``."""
        batch, height, width, channels = qkv.shape
        rows, columns = height // window[0], width // window[1]
        ctx.shape = batch, rows, columns, heads, *window, channels // 3 // heads
        split = qkv.view(batch, rows, window[0], columns, window[1], 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = (part.reshape(-1, window[0] * window[1], channels // 3 // heads) for part in split)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Join the three gradients."""
        batch, rows, columns, heads, height, width, depth = ctx.shape
        joined = gradients[0].new_empty(batch, rows, height, columns, width, 3, heads, depth)
        for i, gradient in enumerate(gradients):
            joined[:, :, :, :, :, i] = gradient.view(ctx.shape).permute(0, 1, 4, 2, 5, 3, 6)
        return joined.view(batch, rows * height, columns * width, -1), None, None


class _PadGrid(torch.autograd.Function):
    """Fill a grid up to whole windows; each way in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, empty: Tensor, window: int) -> Tensor:
        """Fill ``(B, H, W, out)`` up below and right with ``empty (1, out)``."""
        batch, height, width, channels = projected.shape
        ctx.size = height, width
        filled = projected.new_empty(batch, height + -height % window, width + -width % window, channels)
        filled[:, :height, :width] = projected
        filled[:, height:] = empty
        filled[:, :height, width:] = empty
        return filled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Cut the grid out again; what the filling got is summed."""
        height, width = ctx.size
        empty = None
        if ctx.needs_input_grad[1]:
            below, beside = gradient[:, height:], gradient[:, :height, width:]
            empty = (below.sum(dim=(0, 1, 2)) + beside.sum(dim=(0, 1, 2)))[None]
        return gradient[:, :height, :width].contiguous(), empty, None


def project_padded(linear: nn.Module, x: Tensor, window: int) -> Tensor:
    """Project tokens and fill the grid up to whole windows with what the projection makes of zeros.

    Args:
        linear: a linear layer, or one that a fine-tuning method put in its place: it treats each token alone, or it
            has a method ``project_padded(x, window)`` of its own.
        x: ``(B, H, W, dim)``.
        window: tokens per window side.

    Returns:
        ``(B, H', W', out)``, H' and W' the next multiples of `window`.
    """
    own = getattr(linear, "project_padded", None)
    if own is not None:
        padded: Tensor = own(x, window)
        return padded
    return pad_projected(linear, linear(x), window)


def pad_projected(linear: nn.Module, projected: Tensor, window: int) -> Tensor:
    """Fill ``projected (B, H, W, out)``, from `linear`, up to whole windows with what `linear` makes of zeros."""
    if projected.shape[1] % window == 0 and projected.shape[2] % window == 0:
        return projected
    width: Any = linear.in_features
    empty = linear(projected.new_zeros(1, width))
    padded: Tensor = _PadGrid.apply(projected, empty, window)  # type: ignore[no-untyped-call]
    return padded
