"""Every candidate of a search in one table: what it changed, what it scored, and what it costs.

The race that made them: :mod:`semseg_automl.race`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from semseg_automl.bundle import Bundle, load_bundle
from semseg_automl.data.kept import image_of
from semseg_automl.data.table import MaskTable, read_images
from semseg_automl.errors import BundleError, ConfigError
from semseg_automl.evaluation import predictor_of, tally_table
from semseg_automl.inference import Predictor
from semseg_automl.metrics import MetricChoice
from semseg_automl.race import FOLDER

TIMED_IMAGES = 5
"""For the milliseconds of an image, after one that is not timed."""


def known_candidates(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the record of a fitted segmentor tells of its search, the winner first.

    Raises:
        ConfigError: it was fitted without a search.
    """
    search = record.get("search")
    if not isinstance(search, Mapping):
        raise ConfigError(
            "this segmentor was fitted without a search, so there is nothing to rank. Fit with "
            "hyperparameter_tune_kwargs='auto'."
        )
    lines = [dict(line) for line in search["candidates"]]
    for line in lines:
        line["winner"] = line["candidate"] == search["winner"]
    return sorted(lines, key=lambda line: not line["winner"])


def rank(
    folder: Path,
    record: Mapping[str, Any],
    *,
    data: MaskTable | None,
    metrics: Sequence[MetricChoice],
    fitted: Bundle,
) -> pd.DataFrame:
    """Return the leaderboard.

    Args:
        folder: of the segmentor, with the candidates in it.
        record: of the segmentor.
        data: labelled rows to judge all candidates on, or None for what the race knows.
        metrics: to compute on them.
        fitted: the segmentor itself, which is judged as it predicts; the winner's own line.

    Raises:
        ConfigError: it was fitted without a search.
        BundleError: a candidate's folder is gone or damaged.
    """
    lines = known_candidates(record)
    table = pd.DataFrame(
        [{key: value for key, value in line.items() if key != "settings"} for line in lines]
    ).set_index("candidate")
    table.insert(0, "changed", [_told(line["settings"]) for line in lines])
    if data is not None:
        more: list[dict[str, float]] = []
        for line in lines:
            if math.isnan(line["score"]):
                more.append({})
                continue
            own = folder / FOLDER / _folder_name(line["candidate"])
            more.append(_judged(own, fitted if line["winner"] else load_bundle(own), data, metrics))
        table = table.join(pd.DataFrame(more, index=table.index))
    return table.drop(columns="winner")


def _judged(folder: Path, bundle: Bundle, data: MaskTable, metrics: Sequence[MetricChoice]) -> dict[str, float]:
    """Score a candidate on rows, with intervals; time it and weigh it."""
    predictor = predictor_of(bundle, temperature=float(bundle.record.get("temperature", 1.0)))
    threshold = float(bundle.record["threshold"])
    tallies = tally_table(predictor, data, bundle.task, metrics=metrics, threshold=threshold)
    found: dict[str, float] = {}
    for name, interval in tallies.intervals().items():
        found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    found["ms_per_image"] = _milliseconds(predictor, data)
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    found["megabytes"] = round(sum(path.stat().st_size for path in files) / 1e6, 1)
    peak = bundle.record.get("peak_bytes")
    found["training_peak_mb"] = math.nan if peak is None else round(peak / 1e6)
    return found


def _milliseconds(predictor: Predictor, data: MaskTable) -> float:
    """Return the median milliseconds from a decoded image to its scores, one image at a time."""
    taken = []
    for row in range(min(len(data), TIMED_IMAGES + 1)):
        image = read_images(image_of(data, row))
        start = time.perf_counter()
        next(iter(predictor.scores(image)))
        taken.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(taken[1:] or taken), 1)


def _folder_name(candidate: object) -> str:
    """Return a candidate's folder; a name from a file must not lead out of the search's."""
    name = str(candidate)
    if not name.replace("_", "").replace("-", "").isalnum():
        raise BundleError(f"bundle.yaml names a candidate {name!r}, which is none of ours. Fit again.")
    return name


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
