"""What a fitted segmentor does: evaluate, predict, merge, export, save. How it is fitted: the estimator.

The steps live below; here is their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL.Image import Image as PillowImage
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError as SklearnNotFittedError

from semseg_automl.build import build_method
from semseg_automl.bundle import AdapterFormat, Bundle, save_bundle, write_adapter
from semseg_automl.calibration import check_temperature
from semseg_automl.data.annotations import are_annotations
from semseg_automl.data.channels import as_channels
from semseg_automl.data.checks import check_rows
from semseg_automl.data.images import ImageSource
from semseg_automl.data.table import MaskTable, read_frame, read_images, read_table, stream_images
from semseg_automl.errors import BundleError, ConfigError, SemsegError
from semseg_automl.evaluation import check_values, evaluate_table, predictor_of
from semseg_automl.forecast import Forecast
from semseg_automl.inference import FailedPrediction, MetricSize, OnError, Predictor
from semseg_automl.metrics import DEFAULT_METRICS, MetricChoice, SegmentationMetric
from semseg_automl.peft import count_parameters
from semseg_automl.plan import Plan
from semseg_automl.report_page import Judging, write_report
from semseg_automl.sinks import SaveFormat, save_predictions
from semseg_automl.strata import check_stratum
from semseg_automl.task import SegmentationTask

Table = pd.DataFrame | str | PathLike[str]
Metrics = MetricChoice | Sequence[MetricChoice]
Images = Table | ImageSource | Sequence[ImageSource]


class NotFittedError(SemsegError, SklearnNotFittedError):  # type: ignore[misc]
    """A method that needs a fitted segmentor was called before ``fit`` or ``load``."""


class FittedSegmentor(BaseEstimator):  # type: ignore[misc]
    """A segmentor once it is fitted or loaded; the constructor's arguments are those of `SemanticSegmentor`."""

    problem_type: str
    label: str
    image: str
    eval_metric: str | Sequence[str] | None
    base_dir: str | PathLike[str] | None
    channels: Sequence[int] | None
    verbosity: int

    task_: SegmentationTask
    """What the masks hold, inferred."""
    plan_: Plan
    """Every decision of the fit, with its reason."""
    classes_: NDArray[Any]
    """Values of the classes as they are in the masks: numbers, or colours as ``#rrggbb``."""
    forecast_: Forecast
    """What the fit will take, after ``fit(dry_run=True)``."""
    history_: pd.DataFrame
    """One row per validation: epoch, step, seconds, lr, train_loss, the validation metric."""
    path_: Path
    """Folder of the saved segmentor."""
    threshold_: float
    """Foreground probability, as `predict_proba` gives it, above which a pixel is foreground (binary)."""
    temperature_: float
    """What the logits behind all probabilities are divided by; 1 unless `calibrate_temperature` found another."""

    def _adopt(self, bundle: Bundle) -> None:
        """Set the fitted attributes from a bundle."""
        self.task_, self.plan_ = bundle.task, bundle.plan
        self.classes_ = np.asarray(bundle.task.labels)
        self.threshold_ = float(bundle.record["threshold"])
        try:  # bundles of before it was fitted have none
            self.temperature_ = check_temperature(bundle.record.get("temperature", 1.0))
        except ConfigError as error:
            raise BundleError(f"bundle.yaml is damaged: {error}. Save or fit again.") from error
        self.history_ = pd.DataFrame(bundle.record["history"])
        self.dropped_rows_ = list(bundle.record.get("dropped_rows", []))  # older bundles do not tell
        self._bundle = bundle
        self._predictor = predictor_of(bundle, temperature=self.temperature_)

    def evaluate(
        self,
        data: Table,
        metrics: Metrics | None = None,
        *,
        by: str | None = None,
        return_per_image: bool = False,
        intervals: bool = False,
        metric_size: MetricSize = "original",
    ) -> Any:
        """Score the segmentor on labelled images, one image at a time.

        Args:
            data: table, or CSV file, with an image and a label column; or annotations, as for `read_annotations`, of
                which the part ``test``, or else ``val``, is read.
            metrics: names, or `SegmentationMetric` objects; None for the constructor's, else the task's standard set.
            by: return a DataFrame of figures per stratum, with the number of its images and 95 % bootstrap intervals,
                under the index ``(stratum, figure)``, instead. A column of the table: a stratum for each value, for
                each quartile where it holds more than ten different numbers, and ``missing``. Or ``object_size``:
                images in thirds by the mean area of their objects, as a share of the image. ``class``: IoU, Dice,
                precision, recall and pixels of each class. ``boundary_distance``: error rate of the pixels at each
                distance from the true boundary. A column that is called so itself is meant before these.
            return_per_image: return a DataFrame of each image's own figures, with the table's index, instead.
            intervals: return a DataFrame of each figure's ``value``, ``low`` and ``high``, a 95 % bootstrap interval.
            metric_size: ``original``, each image's own resolution; ``model``, that of the network's input, to which
                masks are squashed, as in the Conv-LoRA paper.

        Returns:
            Values by name; a metric with one value per class gives ``name[class]`` for each. NaN where undefined.

        Raises:
            DataError: rows cannot be used, or a mask holds a value that was unknown when fitting.
            ConfigError: a metric or stratum is unknown or of the other kind of task, or several tables are asked for.
            UnsupportedCombination: `metric_size` is ``model``, and images are seen in tiles.
        """
        predictor, table = self._fitted(), self._read(data)
        chosen = self._metric_names(metrics)
        forms: dict[str, Any] = {"return_per_image": return_per_image, "intervals": intervals}
        if by is not None:
            columns = {"image_column": self.image, "label_column": self.label}
            frame = read_frame(data, **columns, base_dir=self.base_dir)
            check_stratum(by, frame, with_metrics=metrics is not None)
            forms["strata"] = by, frame
        forms.update(metrics=chosen, threshold=self.threshold_, metric_size=metric_size)
        return evaluate_table(predictor, table, self.task_, **forms)

    def report(self, data: Table, path: str | PathLike[str] = "report.html", *, pictures: int = 4) -> Path:
        """Judge the segmentor on labelled images and write it all down in one HTML page that needs no network.

        Scores with intervals, classes, confusion, reliability, curves of the training, use of the experts, data, plan
        with its reasons, and the worst, median and best images by the validation metric. `fit` writes one of its
        validation images into its own folder.

        Args:
            data: as for `evaluate`.
            path: of the file.
            pictures: images of the worst, the median and the best each, 0 to 20; each takes about 100 kB.

        Returns:
            The path.

        Raises:
            DataError: rows cannot be used, or the file cannot be written.
            ConfigError: `pictures` is out of range.
        """
        predictor, table = self._fitted(), self._read(data)
        checks = check_rows(table)
        check_values(self.task_, table, checks)
        judging = Judging(self._metric_names(None), self.threshold_, pictures)
        name = self.path_.resolve().name
        return write_report(Path(path), self._bundle, predictor, table, judging, name=name, checks=checks)

    def predict(
        self,
        data: Images,
        *,
        save_to: str | PathLike[str] | None = None,
        format: SaveFormat = "same-as-labels",
        resume: bool = False,
        on_error: OnError = "raise",
    ) -> Any:
        """Predict masks in the values of the training masks, at each image's own size.

        Args:
            data: table or CSV file with an image column, a folder, annotations, a list of paths, arrays or PIL images,
                or one image.
            save_to: folder for one file per row; memory does not grow with the number of images.
            format: of the files: ``same-as-labels`` (PNG in the values, colours or palette of the training masks),
                ``index`` (PNG of class indices), ``overlay`` (PNG of the image with its classes in colour) or
                ``probability`` (binary: 16-bit PNG of the foreground probability times 65535; otherwise float16
                ``.npy`` of the class scores ``(K, H, W)``).
            resume: keep the files of images that have not changed, written by this segmentor in this format before it
                was stopped; images in memory are predicted again. Otherwise files are replaced.
            on_error: ``raise`` stops at an image that cannot be read; ``report`` puts a `FailedPrediction` in its place
                (with `save_to`: no path, and the reason in the column ``error``).

        Returns:
            One array ``(H, W)``, RGB ``(H, W, 3)`` where the training masks are coloured, for one image; a list of
            them, in the order of the rows, otherwise; with `save_to` a DataFrame with the table's own index and the
            columns ``image``, ``mask`` and ``error``.

        Raises:
            DataError: an image cannot be read, or the folder cannot be written or gone on with.
            ConfigError: a word is unknown, or `format` or `resume` come without `save_to`.
        """
        predictor, (table, single) = self._fitted(), self._images(data)
        if save_to is None:
            if resume or format != "same-as-labels":
                raise ConfigError("format and resume belong to files; give save_to= too, or leave them out.")
            masks = self._masks(table, on_error)
            return next(masks) if single else list(masks)
        rows = save_predictions(
            predictor,
            table,
            self.task_,
            Path(save_to),
            threshold=self.threshold_,
            format=format,
            on_error=on_error,
            resume=resume,
        )
        return pd.DataFrame(rows, index=table.index, columns=["image", "mask", "error"])

    def predict_iter(self, data: Images | Iterator[ImageSource], *, on_error: OnError = "raise") -> Iterator[Any]:
        """Predict masks one by one, as they are asked for; memory does not grow with the number of images.

        Args:
            data: as for `predict`, or an iterator (generator, stream) of paths, arrays or PIL images, without an end
                if need be. As many as fit a forward pass are taken from it before the first of them is predicted.
            on_error: as for `predict`.

        Returns:
            An iterator of masks as `predict` returns them, in the order of `data`.

        Raises:
            DataError, ConfigError: as for `predict`, when the image's turn comes.
        """
        predictor = self._fitted()
        if not isinstance(data, Iterator):
            return self._masks(self._images(data)[0], on_error)
        channels = as_channels(self.channels)
        tables = stream_images(data, predictor.batch_size, base_dir=self.base_dir, channels=channels)
        return chain.from_iterable(self._masks(table, on_error) for table in tables)

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
            **({"search": record["search"]} if "search" in record else {}),
            "expert_usage": record.get("expert_usage", {}),  # bundles of before it was counted have none
            "forecast": record.get("forecast", {}),  # nor those of before it was made, or of several processes
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

    def _read(
        self,
        data: Table,
        groups: str | None = None,
        *,
        split: Sequence[str] = ("test", "val"),
        known: Mapping[int, str] | None = None,
    ) -> MaskTable:
        """Read a labelled table; of annotations by default the part to judge on, with the class names of the fit."""
        if known is None:
            self._fitted()
            known = {} if self.task_.colours else dict(zip(self.task_.values, self.task_.class_names, strict=True))
        return read_table(
            data,
            image_column=self.image,
            label_column=self.label,
            base_dir=self.base_dir,
            group_column=groups,
            split=split,
            known=known,
            channels=as_channels(self.channels),
        )

    def _images(self, data: Images) -> tuple[MaskTable, bool]:
        """Read the images to predict; also say whether it is one image, not a list of them."""
        self._fitted()
        channels = as_channels(self.channels)
        table = read_images(data, image_column=self.image, base_dir=self.base_dir, channels=channels)
        if isinstance(data, str | PathLike):
            path = Path(data if self.base_dir is None else Path(self.base_dir) / data)
            return table, not (are_annotations(path) or path.suffix.lower() == ".csv")
        return table, isinstance(data, np.ndarray | PillowImage)

    def _masks(self, table: MaskTable, on_error: OnError) -> Iterator[NDArray[Any] | FailedPrediction]:
        labels = self._fitted().labels(table, threshold=self.threshold_, on_error=on_error)
        return (each if isinstance(each, FailedPrediction) else self.task_.decode(each) for each in labels)

    def _say(self, text: str) -> None:
        if self.verbosity >= 1:
            print(text, flush=True)
