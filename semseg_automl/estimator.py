"""`SemanticSegmentor`: the order of steps from a table to a fitted model. The steps live below.

What it does once it is fitted: :mod:`semseg_automl.fitted`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np

from semseg_automl.bundle import load_bundle
from semseg_automl.config import Config, load_config
from semseg_automl.data.colours import Colour, read_color_map
from semseg_automl.data.table import MaskTable, RowCheck, check_rows, split_holdout
from semseg_automl.errors import BundleError, ConfigError
from semseg_automl.fitted import FittedSegmentor, Table
from semseg_automl.fitting import fit_bundle
from semseg_automl.hardware import detect_hardware
from semseg_automl.metrics import build_metrics
from semseg_automl.models.facts import encoder_facts
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import infer_task
from semseg_automl.training import check_trainer_options

KEPT_SETTINGS = ("label", "image", "eval_metric", "validation_metric")
"""Constructor arguments that a saved segmentor remembers."""

MAX_HOLDOUT = 0.2
"""Share of the rows held out at most when none are given: a tenth, but ten rows at least, of small tables."""


class SemanticSegmentor(FittedSegmentor):
    """Fits the best semantic segmenter to a table of images and masks.

    Arguments are AutoGluon MultiModal's, habits scikit-learn's: the constructor only stores.

    Args:
        problem_type: ``semantic_segmentation``; there is no other.
        label: column of the mask paths.
        image: column of the image paths.
        eval_metric: metric or metrics that `evaluate` computes; None for the task's standard set.
        validation_metric: metric that chooses the best epoch; None for ``iou`` (binary) or ``miou``.
        path: folder the segmentor is saved in; None for a new one under ``runs/``.
        presets: name of a file in ``presets/``.
        hyperparameters: settings by dotted or nested key, over the preset.
        num_classes: number of classes, to check the masks against; None infers it.
        class_names: names by value on disk, or in ascending order of values.
        color_map: where masks are coloured, names by colour, ``{"#ff0000" or (255, 0, 0): name}``, or a file of them
            (``classes.csv``, ``labelmap.txt``); None infers the classes. Colours named ``void`` are no class.
        ignore_label: value on disk, or colour, of pixels without a label; None infers it.
        base_dir: folder that relative paths start from; None for the CSV's own, else the current one.
        verbosity: 0 silent, 1 a line per epoch, 2 a progress bar too.
    """

    def __init__(
        self,
        problem_type: str = "semantic_segmentation",
        *,
        label: str = "label",
        image: str = "image",
        eval_metric: str | Sequence[str] | None = None,
        validation_metric: str | None = None,
        path: str | PathLike[str] | None = None,
        presets: str = "fast",
        hyperparameters: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        color_map: Mapping[Any, str] | str | PathLike[str] | None = None,
        ignore_label: int | Colour | None = None,
        base_dir: str | PathLike[str] | None = None,
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
        seed: int = 0,
        dry_run: bool = False,
        **trainer_options: Any,
    ) -> Self:
        """Fit to a table of images and masks and save the result in `path_`.

        Args:
            train_data: table, or CSV file, with an image and a label column.
            tuning_data: validation rows; None holds some of `train_data` out.
            time_limit: seconds for everything; the learning rate falls so that it ends there.
            presets: instead of the constructor's.
            hyperparameters: over the constructor's.
            holdout_frac: share of the rows to hold out without `tuning_data`.
            seed: of weights, order and augmentation.
            dry_run: decide everything, set `task_` and `plan_`, and train nothing.
            **trainer_options: passed to Lightning's Trainer by name: callbacks, logger, accelerator, devices, ...

        Raises:
            DataError: rows cannot be used; all of them are named, before anything is trained.
            ConfigError: a setting is unknown, out of range or excluded by another.
            CheckpointError: the checkpoint cannot be read.
            TrainingError: the loss is no longer finite.
            KeyboardInterrupt: after Ctrl-C; the best state so far is saved and fitted.
        """
        start = time.monotonic()
        settings = check_trainer_options(trainer_options)
        config = self._config(presets, hyperparameters, holdout_frac, settings)
        table = self._read(train_data)
        checks = check_rows(table)
        if tuning_data is None:
            asked = config.data.holdout_frac
            frac = min(MAX_HOLDOUT, max(0.1, 10 / len(table))) if asked == "auto" else asked
            fit_table, validation = split_holdout(table, checks, frac=frac, seed=seed)
        else:
            fit_table = table
            validation = self._read(tuning_data)
            checks = [*checks, *check_rows(validation)]
        self.task_ = infer_task(
            [check.value_counts for check in checks],
            encodings=[check.encoding for check in checks],
            num_classes=self.num_classes,
            class_names=self.class_names,
            color_map=None if self.color_map is None else read_color_map(self.color_map),
            ignore_label=self.ignore_label,
        )
        self.plan_ = self._plan(config, checks, rows=len(fit_table), seed=seed, time_limit=time_limit)
        self.classes_ = np.asarray(self.task_.labels)
        self._say(f"{self.task_}\n{self.plan_}" if dry_run else str(self.task_))
        if not dry_run:
            deadline = None if time_limit is None else start + time_limit
            self._train(fit_table, validation, deadline, settings)
        return self

    def _config(
        self,
        presets: str | None,
        hyperparameters: Mapping[str, Any] | None,
        holdout_frac: float | None,
        settings: dict[str, Any],
    ) -> Config:
        """Lay the arguments over the preset; `settings` loses the trainer options that a plan decides."""
        if self.problem_type != "semantic_segmentation":
            raise ConfigError(f"problem_type is '{self.problem_type}'; allowed: semantic_segmentation.")
        extra: dict[str, Any] = {} if holdout_frac is None else {"data.holdout_frac": holdout_frac}
        planned = {
            "max_epochs": "optim.max_epochs",
            "precision": "env.precision",
            "gradient_clip_val": "optim.gradient_clip",
        }
        for option, key in planned.items():
            if option in settings:
                extra[key] = settings.pop(option)
        return load_config(presets or self.presets, self.hyperparameters, hyperparameters, extra)

    def _plan(
        self, config: Config, checks: Sequence[RowCheck], *, rows: int, seed: int, time_limit: float | None
    ) -> Plan:
        """Collect what the plan depends on, and make it."""
        stats = DataStats(rows=rows, sizes=tuple(check.size for check in checks))
        asked = config.model
        encoder = encoder_facts(
            asked.encoder,
            checkpoint=asked.checkpoint,
            pretrained=asked.pretrained,
            accept_license=asked.accept_license,
            window_size=asked.window_size,
        )
        only_metric = self.eval_metric if isinstance(self.eval_metric, str) else None
        plan = make_plan(
            config,
            self.task_,
            stats,
            detect_hardware(),
            encoder,
            validation_metric=self.validation_metric or only_metric,
            seed=seed,
            time_limit=time_limit,
        )
        names = list(dict.fromkeys([plan.validation_metric, *self._metric_names(None)]))
        build_metrics(names, kind=self.task_.kind, num_classes=self.task_.num_classes)  # errors now, not after training
        return plan

    def _train(self, table: MaskTable, validation: MaskTable, deadline: float | None, settings: dict[str, Any]) -> None:
        """Fit the plan, keep the best weights in memory and on disk."""
        stamped = Path("runs") / f"segmentor-{datetime.now():%Y%m%d-%H%M%S}"
        self.path_ = Path(self.path) if self.path is not None else stamped
        bundle = fit_bundle(
            self.plan_,
            self.task_,
            table,
            validation,
            self.path_,
            settings={key: getattr(self, key) for key in KEPT_SETTINGS},
            say=self._say,
            deadline=deadline,
            trainer_options=settings,
            progress_bar=self.verbosity >= 2,
        )
        self._adopt(bundle)
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
