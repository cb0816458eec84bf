"""`SemanticSegmentor`: the order of steps from a table to a fitted model and back to masks. The steps live below."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from torch import Tensor

from semseg_automl.build import build_method
from semseg_automl.bundle import AdapterFormat, Bundle, load_bundle, save_bundle, write_adapter
from semseg_automl.config import Config, load_config
from semseg_automl.data.colours import Colour, read_color_map
from semseg_automl.data.images import ImageSource
from semseg_automl.data.table import MaskTable, RowCheck, check_rows, read_images, read_table, split_holdout
from semseg_automl.errors import BundleError, ConfigError, SemsegError
from semseg_automl.evaluation import evaluate_table, save_masks
from semseg_automl.fitting import fit_bundle
from semseg_automl.hardware import detect_hardware
from semseg_automl.inference import FailedPrediction, OnError, Predictor
from semseg_automl.metrics import DEFAULT_METRICS, MetricChoice, SegmentationMetric, build_metrics
from semseg_automl.models.facts import encoder_facts
from semseg_automl.models.segmentation_model import hard_labels
from semseg_automl.peft import count_parameters
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import SegmentationTask, infer_task
from semseg_automl.training import check_trainer_options

Table = pd.DataFrame | str | PathLike[str]
Metrics = MetricChoice | Sequence[MetricChoice]
Images = Table | ImageSource | Sequence[ImageSource]

KEPT_SETTINGS = ("label", "image", "eval_metric", "validation_metric")
"""Constructor arguments that a saved segmentor remembers."""

MAX_HOLDOUT = 0.2
"""Share of the rows held out at most when none are given: a tenth, but ten rows at least, of small tables."""


class NotFittedError(SemsegError, SklearnNotFittedError):  # type: ignore[misc]
    """A method that needs a fitted segmentor was called before ``fit`` or ``load``."""


class SemanticSegmentor(BaseEstimator):  # type: ignore[misc]
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

    task_: SegmentationTask
    """What the masks hold, inferred."""
    plan_: Plan
    """Every decision of the fit, with its reason."""
    classes_: NDArray[Any]
    """Values of the classes as they are in the masks: numbers, or colours as ``#rrggbb``."""
    history_: pd.DataFrame
    """One row per validation: epoch, step, seconds, lr, train_loss, the validation metric."""
    path_: Path
    """Folder of the saved segmentor."""
    threshold_: float
    """Foreground probability above which a pixel is foreground (binary)."""

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

    def _adopt(self, bundle: Bundle) -> None:
        """Set the fitted attributes from a bundle."""
        self.task_, self.plan_ = bundle.task, bundle.plan
        self.classes_ = np.asarray(bundle.task.labels)
        self.threshold_ = float(bundle.record["threshold"])
        self.history_ = pd.DataFrame(bundle.record["history"])
        device = torch.device(detect_hardware().device)
        self._bundle = bundle
        self._predictor = Predictor(
            bundle.model.eval().to(device), bundle.plan.input_size, bundle.plan.micro_batch_size, device
        )

    def evaluate(
        self, data: Table, metrics: Metrics | None = None, *, return_per_image: bool = False, intervals: bool = False
    ) -> Any:
        """Score the segmentor on labelled images, at each image's own resolution, one image at a time.

        Args:
            data: table, or CSV file, with an image and a label column.
            metrics: names, or `SegmentationMetric` objects; None for the constructor's, else the task's standard set.
            return_per_image: return a DataFrame of each image's own figures, with the table's index, instead.
            intervals: return a DataFrame of each figure's ``value``, ``low`` and ``high``, a 95 % bootstrap interval.

        Returns:
            Values by name; a metric with one value per class gives ``name[class]`` for each. NaN where undefined.

        Raises:
            DataError: rows cannot be used, or a mask holds a value that was unknown when fitting.
            ConfigError: a metric is unknown or of the other kind of task, or both tables are asked for.
        """
        predictor, table = self._fitted(), self._read(data)
        chosen = self._metric_names(metrics)
        forms = {"return_per_image": return_per_image, "intervals": intervals}
        return evaluate_table(predictor, table, self.task_, metrics=chosen, threshold=self.threshold_, **forms)

    def predict(
        self,
        data: Images,
        *,
        save_to: str | PathLike[str] | None = None,
        on_error: OnError = "raise",
    ) -> Any:
        """Predict masks in the values of the training masks, at each image's own size.

        Args:
            data: table or CSV file with an image column, a folder, a list of paths, arrays or PIL images, or one image.
            save_to: folder for one PNG per row; memory does not grow with the number of images.
            on_error: ``raise`` stops at an image that cannot be read; ``report`` puts a `FailedPrediction` in its place
                (with `save_to`: no path, and the reason in the column ``error``).

        Returns:
            One array ``(H, W)``, RGB ``(H, W, 3)`` where the training masks are coloured, for one image; a list of
            them, in the order of the rows, otherwise; with `save_to` a DataFrame with the table's own index and the
            columns ``image``, ``mask`` and ``error``.
        """
        table, single = self._images(data)
        masks = (
            scores if isinstance(scores, FailedPrediction) else self._decode(scores)
            for scores in self._fitted().scores(table, on_error=on_error)
        )
        if save_to is not None:
            rows = save_masks(table, masks, Path(save_to), palette=self.task_.palette)
            return pd.DataFrame(rows, index=table.index, columns=["image", "mask", "error"])
        return next(masks) if single else list(masks)

    def predict_proba(self, data: Images, *, on_error: OnError = "raise") -> Any:
        """Predict class scores, at each image's own size.

        Args:
            data: as for `predict`.
            on_error: as for `predict`.

        Returns:
            For one image: the foreground probability ``(H, W)``, or class scores ``(K, H, W)`` in the order of
            `classes_`; a list of them, in the order of the rows, otherwise. Float32.
        """
        table, single = self._images(data)
        binary = self.task_.kind == "binary"
        scores: Iterator[Any] = (
            s if isinstance(s, FailedPrediction) else (s[0] if binary else s).numpy()
            for s in self._fitted().scores(table, on_error=on_error)
        )
        return next(scores) if single else list(scores)

    def fit_summary(self) -> dict[str, Any]:
        """Return what was fitted: task, method, parameters, best score, history, experts, where it is saved."""
        self._fitted()
        trainable, total = count_parameters(self._bundle.model)
        record = self._bundle.record
        return {
            "problem_type": self.problem_type,
            "kind": self.task_.kind,
            "classes": dict(zip(self.task_.labels, self.task_.class_names, strict=True)),
            "encoder": self.plan_.encoder,
            "peft": self.plan_.peft,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "validation_metric": self.plan_.validation_metric,
            **{key: record[key] for key in ("best_score", "best_epoch", "stopped_by")},
            "seconds": record["history"][-1]["seconds"] if record["history"] else math.nan,
            "path": str(self.path_),
            "expert_usage": record.get("expert_usage", {}),  # bundles of before it was counted have none
            "history": record["history"],
        }

    def save(self, path: str | PathLike[str]) -> Path:
        """Save the fitted segmentor in another folder and return it.

        Raises:
            BundleError: the folder cannot be written.
        """
        self._fitted()
        save_bundle(Path(path), self._bundle)
        return Path(path)

    def merge(self) -> Self:
        """Fold what the fine-tuning method learned into the encoder's own weights: the same masks, nothing to add.

        Works for methods whose correction is linear (lora, ssf) or that train the weights themselves. `save` writes
        the merged segmentor; the folder that `fit` wrote stays as it is.

        Raises:
            UnsupportedCombination: the method cannot be folded; the message says why.
        """
        self._fitted()
        if not self.plan_.merged:
            build_method(self.plan_.peft, self.plan_.peft_options).merge(self._bundle.model.encoder)
            self.plan_ = self._bundle.plan = self.plan_.model_copy(update={"merged": True})
        return self

    def export_adapter(self, path: str | PathLike[str], *, format: AdapterFormat = "autogluon") -> Path:
        """Write the trained adapter for other software.

        Args:
            path: a safetensors file for ``autogluon`` (adapters and mask decoder, named as AutoGluon MultiModal names
                them), a folder for ``peft`` (plain LoRA as Hugging Face PEFT keeps it).
            format: ``autogluon`` or ``peft``.

        Raises:
            ConfigError: the format is unknown.
            UnsupportedCombination: the format cannot hold this method; one that can is named.
            BundleError, CheckpointError: the file or folder cannot be written.
        """
        self._fitted()
        write_adapter(Path(path), self._bundle.model, format=format)
        return Path(path)

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

    def __sklearn_is_fitted__(self) -> bool:
        """Tell scikit-learn whether `fit` or `load` has run."""
        return hasattr(self, "_predictor")

    def _fitted(self) -> Predictor:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError("this SemanticSegmentor is not fitted. Call fit, or SemanticSegmentor.load(path).")
        return self._predictor

    def _metric_names(self, asked: Metrics | None) -> list[MetricChoice]:
        chosen = asked if asked is not None else self.eval_metric or DEFAULT_METRICS[self.task_.kind]
        return [chosen] if isinstance(chosen, str | SegmentationMetric) else list(chosen)

    def _read(self, data: Table) -> MaskTable:
        return read_table(data, image_column=self.image, label_column=self.label, base_dir=self.base_dir)

    def _images(self, data: Images) -> tuple[MaskTable, bool]:
        """Read the images to predict; also say whether it is one image, not a list of them."""
        self._fitted()
        table = read_images(data, image_column=self.image, base_dir=self.base_dir)
        listed = isinstance(data, pd.DataFrame | list | tuple)
        is_file = isinstance(data, str | PathLike) and (Path(data).is_dir() or Path(data).suffix.lower() == ".csv")
        return table, not listed and not is_file

    def _decode(self, scores: Tensor) -> NDArray[Any]:
        return self.task_.decode(hard_labels(scores, self.threshold_).numpy())

    def _say(self, text: str) -> None:
        if self.verbosity >= 1:
            print(text, flush=True)
