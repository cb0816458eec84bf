"""Weighted F-measure: stored answers, the definition written out with scipy, edge cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from semseg_automl.errors import DataError
from semseg_automl.weighted_f import weighted_f_measure

TOLERANCE = 1e-10


def by_definition(prediction: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_], beta2: float = 1.0) -> float:
    """Equations 5 to 10 of the paper on whole arrays; the mask is not empty."""
    distance, nearest = ndimage.distance_transform_edt(~mask, return_indices=True)
    error = np.abs(prediction - mask)
    axis = np.exp(-(np.arange(-3, 4) ** 2) / 50)
    kernel = np.outer(axis, axis) / axis.sum() ** 2
    smooth = ndimage.convolve(error[tuple(nearest)], kernel, mode="constant")
    weighted = np.where(mask, np.minimum(error, smooth), error * (2 - 0.5 ** (distance / 5)))
    caught = (1 - weighted)[mask].sum()
    precision, recall = caught / (caught + weighted[~mask].sum()), caught / mask.sum()
    return float((1 + beta2) * precision * recall / (recall + beta2 * precision))


def stretched(prediction: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Map the range to [0, 1]."""
    span: npt.NDArray[np.float64] = (prediction - prediction.min()) / (prediction.max() - prediction.min())
    return span


def blobs(rng: np.random.Generator, size: tuple[int, int], share: float, smooth: float) -> npt.NDArray[np.bool_]:
    """Mask of about `share` of the pixels, in blobs as wide as `smooth` pixels."""
    field = ndimage.gaussian_filter(rng.standard_normal(size), smooth) if smooth else rng.random(size)
    mask: npt.NDArray[np.bool_] = field > np.quantile(field, 1 - share)
    return mask


@pytest.mark.parametrize("index", range(15))
def test_weighted_f__stored_image__equals_the_reference(shared: Callable[[str], Path], index: int) -> None:
    with np.load(shared("golden/saliency_metrics.npz")) as stored:
        prediction = torch.from_numpy(stored[f"pred_{index}"]).double() / 255
        mask = torch.from_numpy(stored[f"gt_{index}"]) > 128
        expected = float(stored["wf_per_image"][index])
    assert weighted_f_measure(prediction, mask).item() == pytest.approx(expected, rel=0, abs=TOLERANCE)


# Thin masks and noise have many pixels with several nearest ones, of which the authors' results depend on one.
@pytest.mark.parametrize(
    ("size", "share", "smooth"),
    [
        ((61, 47), 0.3, 5.0),
        ((40, 53), 0.02, 0.0),
        ((33, 29), 0.5, 0.0),
        ((50, 50), 0.9, 2.0),
        ((1, 30), 0.3, 0.0),
        ((300, 9), 0.2, 3.0),
        ((7, 256), 0.1, 2.0),
    ],
)
@pytest.mark.parametrize("beta2", [1.0, 0.3])
def test_weighted_f__random_image__equals_the_definition(
    size: tuple[int, int], share: float, smooth: float, beta2: float
) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = blobs(rng, size, share, smooth)
        prediction = np.clip(0.5 * mask + rng.uniform(0, 0.6, size), 0, 1)
        ours = weighted_f_measure(torch.from_numpy(prediction), torch.from_numpy(mask), beta2=beta2).item()
        assert ours == pytest.approx(by_definition(stretched(prediction), mask, beta2), rel=0, abs=TOLERANCE)


