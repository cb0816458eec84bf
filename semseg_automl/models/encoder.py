"""The protocol every image encoder keeps, and the sum of auxiliary losses. The encoders live in their own files."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from semseg_automl.errors import UnsupportedCombination


class Encoder(nn.Module):
    """Image encoder: ``(B, 3, H, W)`` normalised images to ``(B, out_channels, H / stride, W / stride)`` embeddings.

    Three seams let a PEFT method in: submodules of `blocks` may be replaced, ``block.attn`` may be wrapped, and
    `side`, when set, is called with the tokens after each block.

    Attributes:
        stride: input pixels per token; both input sides must be divisible by it.
        embed_dim: width of the tokens.
        out_channels: channels of the embeddings.
        blocks: transformer blocks on token grids ``(B, H / stride, W / stride, embed_dim)``; may be empty.
        pixel_mean: per-channel mean of the input normalisation, in units of 0..255.
        pixel_std: per-channel standard deviation, likewise.
        fresh_parameter_names: parameters that no checkpoint filled; they train even when the encoder is frozen.
        side: called as ``side(block_index, tokens) -> tokens`` after each block, or None.
    """

    stride: int
    embed_dim: int
    out_channels: int
    blocks: nn.ModuleList
    fresh_parameter_names: frozenset[str]
    side: nn.Module | None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, pixel_mean: tuple[float, float, float], pixel_std: tuple[float, float, float]) -> None:
        super().__init__()
        self.side = None
        self.fresh_parameter_names = frozenset()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images ``(B, 3, H, W)``."""

    @abstractmethod
    def load_pretrained(self, state: dict[str, Tensor], *, source: str) -> None:
        """Fill the encoder from a checkpoint's tensors and call `mark_pretrained`.

        Args:
            state: tensors by name.
            source: what to call the file in errors.

        Raises:
            CheckpointError: the tensors belong to another architecture.
        """

    @abstractmethod
    def mark_pretrained(self) -> None:
        """Set `fresh_parameter_names` to what a checkpoint of this encoder's kind does not fill."""

    def attention_blocks(self, method: str) -> list[Any]:
        """Return the blocks, each with a fused linear ``attn.qkv``, for the PEFT method that asks.

        Raises:
            UnsupportedCombination: a block has no linear ``attn.qkv`` to adapt.
        """
        blocks: list[Any] = list(self.blocks)
        usable = all(hasattr(getattr(block, "attn", None), "qkv") for block in blocks)
        if not blocks or not usable:
            raise UnsupportedCombination(
                f"optim.peft is '{method}', which adapts the fused attn.qkv of transformer blocks; "
                f"{type(self).__name__} has none. Methods that work with it: decoder_only, full."
            )
        return blocks


def auxiliary_loss(module: nn.Module) -> Tensor:
    """Sum ``layer.aux_loss`` over all layers of `module` that have one; a scalar, zero without any."""
    found = (getattr(layer, "aux_loss", None) for layer in module.modules())
    losses = [loss.float() for loss in found if isinstance(loss, Tensor)]
    return torch.stack(losses).sum() if losses else torch.zeros(())
