"""Calibration on hand-made probabilities: temperature, threshold, reliability, and what cannot be calibrated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from semseg_automl.calibration import (
    THRESHOLD_METRICS,
    Judged,
    check_temperature,
    choose_threshold,
    class_probabilities,
    fit_temperature,
    measure_calibration,
    tempered,
    tempered_threshold,
)
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.metrics import METRICS, build_metrics
from semseg_automl.task import IGNORE_INDEX


def image_of(probabilities: list[float], truth: list[int], threshold: float = 0.5) -> Judged:
    """One image of one row, binary."""
    scores = torch.tensor(probabilities)[None, None]
    return scores, (scores[0] > threshold).long(), torch.tensor([truth])


def random_images(count: int, *, classes: int = 1, temperature: float = 1.0, size: int = 40) -> list[Judged]:
    """Images whose truth is drawn from their probabilities; then the logits are multiplied by `temperature`."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(count):
        logits = 2 * torch.randn(classes, size, size, generator=generator)
        true = logits.sigmoid() if classes == 1 else logits.softmax(dim=0)
        if classes == 1:
            target = torch.bernoulli(true[0], generator=generator).long()
        else:
            draws = torch.multinomial(true.flatten(1).T, 1, generator=generator)
            target = draws.view(size, size)
        said = (temperature * logits).sigmoid() if classes == 1 else (temperature * logits).softmax(dim=0)
        labels = (said[0] > 0.5).long() if classes == 1 else said.argmax(dim=0)
        images.append((said, labels, target))
    return images


def with_ignored(image: Judged, *, classes: int = 1) -> Judged:
    """The image, twice as wide, the new pixels without a label."""
    scores, labels, target = image
    wrong = torch.zeros_like(scores)
    wrong[0] = 1.0
    void = torch.full_like(target, IGNORE_INDEX)
    return torch.cat([scores, wrong], dim=2), torch.cat([labels, labels], dim=1), torch.cat([target, void], dim=1)


@pytest.mark.parametrize("classes", [1, 4])
def test_tempered__any_temperature__divides_the_logits(classes: int) -> None:
    logits = torch.randn(classes, 5, 7, generator=torch.Generator().manual_seed(1))
    scores = logits.sigmoid() if classes == 1 else logits.softmax(dim=0)
    for temperature in (0.3, 1.7, 5.0):
        wanted = logits / temperature
        wanted = wanted.sigmoid() if classes == 1 else wanted.softmax(dim=0)
        torch.testing.assert_close(tempered(scores, temperature), wanted, rtol=1e-5, atol=1e-6)
    assert tempered(scores, 1.0) is scores


def test_tempered__scores_of_queries__are_normalised_and_keep_their_order() -> None:
    scores = torch.tensor([0.3, 0.1, 0.0]).view(3, 1, 1)
    found = tempered(scores, 2.0)[:, 0, 0]
    assert found.sum().item() == pytest.approx(1.0)
    assert found[0] / found[1] == pytest.approx(math.sqrt(3))
    assert found.argsort(descending=True).tolist() == [0, 1, 2]


def test_tempered__scores_of_zero_and_one__stay_finite_and_become_less_sure() -> None:
    found = tempered(torch.tensor([[[0.0, 1.0]]]), 2.0)
    assert found.isfinite().all()
    assert 0 < found[0, 0, 0] < 0.01
    assert 0.99 < found[0, 0, 1] < 1


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.5, 0.8, 1.0])
def test_tempered_threshold__random_scores__decides_as_before(threshold: float) -> None:
    scores = torch.rand(1, 40, 40)
    for temperature in (0.4, 3.0):
        moved = tempered_threshold(threshold, temperature)
        assert torch.equal(tempered(scores, temperature) > moved, scores > threshold)


@pytest.mark.parametrize("wrong", ["2", None, True, 0, -1.0, math.nan, math.inf])
def test_check_temperature__no_positive_number__raises(wrong: object) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        check_temperature(wrong)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_fit_temperature__logits_multiplied__is_the_factor(classes: int, temperature: float) -> None:
    images = random_images(8, classes=classes, temperature=temperature, size=64)
    assert fit_temperature(images, 8) == pytest.approx(temperature, rel=0.05)


