"""From a decoded image to the model's input and back: resizing, its inverse, and joint augmentation.

An augmentation moves image and mask through the same map. Everything geometric (the resize to the model's
input, flips, quarter turns, rotation, zoom, stretch, shift) is composed into one matrix and sampled once, so
an image is interpolated once however many effects are on. Every random number comes from the generator of
the caller.

The effects are a few calls of OpenCV, the well-kept library here, and not one of augmentations. Albumentations has had
no release or fix since June 2025, as its README says; its successor AlbumentationsX is under the AGPL 3 or a commercial
licence. Kornia works on batches of float tensors of one size (``(B, C, H, W)``), so images would be resized before the
random map samples them a second time. Of torchvision nothing is used: a build for another torch than the installed one
does not import (:mod:`semseg_automl.third_party`).

Not here: reading files (:mod:`semseg_automl.data.images`), class indices (:mod:`semseg_automl.task`),
tensors for the network and their normalisation (the dataset and the model).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError, DataError, nearest

Size = tuple[int, int]
"""Height and width in pixels."""

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in OpenCV's RGB to grey


@dataclass(frozen=True)
class Geometry:
    """How one image was brought to the model's input, so that its scores can be brought back.

    >>> geometry = Geometry(original_size=(30, 40), input_size=(16, 16))
    >>> geometry.undo(torch.zeros(3, 4, 4)).shape
    torch.Size([3, 30, 40])
    """

    original_size: Size
    input_size: Size

    def undo(self, scores: torch.Tensor) -> torch.Tensor:
        """Resample scores of the whole input, ``(C, h', w')`` at any stride, to the image's ``(C, H, W)``.

        Bilinear with ``align_corners=False``: pixel edges, not centres, coincide, as in :func:`resize`.

        Raises:
            ValueError: `scores` is not three-dimensional.
        """
        if scores.ndim != 3:
            raise ValueError(f"scores have shape {tuple(scores.shape)}; pass the scores of one image, (C, h, w)")
        return F.interpolate(scores[None], size=self.original_size, mode="bilinear", align_corners=False)[0]

    def undo_rows(self, scores: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of what :meth:`undo` gives, up to rounding, without the rest in memory.

        Raises:
            ValueError: as in :meth:`undo`.
        """
        if scores.ndim != 3:
            raise ValueError(f"scores have shape {tuple(scores.shape)}; pass the scores of one image, (C, h, w)")
        centres = torch.arange(start, stop, device=scores.device, dtype=torch.float32) + 0.5
        position = (centres * (scores.shape[1] / self.original_size[0]) - 0.5).clamp(min=0)
        upper = position.floor().long().clamp(max=scores.shape[1] - 1)
        lower = (upper + 1).clamp(max=scores.shape[1] - 1)
        rows = torch.lerp(scores[:, upper], scores[:, lower], (position - upper)[:, None].to(scores.dtype))
        size = stop - start, self.original_size[1]
        return F.interpolate(rows[None], size=size, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True)
class Augmentation:
    """The ranges one strength draws from; with the defaults an image is only resized."""

    horizontal_flip: float = 0.0
    """Probability."""
    vertical_flip: float = 0.0
    """Probability."""
    quarter_turns: bool = False
    """Turn by 0, 90, 180 or 270 degrees, each as likely."""
    rotation: float = 0.0
    """Largest angle in degrees, either way."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest zoom, drawn evenly on a logarithmic scale; above 1 the objects get larger."""
    aspect: float = 1.0
    """Largest stretch of width against height, either way; at least 1."""
    translation: float = 0.0
    """Largest shift as a fraction of the side, either way."""
    brightness: float = 0.0
    """Largest change as a fraction of white, either way."""
    contrast: float = 1.0
    """Largest factor of the contrast around mid-grey, or its inverse; at least 1."""
    saturation: float = 1.0
    """Largest factor of the distance from grey, or its inverse; at least 1."""
    gamma: float = 1.0
    """Largest exponent, or its inverse, the same for all channels, so that hues stay; at least 1."""
    blur: float = 0.0
    """Probability of a Gaussian blur with a sigma of 0.5 to 1.5 pixels of the input."""
    noise: float = 0.0
    """Probability of Gaussian noise with a standard deviation of 2 to 12 grey levels."""

    @property
    def warps(self) -> bool:
        """Whether pixels are resampled in other ways than by the resize, flips and quarter turns."""
        return self.rotation > 0 or self.scale != (1.0, 1.0) or self.aspect > 1 or self.translation > 0

    @property
    def recolours(self) -> bool:
        """Whether brightness, contrast, saturation or gamma change."""
        return self.brightness > 0 or max(self.contrast, self.saturation, self.gamma) > 1


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    # the protocol of the Conv-LoRA paper (Zhong et al., 2024)
    "flip": Augmentation(horizontal_flip=0.5),
    "light": Augmentation(
        horizontal_flip=0.5,
        scale=(0.9, 1.1),
        translation=0.05,
        brightness=0.08,
        contrast=1.1,
        saturation=1.1,
    ),
    "medium": Augmentation(
        horizontal_flip=0.5,
        rotation=20.0,
        scale=(0.7, 1.4),
        aspect=1.1,
        translation=0.1,
        brightness=0.12,
        contrast=1.25,
        saturation=1.25,
        gamma=1.2,
    ),
    "strong": Augmentation(
        horizontal_flip=0.5,
        vertical_flip=0.5,
        quarter_turns=True,
        rotation=180.0,
        scale=(0.5, 2.0),
        aspect=1.25,
        translation=0.2,
        brightness=0.2,
        contrast=1.5,
        saturation=1.6,
        gamma=1.5,
        blur=0.15,
        noise=0.15,
    ),
}


