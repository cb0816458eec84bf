"""What a fitted segmentor does: evaluate, predict, merge, export, save. How it is fitted: the estimator.

The steps live below; here is their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from semseg_automl.bundle import AdapterFormat, Bundle, save_bundle, write_adapter
from semseg_automl.data.images import ImageSource
from semseg_automl.data.table import MaskTable, read_images, read_table
from semseg_automl.errors import SemsegError
from semseg_automl.evaluation import evaluate_table, save_masks
from semseg_automl.hardware import detect_hardware
from semseg_automl.inference import FailedPrediction, OnError, Predictor
from semseg_automl.metrics import DEFAULT_METRICS, MetricChoice, SegmentationMetric
from semseg_automl.models.segmentation_model import hard_labels
from semseg_automl.peft import count_parameters
from semseg_automl.plan import Plan
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
    verbosity: int

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