def test_weighted_f__pixels_farther_than_16_bits_of_squared_distance__equal_the_definition() -> None:
    mask = np.zeros((6, 700), dtype=bool)
    mask[2:4, :3] = True
    prediction = np.random.default_rng(0).random(mask.shape)
    ours = weighted_f_measure(torch.from_numpy(prediction), torch.from_numpy(mask), stretch=False).item()
    assert ours == pytest.approx(by_definition(prediction, mask), rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("place", [(0, 0), (230, 210), (445, 219), (100, 2)])
def test_weighted_f__small_mask_in_a_large_image__equals_the_definition(place: tuple[int, int]) -> None:
    # Far from the mask no distance is computed: each side of the image is farther away than that for one of these.
    rng = np.random.default_rng(place[0])
    mask = np.zeros((450, 440), dtype=bool)
    mask[place[0] : place[0] + 5, place[1] : place[1] + 3] = True
    for prediction in (rng.random(mask.shape), mask * 0.4 + ~mask * (rng.random(mask.shape) > 0.9)):
        ours = weighted_f_measure(torch.from_numpy(prediction), torch.from_numpy(mask), stretch=False).item()
        assert ours == pytest.approx(by_definition(prediction, mask), rel=1e-10, abs=0)


@pytest.mark.parametrize("size", [(64, 64), (65, 40), (128, 11), (192, 5)])
def test_weighted_f__errors_at_the_edges_of_strips_and_image__equal_the_definition(size: tuple[int, int]) -> None:
    # Errors in few rows: what lies beyond what they reach is not computed, and strips end every 64 rows.
    for row in (0, 1, 6, 7, 31, 56, 57, 58, 60, 61, 62, 63):
        rng = np.random.default_rng(row)
        mask = blobs(rng, size, 0.4, 2.0)
        mask[row, : size[1] // 2] = True
        prediction = mask.astype(np.float64)
        prediction[row] *= 0.3
        ours = weighted_f_measure(torch.from_numpy(prediction), torch.from_numpy(mask)).item()
        assert ours == pytest.approx(by_definition(stretched(prediction), mask), rel=0, abs=TOLERANCE), row


def test_weighted_f__one_false_alarm__matches_hand_computation() -> None:
    # The mask is right, so R is 1. The alarm is 5 pixels away and counts 2 - 0.5: P = 2 / (2 + 1.5).
    mask = torch.tensor([[True, True, False, False, False, False, False]])
    prediction = torch.tensor([[1.0, 1, 0, 0, 0, 0, 1]])
    precision = 2 / 3.5
    score = weighted_f_measure(prediction, mask).item()
    assert score == pytest.approx(2 * precision / (1 + precision), abs=1e-12)
    score = weighted_f_measure(prediction, mask, beta2=0.3).item()
    assert score == pytest.approx(1.3 * precision / (1 + 0.3 * precision), abs=1e-12)


def test_weighted_f__empty_mask__is_zero_and_perfect_prediction_one() -> None:
    mask = torch.zeros(12, 9, dtype=torch.bool)
    assert weighted_f_measure(mask.double(), mask).item() == 0
    assert weighted_f_measure((~mask).double(), mask).item() == 0
    assert weighted_f_measure((~mask).double(), ~mask).item() == pytest.approx(1, abs=1e-12)
    mask[3:6, 2:7] = True
    assert weighted_f_measure(mask.double(), mask).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("stretch", [True, False])
def test_weighted_f__border_not_valid__equals_the_cropped_image(stretch: bool) -> None:
    mask = torch.from_numpy(blobs(np.random.default_rng(0), (24, 24), 0.3, 3.0))
    prediction = torch.rand(24, 24, dtype=torch.float64)
    valid = torch.zeros(24, 24, dtype=torch.bool)
    valid[:20, :21] = True
    prediction[~valid] = math.nan
    whole = weighted_f_measure(prediction, mask | ~valid, valid=valid, stretch=stretch)
    cropped = weighted_f_measure(prediction[:20, :21], mask[:20, :21], stretch=stretch)
    torch.testing.assert_close(whole, cropped, rtol=0, atol=1e-13)


def test_weighted_f__no_valid_pixel__is_nan() -> None:
    nowhere = torch.zeros(4, 4, dtype=torch.bool)
    assert weighted_f_measure(torch.rand(4, 4), ~nowhere, valid=nowhere).isnan()
    assert weighted_f_measure(torch.rand(0, 4), nowhere[:0]).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weighted_f__any_floating_type__computes_in_float64_and_leaves_its_arguments(dtype: torch.dtype) -> None:
    mask = torch.from_numpy(blobs(np.random.default_rng(1), (16, 16), 0.3, 2.0))
    prediction = torch.rand(16, 16).to(dtype).requires_grad_()
    before: tuple[Tensor, ...] = prediction.detach().clone(), mask.clone()
    score = weighted_f_measure(prediction, mask)
    assert score.dtype == torch.float64
    assert not score.requires_grad
    assert torch.equal(score, weighted_f_measure(prediction.detach().double(), mask))
    assert torch.equal(prediction, before[0])
    assert torch.equal(mask, before[1])


@pytest.mark.parametrize("bad", [math.nan, 1.5, -0.2])
def test_weighted_f__value_that_is_no_probability__raises(bad: float) -> None:
    prediction = torch.rand(5, 5)
    prediction[2, 3] = bad
    with pytest.raises(DataError, match=r"prediction ranges from .* probabilities in \[0, 1\]"):
        weighted_f_measure(prediction, prediction > 0.5)


@pytest.mark.parametrize("stretch", [True, False])
def test_weighted_f__8_bit_levels__equal_their_quotient(stretch: bool) -> None:
    some, nowhere = torch.rand(31, 25) > 0.3, torch.zeros(31, 25, dtype=torch.bool)
    for low, high in ((0, 256), (10, 201), (77, 78)):
        levels = torch.randint(low, high, (31, 25), dtype=torch.uint8)
        for mask in (nowhere, ~nowhere, torch.rand(31, 25) > 0.6):
            for valid in (None, some, nowhere):
                counted = weighted_f_measure(levels, mask, valid=valid, stretch=stretch)
                quotient = weighted_f_measure(levels.double() / 255, mask, valid=valid, stretch=stretch)
                torch.testing.assert_close(counted, quotient, rtol=0, atol=1e-12, equal_nan=True)
