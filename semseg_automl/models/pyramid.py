"""Hierarchical networks as encoders: feature maps, one per reduction, to embeddings at one sixteenth of the input.

What network gives the maps is a subclass's to say; none is built here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.models.encoder import Encoder, EncoderState
from semseg_automl.models.layers import LayerNorm2d

EMBEDDING_STRIDE = 16


class PyramidNeck(nn.Module):
    """Feature maps to embeddings: each normed and projected, coarse ones enlarged, the sum through a 3x3 convolution.

    The 3x3 convolution between two norms is SAM's neck; projecting and adding the levels is that of feature pyramids
    (Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017), all at one scale.

    Args:
        channels: channels of each map, the finest first.
        reductions: reduction of each map; the first is at most `EMBEDDING_STRIDE`.
        out_channels: channels of the embeddings.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.enlarge = tuple(max(1, reduction // EMBEDDING_STRIDE) for reduction in reductions)
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in channels)
        self.laterals = nn.ModuleList(nn.Conv2d(width, out_channels, kernel_size=1, bias=False) for width in channels)
        self.norm1 = LayerNorm2d(out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = LayerNorm2d(out_channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map what `pool_to_stride` returned to embeddings ``(B, out_channels, H, W)`` of the first map's size."""
        height, width = maps[0].shape[-2:]
        levels = []
        for features, norm, lateral, factor in zip(maps, self.norms, self.laterals, self.enlarge, strict=True):
            level: Tensor = lateral(norm(features))
            if factor > 1:
                level = F.interpolate(level, scale_factor=factor, mode="bilinear", align_corners=False)
            levels.append(level[:, :, :height, :width])
        out: Tensor = self.norm2(self.conv(self.norm1(sum(levels[1:], levels[0]))))
        return out


def pool_to_stride(maps: Sequence[Tensor], reductions: Sequence[int], size: tuple[int, int]) -> list[Tensor]:
    """Average maps finer than `EMBEDDING_STRIDE` down to it; coarser ones stay as they are.

    Averaging before the neck instead of after its projections leaves less to compute, and less to keep of a frozen
    network.

    Args:
        maps: feature maps ``(B, C_i, height / r_i, width / r_i)``.
        reductions: r_i, divisors or multiples of `EMBEDDING_STRIDE`.
        size: ``(H, W)`` of the embeddings; what padding of the input lies beyond it is cut off, except in the
            coarser maps.
    """
    pooled = []
    for features, reduction in zip(maps, reductions, strict=True):
        if reduction > EMBEDDING_STRIDE:
            pooled.append(features)
            continue
        if reduction < EMBEDDING_STRIDE:
            features = F.avg_pool2d(features, EMBEDDING_STRIDE // reduction)
        pooled.append(features[:, :, : size[0], : size[1]])
    return pooled


def freeze_statistics(module: nn.Module) -> None:
    """Put batch normalisation whose parameters are frozen into evaluation mode: it keeps the statistics it has."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.eval()


class FeaturePyramid(Encoder):
    """An encoder without transformer blocks of its own: a network's feature maps through a `PyramidNeck`.

    The stride is 16. Inputs that the coarsest map does not divide are filled up with zeros, the mean colour, below
    and right; the embeddings are cut to the input again, so that every cell lies where it would otherwise.

    Stage 1 is "after the network", its state the maps as `pool_to_stride` returns them; stage 2 "after the neck".
    Frozen batch normalisation keeps its statistics in training mode too.

    Args:
        body: the network.
        channels: channels of each map it gives, the finest first.
        reductions: input pixels per cell and side of each map.
        fixed_size: ``(height, width)`` that its inputs must have, None for any.
        out_channels: channels of the embeddings.
        pixel_mean: see `Encoder`.
        pixel_std: see `Encoder`.

    Raises:
        UnsupportedCombination: no map is as fine as the embeddings, or their cells do not fit into each other.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        channels: Sequence[int],
        reductions: Sequence[int],
        fixed_size: tuple[int, int] | None,
        out_channels: int,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        fits = all(EMBEDDING_STRIDE % r == 0 or r % EMBEDDING_STRIDE == 0 for r in reductions)
        if not reductions or not fits or reductions[0] > EMBEDDING_STRIDE:
            raise UnsupportedCombination(
                f"the network's feature maps have the reductions {tuple(reductions)}; needed are divisors and "
                f"multiples of {EMBEDDING_STRIDE}, the first at most that. Use another network."
            )
        self.stride = EMBEDDING_STRIDE
        self.embed_dim = channels[-1]
        self.out_channels = out_channels
        self.blocks = nn.ModuleList()
        self.body: Any = body
        self.neck = PyramidNeck(channels, reductions, out_channels)
        self.reductions = tuple(reductions)
        self.fixed_size = fixed_size
        self.fresh_parameter_names = frozenset(name for name, _ in self.named_parameters())

    @abstractmethod
    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the body's maps ``(B, C_i, H / r_i, W / r_i)`` of images that every r_i divides."""

    @property
    def last_stage(self) -> int:
        """One stage for the network and one for the neck."""
        return 2

    def frozen_stage(self) -> int:
        """Return the last stage before which nothing trains."""
        trained = {name.partition(".")[0] for name, p in self.named_parameters() if p.requires_grad}
        return 2 if not trained else 1 if trained == {"neck"} else 0

    def train(self, mode: bool = True) -> FeaturePyramid:
        """Switch training mode, except for batch normalisation whose parameters are frozen."""
        super().train(mode)
        freeze_statistics(self)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images ``(B, 3, H, W)``.

        Raises:
            ConfigError: the network takes images of another size only.
            UnsupportedCombination: it gives maps of other sizes than its reductions say.
        """
        return self.finish(self.begin(images, 1), 1)

    def begin(self, images: Tensor, stage: int) -> EncoderState:
        """Encode normalised images ``(B, 3, H, W)`` up to `stage`, 0 to `last_stage`; raises what `forward` does."""
        if stage == 0:
            return (images,)
        height, width = images.shape[-2:]
        if self.fixed_size not in (None, (height, width)):
            raise ConfigError(
                f"the input is {height} x {width} pixels; this encoder takes {self.fixed_size} alone. Set "
                "model.input_size to that, or use an encoder that takes any size."
            )
        coarsest = max(self.reductions)
        images = F.pad(images, (0, -width % coarsest, 0, -height % coarsest))
        maps = self.feature_maps(images)
        for features, reduction in zip(maps, self.reductions, strict=True):
            if features.shape[-2] * reduction != images.shape[-2] or features.shape[-1] * reduction != images.shape[-1]:
                raise UnsupportedCombination(
                    f"the map of reduction {reduction} has {tuple(features.shape[-2:])} cells on an input of "
                    f"{tuple(images.shape[-2:])} pixels: this network cuts borders off. Use another one."
                )
        size = height // EMBEDDING_STRIDE, width // EMBEDDING_STRIDE
        state = tuple(pool_to_stride(maps, self.reductions, size))
        return state if stage == 1 else (self.finish(state, 1),)

    def finish(self, state: EncoderState, stage: int) -> Tensor:
        """Go on from what `begin` returned for the same `stage` to the embeddings."""
        if stage == 2:
            return state[0]
        embeddings: Tensor = self.neck(self.begin(state[0], 1) if stage == 0 else state)
        return embeddings

    def mark_pretrained(self) -> None:
        """Count everything but the neck as pretrained."""
        self.fresh_parameter_names = frozenset(n for n, _ in self.named_parameters() if n.startswith("neck."))
