"""Large images as overlapping tiles: where the tiles lie, and how their scores become one map, part by part.

Pure: lengths and tensors only. What a tile's scores are is the network's, cutting pixels is
:mod:`semseg_automl.data.crops`'s, whether there are tiles at all is the plan's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels."""

OVERLAP = 0.25
"""Share of a tile that its neighbour covers too, at least: near its border a tile has seen too little to be sure."""


@dataclass(frozen=True)
class TileGrid:
    """Tiles of one size that cover an image.

    >>> tile_grid((10, 20), (10, 8))
    TileGrid(size=(10, 20), tile=(10, 8), tops=(0,), lefts=(0, 6, 12))
    """

    size: Size
    """Of the image."""
    tile: Size
    """Of each tile, in the image's pixels."""
    tops: tuple[int, ...]
    """First row of each row of tiles; negative where the image is lower than a tile and lies in its middle."""
    lefts: tuple[int, ...]
    """The same across."""

    def corners(self) -> Iterator[tuple[int, int]]:
        """Yield top and left of each tile, row by row."""
        return ((top, left) for top in self.tops for left in self.lefts)

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tops) * len(self.lefts)


@dataclass(frozen=True)
class Block:
    """A finished part of an image's scores."""

    top: int
    left: int
    scores: Tensor
    """``(C, h, w)``."""

    @property
    def place(self) -> tuple[slice, slice]:
        """The rows and columns of the image that it covers."""
        height, width = self.scores.shape[-2:]
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def tile_size(input_size: Size, scale: float) -> Size:
    """Return the pixels of the image that one input of the network covers.

    Args:
        input_size: height and width of the input in pixels.
        scale: pixels of the input per pixel of the image.

    >>> tile_size((256, 256), 0.25)
    (1024, 1024)
    """
    return max(1, round(input_size[0] / scale)), max(1, round(input_size[1] / scale))


def tile_grid(size: Size, tile: Size, overlap: float = OVERLAP) -> TileGrid:
    """Lay as few tiles as cover an image, evenly spaced, with at least `overlap` of a tile between neighbours.

    Args:
        size: of the image.
        tile: of each tile. A side of the image that is shorter lies in the middle of its tile.
        overlap: share of a tile, at least 0 and below 1.

    Raises:
        ValueError: a length is not positive, or the overlap is out of range.
    """
    if min(*size, *tile) < 1 or not 0 <= overlap < 1:
        raise ValueError(f"image {size}, tile {tile}, overlap {overlap}: lengths from 1 on, an overlap in [0, 1)")
    return TileGrid(size, tile, _starts(size[0], tile[0], overlap), _starts(size[1], tile[1], overlap))


def blend(grid: TileGrid, tiles: Iterable[Tensor]) -> Iterator[Block]:
    """Blend the scores of tiles into those of the image, handing on what no further tile touches.

    Neighbours fade into each other: each pixel is the mean of its tiles, weighted by a raised cosine (Hann window)
    around the middle of each, so no seam shows. Where one tile alone covers a pixel, its score is kept bit for bit.
    Memory holds the overlap with the tiles below and one tile, whatever the height of the image.

    Args:
        grid: where the tiles lie.
        tiles: ``(C, *grid.tile)`` each, in the order of ``grid.corners()``, all on one device.

    Yields:
        Blocks that cover each pixel of the image once, in the order of the tiles.
    """
    scores = iter(tiles)
    rows, columns = _spans(grid.tops, grid.tile[0], grid.size[0]), _spans(grid.lefts, grid.tile[1], grid.size[1])
    below: Tensor | None = None
    for row in rows:
        above, below, side = below, None, None
        for column in columns:
            tile = next(scores)[:, row.inside, column.inside]
            tile = tile * (row.weights[:, None] * column.weights).to(tile.device)
            # What the left neighbour hands over holds the share of the row above already.
            shared = 0 if side is None else side.shape[2]
            if above is not None:
                tile[:, : above.shape[1], shared:] += above[:, :, column.first + shared : column.last]
            if side is not None:
                tile[:, :, :shared] += side
            yield Block(row.first, column.first, tile[:, : row.final, : column.final])
            side = tile[:, :, column.final :]
            if row.final < tile.shape[1]:
                if below is None:
                    below = tile.new_empty(tile.shape[0], tile.shape[1] - row.final, grid.size[1])
                below[:, :, column.first : column.first + column.final] = tile[:, row.final :, : column.final]


def join(grid: TileGrid, tiles: Iterable[Tensor]) -> Tensor:
    """Return the scores ``(C, H, W)`` of the image, blended as in `blend`, on the device of the tiles."""
    return gather(grid.size, blend(grid, tiles))


def gather(size: Size, blocks: Iterable[Block]) -> Tensor:
    """Put blocks that cover an image into one map ``(C, H, W)`` on their device.

    Raises:
        ValueError: there are no blocks.
    """
    scores: Tensor | None = None
    for block in blocks:
        if block.scores.shape[1:] == size:
            return block.scores
        if scores is None:
            scores = block.scores.new_empty(block.scores.shape[0], *size)
        scores[(slice(None), *block.place)] = block.scores
    if scores is None:
        raise ValueError(f"no scores came for an image of {size}")
    return scores


@dataclass(frozen=True)
class _Span:
    """One tile along one axis: what it covers of the image, from `first` to `last`, and how much it counts there."""

    first: int
    last: int
    inside: slice
    """The part of the tile that lies inside the image."""
    weights: Tensor
    """One per pixel inside; those of all tiles sum to one."""
    final: int
    """Pixels inside, from the first on, that no later tile covers."""


def _starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    if length <= tile:
        return (-((tile - length) // 2),)
    step = max(1, math.floor(tile * (1 - overlap)))
    gaps = math.ceil((length - tile) / step)
    return tuple(i * (length - tile) // gaps for i in range(gaps + 1))


def _spans(starts: tuple[int, ...], tile: int, length: int) -> list[_Span]:
    bump = torch.sin(math.pi * (torch.arange(tile, dtype=torch.float64) + 0.5) / tile) ** 2
    bounds = [(max(0, start), min(length, start + tile)) for start in starts]
    insides = [slice(first - start, last - start) for start, (first, last) in zip(starts, bounds, strict=True)]
    total = torch.zeros(length, dtype=torch.float64)
    for inside, (first, last) in zip(insides, bounds, strict=True):
        total[first:last] += bump[inside]
    ends = [first for first, _ in bounds[1:]] + [length]
    return [
        _Span(first, last, inside, (bump[inside] / total[first:last]).float(), end - first)
        for (first, last), inside, end in zip(bounds, insides, ends, strict=True)
    ]
