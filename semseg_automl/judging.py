"""How far a fitted segmentor can be believed: calibration, confidence, images to review, masks to doubt.

Thin methods; what they compute lives in :mod:`semseg_automl.calibration` and :mod:`semseg_automl.review`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import Tensor

from semseg_automl.calibration import (
    BINS,
    Calibration,
    Judged,
    choose_threshold,
    fit_temperature,
    measure_calibration,
    tempered_threshold,
)
from semseg_automl.data.checks import check_rows
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import UnsupportedCombination
from semseg_automl.evaluation import check_values, finite_scores, judged
from semseg_automl.fitted import FittedSegmentor, Images, Metrics, Table
from semseg_automl.inference import Predictor
from semseg_automl.leaderboard import rank
from semseg_automl.models.segmentation_model import hard_labels
from semseg_automl.review import class_confidence, judge_quality, label_issues, review_list


class JudgedSegmentor(FittedSegmentor):
    """A fitted segmentor that says how far it can be believed."""

    def calibrate_temperature(self, data: Table) -> float:
        """Make probabilities believable: divide the logits by the temperature likeliest on held-out images.

        Guo et al., ICML 2017. Masks stay as they are: the order of classes does, and `threshold_` is moved along. All
        that reads probabilities follows. `save` keeps it; the folder that `fit` wrote stays as it is.

        Args:
            data: validation rows, or others that were not trained on, with labels.

        Returns:
            `temperature_`; above 1 where probabilities were too sure.

        Raises:
            DataError: rows cannot be used, or none has a labelled pixel.
        """
        table = self._read(data)
        images = self._judge(table, replace(self._fitted(), temperature=1.0))
        temperature = fit_temperature(images, len(table))
        self.threshold_ = tempered_threshold(self.threshold_, temperature / self.temperature_)
        self.temperature_ = self._predictor.temperature = temperature
        self._bundle.record |= {"temperature": temperature, "threshold": self.threshold_}
        return temperature

    def calibrate_decision_threshold(self, data: Table, metric: str = "iou") -> float:
        """Choose the foreground probability above which a pixel is foreground (binary tasks).

        Every threshold of 0.001, 0.002, ... 0.999 is tried exactly, in one pass; of equally good ones the nearest to
        0.5 is taken. `save` keeps it; the folder that `fit` wrote stays as it is.

        Args:
            data: validation rows, or others that were not trained on, with labels.
            metric: iou, dice, ber_per_image, iou_pooled, dice_pooled, ber or accuracy.

        Returns:
            `threshold_`.

        Raises:
            UnsupportedCombination: the task has several classes.
            ConfigError: the metric is none of these.
            DataError: rows cannot be used, or none has a labelled pixel.
        """
        self._fitted()
        if self.task_.kind != "binary":
            raise UnsupportedCombination(
                "a decision threshold is for binary tasks; of several classes the likeliest is predicted. "
                "calibrate_temperature works for both."
            )
        self.threshold_ = choose_threshold(self._judge(self._read(data)), metric)
        self._bundle.record["threshold"] = self.threshold_
        return self.threshold_

    def calibration(self, data: Table, *, bins: int = BINS) -> Calibration:
        """Compare predicted probabilities with what came true: calibration errors, Brier, NLL, reliability curves.

        Raises:
            ConfigError: `bins` is not 1 to 1000.
            DataError: rows cannot be used, or none has a labelled pixel.
        """
        return measure_calibration(self._judge(self._read(data)), bins=bins)

    def confidence(self, data: Images) -> Any:
        """Return the probability of the predicted class, ``(H, W)`` float32 for one image, else a list of them.

        Args:
            data: as for `predict`.
        """
        table, single = self._images(data)
        maps = (class_confidence(scores, labels).numpy() for scores, labels in self._decided(table))
        return next(maps) if single else list(maps)

    def quality(self, data: Images) -> Any:
        """Predict the IoU of each prediction, without its truth: `semseg_automl.review.expected_iou`.

        Args:
            data: as for `predict`.

        Returns:
            A number for one image; else a Series ``expected_iou`` with the table's own index.
        """
        table, single = self._images(data)
        found = [judge_quality(*image).expected_iou for image in self._decided(table)]
        return found[0] if single else pd.Series(found, index=table.index, name="expected_iou")

    def review(self, data: Images, n: int = 20) -> pd.DataFrame:
        """List the images to look at or label next: those whose predictions are likely to be the worst, worst first.

        Args:
            data: as for `predict`.
            n: how many to list.

        Returns:
            With the table's own index: ``image``, ``expected_iou``, which ranks, ``confidence`` (mean probability of
            the predicted class) and ``uncertain`` (share of pixels where that is below 0.75).

        Raises:
            ConfigError: `n` is not a whole number above 0.
        """
        table, _ = self._images(data)
        return review_list(table, (judge_quality(*image) for image in self._decided(table)), n)

    def find_label_issues(self, data: Table) -> pd.DataFrame:
        """Rank masks by how much the predictions speak against them: `semseg_automl.review.label_issues`.

        A network agrees with masks that it was trained on, wrong ones too: look through rows it has not seen.

        Raises:
            DataError: rows cannot be used.
        """
        table = self._read(data)
        return label_issues(self._judge(table), table.index, self.task_)

    def leaderboard(self, data: Table | None = None, metrics: Metrics | None = None) -> pd.DataFrame:
        """List every configuration that the search of `fit` tried, the winner first.

        Args:
            data: labelled rows to judge all of them on; None for what the race knows. Needs the folder that `fit`
                wrote, with the candidates in it.
            metrics: as for `evaluate`; None for the metric that chose.

        Returns:
            Under the candidates' names: ``changed`` (settings beside the plan's own), ``score`` of the last validation,
            ``seconds`` and ``steps`` of its training, ``left`` (why it went no further). With `data` each figure, the
            ends of its 95 % bootstrap interval, ``ms_per_image``, ``megabytes`` of the weights on disk, and
            ``training_peak_mb``, the process's largest memory while it trained.

        Raises:
            ConfigError: it was fitted without a search, or a metric is unknown.
            BundleError: a candidate's folder is gone.
            DataError: rows cannot be used.
        """
        self._fitted()
        table = None if data is None else self._read(data)
        if table is not None:
            check_values(self.task_, table, check_rows(table))
        chosen = self._metric_names(self.plan_.validation_metric if metrics is None else metrics)
        return rank(self.path_, self._bundle.record, data=table, metrics=chosen, fitted=self._bundle)

    def _judge(self, table: MaskTable, predictor: Predictor | None = None) -> Iterator[Judged]:
        """Check all masks, then predict and pair each with its prediction."""
        check_values(self.task_, table, check_rows(table))
        return judged(predictor or self._fitted(), table, self.task_, self.threshold_)

    def _decided(self, table: MaskTable) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scores and hard labels."""
        for scores in finite_scores(self._fitted(), table):
            yield scores, hard_labels(scores, self.threshold_)
