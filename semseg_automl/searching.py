"""A fit that searches: race configurations, fit the winner on, then choose how it predicts, all within one time limit.

The race itself: :mod:`semseg_automl.race`. What may be tried: :mod:`semseg_automl.portfolio`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from semseg_automl.bundle import Bundle, copy_bundle, save_bundle
from semseg_automl.calibration import THRESHOLD_METRICS, THRESHOLDS, best_threshold, threshold_figures
from semseg_automl.choosing import encoders_at_hand
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import ConfigError, UnsupportedCombination, check_known
from semseg_automl.evaluation import judged, predictor_of, score_table
from semseg_automl.fitting import Part, fit_bundle
from semseg_automl.inference import Predictor
from semseg_automl.metrics import build_metrics
from semseg_automl.models.facts import OFFICIAL
from semseg_automl.plan import Plan
from semseg_automl.planning import Chosen, Planning
from semseg_automl.portfolio import Portfolio, make_portfolio
from semseg_automl.processes import Processes
from semseg_automl.race import FOLDER, Candidate, Race, baseline_verdict
from semseg_automl.resume import row_name
from semseg_automl.saving import THRESHOLD
from semseg_automl.study import SECONDS, Study
from semseg_automl.training import data_module, image_cache

DEFAULT_CANDIDATES = 8
MIN_GAIN = 0.001
"""Of the validation score, below which another threshold or mirroring is not worth it."""
SEARCHERS = {"auto": "tpe", "bayes": "tpe", "tpe": "tpe", "random": "random"}


def tune_settings(asked: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that ``hyperparameter_tune_kwargs`` stands for, in AutoGluon's words or ours.

    Args:
        asked: "auto", or a mapping: ``num_trials``, ``searcher`` (auto, bayes, tpe, random), ``scheduler`` (auto, ASHA,
            halving), and any of the section ``search`` by its own name (space, storage, study, share, ...).

    Raises:
        ConfigError: a word is unknown.

    >>> tune_settings({"num_trials": 4, "searcher": "random"})
    {'search.candidates': 4, 'search.searcher': 'random'}
    """
    if asked is None:
        return {}
    if isinstance(asked, str):
        check_known("hyperparameter_tune_kwargs", asked, ["auto"])
        return {"search.candidates": DEFAULT_CANDIDATES}
    settings: dict[str, Any] = {"search.candidates": DEFAULT_CANDIDATES}
    for name, value in asked.items():
        if name == "num_trials":
            settings["search.candidates"] = value
        elif name == "searcher":
            check_known("searcher", value, SEARCHERS)
            settings["search.searcher"] = SEARCHERS[value]
        elif name == "scheduler":
            check_known("scheduler", value, ["auto", "ASHA", "halving"])
        else:
            settings[f"search.{name}"] = value
    if settings["search.candidates"] == 0:
        raise ConfigError("hyperparameter_tune_kwargs asks for 0 trials. Leave it out, or ask for 2 or more.")
    return settings


def plan_portfolio(planning: Planning, chosen: Chosen, plan: Plan) -> Portfolio:
    """Say what would race beside a plan.

    Raises:
        ConfigError: a choice that was asked for is none.
    """
    at_hand = encoders_at_hand(planning.hardware) if chosen.automatic else {}
    used = plan.encoder, plan.checkpoint
    others = {
        name: settings
        for name, settings in at_hand.items()
        if (settings["model.encoder"], settings["model.checkpoint"] or OFFICIAL) != used
    }
    asked = chosen.config.search.space
    return make_portfolio(plan, chosen.encoder, fixed=chosen.asked, asked=asked, encoders=others)


def check_search(
    planning: Planning, chosen: Chosen, plan: Plan, processes: Processes, say: Callable[[str], None]
) -> None:
    """Say what will race, before anything is trained.

    Raises:
        UnsupportedCombination: several processes are to fit together.
        ConfigError: a choice that was asked for is none.
    """
    if processes.are_several:
        raise UnsupportedCombination(
            f"a search does not run in {processes.count} processes that fit together. Use devices=1, or leave the "
            "search out: search.candidates=0. Several machines share a search by search.storage."
        )
    portfolio = plan_portfolio(planning, chosen, plan)
    most = chosen.config.search.candidates
    names = [point.name for point in portfolio.points[:most]]
    drawn = f", and {most - len(names)} that are drawn" if most > len(names) else ""
    say(f"search among {most} configurations: {', '.join(names)}{drawn}")


