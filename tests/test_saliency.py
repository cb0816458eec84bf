"""Saliency scores of one image: parity with stored answers, definitions written out, edge cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from semseg_automl.errors import DataError
from semseg_automl.saliency import (
    e_measure,
    e_measure_adaptive,
    e_measure_curve,
    mean_absolute_error,
    s_measure,
)

Array = npt.NDArray[np.float64]
MEASURES = [s_measure, e_measure, e_measure_curve, e_measure_adaptive, mean_absolute_error]
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def answers(shared: Callable[[str], Path]) -> dict[str, npt.NDArray[np.generic]]:
    """Stored predictions, masks, and what the reference says of them."""
    with np.load(shared("golden/saliency_metrics.npz")) as stored:
        return dict(stored)


def stored_image(answers: dict[str, npt.NDArray[np.generic]], index: int) -> tuple[Tensor, Tensor]:
    """Prediction as float64 in [0, 1] and mask as bool, both prepared as the reference prepares them."""
    prediction = torch.from_numpy(answers[f"pred_{index}"]).double() / 255
    return prediction, torch.from_numpy(answers[f"gt_{index}"]) > 128


def disc(size: int, row: float, column: float, radius: float) -> Tensor:
    """Bool mask ``(size, size)`` of a disc."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def s_measure_by_definition(prediction: Array, mask: npt.NDArray[np.bool_]) -> float:
    """S-measure of a stretched prediction from numpy's own covariance; every quadrant needs two pixels."""
    row, column = (int(np.round(index.mean())) + 1 for index in np.nonzero(mask))
    region = 0.0
    for rows in (slice(None, row), slice(row, None)):
        for columns in (slice(None, column), slice(column, None)):
            p, g = prediction[rows, columns].ravel(), mask[rows, columns].ravel().astype(float)
            (var_p, cov), (_, var_g) = np.cov(p, g)
            top, bottom = 4 * p.mean() * g.mean() * cov, (p.mean() ** 2 + g.mean() ** 2) * (var_p + var_g)
            region += p.size / prediction.size * (top / bottom if bottom else 1.0)
    parts = []
    for values in (prediction[mask], 1 - prediction[~mask]):
        parts.append(2 * values.mean() / (values.mean() ** 2 + 1 + values.std(ddof=1)))
    share = mask.mean()
    return max(0.0, 0.5 * float(share * parts[0] + (1 - share) * parts[1]) + 0.5 * region)


def e_measure_by_definition(prediction: Array, mask: npt.NDArray[np.bool_]) -> list[float]:
    """E-measure at 256 thresholds of a stretched prediction, pixel by pixel; mask neither empty nor full."""
    levels = (prediction * 255).astype(np.uint8)
    deviation = mask - mask.mean()
    curve = []
    for threshold in range(256):
        marked = (levels >= threshold).astype(float)
        marked -= marked.mean()
        alignment = 2 * marked * deviation / (marked**2 + deviation**2)
        curve.append(((alignment + 1) ** 2 / 4).sum() / (mask.size - 1))
    return curve


@pytest.mark.parametrize("index", range(15))
def test_measures__stored_image__equal_the_reference(answers: dict[str, npt.NDArray[np.generic]], index: int) -> None:
    prediction, mask = stored_image(answers, index)
    for measure, key in ((s_measure, "s"), (e_measure, "e"), (mean_absolute_error, "mae")):
        expected = float(answers[f"{key}_per_image"][index])
        assert measure(prediction, mask).item() == pytest.approx(expected, rel=0, abs=TOLERANCE), key


