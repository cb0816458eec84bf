"""Tiles cover every image, and what is blended from them is what they agree on."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semseg_automl.tiling import OVERLAP, TileGrid, blend, join, tile_grid, tile_size

LENGTHS = st.integers(1, 70)


def cut_from(scores: Tensor, grid: TileGrid) -> list[Tensor]:
    """The tiles of a map ``(C, H, W)``; outside of the image they hold 99."""
    height, width = grid.tile
    padded = torch.nn.functional.pad(scores, (width, width, height, height), value=99.0)
    return [
        padded[:, height + top : 2 * height + top, width + left : 2 * width + left] for top, left in grid.corners()
    ]


@settings(max_examples=80, deadline=None)
@given(size=st.tuples(LENGTHS, LENGTHS), tile=st.tuples(LENGTHS, LENGTHS), overlap=st.sampled_from([0.0, 0.25, 0.6]))
def test_tile_grid__any_sizes__covers_the_image_with_the_overlap_asked_for(
    size: tuple[int, int], tile: tuple[int, int], overlap: float
) -> None:
    grid = tile_grid(size, tile, overlap)
    assert len(grid) == len(list(grid.corners()))
    for starts, length, side in zip((grid.tops, grid.lefts), size, tile, strict=True):
        if length <= side:
            (start,) = starts
            assert abs(-start - (side - length + start)) <= 1, "in the middle"
            continue
        assert (starts[0], starts[-1]) == (0, length - side)
        steps = [b - a for a, b in itertools.pairwise(starts)]
        assert min(steps) >= 1
        assert max(steps) <= max(1, side * (1 - overlap))
        assert max(steps) - min(steps) <= 1, "evenly spaced"


@settings(max_examples=80, deadline=None)
@given(size=st.tuples(LENGTHS, LENGTHS), tile=st.tuples(LENGTHS, LENGTHS), overlap=st.sampled_from([0.0, 0.25, 0.6]))
def test_blend__tiles_of_one_map__give_the_map_and_every_pixel_once(
    size: tuple[int, int], tile: tuple[int, int], overlap: float
) -> None:
    scores = torch.rand(2, *size, generator=torch.Generator().manual_seed(sum(size)))
    grid = tile_grid(size, tile, overlap)
    torch.testing.assert_close(join(grid, cut_from(scores, grid)), scores, rtol=1e-5, atol=1e-6)
    seen = torch.zeros(size, dtype=torch.int64)
    for block in blend(grid, cut_from(scores, grid)):
        seen[block.place] += 1
    assert (seen == 1).all()


def test_blend__image_in_one_tile__keeps_the_scores_bit_for_bit() -> None:
    scores = torch.rand(3, 20, 31)
    for tile in [(20, 31), (32, 31), (40, 64)]:
        grid = tile_grid((20, 31), tile)
        assert torch.equal(join(grid, cut_from(scores, grid)), scores)


def test_blend__tiles_that_disagree__fade_into_each_other() -> None:
    grid = tile_grid((8, 24), (8, 16))
    assert grid.lefts == (0, 8)
    line = join(grid, [torch.zeros(1, 8, 16), torch.ones(1, 8, 16)])[0, 3]
    assert (line[:8] == 0).all()
    assert (line[16:] == 1).all()
    steps = line[7:17].diff()
    assert (steps >= 0).all()
    assert steps.max() < 0.35
    torch.testing.assert_close(line[8:16], 1 - line[8:16].flip(0))


def test_blend__pixel_of_four_tiles__is_their_weighted_mean() -> None:
    grid = tile_grid((12, 12), (8, 8), 0.5)
    assert (grid.tops, grid.lefts) == ((0, 4), (0, 4))
    values = [1.0, 10.0, 100.0, 1000.0]
    found = join(grid, [torch.full((1, 8, 8), value) for value in values])[0]
    bump = torch.sin(torch.pi * (torch.arange(8) + 0.5) / 8) ** 2
    weights = torch.outer(bump, bump)
    # Pixel (5, 6) is (5, 6), (5, 2), (1, 6) and (1, 2) of the four tiles.
    parts = torch.stack([weights[5, 6], weights[5, 2], weights[1, 6], weights[1, 2]])
    expected = (parts * torch.tensor(values)).sum() / parts.sum()
    torch.testing.assert_close(found[5, 6], expected)


def test_blend__tall_image__holds_no_more_than_a_short_one() -> None:
    def largest(height: int) -> int:
        grid = tile_grid((height, 40), (16, 16))
        tiles = (torch.ones(1, 16, 16) for _ in grid.corners())
        return max(block.scores.untyped_storage().nbytes() for block in blend(grid, tiles))

    assert largest(400) == largest(100) <= 4 * 16 * 16


def test_tile_grid__senseless_lengths__raise() -> None:
    for size, tile, overlap in [((0, 5), (4, 4), 0.2), ((5, 5), (4, 0), 0.2), ((5, 5), (4, 4), 1.0)]:
        with pytest.raises(ValueError, match="lengths from 1 on"):
            tile_grid(size, tile, overlap)
    assert 0 < OVERLAP < 0.5


def test_tile_size__scale__is_input_pixels_per_image_pixel() -> None:
    assert tile_size((64, 96), 0.5) == (128, 192)
    assert tile_size((64, 96), 2.0) == (32, 48)
    assert tile_size((8, 8), 16.0) == (1, 1)
