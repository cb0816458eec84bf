"""Two segmentors judged on the same images."""

from __future__ import annotations

import pandas as pd

from semseg_automl.data.checks import check_rows
from semseg_automl.errors import UnsupportedCombination
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.evaluation import check_values, tally_table
from semseg_automl.fitted import Metrics, Table
from semseg_automl.uncertainty import Comparison


def compare(a: SemanticSegmentor, b: SemanticSegmentor, data: Table, metrics: Metrics | None = None) -> pd.DataFrame:
    """Compare two fitted segmentors on the same labelled images, each image with itself.

    Args:
        a: one; its ``label``, ``image`` and ``base_dir`` say how the table is read.
        b: the other, for masks of the same values.
        data: table, or CSV file, with an image and a label column.
        metrics: names, or `SegmentationMetric` objects; None for `a`'s, else the task's standard set.

    Returns:
        One row per figure. ``a``, ``b`` and ``difference``, which is a - b; ``low`` and ``high``, its 95 % bootstrap
        interval over images drawn for both alike; ``p`` of Wilcoxon's signed-rank test over the images' own figures
        (`semseg_automl.uncertainty.ImageTallies.compared`). An interval without 0 and a small p: it is not chance.

    Raises:
        DataError: rows cannot be used, or a mask holds a value that was unknown when fitting.
        ConfigError: a metric is unknown or of the other kind of task.
        UnsupportedCombination: the segmentors were fitted to masks of different values.
    """
    predictors = [a._fitted(), b._fitted()]
    known = [(each.task_.kind, each.task_.values, each.task_.ignore_values) for each in (a, b)]
    if known[0] != known[1]:
        told = [f"{kind} masks of the values {list(values)}, without a label {list(no)}" for kind, values, no in known]
        raise UnsupportedCombination(
            f"a was fitted to {told[0]}; b to {told[1]}. Figures of different classes cannot be compared: fit both to "
            "masks of the same values"
        )
    table = a._read(data)
    check_values(a.task_, table, check_rows(table))
    chosen = a._metric_names(metrics)
    tallies = [
        tally_table(predictor, table, a.task_, metrics=chosen, threshold=each.threshold_)
        for predictor, each in zip(predictors, (a, b), strict=True)
    ]
    found = tallies[0].compared(tallies[1])
    return pd.DataFrame.from_dict(found, orient="index", columns=list(Comparison._fields))
