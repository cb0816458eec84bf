"""SAM's image encoders ViT-B, ViT-L and ViT-H (Kirillov et al., 2023), at any input size.

Built from ``segment_anything``'s own modules, so that its weights fit name by name; the loop over the blocks is ours
(`TokenEncoder`), and so are attention (`RelativeAttention`) and the normalisation over channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from semseg_automl.errors import CheckpointError, ConfigError
from semseg_automl.models.attention import RelativeAttention
from semseg_automl.models.encoder import Encoder, Seam, TokenEncoder
from semseg_automl.models.layers import LayerNorm2d, interpolate_position
from semseg_automl.models.sam_names import to_sam_names

# Of images in 0..255, as in segment_anything.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
PREFIX = "image_encoder."


class SamBlock(nn.Module):
    """Pre-norm transformer block; the submodules are upstream's but for the attention.

    Args:
        block: upstream's block.
        num_heads: its attention heads.
    """

    def __init__(self, block: Any, num_heads: int) -> None:
        super().__init__()
        self.norm1 = block.norm1
        attn = block.attn
        self.attn = RelativeAttention(
            attn.qkv,
            attn.proj,
            attn.rel_pos_h,
            attn.rel_pos_w,
            num_heads=num_heads,
            window_size=block.window_size,
        )
        self.norm2 = block.norm2
        self.mlp = block.mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, H, W, dim)`` to tokens of the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SamViT(TokenEncoder):
    """SAM's image encoder.

    Args:
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        global_blocks: blocks with attention over the whole grid; the others attend within windows.
        window_size: tokens per window side.
        grid: side of the stored position embedding in tokens: 64, an input of 1024 pixels. At other sizes it and the
            relative positions are interpolated.
        out_channels: channels of the embeddings.

    Raises:
        ConfigError: the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_blocks: Sequence[int],
        window_size: int = 14,
        grid: int = 64,
        out_channels: int = 256,
    ) -> None:
        super().__init__(pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim is {embed_dim} and num_heads {num_heads}; the heads must divide the width.")
        upstream = _upstream_encoder(embed_dim, depth, num_heads, tuple(global_blocks), window_size, grid, out_channels)
        self.stride = 16
        self.embed_dim = embed_dim
        self.out_channels = out_channels
        self.neck_taps = (depth - 1,)
        self.patch_embed = upstream.patch_embed
        self.pos_embed = upstream.pos_embed
        self.blocks = nn.ModuleList(SamBlock(block, num_heads) for block in upstream.blocks)
        self.neck = upstream.neck
        for index in (1, 3):  # the same parameters; upstream spells the formula out, slowly
            self.neck[index] = LayerNorm2d(out_channels)
        self.fresh_parameter_names = frozenset(name for name, _ in self.named_parameters())
        if not self.pos_embed.is_meta:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)  # upstream leaves zeros for a checkpoint to fill

    def embed(self, images: Tensor) -> Tensor:
        """Turn normalised images ``(B, 3, H, W)`` into tokens ``(B, H / 16, W / 16, embed_dim)``."""
        tokens: Tensor = self.patch_embed(images)
        return tokens + interpolate_position(self.pos_embed, tokens.shape[1:3])

    def read_out(self, tapped: list[Tensor]) -> Tensor:
        """Turn the last block's tokens into embeddings ``(B, out_channels, H / 16, W / 16)``."""
        embeddings: Tensor = self.neck(tapped[0].permute(0, 3, 1, 2))
        return embeddings

    def neck_seams(self) -> list[Seam]:
        """Return the neck's four layers: two convolutions, each with its normalisation."""
        return [Seam(self.neck, str(index)) for index in range(len(self.neck))]

    def patch_seam(self) -> Seam:
        """Return the convolution that embeds patches."""
        return Seam(self.patch_embed, "proj")

    def load_pretrained(self, state: dict[str, Tensor], *, source: str) -> None:
        """Fill the encoder from SAM's weights, in the names of ``segment_anything`` or of ``transformers``.

        Args:
            state: tensors of a whole SAM model.
            source: what to call the file in errors.

        Raises:
            CheckpointError: the weights are of another model or size; both are named.
        """
        named = to_sam_names(state, source=source)
        found = {name.removeprefix(PREFIX): tensor.float() for name, tensor in named.items() if name.startswith(PREFIX)}
        width = found["pos_embed"].shape[-1] if "pos_embed" in found else None
        depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
        expected = self.state_dict()
        theirs, ours = _size_name(width, depth), _size_name(self.embed_dim, len(self.blocks))
        if theirs != ours:
            raise CheckpointError(
                f"{source} holds {theirs}; the plan has {ours}. "
                "Set model.encoder to the checkpoint's size, or give the other checkpoint."
            )
        wrong = [n for n in expected if n not in found or found[n].shape != expected[n].shape] + [
            n for n in found if n not in expected
        ]
        if wrong:
            name = wrong[0]
            sides = [tuple(side[name].shape) if name in side else "nothing" for side in (found, expected)]
            raise CheckpointError(
                f"{source}: '{name}' is {sides[0]}, SAM's encoder expects {sides[1]} ({len(wrong)} tensors differ). "
                "Give an official SAM checkpoint."
            )
        self.load_state_dict(found)
        self.mark_pretrained()

    def mark_pretrained(self) -> None:
        """Count everything as pretrained, the neck too."""
        self.fresh_parameter_names = frozenset()


def _upstream_encoder(
    embed_dim: int,
    depth: int,
    num_heads: int,
    global_blocks: tuple[int, ...],
    window_size: int,
    grid: int,
    out_channels: int,
) -> Any:
    """Build ``segment_anything``'s own encoder, as its registry does for an image side of ``16 grid``."""
    from semseg_automl.third_party import segment_anything  # a second of importing: only where it is used

    return segment_anything.modeling.ImageEncoderViT(
        img_size=16 * grid,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_chans=out_channels,
        use_rel_pos=True,
        global_attn_indexes=global_blocks,
        window_size=window_size,
    )


SAM_SIZES: dict[str, dict[str, Any]] = {
    "sam_vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_blocks": (2, 5, 8, 11)},
    "sam_vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_blocks": (5, 11, 17, 23)},
    "sam_vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_blocks": (7, 15, 23, 31)},
}
SAM_ENCODERS: dict[str, Callable[..., SamViT]] = {name: partial(SamViT, **size) for name, size in SAM_SIZES.items()}


def unfilled(build: Callable[[], Encoder]) -> Encoder:
    """Return what `build` makes, with parameters that hold anything: for weights that come from a file.

    Drawing the 632 million random numbers of ViT-H takes seconds and touches all of the memory.
    """
    device = torch.get_default_device()
    with torch.device("meta"):
        encoder = build()
    encoder.to_empty(device=device)
    for name, value in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):  # no file holds these
        encoder.get_buffer(name).copy_(torch.tensor(value).view(3, 1, 1))
    return encoder


def _size_name(width: int | None, depth: int) -> str:
    """Say which of SAM's encoders has this width and depth, in the words of ``model.encoder``."""
    known = {(size["embed_dim"], size["depth"]): name for name, size in SAM_SIZES.items()}
    return known.get((width, depth), f"an encoder of width {width} and {depth} blocks")