def test_fit_temperature__ignored_pixels__change_nothing() -> None:
    images = random_images(3, temperature=2.0)
    assert fit_temperature([with_ignored(each) for each in images], 3) == pytest.approx(
        fit_temperature(images, 3), rel=1e-3
    )


def test_fit_temperature__calibrates__and_keeps_labels() -> None:
    images = random_images(4, temperature=3.0)
    temperature = fit_temperature(images, 4)
    after = [(tempered(scores, temperature), labels, target) for scores, labels, target in images]
    assert all(torch.equal(scores[0] > 0.5, labels.bool()) for scores, labels, _ in after)
    before, now = measure_calibration(images), measure_calibration(after)
    assert now.ece < 0.3 * before.ece
    assert now.nll < before.nll
    assert now.brier < before.brier


def test_fit_temperature__large_images__takes_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semseg_automl.calibration.SAMPLE", 40)
    seen: list[int] = []
    real = torch.nn.functional.cross_entropy

    def counted(logits: Tensor, truth: Tensor) -> Tensor:
        seen.append(len(truth))
        return real(logits, truth)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted)
    images = random_images(4)
    assert fit_temperature(images, 4) == fit_temperature(images, 4)
    assert set(seen) == {40}


@pytest.mark.parametrize("metric", THRESHOLD_METRICS)
def test_choose_threshold__any_metric__is_the_best_that_the_metric_itself_finds(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds = np.arange(1, 50) / 50
    monkeypatch.setattr("semseg_automl.calibration.THRESHOLDS", thresholds)
    images = [*random_images(3, temperature=0.6, size=12), image_of([0.2, 0.301, 0.3], [0, 0, 0])]
    chosen = choose_threshold(images, metric)

    def figure(threshold: float) -> float:
        built = build_metrics([metric], kind="binary", num_classes=2)[metric]
        for scores, _, target in images:
            built.update(scores, (scores[0] > threshold).long(), target)
        return built.compute().item()

    figures = np.array([figure(float(threshold)) for threshold in thresholds])
    higher = METRICS[metric](2).higher_is_better
    best = figures.max() if higher else figures.min()
    equal = thresholds[np.isclose(figures, best, rtol=1e-12)]
    assert figure(chosen) == pytest.approx(best, rel=1e-12)
    assert abs(chosen - 0.5) == pytest.approx(np.abs(equal - 0.5).min())


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [([0.1, 0.2, 0.8, 0.9], 0.5), ([0.1, 0.2, 0.31, 0.9], 0.309), ([0.1, 0.6, 0.65, 0.9], 0.6), ([0.5] * 4, 0.499)],
)
def test_choose_threshold__hand_case__is_the_nearest_to_a_half_that_separates(
    scores: list[float], wanted: float
) -> None:
    # A score that equals the threshold in float32 is background, as the decision has it: 0.31 and 0.6 are no float32.
    image = image_of(scores, [0, 0, 1, 1])
    chosen = choose_threshold([image], "iou")
    assert chosen == wanted
    if len(set(scores)) > 1:
        assert ((image[0][0] > chosen) == image[2].bool()).all()


def test_choose_threshold__ignored_pixels_and_images__change_nothing() -> None:
    images = random_images(3, temperature=0.6)
    void = (*images[0][:2], torch.full_like(images[0][2], IGNORE_INDEX))
    for metric in ("iou", "ber"):
        changed = [*(with_ignored(each) for each in images), void]
        assert choose_threshold(changed, metric) == choose_threshold(images, metric)


def test_choose_threshold__metric_without_counts__names_those_with_them() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric of a decision threshold 's_measure'.*iou, dice"):
        choose_threshold(random_images(1), "s_measure")


@pytest.mark.parametrize("function", ["temperature", "threshold", "calibration"])
def test_calibration__no_labelled_pixel_or_an_unknown_class__raises(function: str) -> None:
    def run(images: list[Judged]) -> None:
        if function == "temperature":
            fit_temperature(images, len(images))
        elif function == "threshold":
            choose_threshold(images, "iou")
        else:
            measure_calibration(images)

    with pytest.raises(DataError, match="has a label"):
        run([image_of([0.2, 0.8], [255, 255])])
    with pytest.raises(DataError, match="has a label"):
        run([])
    with pytest.raises(DataError, match="class indices"):
        run([image_of([0.2, 0.8], [0, 2])])


