"""Which images of a set are the same, or copies of one another that were resized, recompressed or mirrored.

Equal images have equal digests of their decoded pixels, or of what JPEG decodes them from. Copies have nearly equal
small pictures: a perceptual hash finds candidates among all pairs, and the correlation of the small pictures decides.

Not here: files (:mod:`semseg_automl.data.survey`), what a duplicate means for a split
(:mod:`semseg_automl.findings`).
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

THUMBNAIL = 32
"""Side of the small pictures that are compared, in pixels."""

HASH_SIDE = 8
"""The hash keeps this many frequencies per direction, 64 bits in all."""

MAX_DISTANCE = 12
"""Bits in which the hashes of two copies may differ. Different images of one set come as near, hence the next test."""

COMPARED_SIDE = 12
"""Frequencies per direction whose agreement decides: the higher ones change when a copy is resized."""

MIN_SIMILARITY = 0.975
"""Least cosine of the angle between the frequencies of two copies. On the seven data sets of the benchmarks, 95 % of
the copies (JPEG of quality 20 and up, sides from a third to 1.5, brighter by 25, noise of 8 grey levels) are above
0.977; of the pairs of different endoscopy images the next is at 0.963. Frames of one film do come above it."""

FLAT = 2.0
"""Standard deviation in grey levels below which a picture has nothing to compare."""

_SCALES = np.sqrt(np.where(np.arange(COMPARED_SIDE) > 0, 2, 1) / THUMBNAIL)
_ANGLES = np.pi / THUMBNAIL * np.outer(np.arange(COMPARED_SIDE), np.arange(THUMBNAIL) + 0.5)
_WAVES: NDArray[np.float32] = (_SCALES[:, None] * np.cos(_ANGLES)).astype(np.float32)
"""The lowest rows of the orthonormal cosine transform (DCT-II)."""

_BLOCK = 2**16
"""Pairs that are looked at together."""


class Copy(NamedTuple):
    """An image that looks like one before it."""

    later: int
    earlier: int
    similarity: float
    turned: bool
    """Whether it is mirrored or turned by a quarter."""


def pixel_digest(pixels: NDArray[Any]) -> str:
    """Return a digest of the pixels ``(H, W)`` or ``(H, W, 3)`` of an image.

    Grey stored in three equal channels counts as one.

    >>> grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    >>> pixel_digest(grey) == pixel_digest(np.repeat(grey[:, :, None], 3, axis=2))
    True
    """
    if pixels.ndim == 3 and all(np.array_equal(pixels[:, :, 0], pixels[:, :, other]) for other in (1, 2)):
        pixels = pixels[:, :, 0]
    digest = hashlib.blake2b(f"{pixels.shape} {pixels.dtype.str}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def bytes_digest(data: bytes) -> str:
    """Return a digest of bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def small_picture(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image, RGB ``(H, W, 3)`` or grey ``(H, W)``, as grey ``(32, 32)``, each pixel the mean of its area."""
    # First the size, then the colour: a mean is the same in either order, and this one touches fewer pixels.
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    grey = small if small.ndim == 2 else cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    return grey.astype(np.uint8, copy=False)


def frequencies(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the lowest frequencies ``(N, 12, 12)`` of the cosine transform of small pictures ``(N, 32, 32)``."""
    # Matrices this small are multiplied in one thread, and the other frequencies need not be computed.
    low: NDArray[np.float32] = _WAVES @ pictures.astype(np.float32) @ _WAVES.T
    return low


def perceptual_hashes(waves: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return a hash of 64 bits for each image, of its :func:`frequencies`.

    A bit says whether one of the 8 x 8 lowest frequencies is above their median (Zauner, "Implementation and
    Benchmarking of Perceptual Image Hash Functions", 2010, 3.2.1); the mean brightness is left out.
    """
    lowest = waves[:, :HASH_SIDE, :HASH_SIDE].reshape(len(waves), HASH_SIDE**2)
    middle = (HASH_SIDE**2 - 1) // 2
    bits = lowest > np.partition(lowest[:, 1:], middle, axis=1)[:, middle : middle + 1]
    bits[:, 0] = False
    weights = np.uint64(1) << np.arange(HASH_SIDE**2, dtype=np.uint64)
    hashes: NDArray[np.uint64] = (bits * weights).sum(axis=1, dtype=np.uint64)
    return hashes


def find_copies(pictures: NDArray[np.uint8], groups: NDArray[np.integer[Any]]) -> tuple[list[Copy], int]:
    """Find for each picture the most similar one before it, in its own group and in the other groups.

    Mirrored and turned copies are found, too. Pictures of one brightness are like nothing.

    Args:
        pictures: ``(N, 32, 32)``.
        groups: ``(N,)``, the group of each picture.

    Returns:
        At most two copies per picture, and how many pairs are similar in all.
    """
    if not len(pictures):
        return [], 0
    waves = frequencies(pictures)
    told = pictures.reshape(len(pictures), -1).std(axis=1) >= FLAT
    hashes, directions = perceptual_hashes(waves), _directions(waves)
    looks = [(perceptual_hashes(seen), _directions(seen)) for seen in _turned(waves)]
    copies: list[Copy] = []
    pairs = 0
    step = max(1, _BLOCK // len(pictures))
    for start in range(0, len(pictures), step):
        rows = np.arange(start, min(start + step, len(pictures)))
        before = (np.arange(rows[-1] + 1)[None] < rows[:, None]) & told[rows][:, None] & told[None, : rows[-1] + 1]
        best = np.full(before.shape, -1.0, dtype=np.float32)
        turned = np.zeros(before.shape, dtype=np.bool_)
        for look, (seen_hashes, seen) in enumerate(looks):
            near = np.bitwise_count(seen_hashes[rows][:, None] ^ hashes[None, : rows[-1] + 1]) <= MAX_DISTANCE
            near &= before
            # Of few pairs; and a product of matrices would start threads, which takes longer where others work.
            later, earlier = np.divmod(np.flatnonzero(near), near.shape[1])
            similar = np.einsum("ij,ij->i", seen[rows[later]], directions[earlier])
            better = similar > best[later, earlier]
            turned[later[better], earlier[better]] = look > 0
            best[later[better], earlier[better]] = similar[better]
        pairs += int((best >= MIN_SIMILARITY).sum())
        own = groups[rows][:, None] == groups[None, : rows[-1] + 1]
        for wanted in (own, ~own):
            found = np.where(wanted, best, -1.0)
            nearest = found.argmax(axis=1)
            for row in np.flatnonzero(found.max(axis=1) >= MIN_SIMILARITY).tolist():
                first = int(nearest[row])
                copies.append(Copy(int(rows[row]), first, float(found[row, first]), bool(turned[row, first])))
    return copies, pairs


def _directions(waves: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return frequencies as vectors of length 1, ``(N, 143)``, without the mean brightness."""
    vectors = waves.reshape(len(waves), -1)[:, 1:]
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    directions: NDArray[np.float32] = (vectors / lengths).astype(np.float32, copy=False)
    return directions


def _turned(waves: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return the frequencies of the eight ways to mirror and turn a square picture, the picture as it is first.

    Mirroring changes the sign of every odd frequency, swapping the axes swaps those of the frequencies.
    """
    signs = np.where(np.arange(waves.shape[1]) % 2, -1, 1).astype(np.float32)
    ways = []
    for seen in (waves, waves.transpose(0, 2, 1)):
        ways += [seen, seen * signs, seen * signs[:, None], seen * signs * signs[:, None]]
    return ways
