"""The mask decoder: SAM's two-way transformer, upscaling and hypernetwork, for batches of images and no prompts.

Structure and parameter names follow SAM's decoder (Kirillov et al., 2023, appendix A), so its weights load here. One
mask token gives the binary head; N mask tokens share one hypernetwork. Two multi-class heads: a token per class
(``num_classes=None``), or queries with a classification layer, matched to classes as in Mask2Former.

What becomes of the logits (losses, scores) is not decided here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import CheckpointError
from semseg_automl.models.layers import LayerNorm2d, attend


@dataclass(frozen=True)
class SegmentationOutput:
    """What the model gives for a batch.

    Attributes:
        mask_logits: ``(B, Q, h, w)``, one map per mask token.
        class_logits: ``(B, Q, K + 1)``, the last entry is "no object"; None where token q stands for class q.
    """

    mask_logits: Tensor
    class_logits: Tensor | None


class TokenAttention(nn.Module):
    """Attention between two sets of tokens, with an inner width of ``dim / downsample_rate``."""

    def __init__(self, dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        inner = dim // downsample_rate
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``q (B, N, dim)`` to ``k``, ``v (B, M, dim)``; returns ``(B, N, dim)``."""
        q, k, v = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        out: Tensor = self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class TokenMlp(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., dim)``."""
        out: Tensor = self.lin2(F.relu(self.lin1(x)))
        return out


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; post-norm, as in SAM."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, skip_first_layer_pe: bool) -> None:
        super().__init__()
        self.self_attn = TokenAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = TokenAttention(dim, num_heads, downsample_rate=2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TokenMlp(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = TokenAttention(dim, num_heads, downsample_rate=2)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Update ``tokens (B, N, dim)`` and ``image (B, HW, dim)``."""
        if self.skip_first_layer_pe:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens)
        return tokens, self.norm4(image)


