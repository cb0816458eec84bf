"""LoRA: a trainable low-rank correction beside a frozen linear layer (Hu et al., ICLR 2022, arXiv 2106.09685).

The correction is added to the base layer's output in place by one ``addmm``, so the wide output is passed over once.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError
from semseg_automl.models.encoder import Encoder
from semseg_automl.peft.base import PeftMethod, freeze_pretrained


def check_rank(rank: int, base: nn.Linear) -> None:
    """Raise `ConfigError` unless ``1 <= rank <= min(in_features, out_features)``."""
    largest = min(base.in_features, base.out_features)
    if not 1 <= rank <= largest:
        raise ConfigError(
            f"rank is {rank}; a {base.in_features} -> {base.out_features} layer allows 1 to {largest}. "
            "Set optim.lora.rank within that range."
        )


def add_low_rank(output: Tensor, bottleneck: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Compute ``output + scaling * bottleneck @ lora_b.T`` in place on the fresh `output` of a linear layer.

    Args:
        output: ``(..., out)``, contiguous, not needed by any other autograd node.
        bottleneck: ``(..., r)``.
        lora_b: ``(out, r)``.
        scaling: alpha / r.
    """
    out = output.shape[-1]
    flat = output.reshape(-1, out)
    lora_b = lora_b.to(flat.dtype)
    flat.addmm_(bottleneck.reshape(-1, bottleneck.shape[-1]).to(flat.dtype), lora_b.t(), alpha=scaling)
    return flat.view(output.shape)


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank correction: ``h = W0 x + (alpha / r) B A x``.

    ``lora_A (r, in)`` starts Kaiming uniform with a = sqrt(5), ``lora_B (out, r)`` at zero, so the layer starts as
    the frozen one, bit for bit.

    Args:
        base: the linear layer to correct; it is kept, not copied.
        rank: r, the width of the bottleneck.
        alpha: scale of the correction, divided by `rank`.

    Raises:
        ConfigError: the rank is larger than the layer.
    """

    def __init__(self, base: nn.Linear, *, rank: int = 3, alpha: float = 32.0) -> None:
        super().__init__()
        check_rank(rank, base)
        self.base = base
        self.in_features = base.in_features
        self.rank = rank
        self.scaling = alpha / rank
        weight = base.weight
        self.lora_A = nn.Parameter(weight.new_empty(rank, base.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(weight.new_zeros(base.out_features, rank, dtype=torch.float32))
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return add_low_rank(self.base(x), F.linear(x, self.lora_A), self.lora_B, self.scaling)


class Lora(PeftMethod):
    """LoRA on the fused ``attn.qkv`` of every block (Hu et al. 2022; r = 3 and alpha = 32 as in Conv-LoRA's table).

    Args:
        rank: width of the bottleneck.
        alpha: scale of the correction, divided by `rank`.
        last_blocks: adapt only so many blocks, the last ones; None for all. What comes before them stays frozen, so its
            features need computing only once per image.
    """

    name: ClassVar[str] = "lora"

    def __init__(self, *, rank: int = 3, alpha: float = 32.0, last_blocks: int | None = None) -> None:
        if rank < 1:
            raise ConfigError(f"optim.lora.rank is {rank}; allowed: 1 or more.")
        self.rank = rank
        self.alpha = alpha
        self.last_blocks = last_blocks

    def wrap(self, base: nn.Linear) -> nn.Module:
        """Return the adapted layer that takes the place of `base`."""
        return LoraLinear(base, rank=self.rank, alpha=self.alpha)

    def apply(self, encoder: Encoder) -> None:
        """Freeze the encoder and wrap each block's ``attn.qkv``.

        Raises:
            ConfigError: `last_blocks` is more than there are.
        """
        freeze_pretrained(encoder)
        blocks = encoder.attention_blocks(self.name)
        adapted = len(blocks) if self.last_blocks is None else self.last_blocks
        if not 1 <= adapted <= len(blocks):
            raise ConfigError(f"optim.lora.last_blocks is {adapted}; the encoder has {len(blocks)} blocks.")
        for block in blocks[-adapted:]:
            block.attn.qkv = self.wrap(block.attn.qkv)
