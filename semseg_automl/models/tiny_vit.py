"""The built-in encoder: a small SAM-shaped ViT that trains from scratch on a CPU and loads plain ViT checkpoints.

Blocks, attention and token grids are shaped as in SAM's image encoder (Kirillov et al., 2023), so every PEFT method
that works here works there. What differs: the position embedding is the only position signal (no relative positions),
and the neck may read the tokens of several blocks instead of the last alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import CheckpointError, ConfigError
from semseg_automl.models.attention import project_padded
from semseg_automl.models.encoder import Seam, TokenEncoder, choose_taps
from semseg_automl.models.layers import (
    LayerNorm2d,
    attend,
    interpolate_position,
    window_partition,
    window_unpartition,
)

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Attention(nn.Module):
    """Multi-head self-attention over a grid or within its windows, with the fused ``qkv`` that LoRA methods adapt.

    Args:
        dim: width of the tokens.
        num_heads: attention heads.
        window_size: tokens per window side; 0 for attention over the whole grid. A grid that windows do not divide is
            filled up with zeros, as in SAM.
    """

    takes_prompts = True

    def __init__(self, dim: int, num_heads: int, window_size: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Attend within ``(B, H, W, dim)``, and to ``prompts (P, dim)`` from everywhere; returns ``(B, H, W, dim)``."""
        size = x.shape[1:3]
        if self.window_size:
            projected = project_padded(self.qkv, x, self.window_size)
            windows, padded = window_partition(projected, self.window_size)
            attended = window_unpartition(self._attend(windows, prompts), self.window_size, padded, size)
        else:
            attended = self._attend(self.qkv(x), prompts)
        projected_back: Tensor = self.proj(attended)
        return projected_back

    def _attend(self, qkv: Tensor, prompts: Tensor | None) -> Tensor:
        """Attend within each grid of projected ``qkv (B, H, W, 3 dim)``; returns ``(B, H, W, dim)``."""
        batch, height, width, channels = qkv.shape
        heads = qkv.reshape(batch, height * width, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if prompts is not None:
            further = self.qkv(prompts).view(1, prompts.shape[0], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            k, v = (torch.cat([x, y.expand(batch, -1, -1, -1)], dim=2) for x, y in ((k, further[1]), (v, further[2])))
        return attend(q, k, v).transpose(1, 2).reshape(batch, height, width, channels // 3)


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., dim)``."""
        out: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; attention is global, or within windows of ``window_size`` tokens a side."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, window_size: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, H, W, dim)`` to tokens of the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens ``(B, H / patch, W / patch, dim)``."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(B, 3, H, W)``."""
        tokens: Tensor = self.proj(images).permute(0, 2, 3, 1)
        return tokens


class ConvStem(nn.Module):
    """A stack of convolutions to tokens ``(B, H / patch, W / patch, dim)``, for encoders that train from scratch.

    Few images do not teach a ViT locality; early convolutions give it (Xiao et al., "Early Convolutions Help
    Transformers See Better", NeurIPS 2021). Each stage halves the side and doubles the width. Normalisation is over
    groups of channels of the whole map: normalising each pixel's channels, as the ViT does, erases brightness and
    contrast, and on polyps from scratch nothing was learned (benchmarks/LOG.md).
    """

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        stages = patch_size.bit_length() - 1
        widths = [3, *(max(24, dim >> (stages - 1 - i)) for i in range(stages - 1)), dim]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1),
                nn.GroupNorm(4, wide),
                nn.GELU(),
                nn.Conv2d(wide, wide, kernel_size=3, padding=1),
                nn.GroupNorm(4, wide),
                nn.GELU(),
            )
            for narrow, wide in itertools.pairwise(widths)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(B, 3, H, W)``."""
        x = images
        for stage in self.stages:
            x = stage(x)
        return x.permute(0, 2, 3, 1)


class MultiBlockNeck(nn.Module):
    """Tokens of one or more blocks to the embeddings the decoder reads: norm, 1x1 conv, 3x3 conv, as in SAM's neck.

    A plain ViT that was trained for classification keeps position and texture in its middle blocks; reading several
    of them is what makes it a segmentation backbone (as in SETR-MLA and DPT).
    """

    def __init__(self, dim: int, out_channels: int, taps: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(taps))
        self.lateral = nn.Linear(taps * dim, out_channels, bias=False)
        self.norm1 = LayerNorm2d(out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = LayerNorm2d(out_channels)

    def forward(self, tapped: list[Tensor]) -> Tensor:
        """Map as many token grids ``(B, H, W, dim)`` as there are taps to ``(B, out_channels, H, W)``."""
        normed = torch.cat([norm(x) for norm, x in zip(self.norms, tapped, strict=True)], dim=-1)
        x = self.norm1(self.lateral(normed).permute(0, 3, 1, 2))
        out: Tensor = self.norm2(self.conv(x))
        return out


class TinyViT(TokenEncoder):
    """A small plain ViT with windowed and global attention.

    Args:
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads; divides `embed_dim`.
        patch_size: pixels per token and side, the encoder's stride.
        conv_stem: embed patches by a stack of convolutions; `patch_size` must be a power of two then.
        window_size: tokens per window side, 0 for global attention everywhere.
        global_blocks: blocks with global attention when windows are used.
        neck_taps: blocks whose tokens the neck reads; the last one is among them.
        out_channels: channels of the embeddings.
        grid: side of the stored position embedding, in tokens; interpolated to the grid of the input.

    Raises:
        ConfigError: the heads do not divide the width, the taps are not blocks with the last one among them, or the
            stem does not fit the patch size.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 192,
        depth: int = 6,
        num_heads: int = 3,
        patch_size: int = 16,
        conv_stem: bool = False,
        window_size: int = 0,
        global_blocks: Sequence[int] = (),
        neck_taps: Sequence[int] = (-1,),
        out_channels: int = 256,
        grid: int = 16,
    ) -> None:
        super().__init__(pixel_mean=IMAGENET_MEAN, pixel_std=IMAGENET_STD)
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim is {embed_dim} and num_heads {num_heads}; the heads must divide the width.")
        if conv_stem and patch_size & (patch_size - 1):
            raise ConfigError(f"patch_size is {patch_size}; with a convolution stem it must be a power of two.")
        self.stride = patch_size
        self.embed_dim = embed_dim
        self.out_channels = out_channels
        self.neck_taps = choose_taps(neck_taps, depth)
        self.patch_embed = (ConvStem if conv_stem else PatchEmbed)(embed_dim, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, window_size=0 if i in global_blocks else window_size) for i in range(depth)
        )
        self.neck = MultiBlockNeck(embed_dim, out_channels, len(self.neck_taps))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.fresh_parameter_names = frozenset(name for name, _ in self.named_parameters())

    def embed(self, images: Tensor) -> Tensor:
        """Turn normalised images ``(B, 3, H, W)`` into tokens ``(B, H / stride, W / stride, embed_dim)``."""
        tokens: Tensor = self.patch_embed(images)
        return tokens + interpolate_position(self.pos_embed, tokens.shape[1:3])

    def read_out(self, tapped: list[Tensor]) -> Tensor:
        """Turn the tapped token grids into embeddings ``(B, out_channels, H / stride, W / stride)``."""
        embeddings: Tensor = self.neck(tapped)
        return embeddings

    def patch_seam(self) -> Seam | None:
        """Return the layer that embeds patches; None with a stack of convolutions."""
        return Seam(self.patch_embed, "proj") if isinstance(self.patch_embed, PatchEmbed) else None

    def load_pretrained(self, state: dict[str, Tensor], *, source: str) -> None:
        """Fill patch embedding, position embedding and blocks from a plain ViT in timm's naming (DeiT, MAE, ...).

        The class token and the classifier are dropped, the position embedding is kept at its own grid. The neck
        stays fresh.

        Args:
            state: tensors by timm's names, of any floating type.
            source: what to call the file in errors.

        Raises:
            CheckpointError: a tensor is missing or has another shape; both sides are named.
        """
        side = plain_vit_shape(state, source=source)["grid"]
        renamed = {}
        for name, tensor in state.items():
            if name.startswith(("blocks.", "patch_embed.")):
                renamed[name.replace(".mlp.fc1.", ".mlp.lin1.").replace(".mlp.fc2.", ".mlp.lin2.")] = tensor.float()
        position = state["pos_embed"].float()
        self.pos_embed = nn.Parameter(position[:, -side * side :].reshape(1, side, side, -1).clone())
        renamed["pos_embed"] = self.pos_embed.data
        own = {name: p for name, p in self.state_dict().items() if not name.startswith("neck.")}
        missing = sorted(own.keys() - renamed.keys())
        if missing:
            raise CheckpointError(
                f"{source} lacks {len(missing)} tensors that tiny_vit needs, for example '{missing[0]}'. "
                "Give a plain ViT in timm's naming, such as deit_tiny_patch16_224."
            )
        surplus = sorted(renamed.keys() - own.keys())
        if surplus:
            raise CheckpointError(
                f"{source} has {len(surplus)} tensors that tiny_vit has no place for, for example '{surplus[0]}'. "
                "Give a checkpoint of the same architecture."
            )
        for name, tensor in own.items():
            if renamed[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{source}: '{name}' has shape {tuple(renamed[name].shape)}, tiny_vit expects "
                    f"{tuple(tensor.shape)}. Give a checkpoint of the same architecture."
                )
        self.load_state_dict({name: renamed[name] for name in own}, strict=False)
        self.mark_pretrained()

    def mark_pretrained(self) -> None:
        """Count everything but the neck as pretrained."""
        self.fresh_parameter_names = frozenset(n for n, _ in self.named_parameters() if n.startswith("neck."))


def plain_vit_shape(state: dict[str, Tensor], *, source: str) -> dict[str, int]:
    """Read ``embed_dim, depth, num_heads, patch_size, grid`` off a plain ViT's tensors in timm's naming.

    Heads are 64 wide, as in every DeiT, MAE and ViT of the published families.

    Raises:
        CheckpointError: the file does not hold such a ViT.
    """
    patch, position = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if patch is None or position is None or patch.ndim != 4 or position.ndim != 3 or not depth:
        raise CheckpointError(
            f"{source} is not a plain ViT in timm's naming: it needs patch_embed.proj.weight, pos_embed and blocks.*; "
            f"it has {', '.join(sorted(state)[:4])}, ..."
        )
    embed_dim = patch.shape[0]
    grid = int(position.shape[1] ** 0.5)  # a class or distillation token in front does not reach the next square
    if embed_dim % 64 or position.shape[1] - grid * grid > 2:
        raise CheckpointError(
            f"{source}: width {embed_dim} with {position.shape[1]} positions is not a plain ViT with 64-wide heads."
        )
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": embed_dim // 64,
        "patch_size": patch.shape[-1],
        "grid": grid,
    }
