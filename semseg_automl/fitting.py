"""From a plan and its tables to a saved bundle: build, train, keep the best weights on disk as they come."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from semseg_automl.build import seeded_model
from semseg_automl.bundle import Bundle, load_bundle, save_bundle
from semseg_automl.callbacks import TrainingResult, Weights
from semseg_automl.data.cache import ImageCache
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import BundleError, ConfigError, TrainingError
from semseg_automl.fingerprint import Fingerprint
from semseg_automl.forecast import Forecast, compared, look_ahead, taken
from semseg_automl.hardware import training_device
from semseg_automl.memory import begun_with, is_out_of_memory, shared_plan, smaller
from semseg_automl.meters import forget_peak, peak_bytes
from semseg_automl.models.attention_choice import choose_attention
from semseg_automl.peft import count_parameters
from semseg_automl.peft.usage import usage_summary
from semseg_automl.plan import Plan
from semseg_automl.processes import ALONE, Agreement, Processes, meet, parting
from semseg_automl.report import save_expert_usage
from semseg_automl.resume import (
    FOLDER,
    MACHINE_DECIDES,
    RUN,
    StateKeeper,
    begin_run,
    check_same_plan,
    end_run,
    newest_state,
    read_state,
    row_name,
)
from semseg_automl.slices import Slice
from semseg_automl.task import SegmentationTask
from semseg_automl.training import data_module, train

ATTENTION = "attention.json"
"""Beside the states of a fit: a fit that goes on must compute as it began."""
TO_GO_ON = ("interrupt", "slice")
"""What ends a fit that may be gone on with; an interrupt has ended the other processes, too."""
THRESHOLD = 0.5
"""Foreground probability above which a pixel is foreground."""


@dataclass(frozen=True)
class Part:
    """Of a fit that takes turns with others.

    Attributes:
        seconds: of training, after which the fit stops, to be gone on with.
        cache: decoded images of both tables, which all of the fits share; None for none.
        steps: of the optimizer, after which it stops. Neither these nor seconds: its last part.
    """

    seconds: float | None
    cache: ImageCache | None
    steps: int | None = None

    def slice(self, states: StateKeeper) -> Slice | None:
        """Return what ends the part; None where it goes to the end."""
        if self.seconds is None and self.steps is None:
            return None
        return Slice(states, seconds=self.seconds, steps=self.steps)


def fit_bundle(
    plan: Plan,
    task: SegmentationTask,
    table: MaskTable,
    validation: MaskTable,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    dropped_rows: Sequence[str] = (),
    data: Fingerprint | None = None,
    kept: DecodedFiles | None = None,
    say: Callable[[str], None],
    resume: bool = False,
    state_seconds: float | None = None,
    deadline: float | None = None,
    trainer_options: dict[str, Any] | None = None,
    processes: Processes = ALONE,
    part: Part | None = None,
    plan_stands: bool = False,
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
        dropped_rows: rows that were left out, and why; kept in the bundle.
        data: what the rows look like, kept in the bundle for its reports.
        kept: what the check of the rows decoded; emptied.
        say: called with what the user should know.
        resume: go on with the fit that was cut off in the folder, if there is one.
        state_seconds: between two states that a resumed fit can go on with; None for what costs 2 % at most.
        deadline: `time.monotonic` seconds at which everything must be over, or None.
        trainer_options: passed on to Lightning's trainer by name.
        processes: that fit together; each calls this with the same, and the first one speaks and writes.
        part: of the fit to carry out, where others take turns with it; the deadline then stands, whatever time the
            parts before it took. None for all of it.
        plan_stands: no probing changes the plan's micro-batch.
        progress_bar: show Lightning's progress bar.

    Raises:
        ConfigError: a trainer option is unknown, or the fit to go on with is another one.
        BundleError: the folder cannot be written at the end.
        CheckpointError: the checkpoint, or the adapter to start from, cannot be read.
        TrainingError: the loss is no longer finite.
    """
    say = say if processes.is_first else _silent
    states = folder / FOLDER
    if resume and not (states / RUN).exists() and (folder / "bundle.yaml").exists():
        return _finished(folder, plan, settings, say)
    plan = shared_plan(plan, processes, rows=len(table), validation_rows=len(validation))
    tables = {"train": table, "validation": validation}
    state = _earlier_state(states, plan, task, tables, say, resume=resume, writes=processes.is_first)
    result = TrainingResult()
    bundle = Bundle(seeded_model(plan), plan, task)
    saver = _Saver(bundle, folder, result, settings, dropped_rows, data, say, writes=processes.is_first)
    _tell_start(bundle, processes, say)
    if not processes.are_several:
        _look_ahead(saver, tables, state, trainer_options or {}, may_change=not plan_stands, predicts=part is None)
    options = {
        "on_best": saver.save_best,
        "on_epoch": lambda entry: say(_epoch_line(entry, plan.validation_metric)),
        "cache_folder": folder / "features",
        "deadline": deadline,
        "trainer_options": _trainer_options(trainer_options or {}, folder, processes, bundle, tables, state),
        "processes": processes,
        "progress_bar": progress_bar,
        "deadline_stands": part is not None,
    }
    rest: dict[str, Any] = {"kept": kept, "part": part, "say": say, "state_seconds": state_seconds}
    rest["options"] = options
    with parting():
        _train_within_memory(bundle, tables, result, states, state, **rest)
        saver.finish()
    return bundle


