"""The greedy soup: what is averaged, and that it never scores lower than the best state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.soup import Ingredient, greedy_soup, keep_best


def state(value: float, count: int = 3) -> dict[str, Tensor]:
    """Return weights of one value, and a count of steps, which is no weight."""
    return {"weight": torch.full((2,), value), "steps": torch.tensor(count)}


def closeness(weights: dict[str, Tensor]) -> float:
    """Score weights by how near they are to 1."""
    return -abs(float(weights["weight"][0]) - 1)


def ingredients(*values: float) -> list[Ingredient]:
    """Return states with their scores, in this order."""
    return [Ingredient(closeness(state(value)), epoch, state(value, epoch)) for epoch, value in enumerate(values)]


def test_greedy_soup__average_scores_higher__is_taken() -> None:
    weights, score, count = greedy_soup(ingredients(1.2, 0.7), closeness, higher_is_better=True)
    assert count == 2
    assert weights["weight"].tolist() == pytest.approx([0.95, 0.95])
    assert score == pytest.approx(-0.05)
    assert int(weights["steps"]) == 0  # of the best state: counts are not averaged


def test_greedy_soup__average_scores_lower__is_left() -> None:
    weights, score, count = greedy_soup(ingredients(1.1, 1.5, 0.9), closeness, higher_is_better=True)
    assert count == 2  # the third fits the first, the second does not
    assert weights["weight"].tolist() == pytest.approx([1.0, 1.0])
    assert score == pytest.approx(0.0, abs=1e-6)


def test_greedy_soup__lower_is_better__turns_the_comparison() -> None:
    best = [Ingredient(-each.score, each.epoch, each.weights) for each in ingredients(1.1, 1.5)]
    _, score, count = greedy_soup(best, lambda weights: -closeness(weights), higher_is_better=False)
    assert count == 1
    assert score == pytest.approx(0.1)


def test_greedy_soup__nothing_to_average__is_an_error() -> None:
    with pytest.raises(ValueError, match="needs an ingredient"):
        greedy_soup([], closeness, higher_is_better=True)


def test_keep_best__more_than_asked__drops_the_worst_and_undefined() -> None:
    kept: list[Ingredient] = []
    for epoch, score in enumerate([0.1, float("nan"), 0.5, 0.3, 0.5]):
        kept = keep_best(kept, Ingredient(score, epoch, {}), most=3, higher_is_better=True)
    assert [(each.score, each.epoch) for each in kept] == [(0.5, 2), (0.5, 4), (0.3, 3)]


def test_fit__with_a_soup__never_scores_lower_than_the_best_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = draw_dataset(tmp_path / "data", kind="binary", train=8, val=4, test=2, size=(40, 40))
    settings: dict[str, Any] = {
        "model.input_size": 32,
        "model.decoder_dim": 32,
        "model.detail": False,
        "optim.max_epochs": 4,
        "optim.ema": 0.0,
        "optim.soup": 3,
        "env.precision": "32-true",
    }
    segmentor = SemanticSegmentor(path=tmp_path / "run", presets="fast", hyperparameters=settings, verbosity=1)
    segmentor.fit(data / "train.csv", data / "val.csv", logger=False)
    said = capsys.readouterr().out
    assert "soup of the best 3 states" in said or "of 3 states averaged" in said
    best = segmentor.history_["iou"].max()
    score = segmentor.fit_summary()["best_score"]
    assert score >= best
    # What is saved is what was scored: the validation images give the same figure again.
    assert segmentor.evaluate(data / "val.csv", "iou")["iou"] == pytest.approx(score, abs=1e-6)
