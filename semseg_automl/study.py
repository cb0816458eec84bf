"""What Optuna keeps of a race: the configurations to try, their scores after each round, and how each ended.

The default is a SQLite file in the folder of the fit. In any other storage several machines can share one study: each
takes configurations that no other has, and all see the scores of all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from semseg_automl.config import SearchConfig
from semseg_automl.errors import ConfigError
from semseg_automl.portfolio import Point, Range, Space

DATABASE = "race.db"
Ending = Literal["won", "behind", "failed"]
NAME, WHERE, SECONDS, STEPS, LEFT, WHAT = "name", "where", "seconds", "steps", "left", "what"


class Study:
    """A study of Optuna's, in the terms of a race.

    Args:
        folder: of the race; made if need be.
        options: storage, name and sampler.
        higher_is_better: of the scores.
        what: the data and the plan in short; a study is of one of them only.
        seed: of drawn configurations.
        resume: go on with what the folder's own storage holds; otherwise the folder is emptied.

    Raises:
        ConfigError: the storage cannot be used, or its study is of something else.
    """

    def __init__(
        self, folder: Path, options: SearchConfig, *, higher_is_better: bool, what: str, seed: int, resume: bool
    ) -> None:
        self.higher_is_better = higher_is_better
        self.where = str(folder.resolve())
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        storage = options.storage or f"sqlite:///{folder / DATABASE}"
        quiet = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = optuna.samplers
        sampler = samplers.RandomSampler(seed) if options.searcher == "random" else samplers.TPESampler(seed=seed)
        try:
            self._study = optuna.create_study(
                storage=storage,
                study_name=options.study,
                direction="maximize" if higher_is_better else "minimize",
                sampler=sampler,
                load_if_exists=True,
            )
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise ConfigError(
                f"search.storage '{storage}' cannot be used ({str(error).splitlines()[0]}). Give a URL such as "
                "sqlite:///race.db, or leave it out for a file in the fit's folder."
            ) from error
        finally:
            optuna.logging.set_verbosity(quiet)
        known = self._study.user_attrs.get(WHAT)
        if known not in (None, what):
            raise ConfigError(
                f"search.study '{options.study}' in this storage is a race for other data, masks or settings. Give "
                "another search.study."
            )
        self._study.set_user_attr(WHAT, what)

    def offer(self, points: Sequence[Point], space: Space) -> None:
        """Put points on the list to be tried, unless they are on it."""
        for point in points:
            labels = {name: _label(value) for name, value in point.choices.items() if name in space}
            self._study.enqueue_trial(labels, {NAME: point.name}, skip_if_exists=True)

    def mine(self) -> list[FrozenTrial]:
        """Return the trials of this folder, the oldest first."""
        return [trial for trial in self._study.trials if trial.user_attrs.get(WHERE) == self.where]

    def take(self, space: Space) -> FrozenTrial:
        """Take the next point of the list, or one that is drawn."""
        trial = self._study.ask(_distributions(space))
        trial.set_user_attr(WHERE, self.where)
        if NAME not in trial.user_attrs:
            trial.set_user_attr(NAME, f"drawn_{trial.number}")
        return self._study.trials[trial.number]

    def note(self, number: int, **facts: Any) -> None:
        """Keep facts of a trial."""
        for name, value in facts.items():
            self._handle(number).set_user_attr(name, value)

    def report(self, number: int, score: float, turn: int) -> None:
        """Keep the score of a trial after a round."""
        self._handle(number).report(score, turn)

    def scores(self, turn: int) -> list[float]:
        """Return what all trials scored after a round, of whatever machine."""
        return [t.intermediate_values[turn] for t in self._study.trials if turn in t.intermediate_values]

    def end(self, number: int, how: Ending, score: float | None = None) -> None:
        """Say how a trial ended, unless that is known: won (with its score), is behind, or cannot be trained."""
        states = {"won": TrialState.COMPLETE, "behind": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._study.tell(number, score, state=states[how], skip_if_finished=True)

    def _handle(self, number: int) -> optuna.Trial:
        """Return what a trial is changed by; Optuna hands it out once, to whom it was asked for, not after a kill."""
        return optuna.Trial(self._study, self._study.trials[number]._trial_id)


def choices_of(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """Return the choices that a trial stands for."""
    found: dict[str, Any] = {}
    for name, label in trial.params.items():
        choices = space[name]
        found[name] = label if isinstance(choices, Range) else next(c for c in choices if _label(c) == label)
    return found


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {
        name: FloatDistribution(choices.low, choices.high, log=choices.log)
        if isinstance(choices, Range)
        else CategoricalDistribution([_label(choice) for choice in choices])
        for name, choices in space.items()
    }


def _label(value: Any) -> Any:
    """Return a choice as Optuna can keep it: a plain value, or JSON of a list."""
    return json.dumps(value) if isinstance(value, list | tuple | Mapping) else value
