"""LST: a small network beside the frozen encoder (Sung et al., NeurIPS 2022, arXiv 2206.06522)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError
from semseg_automl.models.encoder import TOKENS, Encoder, SideNetwork
from semseg_automl.models.layers import attend
from semseg_automl.peft.base import PeftMethod, freeze_pretrained

TEMPERATURE = 0.1
"""Of the gates, as in the paper's section 3.2."""
HEADS = 8
MLP_RATIO = 2
TABLE_WIDTH, TABLE_DIM = 112, 1280
"""Width of the side blocks beside ViT-H in Conv-LoRA's table, and ViT-H's own."""


class SideBlock(nn.Module):
    """A narrow pre-norm transformer block with attention over the whole grid.

    Args:
        width: of its tokens, divisible by the 8 heads.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.lin1 = nn.Linear(width, MLP_RATIO * width)
        self.lin2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, N, width)`` to tokens of the same shape."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.lin2(F.gelu(self.lin1(self.norm2(x))))
        return out


class LadderSideNetwork(SideNetwork):
    """Side block i reads ``mu_i s + (1 - mu_i) Ladder_i(h_i)``: what the last one gave, and the encoder's tokens.

    ``mu_i = sigmoid(gate_i / T)``. What the neck reads of a tapped block is ``h + Up(s)``. `Up` starts at zero, so that
    the neck reads the frozen tokens before the first step.

    Args:
        dim: width of the encoder's tokens.
        width: of the side blocks.
        depth: number of blocks.
    """

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.ladders = nn.ModuleList(nn.Linear(dim, width) for _ in range(depth))
        self.blocks = nn.ModuleList(SideBlock(width) for _ in range(depth))
        self.gates = nn.Parameter(torch.zeros(depth))
        self.up = nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, grids: list[Tensor], taps: Sequence[int]) -> list[Tensor]:
        """Return what the neck reads of blocks `taps`, given the tokens ``(B, H, W, dim)`` after every block."""
        keep = torch.sigmoid(self.gates / TEMPERATURE)
        side: Tensor | None = None
        read = []
        for index, (ladder, block, grid) in enumerate(zip(self.ladders, self.blocks, grids, strict=True)):
            seen = (1 - keep[index]) * ladder(grid.flatten(1, 2))
            side = block(seen if side is None else keep[index] * side + seen)
            if index in taps:
                read.append(grid + self.up(side).view(grid.shape))
        return read


class Lst(PeftMethod):
    """Ladder side tuning (Sung, Cho, Bansal, "LST", NeurIPS 2022, section 3): no gradient enters the encoder.

    Args:
        width: of the side blocks, divisible by 8; None for the share of the encoder's width that Conv-LoRA's table has
            (112 of 1280), rounded to a multiple of 16.
    """

    name: ClassVar[str] = "lst"
    needs: ClassVar[frozenset[str]] = frozenset({TOKENS})
    not_mergeable: ClassVar[str] = "it is a network of its own beside the encoder"
    frozen_prefix: ClassVar[bool] = True
    reads_all_blocks: ClassVar[bool] = True

    def __init__(self, *, width: int | None = None) -> None:
        if width is not None and (width < HEADS or width % HEADS):
            raise ConfigError(f"optim.lst.width is {width}; it must be divisible by its {HEADS} heads.")
        self.width = width

    def _adapt(self, encoder: Encoder) -> None:
        freeze_pretrained(encoder)
        usual = max(16, 16 * round(encoder.embed_dim * TABLE_WIDTH / TABLE_DIM / 16))
        with torch.device(next(encoder.parameters()).device):
            encoder.side = LadderSideNetwork(encoder.embed_dim, self.width or usual, len(encoder.blocks))
