"""Scores of one soft foreground map against one binary mask: S-measure, E-measure, mean absolute error.

The weighted F-measure, which alone needs distances between pixels, is in `semseg_automl.weighted_f`; what follows holds
for it too.

Pure functions of one image, computed in float64 on the device of their input. They give the answers of PyPI
``pysodmetrics`` (to 1e-10, degenerate masks included) when they are handed ``pred_uint8``, or its quotient by 255 in
float64, and ``mask_uint8 > 128``; where that reference has no answer (0/0), the docstring says what is defined here.

Shared by all functions:

- ``prediction (H, W)``: foreground probability in [0, 1], any floating type; or uint8, levels of 255, as the field
  stores predictions. A map of levels has the score of its quotient in float64, and faster: its pixels are counted.
- ``mask (H, W)``: bool, the truth.
- ``stretch=True`` maps the prediction's own minimum and maximum to 0 and 1 before anything else, the habit
  of the salient-object field; a constant prediction stays as it is. It turns an almost empty prediction
  into one of full contrast, so ``stretch=False`` is there for absolute probabilities.
- ``valid (H, W)``: bool, or None for all pixels. Pixels that are not valid are left out, as though the
  image did not have them: they enter neither the stretch nor any sum, and their prediction may be anything,
  NaN included.
- No valid pixel gives NaN. A tensor that cannot be scored raises `DataError`.

Not here: accumulation over a data set, which lives in `semseg_automl.metrics`, and scores of hard decisions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from semseg_automl.errors import DataError

__all__ = [
    "e_measure",
    "e_measure_adaptive",
    "e_measure_curve",
    "level_values",
    "mean_absolute_error",
    "prepared",
    "s_measure",
]

_EPS = torch.finfo(torch.float64).eps  # MATLAB's eps, added to denominators by all published evaluation code
_LEVELS = 256  # the field stores predictions as 8-bit images and scores every threshold they can have
_SLACK = 1e-3  # resampling overshoots 1 by about 1e-7 in float32 and by one step of 2^-10 in float16


class _Moments(NamedTuple):
    """Number, mean, and sum of squared deviations from the mean of a set of pixels."""

    pixels: int
    mean: float
    squares: float

    @classmethod
    def of(cls, values: Tensor) -> _Moments:
        """Moments of ``values (N,)``; the sum of squares of equal values is exactly 0.

        Subtracting one of the values first keeps that zero, which S-measure branches on: the plain mean of
        N equal floats may differ from them in the last bit.
        """
        if values.numel() == 0:
            return cls(0, 0.0, 0.0)
        first = values[0]
        deviations = values - first
        mean = deviations.mean()
        deviations.sub_(mean)
        return cls(values.numel(), float(first + mean), float(torch.dot(deviations, deviations)))

    @classmethod
    def of_levels(cls, values: Tensor, counts: Tensor) -> _Moments:
        """Moments of ``values (256,)``, each taken as often as ``counts (256,)`` says."""
        present = counts.nonzero().squeeze(1)
        if present.numel() == 0:
            return cls(0, 0.0, 0.0)
        first, weights = values[present[0]], counts[present].to(torch.float64)
        deviations, pixels = values[present] - first, int(weights.sum())
        mean = torch.dot(deviations, weights) / pixels
        return cls(pixels, float(first + mean), float(torch.dot(deviations.sub_(mean).square_(), weights)))

    def joined(self, other: _Moments) -> _Moments:
        """Moments of the union of two disjoint sets (Chan, Golub and LeVeque, 1979)."""
        if self.pixels == 0 or other.pixels == 0:
            return other if self.pixels == 0 else self
        pixels, delta = self.pixels + other.pixels, other.mean - self.mean
        mean = self.mean + delta * other.pixels / pixels
        between = delta**2 * self.pixels * other.pixels / pixels
        return _Moments(pixels, mean, self.squares + other.squares + between)


def s_measure(
    prediction: Tensor,
    mask: Tensor,
    *,
    valid: Tensor | None = None,
    stretch: bool = True,
    alpha: float = 0.5,
) -> Tensor:
    """Structure-measure, 1 for a perfect prediction (Fan, Cheng, Liu, Li, Borji, ICCV 2017).

    ``alpha * S_object + (1 - alpha) * S_region``, not below 0. S_object compares mean and spread of the
    prediction inside and outside the mask; S_region is the structural similarity of the four quadrants that
    meet at the mask's centroid, weighted by their areas.

    An empty mask scores ``1 - mean(prediction)``, a full one ``mean(prediction)``. A quadrant without a
    pixel has no weight; the spread of a single pixel is 0. Both are 0/0 in the formulas. A quadrant in
    which prediction and mask are both constant scores 1; it does so here whatever the constant, in the
    reference only if the mean of equal floats happens to be rounded to that float.

    Args:
        prediction: ``(H, W)``, foreground probability in [0, 1].
        mask: ``(H, W)``, bool.
        valid: ``(H, W)``, bool; the other pixels are left out, of the centroid and the areas as well.
        stretch: Map the prediction's range to [0, 1] first.
        alpha: Weight of the object term, in [0, 1].

    Returns:
        0-d float64 tensor; NaN without a valid pixel.

    Raises:
        DataError: A shape, a type or a range is not as above.

    >>> mask = torch.tensor([[False, True], [False, True]])
    >>> round(s_measure(mask.double(), mask).item(), 6)
    1.0
    >>> round(s_measure(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), mask).item(), 4)
    0.6277
    """
    moments_of = _moments(prediction, mask, valid, stretch)
    inside = mask if valid is None else mask & valid
    foreground = int(torch.count_nonzero(inside))
    pixels = mask.numel() if valid is None else int(torch.count_nonzero(valid))
    answer = functools.partial(torch.tensor, dtype=torch.float64, device=prediction.device)
    if pixels == 0:
        return answer(math.nan)
    if foreground in (0, pixels):
        off, on = moments_of((slice(None), slice(None)))
        return answer(on.mean if foreground else 1 - off.mean)
    regions = [moments_of(area)[::-1] for area in _quadrants(inside, foreground)]
    region_score = sum(_similarity(on, off) * (on.pixels + off.pixels) for on, off in regions) / pixels
    in_mask = functools.reduce(_Moments.joined, (on for on, _ in regions))
    off_mask = functools.reduce(_Moments.joined, (off for _, off in regions))
    object_score = (
        _object_similarity(in_mask) * foreground
        + _object_similarity(off_mask._replace(mean=1 - off_mask.mean)) * (pixels - foreground)
    ) / pixels
    return answer(max(0.0, alpha * object_score + (1 - alpha) * region_score))


def e_measure(prediction: Tensor, mask: Tensor, *, valid: Tensor | None = None, stretch: bool = True) -> Tensor:
    """E-measure, the mean over the 256 thresholds of `e_measure_curve`; arguments and errors as there.

    Returns:
        0-d float64 tensor; NaN without a valid pixel.

    >>> mask = torch.tensor([[False, True], [False, True]])
    >>> round(e_measure(mask.double(), mask).item(), 4)  # 255 thresholds of 4/3, the lowest of 1/3
    1.3294
    """
    return e_measure_curve(prediction, mask, valid=valid, stretch=stretch).mean()


def e_measure_curve(prediction: Tensor, mask: Tensor, *, valid: Tensor | None = None, stretch: bool = True) -> Tensor:
    """Enhanced-alignment measure at each of 256 thresholds (Fan et al., IJCAI 2018).

    Entry t scores the binary map ``floor(255 * prediction) >= t``, the prediction taken after the stretch.
    Each pixel scores ``(1 + 2ab / (a^2 + b^2))^2 / 4`` with a and b the deviations of map and mask from
    their own means; with an empty mask it scores 1 where the map is empty, with a full one where the map is
    set.

    The sum is divided by N - 1, as in all published code, so a perfect map of N pixels scores N / (N - 1).
    A single pixel is divided by 1, where the published code divides by 2e-16.

    The floor is taken of a product in float64: an 8-bit prediction must arrive as uint8 or ``pred.double() / 255``
    to reach the reference's levels; after a stretch, some pixels of a float32 quotient end one level beside.

    Args:
        prediction: ``(H, W)``, foreground probability in [0, 1].
        mask: ``(H, W)``, bool.
        valid: ``(H, W)``, bool; the other pixels are left out.
        stretch: Map the prediction's range to [0, 1] first.

    Returns:
        ``(256,)`` float64, thresholds ascending; all NaN without a valid pixel.

    Raises:
        DataError: A shape, a type or a range is not as above.
    """
    if prediction.dtype == torch.uint8:
        values = level_values(prediction, mask, valid, stretch).clamp(0, 1)  # levels that do not occur may lie outside
        counts = _level_counts(prediction, mask, valid)
        histogram = torch.zeros_like(counts).index_add_(1, (values * (_LEVELS - 1)).to(torch.int64), counts)
    else:
        values, inside = _selected(prediction, mask, valid, stretch)
        histogram = _level_counts((values * (_LEVELS - 1)).to(torch.int16), inside, None)
    off_mask, on_mask = histogram.flip(1).cumsum(1).flip(1)  # [t]: pixels at or above level t
    return _alignment(on_mask, off_mask, *_sizes(histogram))


def e_measure_adaptive(
    prediction: Tensor, mask: Tensor, *, valid: Tensor | None = None, stretch: bool = True
) -> Tensor:
    """E-measure of ``prediction >= min(2 * mean(prediction), 1)``.

    Arguments and errors are those of `e_measure_curve`. A prediction of zeros has threshold 0 and therefore
    counts as all foreground.

    Returns:
        0-d float64 tensor; NaN without a valid pixel.
    """
    if prediction.dtype == torch.uint8:
        values, counts = level_values(prediction, mask, valid, stretch), _level_counts(prediction, mask, valid)
        mean = (values * counts).sum() / counts.sum()
    else:
        values, inside = _selected(prediction, mask, valid, stretch)
        mean, counts = values.mean(), torch.stack((~inside, inside))
    marked = values >= (2 * mean).clamp(max=1)
    off_mask, on_mask = (counts * marked).sum(dim=1)
    return _alignment(on_mask, off_mask, *_sizes(counts))


def mean_absolute_error(
    prediction: Tensor, mask: Tensor, *, valid: Tensor | None = None, stretch: bool = True
) -> Tensor:
    """Mean of ``|prediction - mask|`` over pixels (Perazzi et al., CVPR 2012).

    Arguments and errors are those of `e_measure_curve`.

    Returns:
        0-d float64 tensor, 0 for a perfect prediction; NaN without a valid pixel.

    >>> mask = torch.tensor([[False, True], [False, True]])
    >>> mean_absolute_error(torch.tensor([[0.0, 1.0], [0.5, 1.0]]), mask).item()
    0.125
    """
    if prediction.dtype == torch.uint8:
        values, counts = level_values(prediction, mask, valid, stretch), _level_counts(prediction, mask, valid)
        return (counts * torch.stack((values, 1 - values))).sum() / counts.sum()
    values, inside = _selected(prediction, mask, valid, stretch)
    return (values - inside.to(torch.float64)).abs_().mean()


def prepared(prediction: Tensor, mask: Tensor, valid: Tensor | None, stretch: bool) -> Tensor:
    """Check the arguments and return the prediction ``(H, W)`` as float64, in [0, 1] at every valid pixel.

    Raises:
        DataError: A shape, a type or a range cannot be scored.
    """
    _check(prediction, mask, valid)
    raw = prediction.detach()
    if raw.dtype == torch.uint8:
        raw = raw.to(torch.float64).div_(_LEVELS - 1)
    seen = raw if valid is None else raw.masked_select(valid)
    if seen.numel() == 0:
        return raw.to(torch.float64)
    low, high = (bound.to(torch.float64) for bound in torch.aminmax(seen))
    smallest, largest = float(low), float(high)
    if not (smallest >= -_SLACK and largest <= 1 + _SLACK):  # written so that NaN fails too
        raise DataError(
            f"prediction ranges from {smallest:g} to {largest:g}; probabilities in [0, 1] are needed: apply "
            "the sigmoid to logits, pass 8-bit maps as uint8, and look for NaN in the model's output"
        )
    if stretch and smallest < largest and (smallest, largest) != (0, 1):
        # 0-d tensors, not Python floats: CUDA turns division by a host scalar into multiplication by its
        # reciprocal, which moves some values to the level below.
        return raw.to(torch.float64, copy=True).sub_(low).div_(high - low)
    return raw.to(torch.float64).clamp(0, 1) if smallest < 0 or largest > 1 else raw.to(torch.float64)


def _check(prediction: Tensor, mask: Tensor, valid: Tensor | None) -> None:
    """Raise `DataError` for a shape or a type that cannot be scored."""
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


def level_values(prediction: Tensor, mask: Tensor, valid: Tensor | None, stretch: bool) -> Tensor:
    """The prepared value of each level of a uint8 prediction, ``(256,)``; arguments and errors as in `prepared`."""
    _check(prediction, mask, valid)
    levels = torch.arange(_LEVELS, dtype=torch.uint8, device=prediction.device)[None]
    seen = prediction if valid is None else _picked(prediction, valid)
    low, high = torch.aminmax(seen) if seen.numel() else (levels[0, 0], levels[0, 0])
    # As an image of its own, so that each level is prepared by the arithmetic that its pixels would be.
    return prepared(levels, levels > 0, (levels >= low) & (levels <= high), stretch)[0]


def _level_counts(prediction: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
    """Pixels outside and inside the mask by level of a uint8 or small int16 prediction, ``(2, 256)`` int64."""
    pairs = prediction.to(torch.int16, copy=True).add_(mask, alpha=_LEVELS)
    pairs = pairs.reshape(-1) if valid is None else _picked(pairs, valid)
    return torch.bincount(pairs, minlength=2 * _LEVELS).view(2, _LEVELS)


def _sizes(counts: Tensor) -> tuple[int, int]:
    """Pixels inside the mask, and all pixels, of counts ``(2, ...)`` outside and inside it."""
    return int(counts[1].sum()), int(counts.sum())


def _moments(
    prediction: Tensor, mask: Tensor, valid: Tensor | None, stretch: bool
) -> Callable[[tuple[slice, slice]], tuple[_Moments, _Moments]]:
    """Return what gives the prepared prediction's moments outside and inside the mask within an area."""
    if prediction.dtype == torch.uint8:
        levels = level_values(prediction, mask, valid, stretch)

        def of_levels(area: tuple[slice, slice]) -> tuple[_Moments, _Moments]:
            off, on = _level_counts(prediction[area], mask[area], None if valid is None else valid[area])
            return _Moments.of_levels(levels, off), _Moments.of_levels(levels, on)

        return of_levels
    values = prepared(prediction, mask, valid, stretch)
    inside, outside = (mask, ~mask) if valid is None else (mask & valid, valid & ~mask)

    def of_pixels(area: tuple[slice, slice]) -> tuple[_Moments, _Moments]:
        off, on = (_Moments.of(_picked(values[area], part[area])) for part in (outside, inside))
        return off, on

    return of_pixels


