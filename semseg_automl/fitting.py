"""From a plan and its tables to a saved bundle: build, train, keep the best weights on disk as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from semseg_automl.build import seeded_model
from semseg_automl.bundle import Bundle, save_bundle
from semseg_automl.callbacks import TrainingResult, Weights
from semseg_automl.data.table import MaskTable
from semseg_automl.peft import count_parameters
from semseg_automl.peft.usage import usage_summary
from semseg_automl.plan import Plan
from semseg_automl.report import save_expert_usage
from semseg_automl.task import SegmentationTask
from semseg_automl.training import data_module, train

THRESHOLD = 0.5
"""Foreground probability above which a pixel is foreground."""


def fit_bundle(
    plan: Plan,
    task: SegmentationTask,
    table: MaskTable,
    validation: MaskTable,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    deadline: float | None = None,
    trainer_options: dict[str, Any] | None = None,
    progress_bar: bool = True,
) -> Bundle:
    """Fit what a plan describes and save it, each time it gets better.

    Args:
        plan: the decisions.
        task: what the masks hold.
        table: training rows.
        validation: validation rows.
        folder: where the bundle is saved.
        settings: of the estimator, kept in the bundle.
        say: called with what the user should know.
        deadline: `time.monotonic` seconds at which everything must be over, or None.
        trainer_options: passed on to Lightning's trainer by name.
        progress_bar: show Lightning's progress bar.

    Raises:
        ConfigError: a trainer option is unknown.
        CheckpointError: the checkpoint, or the adapter to start from, cannot be read.
        TrainingError: the loss is no longer finite.
    """
    model = seeded_model(plan)
    result = TrainingResult()
    bundle = Bundle(model, plan, task)
    saved = False

    def save(_: Weights | None = None) -> None:
        nonlocal saved
        bundle.record = _record(result, settings)
        save_bundle(folder, bundle, frozen_too=not saved)
        saved = True

    trainable, total = count_parameters(model)
    say(f"{plan.peft} on {plan.encoder}: {trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
    train(
        model,
        plan,
        task,
        data_module(plan, task, table, validation),
        result=result,
        on_best=save,
        on_epoch=lambda entry: say(_epoch_line(entry, plan.validation_metric)),
        on_notice=say,
        cache_folder=folder / "features",
        deadline=deadline,
        trainer_options={"default_root_dir": str(folder), **(trainer_options or {})},
        progress_bar=progress_bar,
    )
    save()
    say(
        f"stopped by {result.stopped_by}; best {plan.validation_metric} {result.best_score:.4f} in epoch "
        f"{result.best_epoch}; saved in {folder}"
    )
    if result.expert_usage:
        say(usage_summary(result.expert_usage))
    save_expert_usage(folder, result.expert_usage)
    return bundle


def _epoch_line(entry: Mapping[str, float], metric: str) -> str:
    return (
        f"epoch {entry['epoch']:.0f}: {entry['seconds']:.0f} s, step {entry['step']:.0f}, train loss "
        f"{entry.get('train_loss', math.nan):.4f}, {metric} {entry[metric]:.4f}"
    )


def _record(result: TrainingResult, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what the bundle keeps beside weights, plan and task."""
    return {
        "settings": dict(settings),
        "threshold": THRESHOLD,
        "best_score": result.best_score,
        "best_epoch": result.best_epoch,
        "stopped_by": result.stopped_by,
        "expert_usage": result.expert_usage,
        "history": result.history,
    }