def test_e_measure__all_stored_images__max_and_adaptive_equal_the_reference(
    answers: dict[str, npt.NDArray[np.generic]],
) -> None:
    images = [stored_image(answers, index) for index in range(15)]
    curve = torch.stack([e_measure_curve(*image) for image in images]).mean(dim=0)
    adaptive = torch.stack([e_measure_adaptive(*image) for image in images]).mean()
    assert curve.max().item() == pytest.approx(float(answers["e_measure_max"]), rel=0, abs=TOLERANCE)
    assert adaptive.item() == pytest.approx(float(answers["e_measure_adaptive"]), rel=0, abs=TOLERANCE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("measure", MEASURES)
def test_measures__on_cuda__equal_the_host(
    answers: dict[str, npt.NDArray[np.generic]], measure: Callable[..., Tensor]
) -> None:
    for index in range(15):
        prediction, mask = stored_image(answers, index)
        there = measure(prediction.cuda(), mask.cuda())
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.cpu(), measure(prediction, mask), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(8))
def test_s_measure__random_image__equals_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = disc(33, rng.uniform(10, 22), rng.uniform(10, 22), rng.uniform(3, 9)).numpy()
    prediction = np.clip(0.6 * mask + rng.uniform(0, 0.6, mask.shape), 0, 1)
    stretched = (prediction - prediction.min()) / (prediction.max() - prediction.min())
    ours = s_measure(torch.from_numpy(prediction), torch.from_numpy(mask)).item()
    assert ours == pytest.approx(s_measure_by_definition(stretched, mask), rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_e_measure_curve__random_8_bit_image__equals_the_definition_at_every_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((19, 23)) < 0.3
    prediction = rng.integers(7, 240, mask.shape).astype(np.uint8) / 255
    stretched = (prediction - prediction.min()) / (prediction.max() - prediction.min())
    ours = e_measure_curve(torch.from_numpy(prediction), torch.from_numpy(mask))
    np.testing.assert_allclose(ours.numpy(), e_measure_by_definition(stretched, mask), rtol=0, atol=TOLERANCE)


def test_s_measure__two_by_two__matches_hand_computation() -> None:
    # Centroid (0.5, 1) rounds to row 0, column 1: the quadrants are the two rows. The upper row equals its
    # mask (1), the lower one is constant (0). On the mask 2 * 1 / (1 + 1) = 1; off it the values 1 - p are
    # (1, 0), mean 1/2 and deviation sqrt(1/2): 1 / (1.25 + sqrt(1/2)).
    mask = torch.tensor([[False, True], [False, True]])
    score = s_measure(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), mask).item()
    object_score = 0.5 * 1 + 0.5 / (1.25 + math.sqrt(0.5))
    assert score == pytest.approx(0.5 * 0.5 + 0.5 * object_score, abs=1e-12)
    assert s_measure(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), mask, alpha=1).item() == pytest.approx(
        object_score, abs=1e-12
    )


def test_e_measure_curve__half_marked__matches_hand_computation() -> None:
    # Map and mask have mean 1/2: two pixels align (score 1), two oppose (score 0), divided by 4 - 1.
    mask = torch.tensor([[True, True, False, False]])
    curve = e_measure_curve(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), mask)
    assert curve[1:].tolist() == pytest.approx([2 / 3] * 255)
    # Threshold 0 marks all: the map's deviation is 0, alignment 0, (0 + 1)^2 / 4 for each of 4 pixels.
    assert curve[0].item() == pytest.approx(1 / 3)


def test_e_measure_adaptive__threshold_is_twice_the_mean__matches_hand_computation() -> None:
    mask = torch.tensor([[True, True, False, False]])
    # Mean 0.375: the threshold 0.75 leaves the first pixel. Map mean 1/4, mask mean 1/2.
    score = e_measure_adaptive(torch.tensor([[1.0, 0.5, 0.0, 0.0]]), mask)
    cells = [(1, 0.75, 0.5), (1, -0.25, 0.5), (2, -0.25, -0.5)]
    expected = sum(n * (2 * a * b / (a * a + b * b) + 1) ** 2 / 4 for n, a, b in cells) / 3
    assert score.item() == pytest.approx(expected, abs=1e-12)


def test_measures__perfect_prediction__are_best() -> None:
    mask = disc(40, 17, 22, 9)
    prediction = mask.float()
    best = 1600 / 1599  # the sum over N pixels is divided by N - 1
    assert s_measure(prediction, mask).item() == pytest.approx(1, abs=1e-12)
    assert e_measure_adaptive(prediction, mask).item() == pytest.approx(best, abs=1e-12)
    assert e_measure_curve(prediction, mask)[1:].tolist() == pytest.approx([best] * 255, abs=1e-12)
    assert mean_absolute_error(prediction, mask).item() == 0


@pytest.mark.parametrize(("level", "empty", "full"), [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.25, 0.75, 0.25)])
def test_s_measure__empty_or_full_mask__is_mean_of_constant_prediction(level: float, empty: float, full: float) -> None:
    prediction, mask = torch.full((6, 5), level), torch.zeros(6, 5, dtype=torch.bool)
    assert s_measure(prediction, mask).item() == empty
    assert s_measure(prediction, ~mask).item() == full