def _selected(prediction: Tensor, mask: Tensor, valid: Tensor | None, stretch: bool) -> tuple[Tensor, Tensor]:
    """Return prepared prediction and mask of the valid pixels only, ``(N,)``; errors as in `prepared`."""
    values = prepared(prediction, mask, valid, stretch)
    if valid is None:
        return values.flatten(), mask.flatten()
    return _picked(values, valid), _picked(mask, valid)


def _picked(values: Tensor, part: Tensor) -> Tensor:
    """Return the elements of `values` where the bool tensor `part` of the same shape is set, ``(N,)``."""
    if values.device.type != "cpu":
        return values.masked_select(part)
    return torch.from_numpy(values.numpy()[part.numpy()])  # three times faster than masked_select


def _quadrants(inside: Tensor, foreground: int) -> list[tuple[slice, slice]]:
    """Slices of the four quadrants of ``inside (H, W)`` around the centroid of its `foreground` set pixels.

    The centroid is rounded half to even and its row and column belong to the upper left quadrant. The
    others may be empty.
    """
    cuts = []
    for dim in (0, 1):
        profile = inside.view(torch.uint8).sum(dim=1 - dim, dtype=torch.int32)  # several times faster than of bool
        moment = int((profile * torch.arange(profile.numel(), device=profile.device)).sum())
        cuts.append(round(moment / foreground) + 1)
    rows, columns = ((slice(0, cut), slice(cut, None)) for cut in cuts)
    return [(row, column) for row in rows for column in columns]


