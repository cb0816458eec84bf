"""A race of configurations for the same data: slices of training in turns, half of those left leave after each round.

Successive halving (Jamieson and Talwalkar, AISTATS 2016; Li et al., "Hyperband", JMLR 2018). A round gives each that is
left the same time, or steps, so that what one costs is counted; the better half goes on from where it was, and nothing
it has trained is thrown away. A race that was cut off goes on where it was.

What may be tried: :mod:`semseg_automl.portfolio`. What is kept of a race: :mod:`semseg_automl.study`. How a part of a
fit is carried out: :mod:`semseg_automl.fitting`.
"""

from __future__ import annotations

import filecmp
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semseg_automl.bundle import Bundle
from semseg_automl.config import SearchConfig
from semseg_automl.data.cache import ImageCache
from semseg_automl.errors import CheckpointError, ConfigError, TrainingError
from semseg_automl.fitting import Part
from semseg_automl.plan import Plan
from semseg_automl.planning import Chosen, Planning
from semseg_automl.portfolio import BASELINE, Portfolio, relative_settings, settings_of
from semseg_automl.resume import FOLDER as STATES
from semseg_automl.study import LEFT, NAME, SECONDS, STEPS, Ending, Study, choices_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FOLDER = "search"
"""Of the candidates, each in a folder of its own, in the folder of the fit."""
LEAST_SECONDS = 20.0
"""Of a slice: below, a few steps tell little, and building a network and validating it takes most of the time."""
LEAST_STEPS = 25
FROZEN = "frozen.safetensors"

Fit = Callable[[Plan, Path, Part], Bundle]
"""Carries out a part of a fit in a folder, from where the part before left it."""


@dataclass
class Candidate:
    """One configuration in the race.

    Attributes:
        name: what it is called, in tables and as a folder.
        plan: made of its choices.
        settings: over the plan's own.
        trial: its number in the study.
        score: of its last validation, NaN before the first.
        seconds: spent on it, building and validating included.
        steps: of the optimizer.
        rounds: that it has behind it.
        left: why it is out, or empty.
        overhead: seconds of the last part that were not training.
        validation_seconds: of its last validation.
    """

    name: str
    plan: Plan
    settings: dict[str, Any]
    trial: int
    score: float = math.nan
    seconds: float = 0.0
    steps: int = 0
    rounds: int = 0
    left: str = ""
    overhead: float | None = None
    validation_seconds: float = 0.0

    def line(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "candidate": self.name,
            "settings": self.settings,
            "score": self.score,
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "left": self.left,
        }


