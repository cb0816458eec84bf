"""From a plan and its tables to a saved bundle: build, train, keep the best weights on disk as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from semseg_automl.build import seeded_model
from semseg_automl.bundle import Bundle, load_bundle
from semseg_automl.callbacks import TrainingResult
from semseg_automl.data.cache import ImageCache
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import BundleError, ConfigError, TrainingError
from semseg_automl.fingerprint import Fingerprint
from semseg_automl.forecast import look_ahead
from semseg_automl.hardware import training_device
from semseg_automl.memory import begun_with, is_out_of_memory, shared_plan, smaller
from semseg_automl.meters import forget_peak
from semseg_automl.models.attention_choice import choose_attention
from semseg_automl.peft import count_parameters
from semseg_automl.plan import Plan
from semseg_automl.processes import ALONE, Agreement, Processes, parting
from semseg_automl.rehearsal import AUTOCAST
from semseg_automl.resume import (
    FOLDER,
    MACHINE_DECIDES,
    RUN,
    StateKeeper,
    begin_run,
    check_same_plan,
    newest_state,
    read_state,
    row_name,
)
from semseg_automl.saving import Saver
from semseg_automl.slices import Slice
from semseg_automl.task import SegmentationTask
from semseg_automl.training import Course, data_module, train

ATTENTION = "attention.json"
"""Beside the states of a fit: a fit that goes on must compute as it began."""


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
    bundle = Bundle(seeded_model(plan), plan, task)
    saver = Saver(bundle, folder, TrainingResult(), settings, dropped_rows, data, say, writes=processes.is_first)
    _tell_start(bundle, processes, say)
    asked = trainer_options or {}
    if not processes.are_several:
        _look_ahead(saver, tables, kept, state, asked, may_change=not plan_stands, predicts=part is None)
    options = {"cache_folder": folder / "features", "processes": processes, "progress_bar": progress_bar}
    options["trainer_options"] = _trainer_options(asked, folder, processes, bundle, tables, state)
    course = Course(state=state, deadline=deadline, deadline_stands=part is not None)
    with parting():
        _train_within_memory(saver, tables, course, kept, part, state_seconds, options)
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
    saver: Saver,
    tables: Mapping[str, MaskTable],
    kept: DecodedFiles | None,
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
        _choose_attention(bundle, saver.folder / FOLDER, device, _silent)  # said when training begins
        rest: dict[str, Any] = {"device": device, "model": bundle.model, "may_change": may_change}
        rows = (tables["train"] if kept is None else kept.shown_in(tables["train"]), tables["validation"])
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
    saver: Saver,
    tables: Mapping[str, MaskTable],
    course: Course,
    kept: DecodedFiles | None,
    part: Part | None,
    state_seconds: float | None,
    options: Mapping[str, Any],
) -> None:
    """Train the bundle's network; where memory runs out, go on from there with a smaller micro-batch.

    Args:
        saver: of the bundle, whose plan is changed to the one that fitted.
        tables: training and validation rows.
        course: when training begins and ends.
        kept: of the rows, see `fit_bundle`.
        part: see `fit_bundle`.
        state_seconds: see `fit_bundle`.
        options: of `train`.

    Raises:
        TrainingError: not one image at a time fits.
    """
    bundle, say, states = saver.bundle, saver.say, saver.folder / FOLDER
    while True:
        plan = bundle.plan
        if not options["processes"].are_several:  # they would have to choose alike
            _choose_attention(bundle, states, training_device(options["trainer_options"].get("accelerator")), say)
        images = plan.micro_batch_size * options["processes"].count
        keeper = StateKeeper(states, micro_batch_size=images, interval=state_seconds, on_notice=say)
        cache = None if part is None else part.cache
        data = data_module(plan, bundle.task, tables["train"], tables["validation"], kept, cache)
        course = replace(course, states=keeper, stop_after=None if part is None else part.slice(keeper))
        try:
            train(bundle.model, plan, bundle.task, data, course=course, **saver.hearing, **options)
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
        course = replace(course, state=keeper.rescued or _last_state(states, say))
        if course.state is None:
            bundle.model = seeded_model(fewer)
            vars(saver.result).update(vars(TrainingResult()))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _last_state(states: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the last state on disk, for memory that ran out not within a step; None: from the beginning."""
    path = newest_state(states, say)
    return None if path is None else read_state(path)


def _choose_attention(bundle: Bundle, states: Path, device: torch.device, say: Callable[[str], None]) -> None:
    """Give each block the form of attention that is faster here, once for the whole fit, and say which."""
    plan = bundle.plan
    chosen = choose_attention(
        bundle.model.encoder,
        plan.input_size,
        batch=plan.micro_batch_size,
        device=device,
        dtype=AUTOCAST.get(plan.precision, torch.float32),
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