@dataclass(frozen=True)
class Search:
    """A fit that searches.

    Attributes:
        planning: makes plans.
        chosen: the settings of the plan without a search.
        plan: that plan.
        validation: rows that configurations are judged on.
        folder: of the fit.
        say: called with what the user should know.
        fit_options: of `fit_bundle`, the same for every candidate.
        deadline: of everything, in `time.monotonic` seconds, or None.
        resume: go on with a search that was cut off.
    """

    planning: Planning
    chosen: Chosen
    plan: Plan
    validation: MaskTable
    folder: Path
    say: Callable[[str], None]
    fit_options: Mapping[str, Any]
    deadline: float | None
    resume: bool

    def run(self) -> Bundle:
        """Search, fit the winner, and save it in the folder.

        Raises:
            ConfigError: the storage cannot be used, or is of another search.
            TrainingError: no configuration could be trained.
            BundleError: the folder cannot be written.
        """
        study = self._study()
        spent = sum(trial.user_attrs.get(SECONDS, 0.0) for trial in study.mine())
        if spent and self.deadline is not None:  # a search that was cut off: its time counts as in any fit
            return replace(self, deadline=self.deadline - spent)._run(study)
        return self._run(study)

    def _run(self, study: Study) -> Bundle:
        race = Race(
            planning=self.planning,
            chosen=self.chosen,
            own=self.plan,
            portfolio=plan_portfolio(self.planning, self.chosen, self.plan),
            options=self.chosen.config.search,
            study=study,
            folder=self.folder / FOLDER,
            fit=partial(self._part, say=_silent),
            cache=image_cache(self.plan, self.planning.table, self.validation),
            on_best=lambda candidate: copy_bundle(self.folder / FOLDER / candidate.name, self.folder),
            say=self.say,
            deadline=self.deadline,
        )
        self._fill(race)
        winner = race.run()
        bundle = self._finish(race, winner)
        save_bundle(self.folder, bundle)
        return bundle

    @property
    def _higher_is_better(self) -> bool:
        name, task = self.plan.validation_metric, self.planning.task
        metric = build_metrics([name], kind=task.kind, num_classes=task.num_classes)[name]
        return bool(metric.higher_is_better)

    def _fill(self, race: Race) -> None:
        """Move what the check of the rows decoded into the cache that all candidates share."""
        kept = self.fit_options.get("kept")
        if race.cache is not None and kept is not None:
            data_module(self.plan, self.planning.task, self.planning.table, self.validation, kept, race.cache)

    def _study(self) -> Study:
        """Open the study; its data and plan in short keep other searches out of it."""
        tables = (self.planning.table, self.validation)
        rows = [[row_name(table, row) for row in range(len(table))] for table in tables]
        task = self.planning.task.to_dict()
        layers = [dict(layer) for layer in self.chosen.layers]
        what = json.dumps([rows, task, self.chosen.preset, layers, self.plan.time_limit], default=str)
        return Study(
            self.folder / FOLDER,
            self.chosen.config.search,
            higher_is_better=self._higher_is_better,
            what=hashlib.sha256(what.encode()).hexdigest()[:16],
            seed=self.plan.seed,
            resume=self.resume,
        )

    def _part(
        self, plan: Plan, folder: Path, part: Part, *, say: Callable[[str], None], kept_back: float = 0.0
    ) -> Bundle:
        """Carry out a part of a candidate's fit, which is over some seconds before everything is."""
        deadline = None if self.deadline is None else self.deadline - kept_back
        options = {**self.fit_options, "kept": None, "deadline": deadline, "part": part, "say": say}
        return fit_bundle(
            plan, self.planning.task, self.planning.table, self.validation, folder, resume=True, **options
        )

    def _finish(self, race: Race, winner: Candidate) -> Bundle:
        """Fit the winner to the end, and note what the search found."""
        folder = self.folder / FOLDER / winner.name
        start = time.monotonic()
        self.say(f"{winner.name} is fitted on: {_told(winner.settings)}")
        last = Part(None, race.cache)
        bundle = self._part(winner.plan, folder, last, say=self.say, kept_back=self._choosing_seconds(winner))
        winner.seconds += time.monotonic() - start
        winner.score = float(bundle.record["best_score"])
        winner.steps = int(bundle.record["history"][-1]["step"])
        interrupted = bundle.record["stopped_by"] == "interrupt"
        if not interrupted:
            race.study.end(winner.trial, "won", winner.score)
        verdict = baseline_verdict(race.candidates, winner, higher_is_better=race.study.higher_is_better)
        self.say(verdict)
        predicted = "as the plan has it"
        if self.chosen.config.search.calibrate and not interrupted:
            predicted = self._choose_prediction(bundle)
            self.say(predicted)
        bundle.record["search"] = {
            "winner": winner.name,
            "verdict": verdict,
            "prediction": predicted,
            "candidates": [each.line() for each in race.candidates],
        }
        return bundle

    def _choosing_seconds(self, winner: Candidate) -> float:
        """Return how long it will take to choose how to predict: from the validations of the winner's last part."""
        if not self.chosen.config.search.calibrate:
            return 0.0
        return CHOOSING_PASSES * winner.validation_seconds + 1.0

    def _scored(self, predictor: Predictor, name: str) -> dict[float, float]:
        """Return the validation score with the usual threshold and, for binary masks, with the best one."""
        task = self.planning.task
        if task.kind != "binary" or name not in THRESHOLD_METRICS:
            usual = score_table(predictor, self.validation, task, metrics=[name], threshold=THRESHOLD)
            return {THRESHOLD: usual[name]}
        figures = threshold_figures(judged(predictor, self.validation, task, THRESHOLD), name)
        best = best_threshold(figures, name)
        at = {float(threshold): float(figure) for threshold, figure in zip(THRESHOLDS, figures, strict=True)}
        return {THRESHOLD: at[THRESHOLD], best: at[best]}

    def _choose_prediction(self, bundle: Bundle) -> str:
        """Choose mirroring and, for binary masks, the threshold, by validation scores; change the bundle to it."""
        name, plan = bundle.plan.validation_metric, bundle.plan
        sign = 1 if self._higher_is_better else -1
        sides = (plan.mirrored,) if "data.mirrored" in self.chosen.asked else (False, True)
        found: dict[tuple[bool, float], float] = {}
        slow = ""
        for mirrored in sides:
            predictor = predictor_of(bundle, mirrored=mirrored)
            start = time.monotonic()
            scored = self._scored(predictor, name)
            per_image = 1000 * (time.monotonic() - start) / len(self.validation)
            latency = self.chosen.config.search.latency
            if mirrored and not plan.mirrored and latency is not None and per_image > latency:
                slow = f"; mirrored, an image takes {per_image:.0f} ms, above search.latency"
                continue
            found |= {(mirrored, threshold): score for threshold, score in scored.items()}
        usual = found[plan.mirrored, THRESHOLD]
        (mirrored, threshold), best = max(found.items(), key=lambda item: sign * item[1])
        if sign * (best - usual) < MIN_GAIN:
            return f"predictions stay as they are: no mirroring or threshold scores {MIN_GAIN} better{slow}"
        reasons = plan.reasons | {"mirrored": f"{name} {best:.4f} instead of {usual:.4f} on validation images"}
        bundle.plan = plan.model_copy(update={"mirrored": mirrored, "reasons": reasons})
        bundle.record["threshold"] = threshold
        with_or = "mirrored" if mirrored else "not mirrored"
        return f"predictions {with_or}, threshold {threshold:.3f}: {name} {best:.4f} instead of {usual:.4f}{slow}"


CHOOSING_PASSES = 3.5
"""Validations' worth of time to choose how to predict: a pass over the rows as they are, and one mirrored too."""


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as planned"


def _silent(_: str) -> None:
    """Say nothing: the race tells what came of a part."""
