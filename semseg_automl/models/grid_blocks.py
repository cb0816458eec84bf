"""Foreign transformer blocks under our loop: what tells them, and the layers put into them, where the token grid is.

Blocks of other libraries see sequences ``(B, N, C)``: prefix tokens (class, registers) and then the H * W tokens of
the grid. A layer that convolves over the grid needs H and W, and nothing in such a block hands them on. Here is what
does: a wrapper of the block, and a projection in the place of its ``attn.qkv``. No library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from semseg_automl.models.encoder import Seam, block_seams


class GridProjection(nn.Module):
    """The fused projection ``attn.qkv`` of a foreign block, with the seam at which a PEFT method takes hold.

    A method replaces `qkv`. What it puts there gets the whole sequence in one call; a layer that needs the grid has
    a method ``on_sequence(x, grid)``, which is called instead of it.

    Attributes:
        qkv: the linear layer, or what a method made of it.
        grid: ``(H, W)`` of the last H * W tokens of the sequence; set by the `GridBlock` around it before each call,
            because the attention in between passes its input on and nothing else.

    Args:
        qkv: the linear layer to hold.
    """

    grid: tuple[int, int]

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv: nn.Module = qkv
        self.grid = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, P + H * W, C)`` to ``(B, P + H * W, out)``."""
        # By name, not by class: the layers that methods bring are defined above the models.
        on_sequence: Callable[[Tensor, tuple[int, int]], Tensor] | None = getattr(self.qkv, "on_sequence", None)
        projected: Tensor = self.qkv(x) if on_sequence is None else on_sequence(x, self.grid)
        return projected


class GridBlock(nn.Module):
    """A foreign block called with what it needs: tokens, their grid, and rotary positions where it takes them.

    The grid comes with each call instead of being kept from the last image: the block may run again in the backward
    pass (activation checkpointing), or on stored tokens of images of another size.

    Args:
        block: the block; its ``attn.qkv``, if that is a linear layer, is put into a `GridProjection`.
        window: side of the windows in tokens that the block's attention cuts the grid into; 0 for none.
        on_grid: the block takes ``(B, H, W, C)`` instead of a sequence.
    """

    def __init__(self, block: nn.Module, *, window: int = 0, on_grid: bool = False) -> None:
        super().__init__()
        self.block = block
        self.window = window
        self.on_grid = on_grid
        attention: Any = getattr(block, "attn", None)
        if isinstance(getattr(attention, "qkv", None), nn.Linear):
            attention.qkv = GridProjection(attention.qkv)

    @property
    def projection(self) -> GridProjection | None:
        """The projection inside the block, None if the block has no fused one."""
        found = getattr(getattr(self.block, "attn", None), "qkv", None)
        return found if isinstance(found, GridProjection) else None

    def seams(self) -> dict[str, Seam]:
        """Return the block's seams, see `semseg_automl.models.encoder.block_seams`.

        ``qkv`` is there only inside a `GridProjection`. ``prompts`` is the attention over a sequence, to which prompts
        may be prepended.
        """
        found = block_seams(self.block)
        found.pop("qkv", None)
        if self.projection is not None:
            found["qkv"] = Seam(self.projection, "qkv", in_windows=self.window > 0)
            if not self.on_grid:
                found["prompts"] = Seam(self.block, "attn")
        return found

    def forward(self, tokens: Tensor, grid: tuple[int, int], rotary: Tensor | None = None) -> Tensor:
        """Map tokens ``(B, P + H * W, C)`` of a `grid` ``(H, W)`` to tokens of the same shape."""
        projection = self.projection
        if projection is not None:
            projection.grid = (self.window, self.window) if self.window else grid
        if self.on_grid:
            out: Tensor = self.block(tokens.unflatten(1, grid)).flatten(1, 2)
            return out
        out = self.block(tokens) if rotary is None else self.block(tokens, rope=rotary)
        return out
