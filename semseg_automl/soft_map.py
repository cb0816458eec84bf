"""A soft foreground map beside its binary mask, checked, with what several measures need of it worked out once.

The contract of prediction, mask, stretch and valid pixels stands in `semseg_automl.saliency`, whose measures, like the
one in `semseg_automl.weighted_f`, read a `SoftMap`. Not here: any score.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import cv2
import numpy as np
import torch
from torch import Tensor

from semseg_automl.errors import DataError

__all__ = ["LEVELS", "SoftMap", "picked", "shared_map", "shared_maps"]

LEVELS = 256  # the field stores predictions as 8-bit images and scores every threshold they can have
_SLACK = 1e-3  # resampling overshoots 1 by about 1e-7 in float32 and by one step of 2^-10 in float16

_COUNTED = 2**24  # pixels at once; OpenCV counts in float32, which is exact up to there

Area = tuple[slice, slice]
_WHOLE: Area = (slice(None), slice(None))


class SoftMap:
    """One image's prediction and mask, with cached views; memory is that of the image in float64.

    The tensors are kept, not copied: they must not change while the map is in use.
    """

    def __init__(
        self, prediction: Tensor, mask: Tensor, *, valid: Tensor | None = None, stretch: bool = True
    ) -> None:
        """Check shapes and types; values are checked when they are first needed.

        Args:
            prediction: ``(H, W)``, foreground probability in [0, 1], or uint8 levels of 255.
            mask: ``(H, W)``, bool.
            valid: ``(H, W)``, bool, or None for all pixels; the other pixels are left out.
            stretch: Map the prediction's range to [0, 1] first.

        Raises:
            DataError: A shape or a type cannot be scored.
        """
        if prediction.ndim != 2 or not (prediction.is_floating_point() or prediction.dtype == torch.uint8):
            raise DataError(
                f"prediction is {prediction.dtype} of shape {tuple(prediction.shape)}; a (H, W) tensor, floating for "
                "probabilities or uint8 for levels of 255, is needed: pass one image"
            )
        for name, other in (("mask", mask), ("valid", valid)):
            if other is not None and (other.dtype != torch.bool or other.shape != prediction.shape):
                raise DataError(
                    f"{name} is {other.dtype} of shape {tuple(other.shape)}; a torch.bool tensor of shape "
                    f"{tuple(prediction.shape)}, the prediction's, is needed: compare first, as in {name} > 128"
                )
        self.prediction = prediction.detach()
        self.mask = mask
        self.valid = valid
        self.stretch = stretch
        self.has_levels = prediction.dtype == torch.uint8

    @functools.cached_property
    def inside(self) -> Tensor:
        """``(H, W)`` bool, the valid pixels of the mask."""
        return self.mask if self.valid is None else self.mask & self.valid

    @functools.cached_property
    def outside(self) -> Tensor:
        """``(H, W)`` bool, the valid pixels that are not in the mask."""
        return ~self.mask if self.valid is None else self.valid & ~self.mask

    @functools.cached_property
    def pixels(self) -> int:
        """Number of valid pixels."""
        return self.mask.numel() if self.valid is None else _number(self.valid)

    @functools.cached_property
    def foreground(self) -> int:
        """Number of valid pixels of the mask."""
        return int(self._profiles[0].sum())

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest valid prediction as it came, 0-d; zeros without a valid pixel.

        Raises:
            DataError: Probabilities are not in [0, 1].
        """
        seen = self.prediction if self.valid is None else picked(self.prediction, self.valid)
        if seen.numel() == 0:
            return seen.new_zeros(()), seen.new_zeros(())
        if self.has_levels and seen.device.type == "cpu":  # torch's threads would take longer to wake than to look
            levels = seen.numpy()
            return seen.new_tensor(int(levels.min())), seen.new_tensor(int(levels.max()))
        low, high = torch.aminmax(seen)
        if not self.has_levels and not (float(low) >= -_SLACK and float(high) <= 1 + _SLACK):  # so that NaN fails too
            raise DataError(
                f"prediction ranges from {float(low):g} to {float(high):g}; probabilities in [0, 1] are needed: apply "
                "the sigmoid to logits, pass 8-bit maps as uint8, and look for NaN in the model's output"
            )
        return low, high

    @functools.cached_property
    def values(self) -> Tensor:
        """The stretched prediction ``(H, W)`` as float64, in [0, 1] at every valid pixel; errors as for `bounds`."""
        return self._prepared(self.prediction)

    @functools.cached_property
    def level_values(self) -> Tensor:
        """The stretched value of each level of a uint8 prediction, ``(256,)`` float64, by the arithmetic of `values`.

        Levels that do not occur may lie outside [0, 1].
        """
        return self._prepared(torch.arange(LEVELS, dtype=torch.uint8, device=self.prediction.device))

    def _prepared(self, raw: Tensor) -> Tensor:
        low, high = (bound.to(torch.float64) for bound in self.bounds)
        if self.has_levels:
            raw, low, high = (each.to(torch.float64) / (LEVELS - 1) for each in (raw, low, high))
        smallest, largest = float(low), float(high)
        if self.stretch and smallest < largest and (smallest, largest) != (0, 1):
            # 0-d tensors, not Python floats: CUDA turns division by a host scalar into multiplication by its
            # reciprocal, which moves some values to the level below.
            return raw.to(torch.float64, copy=True).sub_(low).div_(high - low)
        return raw.to(torch.float64).clamp(0, 1) if smallest < 0 or largest > 1 else raw.to(torch.float64)

    @functools.cached_property
    def selected(self) -> tuple[Tensor, Tensor]:
        """Stretched prediction and mask of the valid pixels only, ``(N,)`` each."""
        if self.valid is None:
            return self.values.flatten(), self.mask.flatten()
        return picked(self.values, self.valid), picked(self.mask, self.valid)

    @functools.cached_property
    def _profiles(self) -> tuple[Tensor, Tensor]:
        """Pixels of `inside` by row and by column."""
        ones = self.inside.view(torch.uint8)
        if ones.device.type == "cpu" and ones.numel():
            # An eighth of the time that torch's sum over bytes takes.
            rows, columns = (cv2.reduce(ones.numpy(), dim, cv2.REDUCE_SUM, dtype=cv2.CV_32S) for dim in (1, 0))
            return torch.from_numpy(rows).flatten(), torch.from_numpy(columns).flatten()
        return ones.sum(dim=1, dtype=torch.int32), ones.sum(dim=0, dtype=torch.int32)

    @functools.cached_property
    def quadrants(self) -> list[Area]:
        """Slices of the four quadrants around the centroid of `inside`, which is not empty.

        The centroid is rounded half to even and its row and column belong to the upper left quadrant. The others may
        be empty.
        """
        cuts = []
        for profile in self._profiles:
            moment = int((profile * torch.arange(profile.numel(), device=profile.device)).sum())
            cuts.append(round(moment / self.foreground) + 1)
        rows, columns = ((slice(0, cut), slice(cut, None)) for cut in cuts)
        return [(row, column) for row in rows for column in columns]

    @functools.cached_property
    def quadrant_counts(self) -> Tensor:
        """Pixels by quadrant, outside and inside the mask, by level of a uint8 prediction, ``(R, 2, 256)`` int64.

        R is 4, or 1 for an empty mask, which has no centroid.
        """
        areas = self.quadrants if self.foreground else [_WHOLE]
        return torch.stack([self._counts(self.prediction, area) for area in areas])

    @functools.cached_property
    def raw_counts(self) -> Tensor:
        """Pixels outside and inside the mask by level of a uint8 prediction as it came, ``(2, 256)`` int64."""
        if "quadrant_counts" in vars(self):
            return self.quadrant_counts.sum(dim=0)
        return self._counts(self.prediction, _WHOLE)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Pixels outside and inside the mask by level of ``floor(255 * value)``, ``(2, 256)`` int64."""
        if not self.has_levels:
            return self._counts((self.values * (LEVELS - 1)).to(torch.uint8), _WHOLE)
        levels = (self.level_values.clamp(0, 1) * (LEVELS - 1)).to(torch.int64)
        return torch.zeros_like(self.raw_counts).index_add_(1, levels, self.raw_counts)

    def _counts(self, levels: Tensor, area: Area) -> Tensor:
        """Pixels outside and inside the mask by level ``(H, W)`` uint8 in an area, ``(2, 256)`` int64."""
        levels, inside = levels[area], self.inside[area]
        valid = None if self.valid is None else self.valid[area]
        if levels.device.type == "cpu" and levels.shape[1] <= _COUNTED:
            on_mask, seen = _histogram(levels, inside), _histogram(levels, valid)
            return torch.stack((seen - on_mask, on_mask))
        pairs = levels.to(torch.int16).add_(inside, alpha=LEVELS)
        counted = pairs.flatten() if valid is None else picked(pairs, valid)
        return torch.bincount(counted, minlength=2 * LEVELS).view(2, LEVELS)


_shared: ContextVar[dict[tuple[int, ...], tuple[object, SoftMap]] | None] = ContextVar("shared_maps", default=None)


@contextmanager
def shared_maps() -> Iterator[None]:
    """Within this context, `shared_map` makes one map of the same things; around the scoring of one image."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def shared_map(things: tuple[object, ...], make: Callable[[], SoftMap]) -> SoftMap:
    """Return `make()`, or within `shared_maps` what it made of the very same `things` before: objects, not values."""
    kept = _shared.get()
    if kept is None:
        return make()
    key = tuple(map(id, things))
    if key not in kept:
        kept[key] = things, make()  # the things, so that nothing else gets their ids
    return kept[key][1]


def _histogram(levels: Tensor, part: Tensor | None) -> Tensor:
    """Pixels by level ``(H, W)`` uint8 where the bool tensor `part` of the same shape is set, ``(256,)`` int64."""
    counts = torch.zeros(LEVELS, dtype=torch.int64)
    if levels.numel() == 0:
        return counts
    rows = _COUNTED // levels.shape[1]
    for first in range(0, levels.shape[0], rows):
        strip = slice(first, first + rows)
        mask = None if part is None else part[strip].view(torch.uint8).numpy()
        found = cv2.calcHist([levels[strip].numpy()], [0], mask, [LEVELS], [0, LEVELS])
        counts += torch.from_numpy(found).flatten().to(torch.int64)
    return counts


def picked(values: Tensor, part: Tensor) -> Tensor:
    """Return the elements of `values` where the bool tensor `part` of the same shape is set, ``(N,)``."""
    if values.device.type != "cpu":
        return values.masked_select(part)
    return torch.from_numpy(values.numpy()[part.numpy()])  # three times faster than masked_select


def _number(part: Tensor) -> int:
    """Number of set pixels."""
    return int(torch.count_nonzero(part) if part.device.type != "cpu" else np.count_nonzero(part.numpy()))