class TwoWayTransformer(nn.Module):
    """Blocks of two-way attention between mask tokens and the image, then one last look of the tokens."""

    def __init__(self, depth: int, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(dim, num_heads, mlp_dim, skip_first_layer_pe=i == 0) for i in range(depth)
        )
        self.final_attn_token_to_image = TokenAttention(dim, num_heads, downsample_rate=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return updated tokens ``(B, N, dim)`` and image ``(B, HW, dim)``."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image


class HypernetworkMlp(nn.Module):
    """Three linear layers with ReLU: a mask token's output to the weights of its 1x1 convolution."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., out_dim)``."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


def conv_norm_act(channels: int) -> nn.Sequential:
    """Return a 3x3 convolution of as many channels, layer normalisation and GELU."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.GELU())


class DetailBranch(nn.Module):
    """A few convolutions on the image itself, added to the decoder's upscaled maps where tokens are too coarse.

    A token covers 16 x 16 pixels; borders and thin objects live below that. Where to add the maps follows SAM 2
    (Ravi et al., 2024); there they come from the encoder's early stages, which a plain ViT does not have.
    """

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.to_half = nn.Sequential(nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.GroupNorm(4, 24), nn.GELU())
        self.to_quarter = nn.Sequential(
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.GroupNorm(4, 48),
            nn.GELU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.GELU(),
        )
        self.to_eighth = nn.Sequential(nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.GELU())
        self.to_fine = nn.Conv2d(48, fine, 1)
        self.to_coarse = nn.Conv2d(64, coarse, 1)
        self.mix_coarse = conv_norm_act(coarse)
        self.mix_fine = conv_norm_act(fine)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, 3, H, W)`` to ``(B, coarse, H / 8, W / 8)`` and ``(B, fine, H / 4, W / 4)``."""
        quarter = self.to_quarter(self.to_half(images))
        return self.to_coarse(self.to_eighth(quarter)), self.to_fine(quarter)


class MaskDecoder(nn.Module):
    """Image embeddings to mask logits at a quarter of the input side (for an encoder of stride 16).

    Args:
        dim: channels of the embeddings.
        num_mask_tokens: Q.
        num_classes: K for the classification layer ``dim -> K + 1``; None for none.
        depth: blocks of the two-way transformer.
        num_heads: attention heads.
        mlp_dim: hidden width of the transformer's MLP.
        detail: add a `DetailBranch`.
    """

    positional_encoding_gaussian_matrix: Tensor
    no_mask_embed: Tensor

    def __init__(
        self,
        dim: int = 256,
        *,
        num_mask_tokens: int = 1,
        num_classes: int | None = None,
        depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        detail: bool = False,
    ) -> None:
        super().__init__()
        self.num_mask_tokens = num_mask_tokens
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(num_mask_tokens, dim)  # drawn apart, so that queries can specialise
        self.transformer = TwoWayTransformer(depth, dim, num_heads, mlp_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList([HypernetworkMlp(dim, dim // 8)])
        self.class_head = nn.Linear(dim, num_classes + 1) if num_classes is not None else None
        self.detail = DetailBranch(dim // 8, dim // 4) if detail else None
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))
        self.register_buffer("no_mask_embed", torch.zeros(dim))  # what SAM adds to the image where no mask is prompted

    def forward(self, embeddings: Tensor, images: Tensor) -> SegmentationOutput:
        """Decode ``embeddings (B, dim, h, w)`` of normalised ``images (B, 3, H, W)``."""
        batch, _, height, width = embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, -1, -1)
        image_pe = self.image_position(height, width).expand(batch, -1, -1)
        image = embeddings.flatten(2).transpose(1, 2) + self.no_mask_embed
        tokens, image = self.transformer(image, image_pe, tokens)
        mask_tokens = tokens[:, 1:]
        upscaled = self._upscale(image.transpose(1, 2).unflatten(2, (height, width)), images)
        weights = self.output_hypernetworks_mlps[0](mask_tokens)
        mask_logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        class_logits = None if self.class_head is None else self.class_head(mask_tokens)
        return SegmentationOutput(mask_logits, class_logits)

    def load_sam(self, state: dict[str, Tensor], *, source: str) -> None:
        """Fill the decoder from a whole SAM's weights, in the names of ``segment_anything``.

        Of SAM's four mask tokens and hypernetworks the first is taken, the one for a single mask; further mask tokens
        start near it, apart from each other. Class head and detail branch are not SAM's and stay as they are.

        Args:
            state: SAM's tensors by name.
            source: what to call the file in errors.

        Raises:
            CheckpointError: a tensor is missing or has another shape; both are named.
        """
        found = {name.removeprefix("mask_decoder."): tensor.float() for name, tensor in state.items()}
        matrix = "positional_encoding_gaussian_matrix"
        found[matrix] = found.get(f"prompt_encoder.pe_layer.{matrix}", torch.empty(0))
        found["no_mask_embed"] = found.get("prompt_encoder.no_mask_embed.weight", torch.empty(0)).flatten()
        expected = {n: t for n, t in self.state_dict().items() if not n.startswith(("class_head.", "detail."))}
        first = found.get("mask_tokens.weight", torch.empty(0))[:1]
        if first.shape == expected["mask_tokens.weight"][:1].shape:
            # Half of their own spread apart: identical tokens would get identical gradients and never specialise.
            spread = 0.5 * first.std() * torch.randn_like(expected["mask_tokens.weight"])
            spread[0] = 0
            found["mask_tokens.weight"] = first + spread
        for name, tensor in expected.items():
            shape = tuple(found[name].shape) if name in found else None
            if shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{source}: '{name}' of the mask decoder is {shape or 'missing'}, expected {tuple(tensor.shape)}. "
                    "Give an official SAM checkpoint, and leave model.decoder_dim out."
                )
        self.load_state_dict({name: found[name] for name in expected}, strict=False)

    def _upscale(self, x: Tensor, images: Tensor) -> Tensor:
        """Upscale ``(B, dim, h, w)`` four times to ``(B, dim / 8, 4h, 4w)``."""
        if self.detail is None:
            out: Tensor = self.output_upscaling(x)
            return out
        first, norm, act, second, last = self.output_upscaling
        coarse, fine = self.detail(images)
        x = act(norm(first(x) + coarse))
        x = x + self.detail.mix_coarse(x)
        x = last(second(x) + fine)
        mixed: Tensor = x + self.detail.mix_fine(x)
        return mixed

    def image_position(self, height: int, width: int) -> Tensor:
        """Return random Fourier features of a grid's pixel centres, ``(1, height * width, dim)``."""
        matrix = self.positional_encoding_gaussian_matrix
        rows = (torch.arange(height, device=matrix.device, dtype=torch.float32) + 0.5) / height
        columns = (torch.arange(width, device=matrix.device, dtype=torch.float32) + 0.5) / width
        grid = torch.stack(
            [columns.expand(height, width), rows[:, None].expand(height, width)], dim=-1
        )  # x before y, as in SAM
        projected = 2 * math.pi * ((2 * grid - 1) @ matrix.float())
        return torch.cat([projected.sin(), projected.cos()], dim=-1).view(1, height * width, -1)