def resize(image: NDArray[np.uint8], input_size: Size) -> tuple[NDArray[np.uint8], Geometry]:
    """Squash an image ``(H, W, 3)`` to `input_size`; the sides are scaled each by its own factor.

    A side that shrinks is averaged over areas (nothing is skipped), a side that grows is interpolated
    bicubically.

    >>> squashed, geometry = resize(np.zeros((30, 40, 3), np.uint8), (16, 16))
    >>> squashed.shape, geometry.original_size
    ((16, 16, 3), (30, 40))
    """
    height, width = image.shape[:2]
    geometry = Geometry(original_size=(height, width), input_size=input_size)
    shrunk = (min(height, input_size[0]), min(width, input_size[1]))
    out = _to_size(image, shrunk, cv2.INTER_AREA)
    return _to_size(out, input_size, cv2.INTER_CUBIC), geometry


def resize_mask(mask: NDArray[np.uint8], input_size: Size) -> NDArray[np.uint8]:
    """Squash a mask ``(H, W)`` to `input_size` by the nearest pixel centre, so that no value is invented."""
    return _to_size(mask, input_size, cv2.INTER_NEAREST_EXACT)


def augment(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    input_size: Size,
    strength: str,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one augmentation and apply it to image and mask, both brought to `input_size`.

    Args:
        image: ``(H, W, 3)`` RGB.
        mask: ``(H, W)`` class indices.
        input_size: Height and width of the result in pixels.
        strength: A key of :data:`AUGMENTATIONS`. With ``"none"`` and ``"flip"`` the result is exactly that of
            :func:`resize` and :func:`resize_mask`, mirrored or not.
        rng: The only source of chance; equal states give equal results.

    Returns:
        Image ``(h, w, 3)`` and mask ``(h, w)``, both uint8 and contiguous. The mask holds values of the
        given one only.

    Raises:
        ConfigError: `strength` is unknown.
        DataError: The mask is not uint8 or not of the image's size.
    """
    settings = AUGMENTATIONS.get(strength)
    if settings is None:
        allowed = ", ".join(AUGMENTATIONS)
        raise ConfigError(
            f"augmentation {strength!r} is unknown{nearest(strength, AUGMENTATIONS)}; use one of {allowed}"
        )
    if mask.dtype != np.uint8 or mask.shape != image.shape[:2]:
        raise DataError(
            f"mask of {mask.dtype} and shape {mask.shape} beside an image of shape {image.shape}; "
            "encode the mask to uint8 class indices of the image's height and width first"
        )
    mirror = rng.random() < settings.horizontal_flip
    upend = rng.random() < settings.vertical_flip
    turns = int(rng.integers(4)) if settings.quarter_turns else 0
    if settings.warps:
        image, mask = _warp(image, mask, input_size, settings, (mirror, upend, turns), rng)
    else:
        image, mask = (_reorient(array, mirror, upend, turns) for array in (image, mask))
        image, mask = resize(image, input_size)[0], resize_mask(mask, input_size)
    if settings.recolours:
        image = _recolour(image, settings, rng)
    return _degrade(image, settings, rng), mask


def _to_size(array: NDArray[np.uint8], size: Size, interpolation: int) -> NDArray[np.uint8]:
    if array.shape[:2] == size:
        return array
    return np.asarray(cv2.resize(array, (size[1], size[0]), interpolation=interpolation), dtype=np.uint8)


def _reorient(array: NDArray[np.uint8], mirror: bool, upend: bool, turns: int) -> NDArray[np.uint8]:
    if mirror:
        array = np.asarray(cv2.flip(array, 1), dtype=np.uint8)
    if upend:
        array = np.asarray(cv2.flip(array, 0), dtype=np.uint8)
    if turns:
        array = np.ascontiguousarray(np.rot90(array, turns))
    return array


def _symmetric(rng: np.random.Generator, largest: float) -> float:
    return float(rng.uniform(-largest, largest))


def _factor(rng: np.random.Generator, largest: float) -> float:
    return math.exp(_symmetric(rng, math.log(largest)))


def _source_map(
    source_size: Size,
    input_size: Size,
    settings: Augmentation,
    orientation: tuple[bool, bool, int],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Draw the map ``(2, 3)`` from positions in the result to positions in the source, both from the centre.

    Rotation and zoom act in the source's own pixels, so objects keep their shape before the squash to
    `input_size`.
    """
    mirror, upend, turns = orientation
    height, width = source_size
    frame = np.array([width, height] if turns % 2 == 0 else [height, width], dtype=np.float64)
    squash = np.diag(frame / [input_size[1], input_size[0]])
    zoom = math.exp(rng.uniform(math.log(settings.scale[0]), math.log(settings.scale[1])))
    stretch = math.sqrt(_factor(rng, settings.aspect))
    angle = math.radians(_symmetric(rng, settings.rotation))
    shift = frame * [_symmetric(rng, settings.translation), _symmetric(rng, settings.translation)]
    cos, sin = math.cos(angle), math.sin(angle)
    rotate = np.array([[cos, -sin], [sin, cos]])
    unzoom = np.diag([1 / (zoom * stretch), stretch / zoom])
    quarter = np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), turns)
    flip = np.diag([-1.0 if mirror else 1.0, -1.0 if upend else 1.0])
    linear = flip @ quarter @ rotate @ unzoom
    return np.column_stack([linear @ squash, linear @ shift])


