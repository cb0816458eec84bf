"""The chart of experts: shares as darkness, dead routers in red, room for every name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from semseg_automl.data.images import read_image
from semseg_automl.expert_chart import (
    CELL_HEIGHT,
    CELL_WIDTH,
    EXPERT_USAGE,
    RED,
    expert_usage_chart,
    save_expert_usage,
)
from semseg_automl.report import HEADER, PALETTE

Image = NDArray[np.uint8]


def usage_of(*rows: list[int]) -> dict[str, list[int]]:
    """Name each row of counts as the blocks of an encoder would be."""
    return {f"encoder.blocks.{i}.attn.qkv": counts for i, counts in enumerate(rows)}


def cell_colours(chart: Image, row: int, experts: int) -> list[list[int]]:
    """Return the ground of each expert's cell in a row of the chart, read beside its figure."""
    blue = np.flatnonzero((chart[HEADER + CELL_HEIGHT + 3] == PALETTE[0]).all(axis=-1))  # expert 0 has all of row 0
    left = int(blue[0]) + 1
    return [chart[HEADER + (row + 1) * CELL_HEIGHT + 3, left + i * CELL_WIDTH].tolist() for i in range(experts)]


def test_expert_usage_chart__shares__are_the_darkness_of_the_cells() -> None:
    chart = expert_usage_chart(usage_of([20, 0, 0, 0], [0, 10, 5, 5], [0, 0, 0, 30], [0, 0, 0, 0]))
    assert chart.dtype == np.uint8
    assert chart.shape[0] == HEADER + 5 * CELL_HEIGHT + 8
    white, full = [255] * 3, PALETTE[0].tolist()
    assert cell_colours(chart, 0, 4) == [full, white, white, white]
    half, quarter = cell_colours(chart, 1, 4)[1:3]
    assert cell_colours(chart, 1, 4) == [white, half, quarter, quarter]
    assert 255 > quarter[0] > half[0] > full[0]
    assert cell_colours(chart, 2, 4) == [white, white, white, full]
    assert cell_colours(chart, 3, 4) == [white] * 4, "nothing was counted"


def test_expert_usage_chart__dead_router__is_red_and_the_others_are_not() -> None:
    def has_red(chart: Image) -> bool:
        return bool((chart == RED).all(axis=-1).any())

    assert has_red(expert_usage_chart(usage_of([5, 5], [0, 10])))
    assert not has_red(expert_usage_chart(usage_of([5, 5], [1, 9])))


@pytest.mark.parametrize("experts", [1, 2, 16])
def test_expert_usage_chart__any_number_of_experts_and_length_of_names__has_room(experts: int) -> None:
    long = {"a_layer_of_a_rather_long_name_outside_of_any_block": [3] * experts}
    short = expert_usage_chart(usage_of([3] * experts))
    for chart in (short, expert_usage_chart(long)):
        border = np.concatenate([chart[:, :4].reshape(-1, 3), chart[:, -4:].reshape(-1, 3), chart[-4:].reshape(-1, 3)])
        assert (border == 255).all(), "no text runs over the edge"
        assert (chart < 128).any()
    assert expert_usage_chart(long).shape[1] > short.shape[1]


def test_save_expert_usage__with_and_without_experts__writes_and_removes_the_chart(tmp_path: Path) -> None:
    usage = usage_of([1, 2], [3, 0])
    save_expert_usage(tmp_path, usage)
    assert np.array_equal(read_image(tmp_path / EXPERT_USAGE), expert_usage_chart(usage))
    save_expert_usage(tmp_path, {})
    save_expert_usage(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