@dataclass
class Race:
    """Who runs, on what terms, and what is known so far.

    Attributes:
        planning: makes the candidates' plans.
        chosen: the settings of the plan without a search.
        own: that plan.
        portfolio: what may be tried.
        options: of the search.
        study: keeps the race.
        folder: of the candidates.
        fit: carries out parts.
        cache: decoded images, which all candidates share.
        on_best: called with a candidate that scores higher than all before, its bundle saved.
        say: called with what the user should know.
        deadline: of the whole fit in `time.monotonic` seconds; None: slices are counted in steps.
    """

    planning: Planning
    chosen: Chosen
    own: Plan
    portfolio: Portfolio
    options: SearchConfig
    study: Study
    folder: Path
    fit: Fit
    cache: ImageCache | None
    on_best: Callable[[Candidate], None]
    say: Callable[[str], None]
    deadline: float | None
    candidates: list[Candidate] = field(default_factory=list)
    best: float = math.nan
    interrupted: bool = False

    def run(self) -> Candidate:
        """Race until one is left, and return it; it is to be fitted on.

        Raises:
            TrainingError: no candidate could be trained.
        """
        start = time.monotonic()
        most = self._affordable(start)
        self._enter(most)
        rounds = max(1, math.ceil(math.log2(most)))
        for turn in range(rounds):
            runners = self._runners()
            if self.interrupted or not runners or (turn > 0 and len(runners) == 1):
                break
            self._round(turn, rounds - turn, runners, start)
            self._halve(turn, last=turn == rounds - 1)
        ordered = self._ordered(self._runners())
        if not ordered:
            reasons = "; ".join(f"{each.name}: {each.left}" for each in self.candidates)
            raise TrainingError(f"no configuration of the search could be trained. {reasons}")
        for other in () if self.interrupted else ordered[1:]:
            why = "no time was left for it" if math.isnan(other.score) else "behind when the time was up"
            self._leave(other, why, "behind")
        return ordered[0]

    def _affordable(self, start: float) -> int:
        """Return how many candidates get slices that are long enough to tell something."""
        most = self.options.candidates
        if self.deadline is None:
            return most
        seconds = self.options.share * (self.deadline - start)
        while most > 2 and seconds / (math.ceil(math.log2(most)) * most) < LEAST_SECONDS:
            most -= 1
        if most < self.options.candidates:
            self.say(
                f"{most} of {self.options.candidates} configurations race: of {seconds:.0f} s more of them would get "
                f"less than {LEAST_SECONDS:.0f} s each"
            )
        return most

    def _enter(self, most: int) -> None:
        """Admit those of before, then the portfolio's, then drawn ones."""
        for trial in self.study.mine():
            self._admit(trial)
        self.study.offer(self.portfolio.points, self.portfolio.space)
        tries = 2 * most
        while len([each for each in self.candidates if each.steps or not each.left]) < most and tries:
            tries -= 1
            self._admit(self.study.take(self.portfolio.space))

    def _admit(self, trial: FrozenTrial) -> None:
        """Plan a trial's configuration; one that cannot work, or is planned already, is out."""
        facts, choices = trial.user_attrs, choices_of(trial, self.portfolio.space)
        settings = settings_of(choices, self.portfolio.encoders)
        left = facts.get(LEFT, "")
        try:
            chosen = self.chosen.over(settings)
            plan = self.planning.plan(chosen)
            relative = relative_settings(choices, plan, chosen.encoder.stride)
            plan = self.planning.plan(chosen.over(relative)) if relative else plan
            settings |= relative
        except (ConfigError, CheckpointError) as error:
            plan, left = self.own, f"cannot be planned: {error}"
        apart = plan.model_dump(exclude={"reasons"})
        twin = next((e.name for e in self.candidates if e.plan.model_dump(exclude={"reasons"}) == apart), None)
        if twin is not None and not left:
            left = f"the same plan as {twin}"
        scores = trial.intermediate_values
        candidate = Candidate(
            name=facts[NAME],
            plan=plan,
            settings=self._told(settings),
            trial=trial.number,
            score=scores[max(scores)] if scores else math.nan,
            seconds=facts.get(SECONDS, 0.0),
            steps=facts.get(STEPS, 0),
            rounds=len(scores),
            left=left,
        )
        self.candidates.append(candidate)
        if left and LEFT not in facts:
            self._leave(candidate, left, "failed")

    def _told(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that differ from those of the plan without a search."""
        plan = self.own
        own = {"optim.peft": plan.peft, "data.augmentation": plan.augmentation, "optim.loss": plan.loss}
        return {name: value for name, value in settings.items() if own.get(name) != value}

    def _runners(self) -> list[Candidate]:
        return [each for each in self.candidates if not each.left]

    def _ordered(self, candidates: list[Candidate]) -> list[Candidate]:
        """Return candidates, the best first; those without a score last, of equal ones the older first."""
        sign = -1 if self.study.higher_is_better else 1
        return sorted(candidates, key=lambda e: math.inf if math.isnan(e.score) else sign * e.score)

    def _round(self, turn: int, rounds_left: int, runners: list[Candidate], start: float) -> None:
        """Give each runner a slice, unless it had this one before the race was cut off."""
        waiting = [each for each in runners if each.rounds <= turn]
        for place, candidate in enumerate(waiting):
            if self.interrupted:
                return
            part = self._part(candidate, rounds_left, len(runners), len(waiting) - place, start)
            if part is None:
                return
            self._train(candidate, part, turn)

    def _part(
        self, candidate: Candidate, rounds_left: int, runners: int, waiting: int, start: float
    ) -> Part | None:
        """Share out the steps of the race, or the time that is left for it among those that wait; None: none is."""
        plan = candidate.plan
        if self.deadline is None:
            per_epoch = math.ceil(len(self.planning.table) * plan.views / plan.batch_size)
            total = self.options.share * plan.max_epochs * per_epoch
            rounds = math.ceil(math.log2(max(2, self.options.candidates)))
            return Part(None, self.cache, steps=max(LEAST_STEPS, round(total / rounds / runners)))
        left = start + self.options.share * (self.deadline - start) - time.monotonic()
        if left <= 0:
            return None
        known = [each.overhead for each in self.candidates if each.overhead is not None]
        overhead = candidate.overhead or (sum(known) / len(known) if known else 1.0)
        return Part(max(LEAST_SECONDS / 4, left / (rounds_left * waiting) - overhead), self.cache)

    def _train(self, candidate: Candidate, part: Part, turn: int) -> None:
        """Carry out a slice and note what came of it; one that cannot be trained is out."""
        start = time.monotonic()
        try:
            bundle = self.fit(candidate.plan, self.folder / candidate.name, part)
        except (TrainingError, CheckpointError) as error:
            self._leave(candidate, f"cannot be trained: {error}", "failed")
            return
        record = bundle.record
        self.interrupted = record["stopped_by"] == "interrupt"
        took = time.monotonic() - start
        candidate.seconds += took
        candidate.overhead = None if part.seconds is None else max(0.0, took - part.seconds)
        if not record["history"]:
            return
        candidate.score, candidate.steps = float(record["best_score"]), int(record["history"][-1]["step"])
        candidate.validation_seconds = float(record["validation_seconds"])
        self.study.note(candidate.trial, **{SECONDS: candidate.seconds, STEPS: candidate.steps})
        if not self.interrupted:
            self.study.report(candidate.trial, candidate.score, turn)
            candidate.rounds += 1
        name = candidate.plan.validation_metric
        after = f"{candidate.seconds:.0f} s, {candidate.steps} steps"
        self.say(f"{candidate.name}: {name} {candidate.score:.4f} after {after}")
        self._share_frozen(self.folder / candidate.name)
        if self._is_best(candidate.score):
            self.best = candidate.score
            self.on_best(candidate)

    def _is_best(self, score: float) -> bool:
        better = score > self.best if self.study.higher_is_better else score < self.best
        return not math.isnan(score) and (math.isnan(self.best) or better)

    def _halve(self, turn: int, *, last: bool) -> None:
        """Let the better half go on, judged among all machines; of one's own at least the best; in the end only it."""
        ordered = [each for each in self._ordered(self._runners()) if not math.isnan(each.score)]
        if self.interrupted or not ordered:
            return
        everywhere = sorted(self.study.scores(turn), reverse=self.study.higher_is_better)
        places = math.ceil(len(everywhere) / 2)
        bar = everywhere[places - 1] if everywhere else ordered[0].score
        good = [e for e in ordered if (e.score >= bar if self.study.higher_is_better else e.score <= bar)]
        going = 1 if last else min(len(good), math.ceil(len(ordered) / 2))
        for candidate in ordered[max(1, going) :]:
            self._leave(candidate, f"behind after round {turn + 1}", "behind")

    def _leave(self, candidate: Candidate, why: str, how: Ending) -> None:
        """Take a candidate out; what it would need to go on is deleted."""
        candidate.left = why
        self.study.note(candidate.trial, **{LEFT: why})
        self.study.end(candidate.trial, how)
        shutil.rmtree(self.folder / candidate.name / STATES, ignore_errors=True)
        if how == "failed":
            self.say(f"{candidate.name} is out, {why}")

    def _share_frozen(self, folder: Path) -> None:
        """Keep frozen weights that several candidates have on disk once."""
        own = folder / FROZEN
        for other in sorted(self.folder.glob(f"*/{FROZEN}")):
            if other != own and own.is_file() and not os.path.samefile(other, own) and filecmp.cmp(other, own, False):
                linked = own.with_suffix(".link")
                try:
                    os.link(other, linked)
                except OSError:
                    return  # a file system without links: it is kept twice
                os.replace(linked, own)
                return


def baseline_verdict(candidates: list[Candidate], winner: Candidate, *, higher_is_better: bool) -> str:
    """Say whether the winner beats the baseline, by the scores of their last validations."""
    baseline = next((each for each in candidates if each.name == BASELINE), None)
    if baseline is None or math.isnan(baseline.score):
        return "there is no score of a baseline to compare with"
    if baseline is winner:
        return "the baseline itself won: nothing that was tried beats it"
    ahead = winner.score - baseline.score if higher_is_better else baseline.score - winner.score
    if ahead <= 0:
        return f"the winner does not beat the baseline ({winner.score:.4f} against {baseline.score:.4f})"
    return (
        f"the winner is {ahead:.4f} ahead of the baseline, which scored {baseline.score:.4f} after "
        f"{baseline.seconds:.0f} s"
    )
