"""Pictures of what a segmentor does: images beside truth and prediction, masks in colour.

Not here: experts and their use (:mod:`semseg_automl.expert_chart`).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

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

BLACK, WHITE = (0, 0, 0), (255, 255, 255)

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