def _tell_start(bundle: Bundle, processes: Processes, say: Callable[[str], None]) -> None:
    """Say how much trains, and how several processes share it."""
    plan = bundle.plan
    trainable, total = count_parameters(bundle.model)
    say(f"{plan.peft} on {plan.encoder}: {trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
    if processes.are_several:
        images = f"{plan.micro_batch_size} images at a time, {plan.batch_size} together per step"
        say(f"{processes.count} processes train, each on {images}")


def _look_ahead(
    saver: _Saver,
    tables: Mapping[str, MaskTable],
    state: Mapping[str, Any] | None,
    trainer_options: Mapping[str, Any],
    *,
    may_change: bool,
    predicts: bool,
) -> None:
    """Find the micro-batch and say what the fit will take, if it `predicts`; let its peak of memory be counted."""
    bundle, device = saver.bundle, training_device(trainer_options.get("accelerator"))
    if may_change and state is not None:
        bundle.plan, may_change = begun_with(bundle.plan, state["micro_batch_size"]), False
    if predicts and saver.data is not None:
        rest: dict[str, Any] = {"device": device, "model": bundle.model, "may_change": may_change}
        rows = (tables["train"], tables["validation"])
        bundle.plan, saver.forecast = look_ahead(bundle.plan, bundle.task, *rows, largest=saver.data.largest, **rest)
        saver.say(str(saver.forecast))
    saver.peak_of = device if forget_peak(device) else None


def _silent(_: str) -> None:
    """Say nothing: the first process does."""


def _trainer_options(
    asked: Mapping[str, Any],
    folder: Path,
    processes: Processes,
    bundle: Bundle,
    tables: Mapping[str, MaskTable],
    state: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the options of Lightning's trainer; of several processes the first one logs, and all compare notes."""
    options = {"default_root_dir": str(folder), "logger": True, **asked}
    if not processes.are_several:
        return options
    if not processes.is_first:
        options["logger"] = False
    decided = bundle.plan.model_dump(mode="json", exclude=MACHINE_DECIDES - {"micro_batch_size", "checkpointing"})
    facts = {"the plan": json.dumps(decided), "the task": json.dumps(bundle.task.to_dict(), default=str)}
    for name, table in tables.items():
        rows = [row_name(table, row) for row in range(len(table))]
        facts[f"the {name} rows"] = json.dumps(rows)
    facts["the state to go on with"] = "none" if state is None else json.dumps(state["loops"], default=str)
    return options | {"callbacks": [*asked.get("callbacks", []), Agreement(facts)]}


def _tell_experts(folder: Path, usage: Mapping[str, Sequence[int]], say: Callable[[str], None]) -> None:
    if usage:
        say(usage_summary(usage))
    save_expert_usage(folder, usage)


@dataclass
class _Saver:
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
        self.bundle.record = _record(self.result, self.settings, self.dropped_rows) | found
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
            self.say(_last_line(self.result, self.bundle.plan.validation_metric, self.folder))
            if self.forecast is not None:
                self.say(f"it took {compared(self.bundle.record['forecast'])}")
            _tell_experts(self.folder, self.result.expert_usage, self.say)

    def save_best(self, _: Weights) -> None:
        """Write the best so far; a full disk is only told: the weights are in memory too, and saved at the end."""
        try:
            self.save()
        except BundleError as error:
            self.say(f"{error} Training goes on.")


def _earlier_state(
    states: Path,
    plan: Plan,
    task: SegmentationTask,
    tables: Mapping[str, MaskTable],
    say: Callable[[str], None],
    *,
    resume: bool,
    writes: bool,
) -> dict[str, Any] | None:
    """Note what is run, and return the state of an earlier run of the same to go on with, if there is one.

    Where another process `writes`, nothing is noted.

    Raises:
        ConfigError: the earlier run is another one.
        BundleError: the folder cannot be written.
    """
    try:
        known = begin_run(states, plan, task, tables, resume=resume) if writes else resume
    except OSError as error:
        raise BundleError(f"cannot write '{states}' ({error}). Check space and permissions.") from error
    path = newest_state(states, say) if known else None
    if resume:
        say(f"going on with {path}" if path else f"nothing to go on with in '{states}'; the fit begins")
    return None if path is None else read_state(path)


def _train_within_memory(
    bundle: Bundle,
    tables: Mapping[str, MaskTable],
    result: TrainingResult,
    states: Path,
    state: dict[str, Any] | None,
    *,
    kept: DecodedFiles | None,
    part: Part | None,
    say: Callable[[str], None],
    state_seconds: float | None,
    options: Mapping[str, Any],
) -> None:
    """Train the bundle's network; where memory runs out, go on from there with a smaller micro-batch.

    Args:
        bundle: its plan is changed to the one that fitted.
        tables: training and validation rows.
        result: filled in.
        states: folder of the states.
        state: to go on with, or None.
        kept: of the rows, see `fit_bundle`.
        part: see `fit_bundle`.
        say: called with what the user should know.
        state_seconds: see `fit_bundle`.
        options: of `train`.

    Raises:
        TrainingError: not one image at a time fits.
    """
    while True:
        plan = bundle.plan
        if not options["processes"].are_several:  # they would have to choose alike
            _choose_attention(bundle, states, training_device(options["trainer_options"].get("accelerator")), say)
        images = plan.micro_batch_size * options["processes"].count
        keeper = StateKeeper(states, micro_batch_size=images, interval=state_seconds, on_notice=say)
        cache = None if part is None else part.cache
        data = data_module(plan, bundle.task, tables["train"], tables["validation"], kept, cache)
        ends = None if part is None else part.slice(keeper)
        rest = {"result": result, "on_notice": say, "states": keeper, "state": state, "stop_after": ends, **options}
        try:
            train(bundle.model, plan, bundle.task, data, **rest)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if options["processes"].are_several:  # the others are in the middle of the step
                raise TrainingError(
                    f"memory ran out in process {options['processes'].rank} ({error}). Lower env.micro_batch_size, now "
                    f"{plan.micro_batch_size} images per process."
                ) from error
            fewer = smaller(plan, can_recompute=bool(bundle.model.encoder.seams()))
            if fewer is None:
                raise TrainingError(
                    f"not one image at a time fits into memory ({error}). Lower model.input_size, take a smaller "
                    "encoder or a fine-tuning method that trains less of it."
                ) from error
            reason = str(error).splitlines()[0]
        else:
            return
        # Outside of the handler: the error holds on to the tensors of the step.
        say(
            f"memory ran out ({reason}); going on from the same step with micro-batches of {fewer.micro_batch_size}"
            f"{' and recomputed activations' if fewer.checkpointing else ''}"
        )
        bundle.plan = fewer
        state = keeper.rescued
        if state is None:  # not within a step: the last state on disk, or from the beginning
            path = newest_state(states, say)
            state = None if path is None else read_state(path)
        if state is None:
            bundle.model = seeded_model(fewer)
            vars(result).update(vars(TrainingResult()))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _choose_attention(bundle: Bundle, states: Path, device: torch.device, say: Callable[[str], None]) -> None:
    """Give each block the form of attention that is faster here, once for the whole fit, and say which."""
    plan = bundle.plan
    chosen = choose_attention(
        bundle.model.encoder,
        plan.input_size,
        batch=plan.micro_batch_size,
        device=device,
        dtype={"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(plan.precision, torch.float32),
        training=True,
        file=states / ATTENTION,
    )
    if chosen:
        say(chosen)


def _finished(folder: Path, plan: Plan, settings: Mapping[str, Any], say: Callable[[str], None]) -> Bundle:
    """Return the bundle of a fit that was not cut off.

    Raises:
        BundleError: it is damaged.
        ConfigError: it was fitted to another plan, or to other channels of the images.
    """
    bundle = load_bundle(folder)
    check_same_plan(folder, bundle.plan, plan)
    before, now = (each.get("channels") for each in (bundle.record["settings"], settings))
    if (None if before is None else list(before)) != (None if now is None else list(now)):
        raise ConfigError(
            f"the fit in '{folder}' is of the channels {before}, not {now}; give the same channels=, or another path."
        )
    say(f"the fit in '{folder}' is complete; nothing is left to do")
    return bundle


def _epoch_line(entry: Mapping[str, float], metric: str) -> str:
    return (
        f"epoch {entry['epoch']:.0f}: {entry['seconds']:.0f} s, step {entry['step']:.0f}, train loss "
        f"{entry.get('train_loss', math.nan):.4f}, {metric} {entry[metric]:.4f}"
    )


def _last_line(result: TrainingResult, metric: str, folder: Path) -> str:
    return (
        f"stopped by {result.stopped_by}; best {metric} {result.best_score:.4f} in epoch {result.best_epoch}; "
        f"saved in {folder}"
    )


def _record(result: TrainingResult, settings: Mapping[str, Any], dropped_rows: Sequence[str]) -> dict[str, Any]:
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
