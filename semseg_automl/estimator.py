"""`SemanticSegmentor`: the order of steps from a table to a fitted model. The steps live below.

What it does once it is fitted: :mod:`semseg_automl.fitted`, :mod:`semseg_automl.judging`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from semseg_automl.bundle import load_bundle, read_plan
from semseg_automl.capacity import images_room
from semseg_automl.choosing import AUTO
from semseg_automl.config import Config
from semseg_automl.data.annotated import check_names
from semseg_automl.data.checks import RowCheck, check_rows, usable_rows
from semseg_automl.data.colours import Colour, read_color_map
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.splits import check_groups_apart, split_holdout
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import BundleError, ConfigError, check_known
from semseg_automl.fingerprint import Fingerprint, fingerprint
from semseg_automl.fitted import Table
from semseg_automl.fitting import fit_bundle
from semseg_automl.forecast import look_ahead
from semseg_automl.hardware import Hardware, detect_hardware, training_device
from semseg_automl.judging import JudgedSegmentor
from semseg_automl.plan import Plan
from semseg_automl.planning import PLANNED, Chosen, Planning, check_plan, choose_settings, planned_choices
from semseg_automl.processes import ALONE
from semseg_automl.report_page import seconds_of_fit, write_fit_report
from semseg_automl.searching import Search, check_search, tune_settings
from semseg_automl.task import SegmentationTask, infer_task
from semseg_automl.trainer_options import trainer_processes

KEPT_SETTINGS = ("label", "image", "eval_metric", "validation_metric", "channels")
"""Constructor arguments that a saved segmentor remembers."""

MAX_HOLDOUT = 0.2
"""Share of the rows held out at most when none are given: a tenth, but ten rows at least, of small tables."""


class SemanticSegmentor(JudgedSegmentor):
    """Fits the best semantic segmenter to a table of images and masks.

    Arguments are AutoGluon MultiModal's, habits scikit-learn's: the constructor only stores.

    Args:
        problem_type: ``semantic_segmentation``; there is no other.
        label: column of the mask paths.
        image: column of the image paths.
        eval_metric: metric or metrics that `evaluate` computes; None for the task's standard set.
        validation_metric: metric that chooses the best epoch; None for ``iou`` (binary) or ``miou``.
        path: folder the segmentor is saved in; None for a new one under ``runs/``.
        presets: name of a file in ``presets/``; ``auto`` chooses by the machine and the weights at hand, and says why.
        hyperparameters: settings by dotted or nested key, over the preset.
        num_classes: number of classes, to check the masks against; None infers it.
        class_names: names by value on disk, or in ascending order of values.
        color_map: where masks are coloured, names by colour, ``{"#ff0000" or (255, 0, 0): name}``, or a file of them
            (``classes.csv``, ``labelmap.txt``); None infers the classes. Colours named ``void`` are no class.
        ignore_label: value on disk, or colour, of pixels without a label; None infers it.
        base_dir: folder that relative paths start from; None for the CSV's own, else the current one.
        channels: which channels of the images, counted from 0, are red, green and blue, or the one that is grey; needed
            where TIFF or ``.npy`` files have more than four. The saved segmentor reads the same ones.
        verbosity: 0 silent, 1 a line per epoch, 2 a progress bar too.
    """

    _processes = ALONE  # that the last fit trained with

    def __init__(
        self,
        problem_type: str = "semantic_segmentation",
        *,
        label: str = "label",
        image: str = "image",
        eval_metric: str | Sequence[str] | None = None,
        validation_metric: str | None = None,
        path: str | PathLike[str] | None = None,
        presets: str = AUTO,
        hyperparameters: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        color_map: Mapping[Any, str] | str | PathLike[str] | None = None,
        ignore_label: int | Colour | None = None,
        base_dir: str | PathLike[str] | None = None,
        channels: Sequence[int] | None = None,
        verbosity: int = 2,
    ) -> None:
        self.problem_type = problem_type
        self.label = label
        self.image = image
        self.eval_metric = eval_metric
        self.validation_metric = validation_metric
        self.path = path
        self.presets = presets
        self.hyperparameters = hyperparameters
        self.num_classes = num_classes
        self.class_names = class_names
        self.color_map = color_map
        self.ignore_label = ignore_label
        self.base_dir = base_dir
        self.channels = channels
        self.verbosity = verbosity

    def fit(
        self,
        train_data: Table,
        tuning_data: Table | None = None,
        *,
        time_limit: float | None = None,
        presets: str | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        holdout_frac: float | None = None,
        groups: str | None = None,
        seed: int = 0,
        plan: Plan | str | PathLike[str] | None = None,
        resume: bool = False,
        on_bad_rows: Literal["raise", "drop"] = "raise",
        hyperparameter_tune_kwargs: str | Mapping[str, Any] | None = None,
        dry_run: bool = False,
        **trainer_options: Any,
    ) -> Self:
        """Fit to a table of images and masks and save the result in `path_`.

        Args:
            train_data: table, or CSV file, with an image and a label column; or annotations, as for
                `read_annotations`, of which the part ``train`` is read. Do not change files while it fits.
            tuning_data: validation rows, of annotations the part ``val``; None holds some of `train_data` out.
            time_limit: seconds for everything; the learning rate falls so that it ends there.
            presets: instead of the constructor's.
            hyperparameters: over the constructor's.
            holdout_frac: share of the rows to hold out without `tuning_data`.
            groups: column that names the group of each row, such as the patient; none is both trained and validated on.
            seed: of weights, order and augmentation.
            plan: to run again, or the ``plan.yaml`` of a fit, perhaps edited; instead of presets, hyperparameters,
                seed, time limit, epochs and precision, which it holds.
            resume: go on with the fit of the same plan and data that was cut off in the constructor's `path`, if there
                is one; without a time limit, and on one processor type, to the very weights it would have had.
            on_bad_rows: "drop" leaves out rows whose files cannot be used, and names each of them.
            hyperparameter_tune_kwargs: race configurations, and fit the best to the end; "auto", or a mapping such as
                ``{"num_trials": 6}`` (`semseg_automl.searching.tune_settings`). `leaderboard` lists them then.
            dry_run: decide everything, set `task_`, `plan_` and `forecast_`, and train nothing.
            **trainer_options: passed to Lightning's Trainer by name: callbacks, accelerator, devices, ... `logger` is
                ``tensorboard`` (the default, into the folder's ``logs``), ``mlflow``, ``wandb``, ``csv``, a logger of
                Lightning's, a list of these, or False for none.

        Raises:
            DataError: rows cannot be used; all of them are named, before anything is trained.
            ConfigError: a setting is unknown, out of range or excluded by another.
            CheckpointError: the checkpoint cannot be read.
            TrainingError: the loss is no longer finite.
            KeyboardInterrupt: after Ctrl-C; the best state so far is saved and fitted.
        """
        start = time.monotonic()
        settings = self._arranged(trainer_options, resume)
        given = plan if plan is None or isinstance(plan, Plan) else read_plan(Path(plan))
        tuned = tune_settings(hyperparameter_tune_kwargs)
        if given is not None:
            asked = [presets, hyperparameters, self.hyperparameters, tuned, *map(settings.get, PLANNED)]
            seed, time_limit = planned_choices(given, [seed, time_limit, *asked])
        chosen = self._chosen(presets, [hyperparameters, tuned], holdout_frac, settings)
        config, hardware = chosen.config, detect_hardware()  # before anything is kept, which would count as used
        kept = DecodedFiles(0 if dry_run else _room(config, given, hardware))
        table, validation, checks = self._tables(train_data, tuning_data, groups, on_bad_rows, config, seed, kept)
        planning = self._planning(table, checks, hardware, seed=seed, time_limit=time_limit)
        race = self._decide(given, planning, chosen)
        data = fingerprint(self.task_, checks, validation_rows=len(validation))
        if dry_run:
            self._foretell(table, validation, data, settings, may_change=given is None)
            return self
        deadline = None if time_limit is None else start + time_limit
        seconds, stands = config.env.state_seconds, given is not None
        self._train(table, validation, data, kept, deadline, settings, resume, seconds, race, stands)
        return self

    def _decide(
        self, given: Plan | None, planning: Planning, chosen: Chosen
    ) -> tuple[Planning, Chosen] | None:
        """Set the plan, and say what it is for; return what a search needs, if there is to be one."""
        if given is None:
            self.plan_ = planning.plan(chosen)
        else:
            check_plan(given, self.task_)
            self.plan_ = given
        self.classes_ = np.asarray(self.task_.labels)
        self._say(str(self.task_))
        if given is not None or not chosen.config.search.candidates:
            return None
        check_search(planning, chosen, self.plan_, self._processes, self._say)
        return planning, chosen

    def _arranged(self, options: dict[str, Any], resume: bool) -> dict[str, Any]:
        """Check options of Lightning's trainer, and find out which of how many processes this is.

        Raises:
            ConfigError: an option is unknown or cannot work, or a path is needed and not given.
        """
        self._processes, settings = trainer_processes(options)
        if resume and self.path is None:
            raise ConfigError("resume=True needs the folder of the fit to go on with: SemanticSegmentor(path=...).")
        if self._processes.are_several and self.path is None:
            raise ConfigError("several processes need one folder to fit into: SemanticSegmentor(path=...).")
        return settings

    def _say(self, text: str) -> None:
        """Say it once, not once per process."""
        if self._processes.is_first:
            super()._say(text)

    def _tables(
        self,
        train_data: Table,
        tuning_data: Table | None,
        groups: str | None,
        on_bad_rows: str,
        config: Config,
        seed: int,
        kept: DecodedFiles,
    ) -> tuple[MaskTable, MaskTable, list[RowCheck]]:
        """Read and check training and validation rows, and infer the task on the way; also return what was found."""
        self.dropped_rows_: list[str] = []
        table, checks = self._checked(self._read(train_data, groups, split=("train",), known={}), on_bad_rows, kept)
        if tuning_data is None:
            self.task_ = self._infer(table, checks)
            asked = config.data.holdout_frac
            frac = min(MAX_HOLDOUT, max(0.1, 10 / len(table))) if asked == "auto" else asked
            return *split_holdout(table, checks, frac=frac, seed=seed, task=self.task_), checks
        held = self._read(tuning_data, groups, split=("val",), known=table.class_names)
        validation, more = self._checked(held, on_bad_rows, kept)
        check_groups_apart(table, validation)
        self.task_ = self._infer(table, [*checks, *more])
        return table, validation, [*checks, *more]

    def _infer(self, table: MaskTable, checks: Sequence[RowCheck]) -> SegmentationTask:
        """Infer the task; the class names of annotations count where the constructor has none."""
        names, notes = self.class_names, table.notes
        if names is None and self.color_map is None and table.class_names:
            names = {value: name for value, name in table.class_names.items() if value != self.ignore_label}
            notes = (*notes, "the class names are those of the annotations")
        task = infer_task(
            [check.value_counts for check in checks],
            encodings=[check.encoding for check in checks],
            num_classes=self.num_classes,
            class_names=names,
            color_map=None if self.color_map is None else read_color_map(self.color_map),
            ignore_label=self.ignore_label,
        )
        if self.class_names is not None:
            given = dict(zip(task.values, task.class_names, strict=True))
            same = {value: name for value, name in table.class_names.items() if name in task.class_names}
            check_names(given, same, "the training table")
        return replace(task, reasons=(*task.reasons, *notes))

    def _checked(
        self, table: MaskTable, on_bad_rows: str, kept: DecodedFiles
    ) -> tuple[MaskTable, list[RowCheck]]:
        """Check every row; those that cannot be used are an error, or left out, named and remembered."""
        check_known("on_bad_rows", on_bad_rows, ["raise", "drop"])
        if on_bad_rows == "raise":
            return table, check_rows(table, keep=kept, widths=True)
        usable, checks, dropped = usable_rows(table, keep=kept, widths=True)
        if dropped:
            self._say("\n- ".join([f"{len(dropped)} of {len(table)} rows cannot be used and are left out:", *dropped]))
        self.dropped_rows_ += dropped
        return usable, checks

    def _chosen(
        self,
        presets: str | None,
        hyperparameters: Sequence[Mapping[str, Any] | None],
        holdout_frac: float | None,
        settings: dict[str, Any],
    ) -> Chosen:
        """Lay the arguments over the preset; `settings` loses what a plan decides.

        Raises:
            ConfigError: a setting, or the problem type, is unknown.
        """
        if self.problem_type != "semantic_segmentation":
            raise ConfigError(f"problem_type is '{self.problem_type}'; allowed: semantic_segmentation.")
        held_out = {} if holdout_frac is None else {"data.holdout_frac": holdout_frac}
        return choose_settings(presets or self.presets, [self.hyperparameters, *hyperparameters, held_out], settings)

    def _planning(
        self,
        table: MaskTable,
        checks: Sequence[RowCheck],
        hardware: Hardware,
        *,
        seed: int,
        time_limit: float | None,
    ) -> Planning:
        """Collect what a plan depends on."""
        only_metric = self.eval_metric if isinstance(self.eval_metric, str) else None
        return Planning(
            task=self.task_,
            table=table,
            checks=checks,
            hardware=hardware,
            metrics=self._metric_names(None),
            validation_metric=self.validation_metric or only_metric,
            seed=seed,
            time_limit=time_limit,
        )

    def _foretell(
        self,
        table: MaskTable,
        validation: MaskTable,
        data: Fingerprint,
        settings: Mapping[str, Any],
        *,
        may_change: bool,
    ) -> None:
        """Say the plan and, of one process, what the fit will take."""
        said: list[object] = [self.plan_]
        if not self._processes.are_several:
            rest: dict[str, Any] = {"largest": data.largest, "device": training_device(settings.get("accelerator"))}
            tables = (table, validation)
            self.plan_, self.forecast_ = look_ahead(self.plan_, self.task_, *tables, may_change=may_change, **rest)
            said = [self.plan_, self.forecast_]
        self._say("\n".join(map(str, said)))

    def _train(
        self,
        table: MaskTable,
        validation: MaskTable,
        data: Fingerprint,
        kept: DecodedFiles,
        deadline: float | None,
        settings: dict[str, Any],
        resume: bool,
        state_seconds: Literal["auto"] | float,
        race: tuple[Planning, Chosen] | None,
        stands: bool,
    ) -> None:
        """Fit the plan, or what a race beside it finds, keep the best weights in memory and on disk, and report."""
        reporting = seconds_of_fit(self.plan_.time_limit)
        stamped = Path("runs") / f"segmentor-{datetime.now():%Y%m%d-%H%M%S}"
        self.path_ = Path(self.path) if self.path is not None else stamped
        options: dict[str, Any] = {
            "settings": {key: getattr(self, key) for key in KEPT_SETTINGS},
            "dropped_rows": self.dropped_rows_,
            "data": data,
            "kept": kept,
            "state_seconds": None if state_seconds == "auto" else state_seconds,
            "trainer_options": settings,
            "progress_bar": self.verbosity >= 2,
        }
        end = None if deadline is None else deadline - reporting
        if race is None:
            rest: dict[str, Any] = {"processes": self._processes, "deadline": end, "say": self._say, "resume": resume}
            rest["plan_stands"] = stands
            bundle = fit_bundle(self.plan_, self.task_, table, validation, self.path_, **options, **rest)
        else:
            bundle = Search(*race, self.plan_, validation, self.path_, self._say, options, end, resume).run()
        self._adopt(bundle)
        left = reporting if deadline is None else min(reporting, max(0.0, deadline - time.monotonic()))
        if self._processes.is_first:
            write_fit_report(self.path_, bundle, self._predictor, validation, self._metric_names(None), left)
        if bundle.record["stopped_by"] == "interrupt":
            raise KeyboardInterrupt("fit was interrupted; the best state so far is fitted and saved")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Load a segmentor that `fit` or `save` wrote; needs neither the network nor the original checkpoint.

        Raises:
            BundleError: the folder is no saved segmentor, or is damaged.
        """
        bundle = load_bundle(Path(path))
        settings = bundle.record.get("settings")
        if not isinstance(settings, dict) or not set(settings) <= set(KEPT_SETTINGS):
            raise BundleError(f"'{path}' is damaged: bundle.yaml holds no settings. Save or fit again.")
        segmentor = cls(path=path, **settings)
        segmentor.path_ = Path(path)
        segmentor._adopt(bundle)
        return segmentor


def _room(config: Config, given: Plan | None, hardware: Hardware) -> int:
    """Return the bytes that decoded images may take: as the given plan has it, or as one will be made."""
    return images_room(config.env.image_cache, hardware) if given is None else given.image_cache
