"""Data-set metrics: hand-computed policies, agreement with scikit-learn, the contract of all of METRICS."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn

from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination
from semseg_automl.metrics import (
    DEFAULT_METRICS,
    METRICS,
    AdaptiveEMeasure,
    EMeasure,
    MaxEMeasure,
    MeanAbsoluteError,
    SegmentationMetric,
    SMeasure,
    WeightedFMeasure,
    build_metrics,
)
from semseg_automl.task import IGNORE_INDEX

Image = tuple[Tensor, Tensor, Tensor]


def image(labels: list[list[int]], target: list[list[int]], channels: int = 1) -> Image:
    """Scores, labels and target of one image; the scores are the labels in a binary task, else random."""
    hard = torch.tensor(labels)
    scores = hard[None].float() if channels == 1 else torch.rand(channels, *hard.shape)
    return scores, hard, torch.tensor(target)


def random_images(num_classes: int, count: int = 6, *, ignore: bool = True) -> list[Image]:
    """Images of different sizes; the prediction is right for about two pixels in three."""
    images = []
    for index in range(count):
        size = (9 + index, 12)
        target = torch.randint(num_classes, size)
        labels = torch.where(torch.rand(size) < 0.6, target, torch.randint(num_classes, size))
        noise = torch.rand(1 if num_classes == 2 else num_classes, *size)
        scores = 0.7 * labels[None] + 0.3 * noise if num_classes == 2 else noise
        if ignore:
            target[torch.rand(size) < 0.1] = IGNORE_INDEX
        images.append((scores, labels, target))
    return images


def kinds_of(name: str) -> list[str]:
    """Kinds of task the metric called `name` is for."""
    return sorted(METRICS[name](2).tasks)


CASES = [(name, kind) for name in METRICS for kind in kinds_of(name)]
"""Every metric under every kind of task it is for."""


def build(name: str, kind: str) -> tuple[SegmentationMetric, list[Image]]:
    """An empty metric, and images it can be updated with."""
    num_classes = {"binary": 2, "multiclass": 3}[kind]
    return build_metrics([name], kind=kind, num_classes=num_classes)[name], random_images(num_classes)


def score(name: str, *images: Image, num_classes: int = 2) -> float:
    """The metric's value over `images`."""
    metric = METRICS[name](num_classes)
    for each in images:
        metric.update(*each)
    return float(metric.compute())


# One image with TP 1, FP 1, FN 1, TN 1; one empty in truth and prediction; one with a false alarm of 1 in 4.
MIXED = image([[1, 1], [0, 0]], [[1, 0], [1, 0]])
EMPTY = image([[0, 0], [0, 0]], [[0, 0], [0, 0]])
ALARM = image([[1, 0], [0, 0]], [[0, 0], [0, 0]])
FULL_MISS = image([[1, 0], [0, 0]], [[1, 1], [1, 1]])
IGNORED = image([[1, 0], [0, 1]], [[255, 255], [255, 255]])


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("iou", [MIXED], 1 / 3),
        ("iou", [EMPTY], 1.0),
        ("iou", [ALARM], 0.0),
        ("iou", [MIXED, EMPTY, ALARM], (1 / 3 + 1 + 0) / 3),
        ("dice", [MIXED], 0.5),
        ("dice", [EMPTY], 1.0),
        ("dice", [MIXED, EMPTY, ALARM], (0.5 + 1 + 0) / 3),
        ("iou_pooled", [MIXED, EMPTY, ALARM], 1 / 4),
        ("iou_pooled", [EMPTY, EMPTY], 1.0),
        ("dice_pooled", [MIXED, EMPTY, ALARM], 2 / 5),
        ("boundary_iou", [MIXED, EMPTY, ALARM], (1 / 3 + 1 + 0) / 3),
        ("wf", [EMPTY], 0.0),
        ("wf", [ALARM], 0.0),
        ("ber", [MIXED], 50.0),
        ("ber", [EMPTY], 0.0),
        ("ber", [ALARM], 25.0),
        ("ber", [FULL_MISS], 75.0),
        ("ber", [MIXED, ALARM], 100 * (2 / 6 + 1 / 2) / 2),
        ("ber_per_image", [MIXED, ALARM], (50 + 25) / 2),
        ("mae", [MIXED, ALARM], (0.5 + 0.25) / 2),
        ("accuracy", [MIXED, EMPTY, ALARM], 9 / 12),
    ],
)
def test_binary_metric__small_images__matches_hand_computation(name: str, images: list[Image], expected: float) -> None:
    assert score(name, *images) == pytest.approx(expected, rel=0, abs=1e-12)


