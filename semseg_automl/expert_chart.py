"""The chart of Conv-LoRA's experts and how much each layer uses them, a picture in the folder of a fit.

Not here: counting their use, and what the counts say (:mod:`semseg_automl.peft.usage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.images import write_png
from semseg_automl.peft.usage import effective_number, is_collapsed, layer_labels
from semseg_automl.report import BLACK, HEADER, PALETTE, WHITE

EXPERT_USAGE = "expert_usage.png"
CELL_HEIGHT, CELL_WIDTH = 28, 48
FONT_SCALE = 0.45
DARK_SHARE = 0.6  # above it a cell is too dark for black figures
RED = (200, 0, 0)


def expert_usage_chart(usage: Mapping[str, Sequence[int]]) -> NDArray[np.uint8]:
    """Draw how the choices of each layer spread over the experts: a row per layer, a column per expert.

    Cells hold per cent of the layer's choices, the darker the more. The last column is the effective number of experts
    (exp of the entropy), in red where nearly all choices fall on one.

    Args:
        usage: choices per expert, by layer; at least one layer.

    Returns:
        ``(H, W, 3)`` RGB.
    """
    labels = layer_labels(usage)
    experts = max(len(counts) for counts in usage.values())
    left = 20 + max(_text_width(label) for label in labels)
    title = "per cent of the choices that go to each expert"
    width = max(left + (experts + 1) * CELL_WIDTH + 8, _text_width(title) + 20)
    canvas = np.full((HEADER + (len(labels) + 1) * CELL_HEIGHT + 8, width, 3), 255, dtype=np.uint8)
    _write(canvas, title, (10, 0, width, HEADER))

    def cell(row: int, column: int) -> tuple[int, int, int, int]:
        x, y = left + column * CELL_WIDTH, HEADER + row * CELL_HEIGHT
        return x, y, x + CELL_WIDTH, y + CELL_HEIGHT

    for column in range(experts):
        _write(canvas, str(column + 1), cell(0, column), centred=True)
    _write(canvas, "used", cell(0, experts), centred=True)
    for row, (label, counts) in enumerate(zip(labels, usage.values(), strict=True), start=1):
        _write(canvas, label, (10, cell(row, 0)[1], left, cell(row, 0)[3]))
        for column, count in enumerate(counts):
            share = count / max(1, sum(counts))
            x, y, right, bottom = cell(row, column)
            canvas[y + 1 : bottom - 1, x + 1 : right - 1] = 255 + share * (PALETTE[0] - 255.0)
            ink = BLACK if share < DARK_SHARE else WHITE
            _write(canvas, f"{100 * share:.0f}", cell(row, column), centred=True, ink=ink)
        ink = RED if is_collapsed(counts) else BLACK
        _write(canvas, f"{effective_number(counts):.1f}", cell(row, experts), centred=True, ink=ink)
    return canvas


def save_expert_usage(folder: Path, usage: Mapping[str, Sequence[int]]) -> None:
    """Write the chart of experts into a fit's folder; without experts, remove what an earlier fit left there.

    Raises:
        DataError: the file cannot be written.
    """
    if usage:
        write_png(folder / EXPERT_USAGE, expert_usage_chart(usage))
    else:
        (folder / EXPERT_USAGE).unlink(missing_ok=True)


def _text_width(text: str) -> int:
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, 1)[0][0])


def _write(
    canvas: NDArray[np.uint8],
    text: str,
    box: tuple[int, int, int, int],
    *,
    centred: bool = False,
    ink: tuple[int, int, int] = BLACK,
) -> None:
    """Write a line into a `box` ``(left, top, right, bottom)``, half way up it, on the left or centred."""
    left, top, right, bottom = box
    height = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, 1)[0][1]
    start = left + (right - left - _text_width(text)) // 2 if centred else left
    place = (start, (top + bottom + height) // 2)
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, ink, 1, cv2.LINE_AA)
