"""The protocol every image encoder keeps, and the sum of auxiliary losses. The encoders live in their own files."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semseg_automl.errors import ConfigError, UnsupportedCombination

EncoderState = tuple[Tensor, ...]
"""What an encoder has computed up to a stage: the tapped token grids so far and, before the last block, the tokens."""


class Encoder(nn.Module):
    """Image encoder: ``(B, 3, H, W)`` normalised images to ``(B, out_channels, H / stride, W / stride)`` embeddings.

    Three seams let a PEFT method in: submodules of `blocks` may be replaced, ``block.attn`` may be wrapped, and
    `side`, when set, is called with the tokens after each block.

    Encoding can be cut in two at a stage, so that what is frozen before it is computed once: ``finish(begin(images,
    stage), stage)`` equals ``forward(images)``. An encoder that cannot be cut has one stage, all of it.

    Attributes:
        stride: input pixels per token; both input sides must be divisible by it.
        embed_dim: width of the tokens.
        out_channels: channels of the embeddings.
        blocks: transformer blocks; may be empty.
        pixel_mean: per-channel mean of the input normalisation, in units of 0..255.
        pixel_std: per-channel standard deviation, likewise.
        fresh_parameter_names: parameters that no checkpoint filled; they train even when the encoder is frozen.
        side: called as ``side(block_index, tokens) -> tokens`` after each block, or None.
        checkpointing: recompute each block's activations in the backward pass instead of keeping them.
    """

    stride: int
    embed_dim: int
    out_channels: int
    blocks: nn.ModuleList
    fresh_parameter_names: frozenset[str]
    side: nn.Module | None
    checkpointing: bool
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, pixel_mean: tuple[float, float, float], pixel_std: tuple[float, float, float]) -> None:
        super().__init__()
        self.side = None
        self.checkpointing = False
        self.fresh_parameter_names = frozenset()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images ``(B, 3, H, W)``."""

    @property
    def last_stage(self) -> int:
        """The stage at which the embeddings are complete."""
        return 1

    def frozen_stage(self) -> int:
        """Return the last stage before which nothing trains; 0 if already the embedding of patches does."""
        return 0 if any(p.requires_grad for p in self.parameters()) else self.last_stage

    def begin(self, images: Tensor, stage: int) -> EncoderState:
        """Encode normalised images ``(B, 3, H, W)`` up to `stage`, 0 to `last_stage`."""
        return (images,) if stage == 0 else (self(images),)

    def finish(self, state: EncoderState, stage: int) -> Tensor:
        """Go on from what `begin` returned for the same `stage` to the embeddings."""
        embeddings: Tensor = self(state[0]) if stage == 0 else state[0]
        return embeddings

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


class TokenEncoder(Encoder):
    """An encoder of transformer blocks that all see tokens of one shape.

    Stage k is "after k blocks", the last one "after the neck". A subclass says how images become tokens (`embed`)
    and how the tokens of the tapped blocks become embeddings (`read_out`).

    Attributes:
        neck_taps: indices of the blocks whose tokens `read_out` gets, ascending; the last block is among them.
    """

    neck_taps: tuple[int, ...]

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Turn normalised images ``(B, 3, H, W)`` into the tokens that the first block sees."""

    @abstractmethod
    def read_out(self, tapped: list[Tensor]) -> Tensor:
        """Turn the tokens of the tapped blocks into embeddings ``(B, out_channels, H / stride, W / stride)``."""

    @property
    def last_stage(self) -> int:
        """One stage per block and one for the neck."""
        return len(self.blocks) + 1

    def frozen_stage(self) -> int:
        """Return the last stage before which nothing trains; 0 if already the embedding of patches does."""
        trained = [name.split(".") for name, p in self.named_parameters() if p.requires_grad]
        if self.side is not None:
            return 0
        stages = [
            int(parts[1]) if parts[0] == "blocks" else len(self.blocks) if parts[0] == "neck" else 0
            for parts in trained
        ]
        return min(stages, default=self.last_stage)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images ``(B, 3, H, W)``."""
        return self.finish(self.begin(images, 0), 0)

    def begin(self, images: Tensor, stage: int) -> EncoderState:
        """Encode normalised images ``(B, 3, H, W)`` up to `stage`, 0 to `last_stage`."""
        return self._advance((self.embed(images),), 0, stage)

    def finish(self, state: EncoderState, stage: int) -> Tensor:
        """Go on from what `begin` returned for the same `stage` to the embeddings."""
        return self._advance(state, stage, self.last_stage)[0]

    def _advance(self, state: EncoderState, stage: int, to: int) -> EncoderState:
        """Take the state of one stage to a later one."""
        depth = len(self.blocks)
        if stage == to:
            return state
        tapped = list(state)
        if stage < depth:
            tokens = tapped.pop()
            for i in range(stage, min(to, depth)):
                tokens = self._run_block(i, tokens)
                if i in self.neck_taps:
                    tapped.append(tokens)
            if to < depth:
                return (*tapped, tokens)
        return tuple(tapped) if to == depth else (self.read_out(tapped),)

    def _run_block(self, index: int, tokens: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            # Non-reentrant: the reentrant kind gives wrong gradients of losses that layers leave on themselves.
            tokens = checkpoint(self.blocks[index], tokens, use_reentrant=False)
        else:
            tokens = self.blocks[index](tokens)
        return tokens if self.side is None else self.side(index, tokens)


def choose_taps(asked: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the blocks that a neck reads: those asked for, or for None the last one of each quarter of the depth.

    Raises:
        ConfigError: what is asked for is no block, comes twice, or leaves the last block out.
    """
    if asked is None:
        return tuple(sorted({math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)}))
    taps = sorted({tap % depth for tap in asked if -depth <= tap < depth})
    if len(taps) != len(asked) or not taps or taps[-1] != depth - 1:
        raise ConfigError(
            f"neck_taps is {tuple(asked)}; allowed: some of 0 to {depth - 1}, each once, {depth - 1} among them."
        )
    return tuple(taps)


def auxiliary_loss(module: nn.Module) -> Tensor:
    """Sum ``layer.aux_loss`` over all layers of `module` that have one; a scalar, zero without any."""
    found = (getattr(layer, "aux_loss", None) for layer in module.modules())
    losses = [loss.float() for loss in found if isinstance(loss, Tensor)]
    return torch.stack(losses).sum() if losses else torch.zeros(())
