"""Per-image figures, bootstrap intervals and paired comparison, on tallies of random and hand-made images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from semseg_automl.errors import UnsupportedCombination
from semseg_automl.metrics import METRICS, build_metrics
from semseg_automl.task import IGNORE_INDEX
from semseg_automl.uncertainty import RESAMPLES, ImageTallies

Image = tuple[Tensor, Tensor, Tensor]
CASES = [(name, kind) for name in METRICS for kind in sorted(METRICS[name](2).tasks)]
CLASSES = {"binary": ["no", "yes"], "multiclass": ["a", "b", "c"]}


def images_of(kind: str, count: int, *, right: float = 0.6, seed: int = 0) -> list[Image]:
    """Images of 9 x 12 pixels whose labels are right for a share of the pixels; targets do not depend on it."""
    generator = torch.Generator().manual_seed(seed)
    classes, size = len(CLASSES[kind]), (9, 12)
    images = []
    for _ in range(count):
        target = torch.randint(classes, size, generator=generator)
        other = torch.randint(classes, size, generator=generator)
        labels = torch.where(torch.rand(size, generator=generator) < right, target, other)
        noise = torch.rand(1 if kind == "binary" else classes, *size, generator=generator)
        images.append((0.7 * labels[None] + 0.3 * noise if kind == "binary" else noise, labels, target))
    return images


def tallied(names: list[str], kind: str, images: list[Image]) -> ImageTallies:
    """Tallies of `images` under the metrics called `names`."""
    tallies = ImageTallies(build_metrics(names, kind=kind, num_classes=len(CLASSES[kind])), CLASSES[kind])
    for image in images:
        tallies.add(*image)
    return tallies


def one_pixel(wrong: bool) -> Image:
    """Image of one pixel, classified right or wrong."""
    target = torch.ones(1, 1, dtype=torch.int64)
    return torch.ones(1, 1, 1), target - int(wrong), target


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tallies__any_metric__give_the_metrics_own_figures(name: str, kind: str) -> None:
    images = images_of(kind, 5)
    tallies = tallied([name], kind, images)
    together, apart = tallies.figures(), tallies.per_image()
    metric = build_metrics([name], kind=kind, num_classes=len(CLASSES[kind]))[name]
    for row, image in enumerate(images):
        metric.reset()
        metric.update(*image)
        values = metric.compute().reshape(-1)
        np.testing.assert_allclose([apart[each][row] for each in apart], values, rtol=1e-13)
    metric.reset()
    for image in images:
        metric.update(*image)
    np.testing.assert_allclose(list(together.values()), metric.compute().reshape(-1), rtol=1e-13)
    assert list(together) == ([name] if name != "iou_per_class" else [f"{name}[{each}]" for each in CLASSES[kind]])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_intervals__any_metric__hold_the_figure_and_are_those_of_a_loop(name: str, kind: str) -> None:
    images = images_of(kind, 7)
    tallies = tallied([name], kind, images)
    metric = build_metrics([name], kind=kind, num_classes=len(CLASSES[kind]))[name]
    states = [metric.tally(*image) for image in images]
    rng, figures = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = [states[row] for row in rng.choice(7, size=7)]
        sums = {state: torch.stack([each[state] for each in drawn]).sum(dim=0) for state in drawn[0]}
        figures.append(metric.figure(sums).reshape(-1).numpy())
    low, high = np.quantile(np.array(figures), [0.025, 0.975], axis=0)
    found = tallies.intervals()
    np.testing.assert_allclose([each.low for each in found.values()], low, rtol=1e-12)
    np.testing.assert_allclose([each.high for each in found.values()], high, rtol=1e-12)
    assert all(each.low < each.value < each.high for each in found.values())
    assert {key: each.value for key, each in found.items()} == tallies.figures()
    assert tallies.intervals() == found


def test_intervals__mean_of_many_images__have_the_width_theory_gives() -> None:
    # Share of right pixels of 400 one-pixel images, 100 wrong: the interval is 0.75 +- 1.96 sqrt(0.75 * 0.25 / 400).
    tallies = tallied(["accuracy"], "binary", [one_pixel(index < 100) for index in range(400)])
    found = tallies.intervals()["accuracy"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.low == pytest.approx(0.75 - half, abs=0.006)
    assert found.high == pytest.approx(0.75 + half, abs=0.006)


def test_intervals__image_wholly_ignored__count_for_nothing() -> None:
    images = images_of("binary", 4)
    scores, labels, target = images[0]
    ignored = (scores, labels, torch.full_like(target, IGNORE_INDEX))
    names = ["iou", "iou_pooled", "e_measure_max", "wf", "boundary_iou"]
    with_it, without = tallied(names, "binary", [*images, ignored]), tallied(names, "binary", images)
    assert with_it.intervals() == without.intervals()
    assert with_it.figures() == without.figures()
    assert all(np.isnan(values[4]) for values in with_it.per_image().values())


@pytest.mark.parametrize("count", [0, 1])
def test_intervals__fewer_than_two_images__are_nan(count: int) -> None:
    tallies = tallied(["iou", "ber", "wf"], "binary", images_of("binary", count))
    for name, (value, low, high) in tallies.intervals().items():
        assert math.isnan(low), name
        assert math.isnan(high), name
        assert math.isfinite(value) == bool(count), name
    assert all(len(values) == count for values in tallies.per_image().values())


def test_intervals__class_of_one_image__leave_out_the_draws_without_it() -> None:
    images = [
        (scores, labels.clamp(max=1), target.clamp(max=1)) for scores, labels, target in images_of("multiclass", 4)
    ]
    images[0][2][:3] = 2
    images[0][1][:2] = 2
    tallies = tallied(["iou_per_class"], "multiclass", images)
    value, low, high = tallies.intervals()["iou_per_class[c]"]
    assert (value, low, high) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert np.isnan(tallies.per_image()["iou_per_class[c]"][1:]).all()


def test_compared__better_and_worse_labels__difference_interval_and_p_say_so() -> None:
    good, bad = (tallied(["iou", "ber"], "binary", images_of("binary", 12, right=right)) for right in (0.9, 0.5))
    found = good.compared(bad)
    assert found["iou"].difference == found["iou"].a - found["iou"].b
    assert found["iou"].a == good.figures()["iou"]
    assert 0 < found["iou"].low < found["iou"].difference < found["iou"].high
    assert found["ber"].low < found["ber"].difference < found["ber"].high < 0
    images = good.per_image()["iou"], bad.per_image()["iou"]
    assert found["iou"].p == pytest.approx(stats.wilcoxon(*images).pvalue)
    assert found["iou"].p < 0.01
    back = bad.compared(good)["iou"]
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-found["iou"].difference, -found["iou"].high, -found["iou"].low)
    )


def test_compared__pairing__makes_the_interval_narrower_than_each_figures_own() -> None:
    # Images differ much, the predictors little and always alike.
    images = [image for right in (0.2, 0.5, 0.8, 0.95) for image in images_of("binary", 3, right=right)]
    worse = []
    for scores, labels, target in images:
        changed = labels.clone()
        changed[0, 0] = 1 - target[0, 0]
        worse.append((scores, changed, target))
    a, b = tallied(["iou"], "binary", images), tallied(["iou"], "binary", worse)
    paired, alone = a.compared(b)["iou"], a.intervals()["iou"]
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def test_compared__predictor_with_itself__has_no_difference() -> None:
    tallies = tallied(["iou", "mae"], "binary", images_of("binary", 4))
    for found in tallies.compared(tallies).values():
        assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_compared__other_images_or_metrics__raises() -> None:
    tallies = tallied(["iou"], "binary", images_of("binary", 4))
    with pytest.raises(UnsupportedCombination, match=r"4 images .* and 3 images"):
        tallies.compared(tallied(["iou"], "binary", images_of("binary", 3)))
    with pytest.raises(UnsupportedCombination, match="same metrics"):
        tallies.compared(tallied(["dice"], "binary", images_of("binary", 4)))
