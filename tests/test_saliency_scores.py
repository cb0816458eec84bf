"""Several saliency measures at once: the same figures as one by one, whatever the threads; errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor

from semseg_automl import metrics, saliency, soft_map, weighted_f
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.metrics import METRICS, SMeasure
from semseg_automl.saliency_scores import MEASURES, saliency_scores
from semseg_automl.soft_map import SoftMap, shared_map, shared_maps

ALONE: dict[str, Callable[..., Tensor]] = {
    "s_measure": saliency.s_measure,
    "e_measure": saliency.e_measure,
    "e_measure_curve": saliency.e_measure_curve,
    "e_measure_adaptive": saliency.e_measure_adaptive,
    "wf": weighted_f.weighted_f_measure,
    "wf_03": lambda *image, **options: weighted_f.weighted_f_measure(*image, beta2=0.3, **options),
    "mae": saliency.mean_absolute_error,
}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small images are worth a thread; OpenCV's number of threads is put back."""
    monkeypatch.setattr(weighted_f, "_WORTH_A_THREAD", 1)
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    yield
    cv2.setNumThreads(before)


def image(height: int, width: int, *, levels: bool = False) -> tuple[Tensor, Tensor]:
    """Prediction and mask that resemble each other."""
    mask = torch.nn.functional.avg_pool2d(torch.rand(1, height + 4, width + 4), 5, stride=1)[0] > 0.52
    prediction = 0.5 * mask + 0.5 * torch.rand(height, width)
    return (255 * prediction).to(torch.uint8) if levels else prediction, mask


@pytest.mark.parametrize("levels", [True, False])
@pytest.mark.parametrize("partly", [True, False])
@pytest.mark.parametrize("stretch", [True, False])
@pytest.mark.usefixtures("threads")
def test_scores__all_at_once__equal_each_function_alone(levels: bool, partly: bool, stretch: bool) -> None:
    prediction, mask = image(48, 37, levels=levels)
    valid = torch.rand(48, 37) > 0.2 if partly else None
    together = saliency_scores(prediction, mask, list(MEASURES), valid=valid, stretch=stretch)
    assert list(together) == list(ALONE)
    for name, measure in ALONE.items():
        alone = measure(prediction, mask, valid=valid, stretch=stretch)
        assert torch.equal(together[name], alone), name


@pytest.mark.usefixtures("threads")
def test_scores__one_thread_and_two__are_the_same_to_the_last_bit() -> None:
    prediction, mask = image(61, 256)
    two = saliency_scores(prediction, mask, list(MEASURES))
    cv2.setNumThreads(1)
    assert not weighted_f.takes_two_threads(SoftMap(prediction, mask))
    one = saliency_scores(prediction, mask, list(MEASURES))
    assert all(torch.equal(one[name], two[name]) for name in MEASURES)


def test_scores__chosen_measures__come_in_the_order_asked() -> None:
    prediction, mask = image(20, 20)
    assert list(saliency_scores(prediction, mask, ["wf", "mae", "s_measure"])) == ["wf", "mae", "s_measure"]
    assert list(saliency_scores(prediction, mask)) == ["s_measure", "e_measure", "wf", "mae"]
    assert saliency_scores(prediction, mask, []) == {}


@pytest.mark.parametrize("order", [["mae", "s_measure"], ["s_measure", "mae"], ["e_measure_adaptive", "e_measure"]])
@pytest.mark.parametrize("levels", [True, False])
def test_scores__any_order__does_not_change_what_the_measures_share(order: list[str], levels: bool) -> None:
    prediction, mask = image(33, 21, levels=levels)
    before = prediction.clone(), mask.clone()
    for name, score in saliency_scores(prediction, mask, order * 2).items():
        assert torch.equal(score, ALONE[name](prediction, mask)), name
    assert torch.equal(prediction, before[0])
    assert torch.equal(mask, before[1])


def test_scores__names__are_those_of_the_metrics() -> None:
    assert set(MEASURES) - set(METRICS) == {"e_measure_curve"}


def test_scores__unknown_measure__raises_with_the_nearest() -> None:
    prediction, mask = image(8, 8)
    with pytest.raises(ConfigError, match=r"unknown measure 's_mesure'; did you mean 's_measure'\?; there are: s_meas"):
        saliency_scores(prediction, mask, ["mae", "s_mesure"])


