"""The race: who goes on, who leaves, what is shared out, and what an interrupted one takes up again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from semseg_automl import draw_dataset
from semseg_automl.bundle import Bundle
from semseg_automl.config import SearchConfig
from semseg_automl.data.checks import check_rows
from semseg_automl.data.table import read_table
from semseg_automl.errors import ConfigError, TrainingError
from semseg_automl.fitting import Part
from semseg_automl.hardware import detect_hardware
from semseg_automl.plan import Plan
from semseg_automl.planning import Chosen, Planning, choose_settings
from semseg_automl.race import Candidate, Race, baseline_verdict
from semseg_automl.searching import plan_portfolio
from semseg_automl.study import Study
from semseg_automl.task import infer_task


@pytest.fixture(scope="module")
def planning(tmp_path_factory: pytest.TempPathFactory) -> Planning:
    """Collect what plans depend on, for a small set."""
    folder = draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=8, val=2, test=2, size=(40, 40))
    table = read_table(folder / "train.csv")
    checks = check_rows(table)
    return Planning(
        task=infer_task([check.value_counts for check in checks]),
        table=table,
        checks=checks,
        hardware=detect_hardware(),
        metrics=["iou"],
        validation_metric=None,
        seed=0,
        time_limit=None,
    )


@dataclass
class Fits:
    """Stands for training: each candidate learns at a rate of its own, by the step."""

    quality: Callable[[Plan], float]
    seconds: float = 0.0
    parts: list[tuple[str, Part]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    interrupt_at: int = -1

    def __call__(self, plan: Plan, folder: Path, part: Part) -> Any:
        """Train a part: the score nears the candidate's quality."""
        folder.mkdir(parents=True, exist_ok=True)
        self.parts.append((folder.name, part))
        time.sleep(self.seconds)
        quality = self.quality(plan)
        if math.isinf(quality):
            raise TrainingError("the training loss became nan")
        self.steps[folder.name] = self.steps.get(folder.name, 0) + (part.steps or 10)
        score = quality * (1 - 0.5 ** (self.steps[folder.name] / 10))
        interrupted = len(self.parts) == self.interrupt_at
        record = {
            "stopped_by": "interrupt" if interrupted else "slice",
            "best_score": score,
            "history": [{"step": self.steps[folder.name]}],
            "validation_seconds": 0.1,
        }
        return Bundle(None, plan, None, record)  # type: ignore[arg-type]


def by_rate(plan: Plan) -> float:
    """Let those with the highest learning rate be the best, and a small network without pretraining the worst."""
    return min(0.9, 0.3 + 100 * plan.lr) if plan.encoder == "tiny_vit" else 0.2


def race_of(
    planning: Planning,
    folder: Path,
    fit: Fits,
    *,
    deadline: float | None = None,
    resume: bool = False,
    what: str = "this",
    **search: Any,
) -> tuple[Race, list[str], list[str]]:
    """Set a race up; also return what was said and whom it called the best so far."""
    said: list[str] = []
    best: list[str] = []
    chosen: Chosen = choose_settings("fast", [{f"search.{name}": value for name, value in search.items()}], {})
    options: SearchConfig = chosen.config.search
    study = Study(folder, options, higher_is_better=True, what=what, seed=0, resume=resume)
    own = planning.plan(chosen)
    race = Race(
        planning=planning,
        chosen=chosen,
        own=own,
        portfolio=plan_portfolio(planning, chosen, own),
        options=options,
        study=study,
        folder=folder,
        fit=fit,
        cache=None,
        on_best=lambda candidate: best.append(candidate.name),
        say=said.append,
        deadline=deadline,
    )
    return race, said, best


def test_race__without_a_clock__halves_until_the_best_is_left(planning: Planning, tmp_path: Path) -> None:
    fit = Fits(by_rate)
    race, _, best = race_of(planning, tmp_path, fit, candidates=4)
    winner = race.run()
    names = [each.name for each in race.candidates]
    assert names[:2] == ["plan", "baseline"]
    assert len(names) == 4
    assert winner is max(race.candidates, key=lambda each: by_rate(each.plan))
    assert winner.name == "faster_rate"
    assert winner.settings == {"optim.lr": 0.003}
    assert [name for name, _ in fit.parts[:4]] == names
    assert sorted(name for name, _ in fit.parts[4:]) == sorted(["faster_rate", "plan"])
    assert [each.left for each in race.candidates if each is not winner].count("behind after round 1") == 2
    assert best[-1] == "faster_rate"
    assert all(part.seconds is None and part.steps is not None and part.steps >= 25 for _, part in fit.parts)


def test_race__with_a_clock__shares_its_part_of_the_time_out(planning: Planning, tmp_path: Path) -> None:
    fit = Fits(by_rate)
    race, said, _ = race_of(planning, tmp_path, fit, candidates=4, share=0.5, deadline=time.monotonic() + 400)
    race.run()
    assert not any("configurations race" in line for line in said)
    seconds = [float(part.seconds or 0) for _, part in fit.parts]
    first, second = seconds[:4], seconds[4:]
    # Half of 400 s for two rounds: of the first, four share 100 s; what one does not use the next ones share.
    assert first == sorted(first)
    assert 10 < first[0] < 25
    assert 60 < first[-1] < 100
    assert 60 < second[0] < 100
    assert 120 < second[1] < 200
    assert all(part.steps is None for _, part in fit.parts)


def test_race__too_little_time__takes_fewer_and_says_so(planning: Planning, tmp_path: Path) -> None:
    race, said, _ = race_of(planning, tmp_path, Fits(by_rate), candidates=8, deadline=time.monotonic() + 100)
    race.run()
    assert len(race.candidates) == 2
    assert said[0].startswith("2 of 8 configurations race")


