"""The protocol every image encoder keeps, its seams for fine-tuning methods, and the sum of auxiliary losses.

The encoders live in their own files.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semseg_automl.errors import ConfigError

EncoderState = tuple[Tensor, ...]
"""What an encoder has computed up to a stage: the kept token grids so far and, before the last block, the tokens."""

TOKENS = "tokens"
"""The part that only encoders of one token grid have: `TokenEncoder` and its seams `side` and `prompter`."""


@dataclass(frozen=True)
class Seam:
    """A place in an encoder where a fine-tuning method may put a layer of its own.

    Attributes:
        owner: the module that holds the layer.
        attribute: its name there.
        in_windows: the layer is handed the windows of a grid one by one, already cut, and cannot see the grid whole.
    """

    owner: nn.Module
    attribute: str
    in_windows: bool = False

    @property
    def module(self) -> Any:
        """The layer that is there now."""
        return getattr(self.owner, self.attribute)

    def replace(self, module: nn.Module) -> None:
        """Put `module` there."""
        setattr(self.owner, self.attribute, module)


def block_seams(block: nn.Module) -> dict[str, Seam]:
    """Find the seams of a pre-norm transformer block.

    They are ``norm1, qkv, proj, norm2, fc1, fc2, prompts``, as far as the block has them. ``prompts`` is the attention
    itself, where it takes further keys and values (`takes_prompts`).
    """
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    places: list[tuple[str, Any, str]] = [
        ("norm1", block, "norm1"),
        ("qkv", attn, "qkv"),
        ("proj", attn, "proj"),
        ("norm2", block, "norm2"),
        *((part, mlp, name) for part, names in MLP_NAMES.items() for name in names),
    ]
    if getattr(attn, "takes_prompts", False):
        places.append(("prompts", block, "attn"))
    return {
        part: Seam(owner, name) for part, owner, name in places if isinstance(getattr(owner, name, None), nn.Module)
    }


MLP_NAMES = {"fc1": ("fc1", "lin1"), "fc2": ("fc2", "lin2")}
"""What timm and SAM call the two layers of the MLP."""


class SideNetwork(nn.Module):
    """A network beside a frozen encoder that reads its tokens and leaves them alone."""

    @abstractmethod
    def forward(self, grids: list[Tensor], taps: Sequence[int]) -> list[Tensor]:
        """Return what the neck reads of blocks `taps`, given the tokens ``(B, H, W, C)`` after every block."""


class Prompter(nn.Module):
    """A network that adds something made from the image to the tokens before each block."""

    @abstractmethod
    def prepare(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return features ``(B, H, W, w)`` of normalised images and of the first block's tokens ``(B, H, W, C)``."""

    @abstractmethod
    def forward(self, index: int, features: Tensor) -> Tensor:
        """Return what is added to the tokens before block `index`, ``(B, H, W, C)``."""


class Encoder(nn.Module):
    """Image encoder: ``(B, 3, H, W)`` normalised images to ``(B, out_channels, H / stride, W / stride)`` embeddings.

    Fine-tuning methods get in by seams: layers of the blocks, of the neck and the embedding of patches may be replaced
    (`seams`, `neck_seams`, `patch_seam`), `side` and `prompter` may be set on encoders of one token grid.

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
        side: a network beside the blocks, or None.
        prompter: what adds to the tokens before each block, or None.
        checkpointing: recompute each block's activations in the backward pass instead of keeping them.
    """

    stride: int
    embed_dim: int
    out_channels: int
    blocks: nn.ModuleList
    fresh_parameter_names: frozenset[str]
    side: SideNetwork | None
    prompter: Prompter | None
    checkpointing: bool
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, pixel_mean: tuple[float, float, float], pixel_std: tuple[float, float, float]) -> None:
        super().__init__()
        self.side = None
        self.prompter = None
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

    def seams(self) -> list[dict[str, Seam]]:
        """Return the seams of each block, see `block_seams`; none for an encoder without blocks."""
        return [block_seams(block) for block in self.blocks]

    def neck_seams(self) -> list[Seam]:
        """Return the pretrained layers of the neck, in their order; none where the neck starts fresh."""
        return []

    def patch_seam(self) -> Seam | None:
        """Return the layer that embeds patches; None where that is no single layer."""
        return None

    def parts(self) -> frozenset[str]:
        """Name the seams that every block has, `TOKENS`, and ``patch_embed``."""
        each = [set(seams) for seams in self.seams()]
        found = set.intersection(*each) if each else set()
        if self.patch_seam() is not None:
            found.add("patch_embed")
        if isinstance(self, TokenEncoder):
            found.add(TOKENS)
        return frozenset(found)


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
        depth = len(self.blocks)
        later = {"neck": depth, "side": depth}
        trained = [name.split(".") for name, p in self.named_parameters() if p.requires_grad]
        stages = [int(parts[1]) if parts[0] == "blocks" else later.get(parts[0], 0) for parts in trained]
        return min(stages, default=self.last_stage)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images ``(B, 3, H, W)``."""
        return self.finish(self.begin(images, 0), 0)

    def begin(self, images: Tensor, stage: int) -> EncoderState:
        """Encode normalised images ``(B, 3, H, W)`` up to `stage`, 0 to `last_stage`."""
        tokens = self.close(self.embed(images), images)
        features = () if self.prompter is None else (self.prompter.prepare(images, tokens[-1]),)
        return self._advance((*features, *tokens), 0, stage)

    def finish(self, state: EncoderState, stage: int) -> Tensor:
        """Go on from what `begin` returned for the same `stage` to the embeddings."""
        return self._advance(state, stage, self.last_stage)[0]

    def close(self, tokens: Tensor, images: Tensor) -> EncoderState:
        """Turn what `embed` made of images into the part of a state that the next block starts from; the grid last."""
        return (tokens,)

    def _advance(self, state: EncoderState, stage: int, to: int) -> EncoderState:
        """Take the state of one stage to a later one."""
        depth = len(self.blocks)
        if stage == to:
            return state
        kept = list(state)
        if stage < depth:
            features = () if self.prompter is None else (kept.pop(0),)
            tokens = self._run_blocks(kept, range(stage, min(to, depth)), *features)
            if to < depth:
                return (*features, *kept, *tokens)
        if to == depth:
            return tuple(kept)
        return (self.read_out(kept if self.side is None else self.side(kept, self.neck_taps)),)

    def _run_blocks(self, kept: list[Tensor], indices: range, features: Tensor | None = None) -> EncoderState:
        """Run some blocks from the tokens at the end of `kept`, which is edited; return the tokens after them."""
        tokens = kept.pop()
        for i in indices:
            tokens = self._run_block(i, self._prompted(i, tokens, features))
            if self._keeps(i):
                kept.append(tokens)
        return (tokens,)

    def _keeps(self, index: int) -> bool:
        """Tell whether the grid after a block is read later on: by the neck, or by `side`, which reads them all."""
        return self.side is not None or index in self.neck_taps

    def _prompted(self, index: int, grid: Tensor, features: Tensor | None) -> Tensor:
        return grid if self.prompter is None else grid + self.prompter(index, features)

    def _run_block(self, index: int, *inputs: Any) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            # Non-reentrant: the reentrant kind gives wrong gradients of losses that layers leave on themselves.
            tokens: Tensor = checkpoint(self.blocks[index], *inputs, use_reentrant=False)
            return tokens
        tokens = self.blocks[index](*inputs)
        return tokens


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
