"""Conv-LoRA: a mixture of multi-scale convolution experts inside LoRA's bottleneck.

Zhong, Tang, He, Fang, Yuan, "Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything Model",
ICLR 2024 (arXiv 2401.17868). An expert upsamples the bottleneck map by its scale, convolves it, and downsamples it
again. Here it is computed in a collapsed form that is exact: downsampling reads at most four of the upsampled rows
per output row, so only those are ever made, as products with small matrices that depend on scale and grid alone.
All samples of a batch go through one batched product with the matrices of their own expert, without a host
synchronisation. The plain form is the oracle in the tests, not in this file.
"""

from __future__ import annotations

import math
import operator
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.models.attention import pad_projected
from semseg_automl.models.encoder import Seam
from semseg_automl.models.layers import window_partition, window_unpartition
from semseg_automl.peft.lora import Lora, LoraLinear, Scaling

Activation = Literal["gelu", "none"]
Interpolation = Literal["bicubic", "bilinear"]
Gate = Literal["balanced", "learned"]

BALANCE_WEIGHT = 1e-2
NOISE_FLOOR = 1e-2
CUBIC_A = -0.75

_PHASES: dict[str, int] = {"bicubic": 4, "bilinear": 2}
_matrix_cache: dict[tuple[int, int, str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def resize_matrix(source: int, target: int, interpolation: Interpolation) -> NDArray[np.float64]:
    """Return the ``(target, source)`` matrix of one-dimensional resizing as torch computes it.

    Half-pixel centres (``align_corners=False``), no antialiasing, taps clamped at the border.

    Args:
        source: length read.
        target: length written.
        interpolation: ``bicubic`` (Keys' kernel, a = -0.75) or ``bilinear``.
    """
    position = (np.arange(target) + 0.5) * source / target - 0.5
    if interpolation == "bilinear":
        position = position.clip(0)  # torch clamps the coordinate for linear, the taps for cubic
    first = np.floor(position).astype(np.int64)
    t = position - first
    if interpolation == "bilinear":
        taps = {0: 1 - t, 1: t}
    else:
        taps = {-1: _cubic_far(1 + t), 0: _cubic_near(t), 1: _cubic_near(1 - t), 2: _cubic_far(2 - t)}
    matrix = np.zeros((target, source))
    for offset, weight in taps.items():
        np.add.at(matrix, (np.arange(target), (first + offset).clip(0, source - 1)), weight)
    return matrix


def _cubic_near(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel for distances up to 1."""
    return ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1


def _cubic_far(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel for distances from 1 to 2."""
    return ((CUBIC_A * x - 5 * CUBIC_A) * x + 8 * CUBIC_A) * x - 4 * CUBIC_A


def collapse_matrices(
    length: int, scale: int, interpolation: Interpolation
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what upsample, 3-tap convolution and downsample do along one axis, collapsed to the small grid.

    For output position i, downsampling reads the upsampled positions ``j_p(i)`` with weights ``a_p(i)``; tap t of
    the convolution there reads the upsampled position ``j_p(i) + t``, which is a row of the upsampling matrix, or
    zero outside the map (the convolution's zero padding).

    Returns:
        taps ``(P, 3, length, length)`` and weights ``(P, length)``; P phases are the same for every scale (4 for
        bicubic, 2 for bilinear) and unused ones have weight zero.
    """
    phases = _PHASES[interpolation]
    taps = np.zeros((phases, 3, length, length))
    weights = np.zeros((phases, length))
    up = resize_matrix(length, length * scale, interpolation)
    down = resize_matrix(length * scale, length, interpolation)
    padded = np.pad(up, ((1, 1), (0, 0)))  # row j + 1 of `padded` is row j of `up`; the outermost are the padding
    for i in range(length):
        read = np.flatnonzero(np.abs(down[i]) > 1e-12)
        weights[: len(read), i] = down[i, read]
        for t in range(3):
            taps[: len(read), t, i] = padded[read + t]
    return taps, weights


def expert_matrices(
    length: int, experts: int, interpolation: Interpolation, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return `collapse_matrices` of scales 1 to `experts`, stacked: ``(M, P, 3, L, L)`` and ``(M, P, L)``, cached."""
    key = (length, experts, interpolation, device, dtype)
    if key in _matrix_cache:
        return _matrix_cache[key]
    taps, weights = zip(*(collapse_matrices(length, s, interpolation) for s in range(1, experts + 1)), strict=True)
    matrices = (
        torch.from_numpy(np.stack(taps)).to(device=device, dtype=dtype),
        torch.from_numpy(np.stack(weights)).to(device=device, dtype=dtype),
    )
    if not torch.compiler.is_compiling():  # while exporting these are stand-ins without values: never keep them
        _matrix_cache[key] = matrices
    return matrices


def squared_variation(values: Tensor) -> Tensor:
    """Return CV^2, the unbiased variance over the squared mean of ``(M,)`` values; 0 for a single one."""
    if values.shape[0] == 1:
        return values.new_zeros(())
    return values.var() / (values.mean() ** 2 + 1e-10)


class ConvLoraLinear(LoraLinear):
    """A frozen linear layer with Conv-LoRA's correction, on token grids ``(B, H, W, in)``.

    ``z = A x``, ``z <- z + E_g(z)``, ``h = W0 x + s B z`` (equations 2 to 4 of the paper), where expert i
    is ``Down_i(GELU(Conv3x3(Up_i(z))))`` and ``E_g`` the expert that the gate chose for the sample. In SAM's windowed
    blocks B counts windows: gate and convolution work per window there.

    Parameters: ``lora_A (r, in)``, ``lora_B (out, r)``, ``w_gate (r, M)``, ``w_noise (r, M)``,
    ``expert_weight (M, r, r, 3, 3)``, ``expert_bias (M, r)``; entry i belongs to scale i + 1.

    Attributes:
        aux_loss: balancing loss of the last forward pass, a scalar (Shazeer et al. 2017, section 4).
        chosen_expert: ``(B,)`` index of the expert each sample went to in the last forward pass.

    Args:
        base: the linear layer to correct; it is kept, not copied.
        rank: see `LoraLinear`.
        alpha: see `LoraLinear`.
        scaling_rule: see `LoraLinear`.
        dora: see `LoraLinear`; the length is that of ``W0 + s B A``, the experts left out.
        experts: M, the number of experts; expert i works at scale i = 1 .. M.
        activation: ``gelu`` as in the reference implementation, ``none`` as the paper's equation reads.
        interpolation: ``bicubic`` or ``bilinear``.
        gate: ``balanced`` is the reference, where only the balancing loss trains the router; ``learned`` lets the
            task's gradient reach it through the chosen expert's softmax probability, straight-through (the value of
            the output is that of ``balanced``).
        windowed: where attention is within windows, gate and experts see each window alone, as in the paper; False lets
            them see the whole grid there too.

    Raises:
        ConfigError: a value is out of range.
    """

    aux_loss: Tensor
    chosen_expert: Tensor

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int = 3,
        alpha: float = 32.0,
        scaling_rule: Scaling = "rank",
        dora: bool = False,
        experts: int = 8,
        activation: Activation = "gelu",
        interpolation: Interpolation = "bicubic",
        gate: Gate = "balanced",
        windowed: bool = True,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, scaling_rule=scaling_rule, dora=dora)
        check_options(experts, activation, interpolation, gate)
        self.experts = experts
        self.activation = activation
        self.interpolation: Interpolation = interpolation
        self.gate = gate
        self.windowed = windowed

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(base.weight.new_zeros(*shape, dtype=torch.float32))

        self.w_gate = empty(rank, experts)
        self.w_noise = empty(rank, experts)
        self.expert_weight = empty(experts, rank, rank, 3, 3)
        self.expert_bias = empty(experts, rank)
        if not self.lora_A.is_meta:
            for weight in self.expert_weight:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Conv2d starts
        self.aux_loss = torch.zeros(())
        # To the tracers of torch.compile and torch.export these matrices are constants. Said here, since to say it
        # loads the tracers, a second's work, which who checks data or plans a fit does not need.
        torch.compiler.assume_constant_result(expert_matrices)
        self.chosen_expert = torch.zeros(0, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, in)`` to ``(B, H, W, out)``; sets `aux_loss` and `chosen_expert`."""
        z = F.linear(x, self.lora_A)
        return self.correct(self.project(x), z + self._mix(z)).view(*x.shape[:-1], self.base.out_features)

    def project_padded(self, x: Tensor, window: int) -> Tensor:
        """Map ``(B, H, W, in)``, filled up to whole windows with zeros; returns ``(B, H', W', out)``.

        Only tokens of the grid go through the linear layer: the zeros that fill up the last windows leave its bias,
        and zeros in the bottleneck.
        """
        z = F.linear(x, self.lora_A)
        if self.windowed:
            windows, padded = window_partition(z, window)
            mixed = window_unpartition(windows + self._mix(windows), window, padded, padded)
        else:
            mixed = F.pad(z + self._mix(z), (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))
        projected = self.project(x)
        if mixed.shape != z.shape:
            projected = pad_projected(self.base, projected.view(*x.shape[:-1], -1), window)
        return self.correct(projected, mixed).view(*mixed.shape[:-1], -1)

    def on_sequence(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map a sequence ``(B, P + H * W, in)`` to ``(B, P + H * W, out)``; sets `aux_loss` and `chosen_expert`.

        The last H * W tokens are a `grid` ``(H, W)``, corrected as by `forward`. The P tokens in front (class token,
        registers) have no place in it: their correction is plain LoRA's. The base layer sees the sequence whole, so
        that it computes bit for bit what it does without this layer.
        """
        z = F.linear(x, self.lora_A)
        prefix = x.shape[1] - grid[0] * grid[1]
        maps = z[:, prefix:].unflatten(1, grid)
        mixed = (maps + self._mix(maps)).flatten(1, 2)
        if prefix:
            mixed = torch.cat([z[:, :prefix].to(mixed.dtype), mixed], dim=1)
        return self.correct(self.project(x), mixed).view(*x.shape[:-1], self.base.out_features)

    def _mix(self, z: Tensor) -> Tensor:
        """Return what the chosen experts add to ``z (B, H, W, r)``."""
        expert, multiplier = self._route(z)
        convolved = self._convolve(z, expert)
        if multiplier is not None:
            convolved = convolved * multiplier.to(convolved.dtype)[:, None, None, None]
        return convolved

    def _route(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose an expert for each sample of ``z (B, H, W, r)``; top-1 noisy gating of Shazeer et al. 2017.

        Returns the index ``(B,)`` and, for the learned gate, a factor ``(B,)`` of value 1 that carries its gradient.
        """
        # Float32 whatever autocast says: in float16 the normal CDF below gives NaN.
        with torch.autocast(device_type=z.device.type, enabled=False):
            dtype = torch.promote_types(self.w_gate.dtype, torch.float32)
            pooled = z.to(dtype).mean(dim=(1, 2))
            clean = pooled @ self.w_gate.to(dtype)
            if self.training and self.experts > 1:
                noise_std = F.softplus(pooled @ self.w_noise.to(dtype)) + NOISE_FLOOR
                logits = clean + torch.randn_like(clean) * noise_std
                load = self._expected_load(clean, logits, noise_std)
            else:
                logits = clean
                load = F.one_hot(logits.argmax(dim=1), self.experts).float().sum(dim=0)
            expert = logits.argmax(dim=1)
            importance = F.one_hot(expert, self.experts).float().sum(dim=0)
            if not torch.compiler.is_exporting():  # an exported graph has outputs, not attributes
                self.aux_loss = BALANCE_WEIGHT * (squared_variation(importance) + squared_variation(load))
                self.chosen_expert = expert.detach()
            if self.gate == "balanced":
                return expert, None
            probability = logits.softmax(dim=1).gather(1, expert[:, None]).squeeze(1)
            return expert, probability / probability.detach()

    def _expected_load(self, clean: Tensor, logits: Tensor, noise_std: Tensor) -> Tensor:
        """Return the expected number of samples per expert ``(M,)`` if the noise were drawn again, differentiable.

        Shazeer et al. 2017, appendix A, for k = 1: an expert is in if it beats the best of the others.
        """
        best = logits.topk(2, dim=1).values
        is_in = logits > best[:, 1:]
        rival = torch.where(is_in, best[:, 1:], best[:, :1])
        load: Tensor = torch.special.ndtr((clean - rival) / noise_std).sum(dim=0)
        return load

    def _convolve(self, z: Tensor, expert: Tensor) -> Tensor:
        """Apply to each sample of ``z (B, H, W, r)`` its own expert, in the collapsed exact form."""
        batch, height, width, rank = z.shape
        dtype = z.dtype if z.dtype in (torch.float32, torch.float64) else torch.float32
        with torch.autocast(device_type=z.device.type, enabled=False):
            z = z.to(dtype)
            # index: a compiler that has seen several sizes hands on symbols, of which no matrix can be made.
            sides = operator.index(height), operator.index(width)
            (row_taps, row_weights), (column_taps, column_weights) = (
                expert_matrices(side, self.experts, self.interpolation, z.device, dtype) for side in sides
            )
            phases = row_taps.shape[1]
            row_taps, column_taps = row_taps[expert], column_taps[expert]  # (B, P, 3, L, L)
            kernel = self.expert_weight.to(dtype)[expert]  # (B, out, in, t, u)
            # Rows: (B, P*3*H, H) x (B, H, W*r), then the kernel over (t, in) for each column tap u.
            rows = row_taps.reshape(batch, phases * 3 * height, height) @ z.reshape(batch, height, width * rank)
            rows = rows.view(batch, phases, 3, height, width, rank).permute(0, 1, 3, 4, 2, 5)
            kernel = kernel.permute(0, 3, 2, 4, 1).reshape(batch, 3 * rank, 3 * rank)  # (t, in) x (u, out)
            mixed = rows.reshape(batch, phases * height * width, 3 * rank) @ kernel
            # Columns: contract (u, w) with (B, u*W, Q*W').
            mixed = mixed.view(batch, phases, height, width, 3, rank).permute(0, 1, 2, 5, 4, 3)
            mixed = mixed.reshape(batch, phases * height * rank, 3 * width)
            columns = column_taps.permute(0, 2, 4, 1, 3).reshape(batch, 3 * width, phases * width)
            maps = (mixed @ columns).view(batch, phases, height, rank, phases, width)
            maps = maps + self.expert_bias.to(dtype)[expert][:, None, None, :, None, None]
            if self.activation == "gelu":
                maps = F.gelu(maps)
            weights = row_weights[expert][:, :, :, None, None, None] * column_weights[expert][:, None, None, None]
            convolved: Tensor = (maps * weights).sum(dim=(1, 4)).transpose(2, 3)
            return convolved


def check_options(experts: int, activation: str, interpolation: str, gate: str) -> None:
    """Raise `ConfigError` naming the allowed values unless all options are known."""
    if experts < 1:
        raise ConfigError(f"experts is {experts}; allowed: 1 or more. Set optim.lora.experts.")
    allowed = {
        "activation": (activation, ("gelu", "none")),
        "interpolation": (interpolation, ("bicubic", "bilinear")),
        "gate": (gate, ("balanced", "learned")),
    }
    for option, (value, known) in allowed.items():
        if value not in known:
            raise ConfigError(f"{option} is '{value}'; allowed: {', '.join(known)}.")


class ConvLora(Lora):
    """Conv-LoRA on the fused ``attn.qkv`` of every block (Zhong et al., ICLR 2024, section 3).

    Args:
        experts: number of convolution experts, of scales 1, 2, ..., `experts`.
        activation: see `ConvLoraLinear`.
        interpolation: see `ConvLoraLinear`.
        gate: see `ConvLoraLinear`.
        windowed: see `ConvLoraLinear`.
        rank: see `Lora`, as for the options that follow.
        alpha: see `Lora`.
        scaling: see `Lora`.
        dora: see `Lora`.
        decoder_rank: see `Lora`.
        b_lr_ratio: see `Lora`.
        last_blocks: see `Lora`.
    """

    name: ClassVar[str] = "conv_lora"
    not_mergeable: ClassVar[str] = "its experts convolve over the grid, which no linear layer does"

    def __init__(
        self,
        *,
        experts: int = 8,
        activation: Activation = "gelu",
        interpolation: Interpolation = "bicubic",
        gate: Gate = "balanced",
        windowed: bool = True,
        rank: int = 3,
        alpha: float = 32.0,
        scaling: Scaling = "rank",
        dora: bool = False,
        decoder_rank: int = 0,
        b_lr_ratio: float = 1.0,
        last_blocks: int | None = None,
    ) -> None:
        super().__init__(
            rank=rank,
            alpha=alpha,
            scaling=scaling,
            dora=dora,
            decoder_rank=decoder_rank,
            b_lr_ratio=b_lr_ratio,
            last_blocks=last_blocks,
        )
        check_options(experts, activation, interpolation, gate)
        self.experts = experts
        self.activation: Activation = activation
        self.interpolation: Interpolation = interpolation
        self.gate: Gate = gate
        self.windowed = windowed

    def wrap(self, seam: Seam) -> nn.Module:
        """Return the adapted layer that takes the place of the one at `seam`.

        Raises:
            UnsupportedCombination: experts are to see the whole grid, which the layer is never handed.
        """
        if seam.in_windows and not self.windowed:
            raise UnsupportedCombination(
                f"optim.lora.windowed is false with optim.peft='{self.name}', but this encoder hands its layers one "
                "window at a time. Leave it out, or use sam_vit_b, sam_vit_l or sam_vit_h."
            )
        return ConvLoraLinear(
            seam.module,
            rank=self.rank,
            alpha=self.alpha,
            scaling_rule=self.scaling,
            dora=self.dora,
            experts=self.experts,
            activation=self.activation,
            interpolation=self.interpolation,
            gate=self.gate,
            windowed=self.windowed,
        )