def test_race__time_used_up__stops_between_slices(planning: Planning, tmp_path: Path) -> None:
    fit = Fits(by_rate, seconds=6.5)
    race, _, _ = race_of(planning, tmp_path, fit, candidates=2, share=0.5, deadline=time.monotonic() + 12)
    winner = race.run()
    assert [name for name, _ in fit.parts] == ["plan"]
    assert winner.name == "plan"
    assert [each.left for each in race.candidates if each is not winner] == ["no time was left for it"]


def test_race__one_cannot_be_trained__goes_on_without_it(planning: Planning, tmp_path: Path) -> None:
    fit = Fits(lambda plan: math.inf if plan.lr > 0.002 else by_rate(plan))
    race, said, _ = race_of(planning, tmp_path, fit, candidates=4)
    winner = race.run()
    out = next(each for each in race.candidates if each.name == "faster_rate")
    assert "loss became nan" in out.left
    assert any(line.startswith("faster_rate is out") for line in said)
    assert winner.name != "faster_rate"


def test_race__none_can_be_trained__says_why(planning: Planning, tmp_path: Path) -> None:
    race, _, _ = race_of(planning, tmp_path, Fits(lambda _: math.inf), candidates=2)
    with pytest.raises(TrainingError, match=r"plan: cannot be trained.*nan.*baseline"):
        race.run()


def test_race__more_than_the_portfolio_has__draws_the_rest(planning: Planning, tmp_path: Path) -> None:
    race, _, _ = race_of(planning, tmp_path, Fits(by_rate), candidates=11, searcher="random")
    race.run()
    drawn = [each for each in race.candidates if each.name.startswith("drawn_")]
    assert drawn
    assert any(each.settings for each in drawn)
    plans = [each.plan.model_dump(exclude={"reasons"}) for each in race.candidates if "same plan" not in each.left]
    assert all(plan not in plans[:place] for place, plan in enumerate(plans))


def test_race__space_of_the_user__is_all_that_changes(planning: Planning, tmp_path: Path) -> None:
    space = {"optim.weight_decay": {"low": 0.001, "high": 0.1, "log": True}, "optim.lr": [0.001, 0.002]}
    race, _, _ = race_of(planning, tmp_path, Fits(by_rate), candidates=5, space=space)
    race.run()
    assert [each.name for each in race.candidates][:2] == ["plan", "baseline"]
    for each in race.candidates[2:]:
        assert 0.001 <= each.plan.weight_decay <= 0.1
        assert each.plan.lr in (0.001, 0.002)


def test_race__cut_off__takes_up_scores_and_goes_on(planning: Planning, tmp_path: Path) -> None:
    whole, _, _ = race_of(planning, tmp_path / "whole", Fits(by_rate), candidates=4)
    expected = whole.run()
    fit = Fits(by_rate, interrupt_at=4)
    first, _, _ = race_of(planning, tmp_path / "cut", fit, candidates=4)
    first.run()
    assert first.interrupted
    fit.interrupt_at = -1
    second, _, _ = race_of(planning, tmp_path / "cut", fit, candidates=4, resume=True)
    winner = second.run()
    assert (winner.name, len(second.candidates)) == (expected.name, 4)
    names = [name for name, _ in fit.parts]
    assert [names.count(each.name) for each in first.candidates[:3]] == [2, 1, 1]  # nobody trains a round twice
    assert winner.steps > 0


def test_race__two_folders_one_storage__share_configurations_and_scores(planning: Planning, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    one, _, _ = race_of(planning, tmp_path / "one", Fits(by_rate), candidates=3, storage=storage)
    two, _, _ = race_of(planning, tmp_path / "two", Fits(by_rate), candidates=3, storage=storage)
    one.run()
    winner = two.run()
    first, second = ({each.name for each in race.candidates} for race in (one, two))
    assert not first & second
    assert {"plan", "baseline"} <= first
    assert len(two.study.scores(0)) == 6
    assert winner.name in second


def test_study__of_other_data__is_refused(planning: Planning, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    race_of(planning, tmp_path / "one", Fits(by_rate), candidates=2, storage=storage)
    with pytest.raises(ConfigError, match="is a race for other data"):
        race_of(planning, tmp_path / "two", Fits(by_rate), candidates=2, storage=storage, what="that")


@pytest.mark.parametrize("storage", ["nonsense://x/y", "sqlite:////no/such/folder/race.db", "just words"])
def test_study__storage_that_cannot_be_used__is_named(planning: Planning, tmp_path: Path, storage: str) -> None:
    with pytest.raises(ConfigError, match=r"search.storage .* cannot be used"):
        race_of(planning, tmp_path, Fits(by_rate), candidates=2, storage=storage)


@pytest.mark.parametrize(
    ("scores", "winner", "told"),
    [
        ((0.5, 0.7), 1, "0.2000 ahead of the baseline"),
        ((0.5, 0.4), 1, "does not beat the baseline"),
        ((0.5, 0.4), 0, "the baseline itself won"),
        ((math.nan, 0.4), 1, "no score of a baseline"),
    ],
)
def test_baseline_verdict__every_case__is_said(
    planning: Planning, scores: tuple[float, float], winner: int, told: str
) -> None:
    plan = planning.plan(choose_settings("fast", [], {}))
    both = [Candidate(name, plan, {}, 0, score=s) for name, s in zip(("baseline", "lora"), scores, strict=True)]
    assert told in baseline_verdict(both, both[winner], higher_is_better=True)