def test_s_measure__opposite_prediction__is_not_below_zero() -> None:
    mask = disc(20, 9, 9, 6)
    assert s_measure(1 - mask.float(), mask).item() == 0


@pytest.mark.parametrize("pixel", [(0, 0), (0, 7), (5, 0), (5, 7), (2, 3)])
def test_s_measure__one_pixel_mask_and_empty_quadrants__perfect_is_one(pixel: tuple[int, int]) -> None:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[pixel] = True
    assert s_measure(mask.float(), mask).item() == pytest.approx(1, abs=TOLERANCE)
    noisy = s_measure(torch.rand(6, 8), mask).item()
    assert 0 <= noisy < 1


@pytest.mark.parametrize("level", [0.1, 0.3, 0.7])
def test_s_measure__quadrants_without_mask_and_contrast__count_fully(level: float) -> None:
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[4, 4] = True
    prediction = torch.full((40, 40), level, dtype=torch.float64)
    prediction[4, 4] = 1
    # Quadrants: 5 x 5 with the pixel at its corner; the other three, 1575 of 1600 pixels, score 1.
    p, g = prediction[:5, :5].flatten().numpy(), mask[:5, :5].flatten().numpy().astype(float)
    (var_p, cov), (_, var_g) = np.cov(p, g)
    corner = 4 * p.mean() * g.mean() * cov / ((p.mean() ** 2 + g.mean() ** 2) * (var_p + var_g))
    score = s_measure(prediction, mask, stretch=False, alpha=0).item()
    assert score == pytest.approx((1575 + 25 * corner) / 1600, abs=TOLERANCE)


def test_measures__stretch__makes_a_faint_prediction_as_good_as_a_strong_one() -> None:
    mask = disc(30, 14, 15, 7)
    strong = mask.double()
    faint = 0.02 * strong
    for measure in MEASURES:
        torch.testing.assert_close(measure(faint, mask), measure(strong, mask), rtol=0, atol=1e-12)
    assert mean_absolute_error(faint, mask, stretch=False).item() == pytest.approx(0.98 * mask.double().mean().item())
    assert s_measure(faint, mask, stretch=False).item() < 0.6
    assert e_measure(faint, mask, stretch=False).item() < e_measure(strong, mask, stretch=False).item()


def test_e_measure_curve__8_bit_quotient_in_float32__misses_levels_that_float64_hits() -> None:
    # Why the docstring asks for a float64 quotient.
    image = torch.arange(10, 201).expand(4, -1)
    mask = torch.zeros_like(image, dtype=torch.bool)
    mask[:, 80:] = True
    stretched = (image.double() / 255 - 10 / 255) / (200 / 255 - 10 / 255)
    expected = e_measure_by_definition(stretched.numpy(), mask.numpy())
    exact = e_measure_curve(image.double() / 255, mask)
    rounded = e_measure_curve(image.float() / 255, mask)
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=TOLERANCE)
    assert (rounded - exact).abs().max().item() > 1e-4


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_measures__any_floating_type__compute_in_float64(measure: Callable[..., Tensor], dtype: torch.dtype) -> None:
    mask, prediction = disc(16, 8, 8, 4), torch.rand(16, 16).to(dtype).requires_grad_()
    score = measure(prediction, mask)
    assert score.dtype == torch.float64
    assert not score.requires_grad
    assert torch.equal(score, measure(prediction.double(), mask))


@pytest.mark.parametrize("measure", MEASURES)
def test_measures__arguments__are_left_as_they_were(measure: Callable[..., Tensor]) -> None:
    prediction, mask, valid = torch.rand(9, 9).double(), disc(9, 4, 4, 3), torch.rand(9, 9) > 0.2
    before = prediction.clone(), mask.clone(), valid.clone()
    measure(prediction, mask, valid=valid)
    measure(prediction, mask, stretch=False)
    assert all(torch.equal(a, b) for a, b in zip(before, (prediction, mask, valid), strict=True))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("stretch", [True, False])
def test_measures__border_not_valid__equal_the_cropped_image(measure: Callable[..., Tensor], stretch: bool) -> None:
    mask, prediction = disc(24, 11, 9, 6), torch.rand(24, 24, dtype=torch.float64)
    valid = torch.zeros(24, 24, dtype=torch.bool)
    valid[:20, :21] = True
    outside_mask = mask | ~valid
    prediction[~valid] = math.nan
    whole = measure(prediction, outside_mask, valid=valid, stretch=stretch)
    cropped = measure(prediction[:20, :21], mask[:20, :21], stretch=stretch)
    torch.testing.assert_close(whole, cropped, rtol=0, atol=1e-13)