def _similarity(on_mask: _Moments, off_mask: _Moments) -> float:
    """Structural similarity of prediction and mask in one region, from the moments on and off the mask.

    The region-aware term of ICCV 2017, SSIM without its constants. The covariance with a binary mask needs
    no pixels: with n1 of them on and n0 off the mask it is ``n1 n0 / (n1 + n0) * (mean1 - mean0)`` before
    normalisation.
    """
    both = on_mask.joined(off_mask)
    if both.pixels == 0:
        return 0.0
    freedom = max(both.pixels - 1, 1)
    spread = on_mask.pixels * off_mask.pixels / both.pixels
    mask_mean = on_mask.pixels / both.pixels
    covariance = spread * (on_mask.mean - off_mask.mean) / freedom
    variances = (both.squares + spread) / freedom
    numerator = 4 * both.mean * mask_mean * covariance
    denominator = (both.mean**2 + mask_mean**2) * variances
    if numerator != 0:
        return numerator / (denominator + _EPS)
    return 1.0 if denominator == 0 else 0.0


def _object_similarity(moments: _Moments) -> float:
    """``2 m / (m^2 + 1 + s)`` of mean m and sample deviation s: the object-aware term, lambda 0.5."""
    deviation = math.sqrt(moments.squares / max(moments.pixels - 1, 1))
    return 2 * moments.mean / (moments.mean**2 + 1 + deviation + _EPS)


