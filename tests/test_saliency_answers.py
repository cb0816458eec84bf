"""All saliency measures against what pysodmetrics said of 200 random pairs (`benchmarks.saliency_answers`)."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.saliency_answers import ANSWERS, MAX_SIZE, PAIRS, digest, draw
from semseg_automl.metrics import METRICS
from semseg_automl.saliency_scores import MEASURES, saliency_scores

TOLERANCE = 1e-10
NAMES = ("s_measure", "e_measure", "e_measure_max", "e_measure_adaptive", "wf", "wf_03", "mae")
EPS = float(np.finfo(np.float64).eps)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """What the reference said."""
    answers: dict[str, Any] = json.loads(ANSWERS.read_text(encoding="utf-8"))
    return answers


def s_measure_of_constant(level: float, mask: npt.NDArray[np.bool_]) -> float:
    """S-measure of a constant prediction by hand; mask neither empty nor full.

    A quadrant in which the mask is constant as well scores 1, any other has no covariance and scores 0.
    """
    row, column = (int(np.round(index.mean())) + 1 for index in np.nonzero(mask))
    quadrants = [
        mask[rows, columns]
        for rows in (slice(None, row), slice(row, None))
        for columns in (slice(None, column), slice(column, None))
    ]
    region = sum(quadrant.size for quadrant in quadrants if len(np.unique(quadrant)) == 1) / mask.size
    on, off = (2 * mean / (mean**2 + 1) for mean in (level, 1 - level))
    return 0.5 * float(mask.mean() * on + (1 - mask.mean()) * off) + 0.5 * region


def test_pairs__drawn_again__are_those_that_the_reference_saw(stored: dict[str, Any]) -> None:
    assert len(stored["answers"]) == PAIRS
    assert digest(range(PAIRS)) == stored["digest"], "draw has changed: write the answers again"
    pairs = [draw(seed) for seed in range(PAIRS)]
    sizes = np.array([mask.shape for _, mask in pairs])
    assert sizes.min() == 1
    assert (sizes.max(axis=0) > 0.9 * np.array(MAX_SIZE)).all()
    shares = np.array([(mask > 0).mean() for _, mask in pairs])
    assert (shares == 0).sum() >= 5
    assert (shares == 1).sum() >= 5
    assert sum(set(np.unique(prediction)) == {0, 255} for prediction, _ in pairs) >= 20


@pytest.mark.parametrize("as_levels", [True, False])
def test_measures__200_random_pairs__equal_the_reference(stored: dict[str, Any], as_levels: bool) -> None:
    compared = dict.fromkeys(NAMES, 0)
    for seed, answers in enumerate(stored["answers"]):
        levels, mask = draw(seed)
        prediction = torch.from_numpy(levels) if as_levels else torch.from_numpy(levels).double() / 255
        scores = saliency_scores(prediction, torch.from_numpy(mask > 0), list(MEASURES))
        scores["e_measure_max"] = scores["e_measure_curve"].max()
        for name in NAMES:
            expected = answers[name]
            if name == "s_measure" and len(np.unique(levels)) == 1 and 0 < (mask > 0).mean() < 1:
                # The reference's answer hangs on the last bit of a mean of equal floats.
                expected = s_measure_of_constant(levels.flat[0] / 255, mask > 0)
            elif name == "s_measure" and expected is None:
                # 0/0 there: a quadrant without a pixel, or a spread of a single one.
                assert 0 <= scores[name].item() <= 1, f"pair {seed}"
                continue
            elif name.startswith("e_measure") and mask.size == 1:
                expected *= EPS  # a single pixel is divided by 1 instead
            assert scores[name].item() == pytest.approx(expected, rel=0, abs=TOLERANCE), f"pair {seed}: {name}"
            compared[name] += 1
    assert min(compared.values()) >= 0.9 * PAIRS


@pytest.mark.parametrize("name", NAMES)
def test_metrics__200_random_pairs__mean_equals_the_mean_of_the_references_answers(
    stored: dict[str, Any], name: str
) -> None:
    metric, expected, curves = METRICS[name](2), [], []
    for seed, answers in enumerate(stored["answers"]):
        levels, mask = draw(seed)
        odd = len(np.unique(levels)) == 1 and name == "s_measure"
        if answers[name] is None or odd or mask.size == 1:
            continue
        scores = (torch.from_numpy(levels).double() / 255)[None]
        target = torch.from_numpy(mask > 0).long()
        metric.update(scores, (scores[0] > 0.5).long(), target)
        expected.append(answers[name])
        if name == "e_measure_max":  # of the mean curve, not the mean of maxima
            curves.append(saliency_scores(scores[0], target == 1, [name.replace("max", "curve")]))
    value = metric.compute().item()
    if name == "e_measure_max":
        assert value <= math.fsum(expected) / len(expected)
        curve = torch.stack([each["e_measure_curve"] for each in curves]).mean(dim=0)
        assert value == pytest.approx(curve.max().item(), rel=0, abs=TOLERANCE)
    else:
        assert value == pytest.approx(math.fsum(expected) / len(expected), rel=0, abs=TOLERANCE)
