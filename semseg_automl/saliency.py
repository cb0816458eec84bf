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

Each measure has a second form, ``..._of``, which takes a `SoftMap`: prediction, mask, stretch and valid pixels in one
object. What measures need alike is worked out once for all that are given the same one.

Not here: several measures at once (`semseg_automl.saliency_scores`), accumulation over a data set, which lives in
`semseg_automl.metrics`, and scores of hard decisions.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from semseg_automl.soft_map import SoftMap, picked

__all__ = [
    "e_measure",
    "e_measure_adaptive",
    "e_measure_adaptive_of",
    "e_measure_curve",
    "e_measure_curve_of",
    "e_measure_of",
    "mean_absolute_error",
    "mean_absolute_error_of",
    "s_measure",
    "s_measure_of",
]

_EPS = torch.finfo(torch.float64).eps  # MATLAB's eps, added to denominators by all published evaluation code


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
    def of_counts(cls, values: Tensor, counts: Tensor) -> list[_Moments]:
        """Moments of ``values (256,)`` for each row of ``counts (N, 256)``, which says how often a value is taken."""
        weights = counts.to(torch.float64)
        pixels = weights.sum(dim=1)
        first = values[(counts > 0).to(torch.uint8).argmax(dim=1)]
        deviations = values - first[:, None]
        mean = (deviations * weights).sum(dim=1) / pixels.clamp(min=1)
        squares = (deviations.sub_(mean[:, None]).square_() * weights).sum(dim=1)
        rows = zip(pixels.tolist(), (first + mean).tolist(), squares.tolist(), strict=True)
        return [cls(int(number), middle, spread) if number else cls(0, 0.0, 0.0) for number, middle, spread in rows]

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
    return s_measure_of(SoftMap(prediction, mask, valid=valid, stretch=stretch), alpha=alpha)


def s_measure_of(image: SoftMap, *, alpha: float = 0.5) -> Tensor:
    """`s_measure` of a map whose tensors are in one object; answer and errors as there."""
    answer = functools.partial(torch.tensor, dtype=torch.float64, device=image.prediction.device)
    regions, pixels, foreground = _moments(image), image.pixels, image.foreground
    if pixels == 0:
        return answer(math.nan)
    off_mask, on_mask = (functools.reduce(_Moments.joined, side) for side in zip(*regions, strict=True))
    if foreground in (0, pixels):
        return answer(on_mask.mean if foreground else 1 - off_mask.mean)
    region_score = sum(_similarity(on, off) * (on.pixels + off.pixels) for off, on in regions) / pixels
    object_score = (
        _object_similarity(on_mask) * foreground
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
    return e_measure_of(SoftMap(prediction, mask, valid=valid, stretch=stretch))


def e_measure_of(image: SoftMap) -> Tensor:
    """`e_measure` of a map whose tensors are in one object; answer and errors as there."""
    return e_measure_curve_of(image).mean()


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
    return e_measure_curve_of(SoftMap(prediction, mask, valid=valid, stretch=stretch))


def e_measure_curve_of(image: SoftMap) -> Tensor:
    """`e_measure_curve` of a map whose tensors are in one object; answer and errors as there."""
    off_mask, on_mask = image.counts.flip(1).cumsum(1).flip(1)  # [t]: pixels at or above level t
    return _alignment(on_mask, off_mask, image.foreground, image.pixels)


def e_measure_adaptive(
    prediction: Tensor, mask: Tensor, *, valid: Tensor | None = None, stretch: bool = True
) -> Tensor:
    """E-measure of ``prediction >= min(2 * mean(prediction), 1)``.

    Arguments and errors are those of `e_measure_curve`. A prediction of zeros has threshold 0 and therefore
    counts as all foreground.

    Returns:
        0-d float64 tensor; NaN without a valid pixel.
    """
    return e_measure_adaptive_of(SoftMap(prediction, mask, valid=valid, stretch=stretch))


def e_measure_adaptive_of(image: SoftMap) -> Tensor:
    """`e_measure_adaptive` of a map whose tensors are in one object; answer and errors as there."""
    if image.has_levels:
        values, counts = image.level_values, image.raw_counts
        mean = (values * counts).sum() / counts.sum()
    else:
        values, inside = image.selected
        mean, counts = values.mean(), torch.stack((~inside, inside))
    marked = values >= (2 * mean).clamp(max=1)
    off_mask, on_mask = (counts * marked).sum(dim=1)
    return _alignment(on_mask, off_mask, image.foreground, image.pixels)


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
    return mean_absolute_error_of(SoftMap(prediction, mask, valid=valid, stretch=stretch))


def mean_absolute_error_of(image: SoftMap) -> Tensor:
    """`mean_absolute_error` of a map whose tensors are in one object; answer and errors as there."""
    if image.has_levels:
        values, counts = image.level_values, image.raw_counts
        return (counts * torch.stack((values, 1 - values))).sum() / counts.sum()
    values, inside = image.selected
    return (values - inside.to(torch.float64)).abs_().mean()


def _moments(image: SoftMap) -> list[tuple[_Moments, _Moments]]:
    """Moments of the prediction outside and inside the mask by quadrant; of the whole image where a side is empty."""
    if image.has_levels:
        moments = _Moments.of_counts(image.level_values, image.quadrant_counts.flatten(0, 1))
        return list(zip(moments[::2], moments[1::2], strict=True))
    values = image.values
    whole = image.foreground in (0, image.pixels)
    areas = [(slice(None), slice(None))] if whole else image.quadrants
    outside, inside = (
        [_Moments.of(picked(values[area], part[area])) for area in areas] for part in (image.outside, image.inside)
    )
    return list(zip(outside, inside, strict=True))


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