def _alignment(on_mask: Tensor, off_mask: Tensor, foreground: int, pixels: int) -> Tensor:
    """E-measure of binary maps with `on_mask` marked pixels in the mask and `off_mask` outside it.

    Args:
        on_mask: Any shape, integers; one entry per map.
        off_mask: As `on_mask`.
        foreground: Pixels of the mask.
        pixels: Pixels of the image.

    Returns:
        float64 tensor of the shape of `on_mask`; NaN without a pixel.
    """
    on_mask, off_mask = on_mask.to(torch.float64), off_mask.to(torch.float64)
    if pixels == 0:
        return torch.full_like(on_mask, math.nan)
    marked = on_mask + off_mask
    if foreground == 0:
        total = pixels - marked
    elif foreground == pixels:
        total = marked
    else:
        map_mean, mask_mean = marked / pixels, foreground / pixels
        cells = (
            (on_mask, 1 - map_mean, 1 - mask_mean),
            (off_mask, 1 - map_mean, -mask_mean),
            (foreground - on_mask, -map_mean, 1 - mask_mean),
            (pixels - foreground - off_mask, -map_mean, -mask_mean),
        )
        total = torch.zeros_like(on_mask)
        for count, a, b in cells:
            total += count * (2 * a * b / (a**2 + b**2 + _EPS) + 1) ** 2 / 4
    return total / max(pixels - 1, 1)