def test_multiclass_metrics__class_absent_and_class_only_predicted__follow_their_policies() -> None:
    # Class 0: 2 right, 1 taken for 3. Class 1: 1 right. Class 2 is nowhere, class 3 only predicted.
    data = image([[0, 0], [3, 1], [0, 2]], [[0, 0], [0, 1], [255, 255]], channels=4)
    expected = torch.tensor([2 / 3, 1.0, math.nan, 0.0], dtype=torch.float64)
    per_class = METRICS["iou_per_class"](4)
    per_class.update(*data)
    torch.testing.assert_close(per_class.compute(), expected, equal_nan=True)
    assert score("miou", data, num_classes=4) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert score("miou_with_absent", data, num_classes=4) == pytest.approx((2 / 3 + 1 + 0 + 0) / 4)
    assert score("accuracy", data, num_classes=4) == pytest.approx(3 / 4)


def test_miou__two_images__is_of_one_confusion_matrix_and_no_mean_over_images() -> None:
    first = image([[0, 0, 0, 1]], [[0, 0, 0, 1]], channels=2)
    second = image([[1, 0, 0, 0]], [[0, 0, 0, 0]], channels=2)
    assert score("miou", first, second) == pytest.approx((6 / 7 + 1 / 2) / 2)


def test_iou__hard_labels_decide_and_not_the_scores() -> None:
    scores, labels, target = MIXED
    assert score("iou", (torch.zeros_like(scores), labels, target)) == pytest.approx(1 / 3)


def test_binary_metrics__random_images__equal_scikit_learn() -> None:
    images = random_images(2)
    valid = [target != IGNORE_INDEX for _, _, target in images]
    truths = [target[v].numpy() for (_, _, target), v in zip(images, valid, strict=True)]
    guesses = [labels[v].numpy() for (_, labels, _), v in zip(images, valid, strict=True)]
    pooled = np.concatenate(truths), np.concatenate(guesses)
    pairs = list(zip(truths, guesses, strict=True))
    expected = {
        "iou": np.mean([sklearn_metrics.jaccard_score(*pair) for pair in pairs]),
        "dice": np.mean([sklearn_metrics.f1_score(*pair) for pair in pairs]),
        "iou_pooled": sklearn_metrics.jaccard_score(*pooled),
        "ber": 100 * (1 - sklearn_metrics.balanced_accuracy_score(*pooled)),
        "ber_per_image": 100 * np.mean([1 - sklearn_metrics.balanced_accuracy_score(*pair) for pair in pairs]),
        "accuracy": sklearn_metrics.accuracy_score(*pooled),
    }
    for name, value in expected.items():
        assert score(name, *images) == pytest.approx(float(value), rel=1e-12), name


def test_miou__data_set_without_some_classes__equals_scikit_learn_over_those_present() -> None:
    images = random_images(3, ignore=False)
    five = [(torch.rand(5, *labels.shape), labels, target) for _, labels, target in images]
    y_true = np.concatenate([target.numpy().ravel() for _, _, target in five])
    y_pred = np.concatenate([labels.numpy().ravel() for _, labels, _ in five])
    present = sklearn_metrics.jaccard_score(y_true, y_pred, average="macro")
    assert score("miou", *five, num_classes=5) == pytest.approx(present, rel=1e-12)
    assert score("miou_with_absent", *five, num_classes=5) == pytest.approx(present * 3 / 5, rel=1e-12)


def test_saliency_metrics__stored_images__equal_the_reference(shared: Callable[[str], Path]) -> None:
    keys = {
        "s_measure": "s_measure",
        "e_measure": "e_measure_mean",
        "e_measure_max": "e_measure_max",
        "e_measure_adaptive": "e_measure_adaptive",
        "mae": "mae",
        "wf": "wf_beta2_1",
        "wf_03": "wf_beta2_03",
    }
    built = build_metrics(list(keys), kind="binary", num_classes=2)
    with np.load(shared("golden/saliency_metrics.npz")) as stored:
        for index in range(15):
            scores = torch.from_numpy(stored[f"pred_{index}"])[None].double() / 255
            target = (torch.from_numpy(stored[f"gt_{index}"]) > 128).long()
            for metric in built.values():
                metric.update(scores, (scores[0] > 0.5).long(), target)
        for name, key in keys.items():
            assert built[name].compute().item() == pytest.approx(float(stored[key]), rel=0, abs=1e-10), name


