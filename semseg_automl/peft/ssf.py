"""SSF: scale and shift what frozen layers give (Lian et al., NeurIPS 2022, arXiv 2210.08823)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from semseg_automl.errors import UnsupportedCombination
from semseg_automl.models.encoder import Encoder, Seam
from semseg_automl.models.layers import LayerNorm2d
from semseg_automl.peft.base import PeftMethod, freeze_pretrained

PARTS = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")


class ScaleShift(nn.Module):
    """A frozen layer and a channelwise correction of what it gives: ``gamma * f(x) + beta`` (equation 1 of the paper).

    Starts with 1 and 0, as the frozen layer, bit for bit (the published code draws around them).

    Args:
        base: a linear layer, a convolution or a normalisation; it is kept, not copied.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        weight: Any = base.weight
        self.on_maps = isinstance(base, nn.Conv2d | LayerNorm2d)
        self.scale = nn.Parameter(torch.ones(weight.shape[0], device=weight.device))
        self.shift = nn.Parameter(torch.zeros(weight.shape[0], device=weight.device))
        if isinstance(base, nn.Linear):
            self.in_features = base.in_features  # attention asks for it where it fills windows up

    def forward(self, x: Tensor) -> Tensor:
        """Map as `base` does and correct channels: the second dimension of maps, the last one of tokens."""
        shape = (-1, 1, 1) if self.on_maps else (-1,)
        out: Tensor = self.base(x)
        return out * self.scale.view(shape).to(out.dtype) + self.shift.view(shape).to(out.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """Return `base` with scale and shift folded into its weight and bias."""
        base: Any = self.base
        base.weight.mul_(self.scale.view(-1, *[1] * (base.weight.ndim - 1)))
        if base.bias is None:
            base.bias = nn.Parameter(self.shift.detach().clone(), requires_grad=False)
        else:
            base.bias.mul_(self.scale).add_(self.shift)
        return self.base


class Ssf(PeftMethod):
    """Scale and shift behind both norms, qkv, projection and MLP layers of every block, patch embedding and neck.

    Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022, section 3.2. A neck that starts fresh trains whole.
    """

    name: ClassVar[str] = "ssf"
    needs: ClassVar[frozenset[str]] = frozenset({*PARTS, "patch_embed"})

    def _adapt(self, encoder: Encoder) -> None:
        freeze_pretrained(encoder)
        for seam in _places(encoder):
            seam.replace(ScaleShift(seam.module))

    def _fold(self, encoder: Encoder) -> None:
        places = _places(encoder)
        without = {type(seam.module.base).__name__ for seam in places if not hasattr(seam.module.base, "bias")}
        if without:
            raise UnsupportedCombination(
                f"optim.peft is 'ssf', which cannot be merged here: {', '.join(without)} has no bias to take the "
                "shift. Use the segmentor as it is."
            )
        for seam in places:
            seam.replace(seam.module.folded())


def _places(encoder: Encoder) -> list[Seam]:
    """Return every layer that is scaled and shifted."""
    patch = encoder.patch_seam()
    blocks = [seams[part] for seams in encoder.seams() for part in PARTS]
    return [*([patch] if patch is not None else []), *blocks, *encoder.neck_seams()]
