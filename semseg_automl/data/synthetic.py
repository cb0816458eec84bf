"""Small data sets drawn on the spot, for demos and tests: textured blobs on textured ground, with exact masks.

Each kind of blob has a texture and a range of colours of its own, but the ground is mottled, tinted by broad patches
of the same colours and noisy, so neither a colour threshold nor an edge detector solves the task, while a small
network does within minutes. Image i of a split depends on the seed alone, not on how many are drawn.

Not here: anything that reads data; a drawn folder is used like any other.
"""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.images import write_png
from semseg_automl.errors import ConfigError

Size = tuple[int, int]

_SMALLEST_SIDE = 32  # below, the textures, 4 to 9 pixels a period, cannot be told apart inside a blob
_BLOB_KINDS = 3
# Hues in degrees, far enough apart that the spread of +-_HUE_SPREAD leaves them distinct.
_HUES = (20.0, 135.0, 250.0)
_HUE_SPREAD = 40.0


def draw_dataset(
    folder: str | os.PathLike[str],
    *,
    kind: Literal["binary", "multiclass"],
    train: int = 48,
    val: int = 12,
    test: int = 12,
    size: Size = (160, 160),
    seed: int = 0,
) -> Path:
    """Draw a data set into a folder: ``images/``, ``masks/`` and ``train.csv``, ``val.csv``, ``test.csv``.

    The tables have the columns ``image`` and ``label`` with paths relative to the folder. Binary masks hold 0 and
    255 (one kind of blob), multi-class masks 0 for the ground and 1 to 3 for the three kinds of blobs.

    Args:
        folder: Where to draw; created if missing, files of the same names are replaced.
        kind: One kind of blob or three.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        size: Height and width in pixels.
        seed: Equal seeds draw equal files.

    Returns:
        The folder.

    Raises:
        ConfigError: `kind` is unknown, a number of images is below 1, or a side is shorter than 32 pixels.
        DataError: A file cannot be written.
    """
    if kind not in ("binary", "multiclass"):
        raise ConfigError(f"kind {kind!r} of a drawn data set; use 'binary' or 'multiclass'")
    counts = {"train": train, "val": val, "test": test}
    if min(counts.values()) < 1:
        raise ConfigError(f"numbers of images to draw: {counts}; draw at least one for each table")
    if min(size) < _SMALLEST_SIDE:
        raise ConfigError(f"images of {size[0]} x {size[1]} pixels; draw at least {_SMALLEST_SIDE} a side")
    root = Path(folder)
    for split, (name, count) in enumerate(counts.items()):
        rows = []
        for i in range(count):
            rng = np.random.default_rng([seed, split, i])
            # The first blob's kind goes round, so that three images already show every class.
            image, ids = _draw_image(size, _BLOB_KINDS if kind == "multiclass" else 1, i, rng)
            row = (f"images/{name}_{i:03d}.png", f"masks/{name}_{i:03d}.png")
            write_png(root / row[0], image)
            write_png(root / row[1], ids * np.uint8(255) if kind == "binary" else ids)
            rows.append(row)
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("image", "label"))
            writer.writerows(rows)
    return root