@pytest.mark.parametrize("measure", MEASURES)
def test_measures__all_valid__equal_no_valid_given(measure: Callable[..., Tensor]) -> None:
    mask, prediction = disc(18, 6, 9, 4), torch.rand(18, 18)
    everywhere = torch.ones_like(mask)
    torch.testing.assert_close(
        measure(prediction, mask, valid=everywhere), measure(prediction, mask), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_measures__no_valid_pixel__are_nan(measure: Callable[..., Tensor]) -> None:
    nowhere = torch.zeros(4, 4, dtype=torch.bool)
    assert measure(torch.rand(4, 4), ~nowhere, valid=nowhere).isnan().all()
    assert measure(torch.rand(0, 4), nowhere[:0]).isnan().all()


def test_measures__one_pixel_image__are_finite() -> None:
    yes, no = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    assert s_measure(torch.ones(1, 1), yes).item() == 1
    assert e_measure(torch.ones(1, 1), yes).item() == 1
    assert e_measure_adaptive(torch.ones(1, 1), no).item() == 0
    assert mean_absolute_error(torch.ones(1, 1), no).item() == 1


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [math.nan, 1.5, -0.2, math.inf])
def test_measures__value_that_is_no_probability__raise(measure: Callable[..., Tensor], bad: float) -> None:
    prediction = torch.rand(5, 5)
    prediction[2, 3] = bad
    with pytest.raises(DataError, match=r"prediction ranges from .* probabilities in \[0, 1\]"):
        measure(prediction, disc(5, 2, 2, 2))


@pytest.mark.parametrize("stretch", [True, False])
def test_measures__rounding_above_one__counts_as_one(stretch: bool) -> None:
    mask = disc(12, 6, 6, 3)
    exact = mask.double()
    for measure in MEASURES:
        over = measure(exact * (1 + 1e-6), mask, stretch=stretch)
        torch.testing.assert_close(over, measure(exact, mask, stretch=stretch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_measures__wrong_shape_or_type__raise(measure: Callable[..., Tensor]) -> None:
    mask = disc(5, 2, 2, 2)
    with pytest.raises(DataError, match=r"prediction is torch\.int32"):
        measure(torch.zeros(5, 5, dtype=torch.int32), mask)
    with pytest.raises(DataError, match=r"shape \(1, 5, 5\).*one image"):
        measure(torch.zeros(1, 5, 5), mask)
    with pytest.raises(DataError, match=r"mask is torch\.int64"):
        measure(torch.zeros(5, 5), mask.long())
    with pytest.raises(DataError, match=r"mask is torch\.bool of shape \(4, 5\)"):
        measure(torch.zeros(5, 5), mask[:4])
    with pytest.raises(DataError, match="valid is"):
        measure(torch.zeros(5, 5), mask, valid=mask.float())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("stretch", [True, False])
def test_measures__8_bit_levels__equal_their_quotient(measure: Callable[..., Tensor], stretch: bool) -> None:
    empty, whole = torch.zeros(31, 25, dtype=torch.bool), torch.ones(31, 25, dtype=torch.bool)
    some = torch.rand(31, 25) > 0.3
    for low, high in ((0, 256), (10, 201), (77, 78), (0, 1), (255, 256), (3, 5)):
        levels = torch.randint(low, high, (31, 25), dtype=torch.uint8)
        for mask in (empty, whole, torch.rand(31, 25) > 0.6):
            for valid in (None, some, empty):
                counted = measure(levels, mask, valid=valid, stretch=stretch)
                quotient = measure(levels.double() / 255, mask, valid=valid, stretch=stretch)
                torch.testing.assert_close(counted, quotient, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("index", range(15))
def test_measures__stored_8_bit_image__equal_the_reference(
    answers: dict[str, npt.NDArray[np.generic]], index: int
) -> None:
    levels, mask = torch.from_numpy(answers[f"pred_{index}"]), torch.from_numpy(answers[f"gt_{index}"]) > 128
    for measure, key in ((s_measure, "s"), (e_measure, "e"), (mean_absolute_error, "mae")):
        expected = float(answers[f"{key}_per_image"][index])
        assert measure(levels, mask).item() == pytest.approx(expected, rel=0, abs=TOLERANCE), key
