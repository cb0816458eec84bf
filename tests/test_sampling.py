"""What an epoch shows: every row alike, or rows of rare classes more often, in views that do not come twice."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from semseg_automl import SemanticSegmentor
from semseg_automl.data.images import write_png
from semseg_automl.data.repeats import MOST_REPEATS, class_repeats, row_repeats
from semseg_automl.data.sampling import ViewSampler
from semseg_automl.data.table import read_table
from semseg_automl.processes import Processes
from semseg_automl.training import data_module

REPEATS = np.array([1.0, 1.0, 3.0, 1.0, 1.6, 1.0, 1.0])


@pytest.mark.parametrize("views", [1, 3])
def test_view_sampler__each_epoch__shows_every_row_as_often_as_asked(views: int) -> None:
    sampler = ViewSampler(rows=7, views=views, seed=0)
    seen: set[int] = set()
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler) == 7 * views
        assert Counter(index % 7 for index in indices) == dict.fromkeys(range(7), views)
        assert seen.isdisjoint(indices), "a view is shown once in a training"
        seen.update(indices)
        orders.append([index % 7 for index in indices])
    assert orders[0] != orders[1]


def test_view_sampler__same_seed_and_epoch__gives_the_same_order() -> None:
    first, second, other = ViewSampler(20, 2, 0), ViewSampler(20, 2, 0), ViewSampler(20, 2, 1)
    assert list(first) == list(second) == list(first)
    assert list(first) != list(other)


@pytest.mark.parametrize(("views", "cached_views", "epochs"), [(1, 2, 2), (2, 4, 2), (3, 2, 1), (2, 3, 3)])
def test_view_sampler__cached_views__come_round_again_in_another_order(
    views: int, cached_views: int, epochs: int
) -> None:
    sampler = ViewSampler(7, views, seed=0, cached_views=cached_views)
    first: list[int] = []
    second: list[int] = []
    for epoch in range(2 * epochs):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert Counter(index % 7 for index in indices) == dict.fromkeys(range(7), views)
        (first if epoch < epochs else second).extend(indices)
    assert set(first) == set(second) == set(range(7 * cached_views))
    assert first != second


def repeated(epochs: int, *, views: int = 2, cached_views: int = 0, seed: int = 0) -> list[list[int]]:
    """Draw some epochs of rows that repeat unequally."""
    sampler = ViewSampler(7, views, seed, cached_views, repeats=REPEATS)
    drawn = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
        assert len(drawn[-1]) == len(sampler) == 7 * views
    return drawn


def counts_of(indices: list[int]) -> NDArray[np.int64]:
    """Count how often each of the rows is shown."""
    return np.bincount([index % 7 for index in indices], minlength=7)


def test_view_sampler__repeats__show_each_row_its_share_of_as_many_samples() -> None:
    expected = 14 * REPEATS / REPEATS.sum()
    epochs = repeated(1000)
    for indices in epochs:
        assert (np.abs(counts_of(indices) - expected) < 1).all()
    mean = np.mean([counts_of(indices) for indices in epochs], axis=0)
    np.testing.assert_allclose(mean, expected, atol=0.045)
    assert epochs[0] != sorted(epochs[0])


def test_view_sampler__repeats__show_every_view_of_a_row_once_from_the_first_on() -> None:
    shown = [index for indices in repeated(5) for index in indices]
    for row in range(7):
        views = sorted(index // 7 for index in shown if index % 7 == row)
        assert views == list(range(len(views)))


def test_view_sampler__repeats_and_cached_views__come_round_and_round() -> None:
    shown = [index for indices in repeated(20, cached_views=3) for index in indices]
    assert set(shown) == set(range(3 * 7))
    often = Counter(shown)
    for row in range(7):
        of_views = [often[7 * view + row] for view in range(3)]
        assert max(of_views) - min(of_views) <= 1


def test_view_sampler__repeats_gone_on_with__draws_what_it_would_have_drawn() -> None:
    epochs = repeated(4)
    assert epochs == repeated(4) != repeated(4, seed=1)
    later = ViewSampler(7, 2, 0, repeats=REPEATS)
    later.start_at(3, 6)
    assert list(later) == epochs[3][6:]
    later.set_epoch(1)
    assert list(later) == epochs[1]


def test_view_sampler__repeats_and_processes_in_turns__see_what_one_sees() -> None:
    single = repeated(1)[0]
    samplers = [
        ViewSampler(7, 2, 0, batch_size=2, processes=Processes(rank, 2, 2), repeats=REPEATS) for rank in range(2)
    ]
    first, second = (list(sampler) for sampler in samplers)
    assert [len(sampler) for sampler in samplers] == [len(first), len(second)] == [6, 6]
    turns = [index for at in (0, 2, 4) for index in (*first[at : at + 2], *second[at : at + 2])]
    assert turns == single[:12]


def test_view_sampler__all_repeats_alike__shows_every_row_as_often() -> None:
    sampler = ViewSampler(7, 3, 0, repeats=np.full(7, 2.5))
    assert (counts_of(list(sampler)) == 3).all()


def test_class_repeats__shares__follow_the_root_of_what_the_median_class_has() -> None:
    shares = np.array([1.0, 0.64, 0.64, 0.16, 0.0001, 0.0])
    np.testing.assert_allclose(class_repeats(shares), [1, 1, 1, 2, MOST_REPEATS, 1])
    assert (class_repeats(np.full(4, 0.3)) == 1).all()
    assert (class_repeats(np.zeros(3)) == 1).all()


def test_row_repeats__several_classes__are_those_of_the_rarest() -> None:
    present = np.zeros((16, 4), np.bool_)
    present[:, 0] = present[:, 1] = present[:, 2] = True
    present[3, 3] = True
    present[5] = False
    factors = row_repeats(present)
    assert factors[3] == pytest.approx(np.sqrt(15))
    assert (np.delete(factors, 3) == 1).all()


@pytest.fixture
def street(tmp_path: Path) -> pd.DataFrame:
    """Write sixteen images with bands of three classes, and a fourth one in the image of row 3 alone."""
    rows = []
    for row in range(16):
        mask = np.repeat(np.array([0, 1, 2], np.uint8), 8)[:, None].repeat(24, axis=1)
        mask[10:12] = 3 if row == 3 else 1
        write_png(tmp_path / f"{row}.png", np.full((24, 24, 3), 10 * row, np.uint8))
        write_png(tmp_path / f"mask{row}.png", mask)
        rows.append({"image": str(tmp_path / f"{row}.png"), "label": str(tmp_path / f"mask{row}.png")})
    return pd.DataFrame(rows)


def test_fit__class_in_one_image__plans_and_loads_it_more_often(street: pd.DataFrame) -> None:
    segmentor = SemanticSegmentor(verbosity=0, hyperparameters={"model.input_size": 32})
    segmentor.fit(street, street.iloc[4:7], dry_run=True)
    plan, task = segmentor.plan_, segmentor.task_
    assert plan.sampling == "repeat_factor"
    assert "is in 5% of the images, shown 4.4 times as often" in plan.reasons["sampling"]
    data = data_module(plan, task, read_table(street), read_table(street))
    assert data.repeats is not None
    assert (np.delete(data.repeats, 3) == 1).all()
    assert data.repeats[3] == pytest.approx(np.sqrt(16))
    shown = np.concatenate([batch.index.numpy() for batch in data.train_dataloader()]) % 16
    often = np.bincount(shown, minlength=16)
    assert often[3] > 2 * np.delete(often, 3).max()
    alike = data_module(plan.model_copy(update={"sampling": "uniform"}), task, read_table(street), read_table(street))
    assert alike.repeats is None


def test_fit__sampling_asked_for__trains_and_is_remembered(street: pd.DataFrame, tmp_path: Path) -> None:
    settings = {
        "model.input_size": 32,
        "model.decoder_dim": 32,
        "optim.max_epochs": 1,
        "env.batch_size": 8,
        "env.precision": "32-true",
        "data.sampling": "repeat_factor",
    }
    segmentor = SemanticSegmentor(path=tmp_path / "fit", verbosity=0, hyperparameters=settings)
    segmentor.fit(street, street.iloc[3:6], logger=False)
    loaded = SemanticSegmentor.load(tmp_path / "fit")
    assert (loaded.plan_.sampling, loaded.plan_.reasons["sampling"]) == ("repeat_factor", "as asked")
