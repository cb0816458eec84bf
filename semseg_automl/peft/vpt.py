"""VPT: trained tokens that every block's attention looks at (Jia et al., ECCV 2022, arXiv 2203.12119)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from semseg_automl.errors import ConfigError
from semseg_automl.models.encoder import Encoder
from semseg_automl.peft.base import PeftMethod, freeze_pretrained


class PromptedAttention(nn.Module):
    """A block's attention over a grid, looking at trained prompts as well.

    The prompts stand among the normalised tokens and, where attention is within windows, in each of them; they have no
    relative position. What attention would give for them is dropped, since the next block brings its own ("deep"
    prompts), so it is not computed.

    Args:
        attn: the attention; it is kept, not copied.
        prompts: ``(P, C)``.
    """

    def __init__(self, attn: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.attn = attn
        self.prompts = nn.Parameter(prompts)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``(B, H, W, C)``; returns the same shape."""
        attended: Tensor = self.attn(x, prompts=self.prompts)
        return attended


class PrependedAttention(PromptedAttention):
    """The same for an attention over sequences ``(B, N, C)``: prompts are prepended, and cut off behind it.

    Rotary positions are for the last tokens of a sequence; the attention is told that there are more before them.
    """

    def __init__(self, attn: nn.Module, prompts: Tensor) -> None:
        super().__init__(attn, prompts)
        before: Any = getattr(attn, "num_prefix_tokens", None)
        if before is not None:
            attn.num_prefix_tokens = before + prompts.shape[0]

    def forward(self, x: Tensor, **positions: Any) -> Tensor:
        """Attend within ``(B, N, C)``; returns the same shape."""
        prompts = self.prompts.to(x.dtype).expand(x.shape[0], -1, -1)
        attended: Tensor = self.attn(torch.cat([prompts, x], dim=1), **positions)
        return attended[:, prompts.shape[1] :]


class Vpt(PeftMethod):
    """Deep visual prompt tuning (Jia et al., "Visual Prompt Tuning", ECCV 2022, equation 5).

    Here the prompts join the tokens behind the block's first normalisation, because SAM cuts windows there.

    Args:
        tokens: prompts per block; 12 in Conv-LoRA's table.
    """

    name: ClassVar[str] = "vpt"
    needs: ClassVar[frozenset[str]] = frozenset({"prompts", "qkv"})
    changes_at_init: ClassVar[str] = "attention gives a share of its weight to prompts from the start"
    not_mergeable: ClassVar[str] = "prompts are tokens, not weights"

    def __init__(self, *, tokens: int = 12) -> None:
        if not 1 <= tokens <= 1024:
            raise ConfigError(f"optim.vpt.tokens is {tokens}; allowed: 1 to 1024.")
        self.tokens = tokens

    def _adapt(self, encoder: Encoder) -> None:
        freeze_pretrained(encoder)
        device = next(encoder.parameters()).device
        # As the published code draws them: uniform, as wide as Xavier's rule for a patch and a token.
        bound = math.sqrt(6 / (3 * encoder.stride**2 + encoder.embed_dim))
        for seams in encoder.seams():
            seam = seams["prompts"]
            prompts = torch.empty(self.tokens, encoder.embed_dim, device=device).uniform_(-bound, bound)
            takes_prompts = getattr(seam.module, "takes_prompts", False)
            seam.replace((PromptedAttention if takes_prompts else PrependedAttention)(seam.module, prompts))
