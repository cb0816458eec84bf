"""What a fit leaves in its folder, written whenever it gets better, and what it tells of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from semseg_automl.bundle import Bundle, save_bundle
from semseg_automl.callbacks import TrainingResult
from semseg_automl.errors import BundleError
from semseg_automl.expert_chart import save_expert_usage
from semseg_automl.fingerprint import Fingerprint
from semseg_automl.forecast import Forecast, compared, taken
from semseg_automl.meters import peak_bytes
from semseg_automl.peft.usage import usage_summary
from semseg_automl.processes import meet
from semseg_automl.resume import FOLDER, end_run
from semseg_automl.soup import Weights

TO_GO_ON = ("interrupt", "slice")
"""What ends a fit that may be gone on with; an interrupt has ended the other processes, too."""
THRESHOLD = 0.5
"""Foreground probability above which a pixel is foreground."""


def epoch_line(entry: Mapping[str, float], metric: str) -> str:
    """Say what came of an epoch."""
    return (
        f"epoch {entry['epoch']:.0f}: {entry['seconds']:.0f} s, step {entry['step']:.0f}, train loss "
        f"{entry.get('train_loss', math.nan):.4f}, {metric} {entry[metric]:.4f}"
    )


def last_line(result: TrainingResult, metric: str, folder: Path) -> str:
    """Say what came of a fit."""
    return (
        f"stopped by {result.stopped_by}; best {metric} {result.best_score:.4f} in epoch {result.best_epoch}; "
        f"saved in {folder}"
    )


def record_of(result: TrainingResult, settings: Mapping[str, Any], dropped_rows: Sequence[str]) -> dict[str, Any]:
    """Gather what the bundle keeps beside weights, plan and task."""
    return {
        "settings": dict(settings),
        "dropped_rows": list(dropped_rows),
        "threshold": THRESHOLD,
        "best_score": result.best_score,
        "best_epoch": result.best_epoch,
        "stopped_by": result.stopped_by,
        "expert_usage": result.expert_usage,
        "validation_seconds": result.validation_seconds,
        "history": result.history,
    }


def _tell_experts(folder: Path, usage: Mapping[str, Sequence[int]], say: Callable[[str], None]) -> None:
    if usage:
        say(usage_summary(usage))
    save_expert_usage(folder, usage)


@dataclass
class Saver:
    """Writes the bundle whenever it is better, what does not change only once."""

    bundle: Bundle
    folder: Path
    result: TrainingResult
    settings: Mapping[str, Any]
    dropped_rows: Sequence[str]
    data: Fingerprint | None
    say: Callable[[str], None]
    writes: bool = True
    saved: bool = False
    forecast: Forecast | None = None
    peak_of: torch.device | None = None

    @property
    def hearing(self) -> dict[str, Any]:
        """What `semseg_automl.training.train` fills in and calls."""
        metric = self.bundle.plan.validation_metric
        return {
            "result": self.result,
            "on_best": self.save_best,
            "on_epoch": lambda entry: self.say(epoch_line(entry, metric)),
            "on_notice": self.say,
        }

    def save(self) -> None:
        """Write what there is.

        Raises:
            BundleError: the folder cannot be written.
        """
        found: dict[str, Any] = {} if self.data is None else {"data": self.data.model_dump(mode="json")}
        peak = None if self.peak_of is None else peak_bytes(self.peak_of)
        found["peak_bytes"] = peak
        if self.forecast is not None:
            found["forecast"] = {"predicted": self.forecast.plain(), "actual": taken(self.result.history, peak)}
        self.bundle.record = record_of(self.result, self.settings, self.dropped_rows) | found
        if self.writes:
            save_bundle(self.folder, self.bundle, frozen_too=not self.saved)
        self.saved = True

    def finish(self) -> None:
        """Save what there is, wait for the other processes to be here, too, and tidy up.

        Raises:
            BundleError: the folder cannot be written.
        """
        self.save()
        if self.result.stopped_by not in TO_GO_ON:
            meet()
            if self.writes:
                end_run(self.folder / FOLDER)
        if self.writes:
            self.say(last_line(self.result, self.bundle.plan.validation_metric, self.folder))
            if self.forecast is not None:
                self.say(f"it took {compared(self.bundle.record['forecast'])}")
            _tell_experts(self.folder, self.result.expert_usage, self.say)

    def save_best(self, _: Weights) -> None:
        """Write the best so far; a full disk is only told: the weights are in memory too, and saved at the end."""
        try:
            self.save()
        except BundleError as error:
            self.say(f"{error} Training goes on.")