def test_measure_calibration__binary_hand_case__equals_it() -> None:
    # Of five bins: (0, 0.2] holds 0.1 and 0.2 with no foreground, (0.6, 0.8] holds 0.7 twice with one, (0.8, 1] 0.9
    # with one; the last pixel has no label.
    image = image_of([0.1, 0.1875, 0.75, 0.75, 0.9, 0.5], [0, 0, 1, 0, 1, 255])
    found = measure_calibration([image], bins=5)
    assert found.pixels == 5
    assert [each.pixels for each in found.curve] == [2, 0, 0, 2, 1]
    assert [each.low for each in found.curve] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert found.curve[3].confidence == pytest.approx(0.75)
    assert found.curve[3].accuracy == 0.5
    assert math.isnan(found.curve[1].confidence)
    assert found.ece == pytest.approx((2 * 0.14375 + 2 * 0.25 + 1 * 0.1) / 5)
    errors = [0.1, 0.1875, 0.25, 0.75, 0.1]
    assert found.brier == pytest.approx(sum(error**2 for error in errors) / 5)
    assert found.nll == pytest.approx(-sum(math.log(1 - error) for error in errors) / 5)


def test_measure_calibration__multiclass_hand_case__equals_it() -> None:
    scores = torch.tensor([[0.5, 0.125], [0.25, 0.25], [0.25, 0.625]])[:, None]
    image = (scores, scores.argmax(dim=0), torch.tensor([[1, 2]]))
    found = measure_calibration([image], bins=10)
    assert [each.pixels for each in found.curve] == [0, 0, 0, 0, 1, 0, 1, 0, 0, 0]
    assert found.ece == pytest.approx((0.5 + 0.375) / 2)
    squares = [0.5**2, 0.75**2, 0.25**2, 0.125**2, 0.25**2, 0.375**2]
    assert found.brier == pytest.approx(sum(squares) / 2)
    assert found.nll == pytest.approx(-(math.log(0.25) + math.log(0.625)) / 2)


def test_measure_calibration__equal_mass__spreads_pixels_where_equal_widths_do_not() -> None:
    # All probabilities are below 0.04: one bin of equal width, four of equal mass; only the last quarter comes true.
    probabilities = [0.0001] * 5 + [0.001] * 5 + [0.01] * 5 + [0.03] * 5
    found = measure_calibration([image_of(probabilities, [0] * 15 + [1] * 5)], bins=4)
    assert [each.pixels for each in found.curve] == [20, 0, 0, 0]
    assert [each.pixels for each in found.curve_equal_mass] == [5, 5, 5, 5]
    assert found.ece == pytest.approx(0.25 - np.mean(probabilities), abs=1e-7)
    assert found.ece_equal_mass == pytest.approx((0.0001 + 0.001 + 0.01 + 0.97) / 4, abs=1e-7)


@pytest.mark.parametrize("classes", [1, 3])
def test_measure_calibration__truth_drawn_from_the_probabilities__is_small(classes: int) -> None:
    images = random_images(6, classes=classes, size=64)
    found = measure_calibration(images)
    assert found.ece < 0.015
    assert found.ece_equal_mass < 0.015
    assert sum(each.pixels for each in found.curve_equal_mass) == found.pixels == 6 * 64 * 64
    assert repr(measure_calibration([with_ignored(each) for each in images])) == repr(found)  # equal NaNs too


@pytest.mark.parametrize("bins", [0, 1001, 2.0, True])
def test_measure_calibration__bins_out_of_range__raises(bins: int) -> None:
    with pytest.raises(ConfigError, match="bins"):
        measure_calibration(random_images(1), bins=bins)


def test_class_probabilities__one_map_and_queries__add_up_to_one() -> None:
    assert class_probabilities(torch.tensor([[0.25]])).tolist() == [[0.75], [0.25]]
    assert class_probabilities(torch.tensor([[0.3], [0.1]])).flatten().tolist() == pytest.approx([0.75, 0.25])
