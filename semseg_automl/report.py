"""Pictures of what a segmentor does: images beside truth and prediction, masks in colour, experts and their use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.images import write_png
from semseg_automl.peft.usage import effective_number, is_collapsed, layer_labels
from semseg_automl.task import IGNORE_INDEX

# Okabe and Ito's palette, which colour-blind readers can tell apart, and further ones; two blues never side by side.
PALETTE: NDArray[np.uint8] = np.array(
    [
        [0, 114, 178], [230, 159, 0], [0, 158, 115], [213, 94, 0], [204, 121, 167], [154, 205, 50],
        [240, 228, 66], [128, 128, 128], [148, 0, 211], [220, 20, 60], [86, 180, 233], [139, 69, 19],
    ],
    dtype=np.uint8,
)  # fmt: skip

TILE = 240
HEADER = 26
LEGEND_COLUMNS = 6

# Of the chart of experts.
EXPERT_USAGE = "expert_usage.png"
CELL_HEIGHT, CELL_WIDTH = 28, 48
FONT_SCALE = 0.45
DARK_SHARE = 0.6  # above it a cell is too dark for black figures
BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (200, 0, 0)

# Of errors, from the same palette: orange and blue.
ORANGE, BLUE = (230, 159, 0), (0, 114, 178)


def overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], *, binary: bool) -> NDArray[np.uint8]:
    """Lay class indices over an image, half transparent, with a line along their borders.

    Args:
        image: ``(H, W, 3)`` RGB.
        labels: ``(H, W)`` class indices; 255 is left uncoloured.
        binary: leave class 0 uncoloured.
    """
    colours = PALETTE[(labels.astype(np.int64) - (1 if binary else 0)) % len(PALETTE)]
    painted = (labels != IGNORE_INDEX) & ((labels > 0) | (not binary))
    out = image.copy()
    out[painted] = (0.5 * image[painted] + 0.5 * colours[painted]).astype(np.uint8)
    edge = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    out[edge & painted] = colours[edge & painted]
    return out


def error_map(
    image: NDArray[np.uint8], truth: NDArray[np.uint8], prediction: NDArray[np.uint8], *, binary: bool
) -> NDArray[np.uint8]:
    """Show where a prediction is wrong, over the image in pale grey.

    Orange is foreground that is not there, blue is foreground that was missed, white was found; of several classes,
    orange is any wrong one. Pixels without a label are dark. The two colours differ for colour-blind readers, too.

    Args:
        image: ``(H, W, 3)`` RGB.
        truth: ``(H, W)`` class indices, 255 without a label.
        prediction: ``(H, W)`` class indices.
        binary: tell false foreground from missed foreground.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    out = np.repeat((0.45 * grey + 80)[:, :, None], 3, axis=2)
    labelled = truth != IGNORE_INDEX
    wrong = labelled & (truth != prediction)
    missed = wrong & (truth == 1) if binary else np.zeros_like(wrong)
    found = labelled & ~wrong & (truth > 0) if binary else np.zeros_like(wrong)
    for where, colour in ((found, WHITE), (wrong & ~missed, ORANGE), (missed, BLUE)):
        out[where] = 0.25 * out[where] + 0.75 * np.array(colour, dtype=np.float32)
    out[~labelled] *= 0.3
    return out.astype(np.uint8)


def confidence_map(confidence: NDArray[np.float32], *, lowest: float) -> NDArray[np.uint8]:
    """Paint the probability of the predicted class, dark blue for `lowest` to yellow for 1 (viridis).

    Args:
        confidence: ``(H, W)``, 0 to 1.
        lowest: the least that the most probable of all classes can have; below it is dark blue as well.
    """
    share = ((confidence - lowest) / (1 - lowest)).clip(0, 1)
    painted = cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    return np.ascontiguousarray(painted[:, :, ::-1]).astype(np.uint8)


def overlay_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    *,
    binary: bool,
    class_names: Sequence[str] = (),
    titles: Sequence[str] = ("image", "truth", "prediction"),
) -> NDArray[np.uint8]:
    """Draw ``image | truth | prediction``, one row an image, under a header.

    Args:
        rows: image ``(H, W, 3)``, true and predicted class indices ``(H, W)``, of any sizes.
        binary: leave class 0 uncoloured.
        class_names: names for a legend below, in the order of the class indices; none for no legend.
        titles: of the columns; each row has as many pictures, those after the first are class indices.

    Returns:
        ``(H', W', 3)`` RGB.
    """
    lines = [_header(titles)]
    for image, *labels in rows:
        tiles = (image, *(overlay(image, each, binary=binary) for each in labels))
        lines.append(np.concatenate([_tile(tile) for tile in tiles], axis=1))
    coloured = [(i, name) for i, name in enumerate(class_names) if i or not binary]
    lines.extend(
        _legend_line(coloured[i : i + LEGEND_COLUMNS], binary, TILE * len(titles))
        for i in range(0, len(coloured), LEGEND_COLUMNS)
    )
    return np.concatenate(lines)


def _legend_line(entries: list[tuple[int, str]], binary: bool, width: int) -> NDArray[np.uint8]:
    """Draw a swatch and a name for each class index, of at most `LEGEND_COLUMNS`."""
    line = np.full((HEADER, width, 3), 255, dtype=np.uint8)
    for place, (index, name) in enumerate(entries):
        left = 8 + place * (width // LEGEND_COLUMNS)
        line[6 : HEADER - 6, left : left + 14] = PALETTE[(index - (1 if binary else 0)) % len(PALETTE)]
        cv2.putText(line, name, (left + 20, HEADER - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return line


def _tile(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fit an image into a white square of `TILE` pixels, its aspect ratio kept."""
    height, width = image.shape[:2]
    scale = (TILE - 4) / max(height, width)
    small = cv2.resize(
        image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )
    tile = np.full((TILE, TILE, 3), 255, dtype=np.uint8)
    top, left = (TILE - small.shape[0]) // 2, (TILE - small.shape[1]) // 2
    tile[top : top + small.shape[0], left : left + small.shape[1]] = small
    return tile


def _header(titles: Sequence[str]) -> NDArray[np.uint8]:
    line = np.full((HEADER, TILE * len(titles), 3), 255, dtype=np.uint8)
    for i, title in enumerate(titles):
        (width, height), _ = cv2.getTextSize(title, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        place = (TILE * i + (TILE - width) // 2, (HEADER + height) // 2)
        cv2.putText(line, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return line


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