@pytest.mark.parametrize("measures", [["wf"], ["mae", "wf"], ["s_measure"], ["wf", "wf_03", "e_measure"]])
@pytest.mark.usefixtures("threads")
def test_scores__value_that_is_no_probability__raises_from_either_thread(measures: list[str]) -> None:
    prediction, mask = image(8, 8)
    prediction[3, 4] = math.nan
    with pytest.raises(DataError, match=r"prediction ranges from .* probabilities in \[0, 1\]"):
        saliency_scores(prediction, mask, measures)


@pytest.mark.usefixtures("threads")
def test_scores__no_valid_pixel__are_nan() -> None:
    prediction, mask = image(8, 8)
    scores = saliency_scores(prediction, mask, list(MEASURES), valid=torch.zeros_like(mask))
    assert all(score.isnan().all() for score in scores.values())


@pytest.mark.parametrize("levels", [True, False])
def test_soft_map__counts__are_those_of_every_pixel(levels: bool) -> None:
    prediction, mask = image(30, 41, levels=levels)
    valid = torch.rand(30, 41) > 0.3
    for part in (None, valid):
        soft = SoftMap(prediction, mask, valid=part, stretch=True)
        seen = torch.ones_like(mask) if part is None else part
        raw = (prediction.double() / 255 if levels else prediction.double())[seen]
        reached = ((raw - raw.min()) / (raw.max() - raw.min()) * 255).floor().long()
        expected = torch.stack([torch.bincount(reached[mask[seen] == side], minlength=256) for side in (0, 1)])
        assert torch.equal(soft.counts, expected)
        assert (soft.pixels, soft.foreground) == (int(seen.sum()), int((mask & seen).sum()))


@pytest.mark.parametrize("chunk", [1, 50, 2**24])
@pytest.mark.parametrize("kind", ["whole", "expanded", "transposed", "strided"])
def test_soft_map__counts_in_pieces_of_any_layout__are_those_of_every_pixel(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_map, "_COUNTED", chunk)  # 1: too wide for the counting that is exact up to there
    prediction, mask = image(40, 40, levels=True)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "whole": lambda x: x,
        "expanded": lambda x: x[:1].expand(40, 40),
        "transposed": lambda x: x.t(),
        "strided": lambda x: x[::2, 1::3],
    }
    prediction, mask = layouts[kind](prediction), layouts[kind](mask)
    soft = SoftMap(prediction, mask, stretch=False)
    expected = torch.stack([torch.bincount(prediction[mask == side].long(), minlength=256) for side in (0, 1)])
    assert torch.equal(soft.counts, expected)
    assert torch.equal(SoftMap(prediction, mask, stretch=False).quadrant_counts.sum(dim=0), expected)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[SoftMap]:
    """The maps that metrics make."""
    found: list[SoftMap] = []

    def make(*tensors: Tensor, **options: Any) -> SoftMap:
        found.append(SoftMap(*tensors, **options))
        return found[-1]

    monkeypatch.setattr(metrics, "SoftMap", make)
    return found


NAMES = ("s_measure", "e_measure", "e_measure_max", "e_measure_adaptive", "wf", "wf_03", "mae")


def test_shared_maps__metrics_of_one_image__share_one_map_and_score_the_same(made: list[SoftMap]) -> None:
    images = [image(20, 24), image(20, 24)]
    figures: list[list[Tensor]] = []
    for context in (nullcontext, shared_maps):
        built = metrics.build_metrics(NAMES, kind="binary", num_classes=2)
        built["plain"] = SMeasure(stretch=False)
        made.clear()
        for prediction, mask in images:
            scores, labels, target = prediction[None], (prediction > 0.5).long(), mask.long()
            target[0, :3] = 255
            with context():
                for metric in built.values():
                    metric.update(scores, labels, target)
        figures.append([metric.compute() for metric in built.values()])
        assert len(made) == (16 if context is nullcontext else 4), "per image one with and one without the stretch"
    assert all(torch.equal(one, two) for one, two in zip(*figures, strict=True))


def test_shared_maps__other_objects_or_after_the_context__are_made_anew() -> None:
    prediction, mask = image(8, 8)
    with shared_maps():
        first = shared_map((prediction, True), lambda: SoftMap(prediction, mask))
        assert shared_map((prediction, True), lambda: SoftMap(prediction, mask)) is first
        assert shared_map((prediction, False), lambda: SoftMap(prediction, mask)) is not first
        assert shared_map((prediction.clone(), True), lambda: SoftMap(prediction, mask)) is not first
    assert shared_map((prediction, True), lambda: SoftMap(prediction, mask)) is not first
    with shared_maps():
        assert shared_map((prediction, True), lambda: SoftMap(prediction, mask)) is not first
