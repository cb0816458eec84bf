"""Greedy soup: average the best states of a training's weights, each only if the average scores higher with it.

Wortsman et al., "Model soups", ICML 2022, recipe 1, over the states that one training was validated at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""Trainable parameters, and what else training changes (statistics of batch norms), by name, on the CPU."""


@dataclass(frozen=True)
class Ingredient:
    """A state of the weights.

    Attributes:
        score: of its validation.
        epoch: it was reached in.
        weights: by name, on the CPU.
    """

    score: float
    epoch: int
    weights: Weights


def keep_best(kept: Sequence[Ingredient], new: Ingredient, *, most: int, higher_is_better: bool) -> list[Ingredient]:
    """Return the best ingredients, the best first; of equal ones the older is before the newer.

    >>> kept = keep_best([Ingredient(0.5, 0, {})], Ingredient(0.7, 1, {}), most=1, higher_is_better=True)
    >>> [each.epoch for each in kept]
    [1]
    """
    finite = [each for each in (*kept, new) if math.isfinite(each.score)]
    return sorted(finite, key=lambda each: -each.score if higher_is_better else each.score)[:most]


def greedy_soup(
    ingredients: Sequence[Ingredient], judge: Callable[[Weights], float], *, higher_is_better: bool
) -> tuple[Weights, float, int]:
    """Average ingredients, the best first, and keep each only if the average then scores at least as high.

    Args:
        ingredients: the best first; one or more.
        judge: scores weights on the validation data.
        higher_is_better: of the score.

    Returns:
        The weights, their score, and how many states they are the average of.

    Raises:
        ValueError: there is no ingredient.
    """
    if not ingredients:
        raise ValueError("a soup needs an ingredient; validate at least once before")
    best, score = ingredients[0].weights, ingredients[0].score
    taken = [best]
    for ingredient in ingredients[1:]:
        tried = _mean([*taken, ingredient.weights])
        found = judge(tried)
        if (found >= score) if higher_is_better else (found <= score):
            taken.append(ingredient.weights)
            best, score = tried, found
    return best, score, len(taken)


def _mean(states: Sequence[Weights]) -> Weights:
    """Average states by name; what is counted in whole numbers is taken of the first."""
    first = states[0]
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if first[name].is_floating_point() else first[name]
        for name in first
    }
