"""LoRA: a trainable low-rank correction beside a frozen linear layer (Hu et al., ICLR 2022, arXiv 2106.09685).

The correction is added to the base layer's output in place by one ``addmm``, so the wide output is passed over once.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError
from semseg_automl.models.encoder import Encoder, Seam
from semseg_automl.models.mask_decoder import MaskDecoder, TokenAttention
from semseg_automl.peft.base import PeftMethod, freeze_pretrained

Scaling = Literal["rank", "sqrt_rank"]


def check_rank(rank: int, base: nn.Linear) -> None:
    """Raise `ConfigError` unless ``1 <= rank <= min(in_features, out_features)``."""
    largest = min(base.in_features, base.out_features)
    if not 1 <= rank <= largest:
        raise ConfigError(
            f"rank is {rank}; a {base.in_features} -> {base.out_features} layer allows 1 to {largest}. "
            "Set optim.lora.rank within that range."
        )


def scale_of(alpha: float, rank: int, rule: Scaling) -> float:
    """Return the scale s of a correction, see `LoraLinear`."""
    return alpha / (rank if rule == "rank" else math.sqrt(rank))


class _AddLowRank(torch.autograd.Function):
    """``output + scaling * bottleneck @ lora_b.T``, written into `output`; the products each way in their fast order.

    Left to autograd, writing into a view of the wide output would copy its gradient three times, and the gradient of
    ``lora_b`` would be taken as ``(out x N) (N x r)``, ten times slower on a processor than ``(r x N) (N x out)``.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, bottleneck: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """Add to ``output (..., out)`` in place."""
        rows = lora_b.to(output.dtype).t().contiguous()
        narrow = bottleneck.reshape(-1, rows.shape[0]).to(output.dtype)
        output.view(-1, rows.shape[1]).addmm_(narrow, rows, alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(narrow, rows)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, bottleneck.shape, (bottleneck.dtype, lora_b.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient of the output on, and take those of bottleneck and `lora_b`."""
        narrow, rows = ctx.saved_tensors
        wide = gradient.reshape(-1, rows.shape[1])
        of_bottleneck = (wide @ rows.t()).mul_(ctx.scaling).view(ctx.shape).to(ctx.dtypes[0])
        of_b = (narrow.t() @ wide).mul_(ctx.scaling).t().to(ctx.dtypes[1])
        return gradient, of_bottleneck, of_b, None


def add_low_rank(output: Tensor, bottleneck: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Compute ``output + scaling * bottleneck @ lora_b.T``, into the fresh `output` of a linear layer.

    Args:
        output: ``(..., out)``, contiguous, no view, and not needed by any other autograd node.
        bottleneck: ``(..., r)``.
        lora_b: ``(out, r)``.
        scaling: of the correction.
    """
    if torch.compiler.is_compiling():  # the compiler decides itself what is written in place
        added = F.linear(bottleneck.to(output.dtype), lora_b.to(output.dtype))
        return output + scaling * added.view(output.shape)
    corrected: Tensor = _AddLowRank.apply(output, bottleneck, lora_b, scaling)  # type: ignore[no-untyped-call]
    return corrected


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank correction: ``h = W0 x + s B A x``.

    ``lora_A (r, in)`` starts Kaiming uniform with a = sqrt(5), ``lora_B (out, r)`` at zero, so the layer starts as
    the frozen one, bit for bit.

    Args:
        base: the linear layer to correct; it is kept, not copied.
        rank: r, the width of the bottleneck.
        alpha: numerator of the scale s.
        scaling_rule: ``rank``: s = alpha / r; ``sqrt_rank``: s = alpha / sqrt(r), which keeps the correction's size as
            the rank grows (Kalajdzievski, "rsLoRA", 2023, arXiv 2312.03732, equation 4).
        dora: train the length of each row of the corrected weight apart from its direction, by a parameter
            ``magnitude (out,)`` (Liu et al., "DoRA", ICML 2024, arXiv 2402.09353, equation 5; the length the direction
            is divided by counts as constant in the backward pass, section 4.3).

    Raises:
        ConfigError: the rank is larger than the layer.
    """

    magnitude: nn.Parameter | None

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int = 3,
        alpha: float = 32.0,
        scaling_rule: Scaling = "rank",
        dora: bool = False,
    ) -> None:
        super().__init__()
        check_rank(rank, base)
        self.base = base
        self.in_features = base.in_features
        self.rank = rank
        self.alpha = alpha
        self.scaling_rule: Scaling = scaling_rule
        self.scaling = scale_of(alpha, rank, scaling_rule)
        weight = base.weight
        self.lora_A = nn.Parameter(weight.new_empty(rank, base.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(weight.new_zeros(base.out_features, rank, dtype=torch.float32))
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(self._lengths()) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        corrected = self.correct(self.project(x), F.linear(x, self.lora_A))
        return corrected.view(*x.shape[:-1], self.base.out_features)

    def project(self, x: Tensor) -> Tensor:
        """Return what the base layer makes of ``x (..., in)``: ``(tokens, out)``, fresh memory to write to."""
        projected: Tensor = self.base(x.reshape(-1, x.shape[-1]))
        return projected

    def correct(self, projected: Tensor, bottleneck: Tensor) -> Tensor:
        """Add the correction made of ``bottleneck (..., r)`` to `projected`, whose last dimension is out.

        `projected` is written to; it may come from `project`, or be a tensor of its own, but no view.
        """
        corrected = add_low_rank(projected, bottleneck, self.lora_B, self.scaling)
        if self.magnitude is None:
            return corrected
        change = (self.magnitude / self._lengths() - 1).to(corrected.dtype)
        bias = 0 if self.base.bias is None else self.base.bias.to(corrected.dtype)
        return corrected + change * (corrected - bias)  # exactly `corrected` where the lengths are unchanged

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Return the length of each row of ``W0 + s B A``, ``(out,)``, without making that matrix."""
        if self.base.weight.is_meta:  # autocast knows no such device
            return self.lora_B[:, 0].detach().clone()
        with torch.autocast(device_type=self.lora_A.device.type, enabled=False):
            weight = self.base.weight.to(self.lora_A.dtype)
            cross = ((weight @ self.lora_A.t()) * self.lora_B).sum(dim=1)
            square = ((self.lora_B @ (self.lora_A @ self.lora_A.t())) * self.lora_B).sum(dim=1)
            return (weight.square().sum(dim=1) + 2 * self.scaling * cross + self.scaling**2 * square).sqrt()

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """Return `base` with the correction folded into its weight."""
        lengths = self._lengths()
        self.base.weight.addmm_(self.lora_B, self.lora_A, alpha=self.scaling)
        if self.magnitude is not None:
            self.base.weight.mul_((self.magnitude / lengths)[:, None])
        return self.base


class Lora(PeftMethod):
    """LoRA on the fused ``attn.qkv`` of every block (Hu et al. 2022; r = 3 and alpha = 32 as in Conv-LoRA's table).

    Args:
        rank: width of the bottleneck.
        alpha: numerator of the correction's scale.
        scaling: see `LoraLinear`.
        dora: see `LoraLinear`.
        decoder_rank: rank of further corrections on the attention layers of the mask decoder, 0 for none. Where the
            decoder is pretrained those layers are frozen then, and only their corrections train.
        b_lr_ratio: learning rate of ``lora_B`` as a multiple of the others' (Hayou, Ghosh, Yu, "LoRA+", ICML 2024,
            arXiv 2402.12354).
        last_blocks: adapt only so many blocks, the last ones; None for all. What comes before them stays frozen, so its
            features need computing only once per image.
    """

    name: ClassVar[str] = "lora"
    needs: ClassVar[frozenset[str]] = frozenset({"qkv"})

    def __init__(
        self,
        *,
        rank: int = 3,
        alpha: float = 32.0,
        scaling: Scaling = "rank",
        dora: bool = False,
        decoder_rank: int = 0,
        b_lr_ratio: float = 1.0,
        last_blocks: int | None = None,
    ) -> None:
        if rank < 1 or decoder_rank < 0:
            raise ConfigError(
                f"optim.lora.rank is {rank} and decoder_rank {decoder_rank}; allowed: 1 or more, and 0 or more."
            )
        if scaling not in ("rank", "sqrt_rank"):
            raise ConfigError(f"optim.lora.scaling is '{scaling}'; allowed: rank, sqrt_rank.")
        if not 0 < b_lr_ratio <= 1000:
            raise ConfigError(f"optim.lora.b_lr_ratio is {b_lr_ratio}; allowed: above 0, up to 1000.")
        self.rank = rank
        self.alpha = alpha
        self.scaling: Scaling = scaling
        self.dora = dora
        self.decoder_rank = decoder_rank
        self.b_lr_ratio = b_lr_ratio
        self.last_blocks = last_blocks

    def wrap(self, seam: Seam) -> nn.Module:
        """Return the adapted layer that takes the place of the one at `seam`."""
        return LoraLinear(seam.module, rank=self.rank, alpha=self.alpha, scaling_rule=self.scaling, dora=self.dora)

    def _adapt(self, encoder: Encoder) -> None:
        freeze_pretrained(encoder)
        for seam in self._places(encoder):
            seam.replace(self.wrap(seam))

    def _fold(self, encoder: Encoder) -> None:
        for seam in self._places(encoder):
            seam.replace(seam.module.folded())

    def _places(self, encoder: Encoder) -> list[Seam]:
        """Return the layers to correct.

        Raises:
            ConfigError: `last_blocks` is more than there are.
        """
        places = [seams["qkv"] for seams in encoder.seams()]
        adapted = len(places) if self.last_blocks is None else self.last_blocks
        if not 1 <= adapted <= len(places):
            raise ConfigError(f"optim.lora.last_blocks is {adapted}; the encoder has {len(places)} blocks.")
        return places[-adapted:]

    def apply_to_decoder(self, decoder: MaskDecoder, *, pretrained: bool) -> None:
        """Put low-rank corrections beside the decoder's attention layers, if there are to be any."""
        if not self.decoder_rank:
            return
        for attention in (m for m in decoder.transformer.modules() if isinstance(m, TokenAttention)):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                base: nn.Linear = getattr(attention, name)
                base.requires_grad_(not pretrained)
                # The scale of the encoder's corrections, whatever the two ranks.
                alpha = self.decoder_rank * scale_of(self.alpha, self.rank, self.scaling)
                setattr(attention, name, LoraLinear(base, rank=self.decoder_rank, alpha=alpha))

    def learning_rate_ratio(self, parameter_name: str) -> float:
        """Return the parameter's learning rate as a multiple of the plan's."""
        return self.b_lr_ratio if parameter_name.endswith("lora_B") else 1.0