def _pixel_map(
    centred: NDArray[np.float64], source_size: Size, input_size: Size, shrink: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Express a map between centres as OpenCV's, which counts from the centre of the top left pixel.

    `shrink` ``(2,)`` says how many source pixels a pixel of the sampled array covers, in x and y.
    """
    source_centre = np.array([source_size[1], source_size[0]]) / 2
    input_centre = np.array([input_size[1], input_size[0]]) / 2 - 0.5
    offset = centred[:, 2] + source_centre - centred[:, :2] @ input_centre
    edges = np.column_stack([centred[:, :2], offset]) / shrink[:, None]
    edges[:, 2] -= 0.5
    return edges


def _warp(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    input_size: Size,
    settings: Augmentation,
    orientation: tuple[bool, bool, int],
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Sample image and mask once each through one drawn map.

    A bilinear sample reads 2 x 2 pixels, so steps of more than two source pixels would skip some and thin
    structures would come and go. The image is averaged over whole blocks first until every step is below
    two; blocks of whole pixels cost a twentieth of an area resize by a fraction, and the map absorbs their
    size exactly.
    """
    size = mask.shape[0], mask.shape[1]
    centred = _source_map(size, input_size, settings, orientation, rng)
    step = np.hypot(centred[:, 0], centred[:, 1])  # source pixels per pixel of the result, in x and in y
    shrink = np.clip(step.astype(np.int64), 1, [size[1], size[0]])
    one = np.ones(2, dtype=np.int64)
    warped = _sample(
        _block_mean(image, shrink),
        _pixel_map(centred, size, input_size, shrink),
        input_size,
        cv2.INTER_LINEAR,
    )
    return warped, _sample(mask, _pixel_map(centred, size, input_size, one), input_size, cv2.INTER_NEAREST)


def _block_mean(image: NDArray[np.uint8], block: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Average over blocks of `block` ``(x, y)`` pixels, leaving incomplete ones at the right and bottom."""
    across, down = int(block[0]), int(block[1])
    height, width = image.shape[0] // down, image.shape[1] // across
    return _to_size(image[: height * down, : width * across], (height, width), cv2.INTER_AREA)


def _sample(
    array: NDArray[np.uint8], pixel_map: NDArray[np.float64], size: Size, interpolation: int
) -> NDArray[np.uint8]:
    out = cv2.warpAffine(
        array,
        pixel_map,
        (size[1], size[0]),
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return np.asarray(out, dtype=np.uint8)


def _recolour(image: NDArray[np.uint8], settings: Augmentation, rng: np.random.Generator) -> NDArray[np.uint8]:
    saturation = _factor(rng, settings.saturation)
    gamma = _factor(rng, settings.gamma)
    contrast = _factor(rng, settings.contrast)
    brightness = _symmetric(rng, settings.brightness)
    mix = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
    levels = (np.linspace(0.0, 1.0, 256) ** gamma - 0.5) * contrast + 0.5 + brightness
    table = np.clip(np.rint(255 * levels), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(cv2.transform(image, mix), table), dtype=np.uint8)


def _degrade(image: NDArray[np.uint8], settings: Augmentation, rng: np.random.Generator) -> NDArray[np.uint8]:
    if rng.random() < settings.blur:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.5)), dtype=np.uint8)
    if rng.random() < settings.noise:
        noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(2.0, 12.0))
        image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
    return image