def _draw_image(
    size: Size, kinds: int, first: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one image ``(H, W, 3)`` and the kind of blob at each pixel ``(H, W)``, 0 for the ground."""
    canvas = _ground(size, rng)
    ids = np.zeros(size, np.uint8)
    for blob in range(int(rng.integers(1, 5))):
        kind = (first if blob == 0 else int(rng.integers(kinds))) % kinds
        shape = _blob(size, rng, ids if blob else None)
        if shape is None:
            continue
        ids[shape > 0] = kind + 1
        # Half a pixel of blur, so that the edge is as soft as a lens makes it and gives nothing away.
        opacity = cv2.GaussianBlur(shape.astype(np.float32), (0, 0), 0.7)[:, :, None]
        canvas = (1 - opacity) * canvas + opacity * _filling(size, kind, rng)
    light = 1 + 0.35 * (_cloud(size, 1.5, rng) - 0.5)[:, :, None]
    noise = rng.normal(0.0, rng.uniform(4.0, 12.0), (*size, 3))
    return np.clip(np.rint(canvas * light + noise), 0, 255).astype(np.uint8), ids


def _cloud(size: Size, cells: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw smooth noise ``(H, W)`` of 0 to 1 with about `cells` bumps along the shorter side."""
    step = max(1, round(min(size) / cells))
    grid = rng.random((math.ceil(size[0] / step) + 3, math.ceil(size[1] / step) + 3))
    full = cv2.resize(grid, (grid.shape[1] * step, grid.shape[0] * step), interpolation=cv2.INTER_CUBIC)
    top, left = rng.integers(0, step, 2)
    return np.clip(full[step + top :, step + left :][: size[0], : size[1]], 0.0, 1.0)


def _colour(hue: float, saturation: float, value: float) -> NDArray[np.float64]:
    """Return an RGB colour of 0 to 255 from a hue in degrees, saturation and value of 0 to 1 (the HSV cone)."""
    sectors = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(sectors, 4 - sectors), 0, 1))


def _ground(size: Size, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the ground: two muted colours mottled at two scales, with broad tints in the blobs' own hues."""
    dark, bright = (_colour(rng.uniform(0, 360), rng.uniform(0.1, 0.4), v) for v in (0.35, 0.7))
    mottled = 0.6 * _cloud(size, 6, rng) + 0.4 * _cloud(size, 28, rng)
    canvas = dark + (bright - dark) * mottled[:, :, None]
    for hue in rng.permutation(_HUES)[:2]:
        tint = np.clip(2.2 * _cloud(size, 2.5, rng) - 1.2, 0, 1)[:, :, None] * rng.uniform(0.6, 0.95)
        colour = _colour(hue + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD), 0.75, 0.7)
        canvas = canvas * (1 - tint) + tint * colour * (0.7 + 0.6 * mottled[:, :, None])
    return canvas


def _blob(size: Size, rng: np.random.Generator, taken: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    """Draw a smooth irregular shape ``(H, W)`` of 0 and 1, or None where it would hide much of what is `taken`."""
    side = min(size)
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    radius = np.ones_like(angles)
    for wave in range(2, 6):
        radius += rng.uniform(0, 0.45 / wave) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
    radius *= side * rng.uniform(0.09, 0.24)
    stretch, turn = rng.uniform(0.6, 1.0), rng.uniform(0, 2 * np.pi)
    centre = rng.uniform(0.1, 0.9, 2) * [size[1], size[0]]
    x, y = radius * np.cos(angles), radius * np.sin(angles) * stretch
    outline = np.column_stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)]) + centre
    shape = np.zeros(size, np.uint8)
    cv2.fillPoly(shape, [np.rint(outline).astype(np.int32)], (1,))
    if taken is not None and np.count_nonzero(shape & (taken > 0)) > 0.15 * np.count_nonzero(shape):
        return None
    return shape


def _filling(size: Size, kind: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the texture of a kind of blob over the whole ``(H, W, 3)``: stripes, dots, or a grid of lines."""
    hue = _HUES[kind] + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    base = _colour(hue, rng.uniform(0.4, 0.75), rng.uniform(0.55, 0.85))
    mark = _colour(hue + rng.uniform(-20, 20), rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.4))
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 9)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] * (2 * np.pi / period)
    bend = 3.0 * _cloud(size, 3, rng)
    along = np.cos(x * np.cos(angle) + y * np.sin(angle) + bend)
    across = np.cos(-x * np.sin(angle) + y * np.cos(angle) + bend)
    if kind == 0:
        pattern = along
    elif kind == 1:
        pattern = 2 * np.clip(along + across - 0.2, 0, 1) - 1
    else:
        pattern = 2 * np.maximum(np.clip(along, 0, 1), np.clip(across, 0, 1)) ** 3 - 1
    weight = np.clip(0.5 + 0.5 * pattern, 0, 1)[:, :, None] * rng.uniform(0.6, 0.95)
    texture: NDArray[np.float64] = base + (mark - base) * weight
    return texture