@pytest.mark.parametrize(
    "make", [SMeasure, EMeasure, MaxEMeasure, AdaptiveEMeasure, MeanAbsoluteError, WeightedFMeasure]
)
def test_saliency_metric__faint_but_right_prediction__is_perfect_only_with_stretch(
    make: Callable[..., SegmentationMetric],
) -> None:
    target = torch.zeros(8, 8, dtype=torch.int64)
    target[2:5, 2:6] = 1
    faint, perfect = make(), make(stretch=False)
    faint.update(0.1 * target[None].double(), target, target)
    perfect.update(target[None].double(), target, target)
    torch.testing.assert_close(faint.compute(), perfect.compute(), rtol=0, atol=1e-12)


def test_saliency_metric__without_stretch__sees_absolute_probabilities() -> None:
    target = torch.tensor([[0, 1], [0, 1]])
    metric = MeanAbsoluteError(stretch=False)
    metric.update(0.2 * target[None].double(), target, target)
    assert metric.compute().item() == pytest.approx(0.8 / 2)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__no_image__is_nan_without_warning(name: str, kind: str) -> None:
    assert build(name, kind)[0].compute().isnan().all()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__some_images__is_finite_float64_of_the_promised_shape(name: str, kind: str) -> None:
    metric, images = build(name, kind)
    for each in images:
        metric.update(*each)
    value = metric.compute()
    assert value.dtype == torch.float64
    assert value.shape == ((3,) if name == "iou_per_class" else ())
    assert value.isfinite().all()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__image_wholly_ignored__is_not_counted(name: str, kind: str) -> None:
    metric, images = build(name, kind)
    scores, labels, target = images[0]
    metric.update(scores, labels, torch.full_like(target, IGNORE_INDEX))
    assert metric.compute().isnan().all()
    metric.update(*images[0])
    alone, _ = build(name, kind)
    alone.update(*images[0])
    assert torch.equal(metric.compute(), alone.compute())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__ignored_pixels__do_not_matter(name: str, kind: str) -> None:
    values = []
    for fill in (0, 1):
        metric, _ = build(name, kind)
        torch.manual_seed(1)
        for scores, labels, target in random_images(2 if kind == "binary" else 3):
            ignored = target == IGNORE_INDEX
            metric.update(scores.masked_fill(ignored, fill), labels.masked_fill(ignored, fill), target)
        values.append(metric.compute())
    assert torch.equal(*values)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__states_of_two_halves_summed__equal_one_over_all(name: str, kind: str) -> None:
    whole, images = build(name, kind)
    left, right, merged = (build(name, kind)[0] for _ in range(3))
    for index, each in enumerate(images):
        whole.update(*each)
        (left if index % 2 else right).update(*each)
    for state in left.metric_state:
        setattr(merged, state, getattr(left, state) + getattr(right, state))
    torch.testing.assert_close(merged.compute(), whole.compute(), rtol=1e-14, atol=0)
    gathered, _ = build(name, kind)
    for half in (left, right):
        gathered.compute()  # neither this value nor a warning of no update may stay
        gathered.merge_state(half)
    torch.testing.assert_close(gathered.compute(), whole.compute(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__images_in_another_order__is_the_same(name: str, kind: str) -> None:
    forwards, images = build(name, kind)
    backwards, _ = build(name, kind)
    for first, last in zip(images, reversed(images), strict=True):
        forwards.update(*first)
        backwards.update(*last)
    torch.testing.assert_close(forwards.compute(), backwards.compute(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__copied_pickled_and_reset__keeps_and_loses_its_state(name: str, kind: str) -> None:
    metric, images = build(name, kind)
    metric.update(*images[0])
    expected = metric.compute()
    for twin in (copy.deepcopy(metric), metric.clone()):
        assert torch.equal(twin.compute(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), expected)
    metric.reset()
    assert metric.compute().isnan().all()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__module_moved_to_half_precision__keeps_its_sums(name: str, kind: str) -> None:
    metric, images = build(name, kind)
    for each in images:
        metric.update(*each)
    expected = metric.compute()
    parent = nn.ModuleDict({"metric": metric, "layer": nn.Linear(2, 2)})
    parent.to(torch.bfloat16).half().to("cpu")
    assert torch.equal(metric.compute(), expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__called_as_a_function__gives_the_image_and_accumulates(name: str, kind: str) -> None:
    called, images = build(name, kind)
    updated, alone = build(name, kind)[0], build(name, kind)[0]
    called(*images[0])
    value = called(*images[1])
    alone.update(*images[1])
    updated.update(*images[0])
    updated.update(*images[1])
    assert torch.equal(value, alone.compute())
    assert torch.equal(called.compute(), updated.compute())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric__better_prediction__has_the_better_value(name: str, kind: str) -> None:
    good, images = build(name, kind)
    bad, _ = build(name, kind)
    for scores, labels, target in images:
        truth = target.masked_fill(target == IGNORE_INDEX, 0)
        perfect = truth[None].float() if kind == "binary" else scores
        good.update(perfect, truth, target)
        bad.update(scores, labels, target)
    difference = (good.compute() - bad.compute()).mean().item()
    assert difference > 0 if good.higher_is_better else difference < 0


@pytest.mark.parametrize("name", list(METRICS))
def test_update__wrong_shape_or_type__raises(name: str) -> None:
    kind = kinds_of(name)[0]
    metric, images = build(name, kind)
    scores, labels, target = images[0]
    with pytest.raises(DataError, match=r"scores are .* one image at a time"):
        metric.update(scores[None], labels, target)
    with pytest.raises(DataError, match=r"scores are torch\.int64"):
        metric.update(scores.long(), labels, target)
    with pytest.raises(DataError, match="with C in"):
        metric.update(torch.rand(9, *labels.shape), labels, target)
    with pytest.raises(DataError, match=r"target is .* without a channel"):
        metric.update(scores, labels, target[None])
    with pytest.raises(DataError, match=r"labels is torch\.bool"):
        metric.update(scores, labels > 0, target)
    assert metric.compute().isnan().all()


@pytest.mark.parametrize("name", list(METRICS))
@pytest.mark.parametrize("bad", [-1, 9, 254])
def test_update__target_outside_the_classes__raises(name: str, bad: int) -> None:
    metric, images = build(name, kinds_of(name)[0])
    scores, labels, target = images[0]
    target[3, 4] = bad
    with pytest.raises(DataError, match=r"target holds class indices .* 255 for ignored"):
        metric.update(scores, labels, target)
    assert metric.compute().isnan().all()


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_default_metrics__kind__can_be_built_in_order(kind: str) -> None:
    names = DEFAULT_METRICS[kind]
    built = build_metrics(names, kind=kind, num_classes={"binary": 2, "multiclass": 12}[kind])
    assert tuple(built) == names
    assert all(kind in metric.tasks for metric in built.values())


def test_build_metrics__unknown_name__names_the_nearest_and_the_known_ones() -> None:
    expected = r"'s_mesure'; did you mean 's_measure'\?; .*: iou, dice, .*mae"
    with pytest.raises(ConfigError, match=expected) as info:
        build_metrics(["iou", "s_mesure"], kind="binary", num_classes=2)
    assert "miou" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "kind", "num_classes", "known"),
    [("miou", "binary", 2, "iou, dice"), ("s_measure", "multiclass", 4, "accuracy, miou")],
)
def test_build_metrics__metric_of_the_other_kind__names_those_that_fit(
    name: str, kind: str, num_classes: int, known: str
) -> None:
    with pytest.raises(UnsupportedCombination, match=f"{name!r} is not defined for a {kind} task.*{known}"):
        build_metrics([name], kind=kind, num_classes=num_classes)


@pytest.mark.parametrize(
    ("names", "kind", "num_classes", "message"),
    [
        (["iou"], "panoptic", 2, "'panoptic'; one of binary, multiclass"),
        (["iou"], "binary", 3, "num_classes is 3 in a binary task"),
        (["miou"], "multiclass", 1, "num_classes is 1; 2 to 255"),
        (["miou"], "multiclass", 256, "num_classes is 256; 2 to 255"),
        ("iou", "binary", 2, r"such as \['iou'\]"),
        (["iou", "dice", "iou"], "binary", 2, "more than once"),
    ],
)
def test_build_metrics__unusable_argument__raises(names: list[str], kind: str, num_classes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_metrics(names, kind=kind, num_classes=num_classes)
