"""The report of a fitted segmentor: one HTML page that needs no network, and no JavaScript to be read.

Here the page's content is put together; its look is in ``report_page.html``, its charts come from
`semseg_automl.report_charts`, its scores and pictures from `semseg_automl.report_scores`.
"""

from __future__ import annotations

import base64
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from semseg_automl.bundle import Bundle
from semseg_automl.data.checks import RowCheck
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import ConfigError, DataError, SemsegError
from semseg_automl.files import replaced
from semseg_automl.fingerprint import Fingerprint, fingerprint, read_fingerprint
from semseg_automl.forecast import compared
from semseg_automl.inference import Predictor
from semseg_automl.metrics import MetricChoice
from semseg_automl.peft.usage import effective_number, is_collapsed, layer_labels, usage_summary
from semseg_automl.plan import Plan
from semseg_automl.report import BLACK, BLUE, ORANGE, PALETTE, WHITE
from semseg_automl.report_charts import curve_chart, interval_chart, reliability_chart
from semseg_automl.report_scores import GROUPS, VIEWS, Case, Scored, draw_cases, score_rows
from semseg_automl.task import SegmentationTask
from semseg_automl.uncertainty import Interval
from semseg_automl.version import __version__

PAGE = "report.html"
MAX_PICTURES = 20
"""Images per group (worst, median, best) at most; each takes about 100 kB of the page."""
MATRIX_CLASSES = 30
"""Classes that the confusion matrix shows at most."""

FIT_SECONDS, FIT_SHARE = 5.0, 0.05
_SCORING = 0.6  # of the seconds for a page; the rest is for the pictures and the page itself
_DRAWING = 0.9
_JPEG_QUALITY = 82
_PER_CLASS = "iou_per_class"
_UNKNOWN = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Judging:
    """How a report judges the segmentor.

    Attributes:
        metrics: names of metrics, or metrics, of the score table.
        threshold: foreground probability above which a pixel is foreground.
        pictures: images shown of the worst, the median and the best each.
        seconds: how long it may take, or None; then fewer images are judged, evenly spread, and fewer shown.
    """

    metrics: Sequence[MetricChoice]
    threshold: float
    pictures: int = 4
    seconds: float | None = None


def seconds_of_fit(time_limit: float | None) -> float:
    """Return the seconds that a fit keeps for its report: five, or a twentieth of its time limit if that is less."""
    return FIT_SECONDS if time_limit is None else min(FIT_SECONDS, FIT_SHARE * time_limit)


def write_report(
    path: Path,
    bundle: Bundle,
    predictor: Predictor,
    table: MaskTable,
    judging: Judging,
    *,
    name: str,
    checks: Sequence[RowCheck] | None = None,
) -> Path:
    """Judge a segmentor on labelled images and write the page, whole or not at all.

    Args:
        path: of the HTML file; missing folders are made.
        bundle: what was fitted.
        predictor: gives its class scores.
        table: images and masks, in values that the task knows.
        judging: how.
        name: of the segmentor, for the title.
        checks: of the table's rows, for their summary; None leaves it out.

    Returns:
        The path.

    Raises:
        ConfigError: a metric is unknown or of the other kind of task, or `pictures` is not 0 to 20.
        DataError: an image or mask cannot be used, the scores are not finite, or the file cannot be written.
        BundleError: the summary of the training data in the bundle is damaged.
    """
    if isinstance(judging.pictures, bool) or not 0 <= judging.pictures <= MAX_PICTURES:
        raise ConfigError(f"pictures is {judging.pictures!r}; a whole number from 0 to {MAX_PICTURES} is needed")
    start, task, plan = time.monotonic(), bundle.task, bundle.plan
    limits = [None if judging.seconds is None else start + judging.seconds * share for share in (_SCORING, _DRAWING)]
    asked = [plan.validation_metric, *judging.metrics, *([_PER_CLASS] if task.kind == "multiclass" else [])]
    metrics: list[MetricChoice] = list(dict.fromkeys(asked))
    same = {"threshold": judging.threshold}
    scored = score_rows(predictor, table, task, metrics=metrics, deadline=limits[0], **same)
    cases = draw_cases(predictor, table, task, scored, each=judging.pictures, deadline=limits[1], **same)
    page = _rendered(
        title=f"Segmentation report: {name}",
        subtitle=f"{task.kind} segmentation of {task.num_classes} classes; {plan.peft} on {plan.encoder}",
        **_scores(task, plan, scored, rows=len(table)),
        **_images(task, scored, cases),
        matrix=_matrix(task, scored.confusion) if scored.rows else None,
        reliability=_reliability(task, scored),
        **_training(plan, bundle.record),
        search=_search(plan, bundle.record.get("search")),
        experts=_experts(bundle.record.get("expert_usage", {})),
        fingerprints=_fingerprints(task, bundle.record, checks),
        reasons=[f"Task: {reason}." for reason in task.reasons],
        plan=_plan(plan),
        footer=f"Written {datetime.now():%Y-%m-%d %H:%M} by semseg_automl {__version__}. "
        "The page is one file and loads nothing from elsewhere.",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_bytes(page.encode("utf-8", errors="replace"))  # names of files may be no text at all
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error
    return path


def write_fit_report(
    folder: Path,
    bundle: Bundle,
    predictor: Predictor,
    table: MaskTable,
    metrics: Sequence[MetricChoice],
    seconds: float,
) -> None:
    """Write the report of a fit into its folder, in the time that it kept for it.

    The fit is saved by then, so what goes wrong here is a warning. After an interrupt no image is judged.

    Args:
        folder: of the fit.
        bundle: what was fitted.
        predictor: gives its class scores.
        table: validation rows.
        metrics: of the score table.
        seconds: that the report may take.
    """
    seconds = 0.0 if bundle.record.get("stopped_by") == "interrupt" else seconds
    judging = Judging(metrics, float(bundle.record["threshold"]), seconds=seconds)
    try:
        write_report(folder / PAGE, bundle, predictor, table, judging, name=folder.resolve().name)
    except SemsegError as error:
        warnings.warn(f"the fit is saved, but its report could not be written: {error}", stacklevel=2)


def _rendered(**content: Any) -> str:
    template = files("semseg_automl").joinpath("report_page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(template).render(**content)


def _scores(task: SegmentationTask, plan: Plan, scored: Scored, *, rows: int) -> dict[str, Any]:
    """Return cards, score table and table of classes; only what can be said without an image where there is none."""
    cards = [
        {"name": "images judged", "value": f"{len(scored.rows)} of {rows}"},
        {"name": "classes", "value": task.num_classes},
        {"name": "input in pixels", "value": f"{plan.input_size[0]} × {plan.input_size[1]}"},  # noqa: RUF001
    ]
    if not scored.rows:
        notice = "No image was judged: no time was left. Call report(data) on the segmentor to judge all of them."
        return {"cards": cards, "scores": [], "classes": [], "notice": notice, "scored_note": ""}
    found = scored.tallies.intervals()
    main = {name: found[name] for name in found if not name.startswith(f"{_PER_CLASS}[")}
    best = main.get(plan.validation_metric, next(iter(main.values())))
    named = plan.validation_metric if plan.validation_metric in main else next(iter(main))
    cards.insert(0, {"name": f"{named}, 95 % {_interval(best)}", "value": _figure(best.value)})
    partial = "" if len(scored.rows) == rows else (
        f"{len(scored.rows)} of {rows} images were judged, spread evenly over the table: those that the time of a fit "
        "left for its report sufficed for. Call report(data) on the segmentor to judge all of them."
    )  # fmt: skip
    return {
        "cards": cards,
        "notice": partial,
        "scores": [
            {"name": name, "value": _figure(each.value), "interval": _interval(each), "chart": interval_chart(*each)}
            for name, each in main.items()
        ],
        "scored_note": "Intervals: 1000 bootstrap draws of the images. Each image at its own resolution.",
        "classes": _classes(task, scored, found) if task.kind == "multiclass" else [],
    }


def _classes(task: SegmentationTask, scored: Scored, found: Mapping[str, Interval]) -> list[dict[str, Any]]:
    counts = scored.confusion.astype(np.float64)
    hits, truth, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        precision, recall, share = hits / predicted, hits / truth, truth / truth.sum()
    return [
        {
            "name": name,
            "label": label,
            "colour": _colour_of(task, index),
            "share": _share(share[index]),
            "iou": _figure(found[f"{_PER_CLASS}[{name}]"].value),
            "interval": _interval(found[f"{_PER_CLASS}[{name}]"]),
            "precision": _figure(precision[index]),
            "recall": _figure(recall[index]),
        }
        for index, (name, label) in enumerate(zip(task.class_names, task.labels, strict=True))
    ]


def _images(task: SegmentationTask, scored: Scored, cases: Sequence[Case]) -> dict[str, Any]:
    binary = task.kind == "binary"
    classes = [
        {"name": name, "colour": _colour_of(task, index)}
        for index, name in enumerate(task.class_names)
        if index or not binary
    ]
    told = [("falsely foreground", ORANGE), ("missed", BLUE), ("found", WHITE)] if binary else [("wrong class", ORANGE)]
    errors = [{"name": name, "colour": f"rgb{colour}"} for name, colour in [*told, ("no label", BLACK)]]
    plain: dict[str, Any] = {"caption": "", "legend": [], "ramp": ""}
    sure = {"caption": "probability of the predicted class", "ramp": f"{1 / task.num_classes:.2g} to 1"}
    about: dict[str, dict[str, Any]] = {
        "truth": {"legend": classes},
        "prediction": {"legend": classes},
        "errors": {"legend": errors},
        "confidence": sure,
    }
    places = dict.fromkeys(GROUPS, 0)
    shown = []
    for case in cases:
        places[case.group] += 1
        views = zip(VIEWS, case.pictures, strict=True)
        shown.append(
            {
                "group": case.group.capitalize(),
                "place": places[case.group],
                "first": places[case.group] == 1,
                "name": case.name,
                "score": f"{case.score:.3f}",
                "views": [plain | about.get(view, {}) | _picture(view, picture) for view, picture in views],
            }
        )
    return {"cases": shown, "ranked_by": scored.ranked_by}


def _picture(view: str, picture: NDArray[np.uint8]) -> dict[str, Any]:
    height, width = picture.shape[:2]
    return {"name": view.capitalize(), "source": _data_uri(picture), "width": width, "height": height}


def _matrix(task: SegmentationTask, confusion: NDArray[np.int64]) -> dict[str, Any]:
    """Normalise the rows; of many classes keep those with the most pixels, in their order."""
    kept = np.sort(np.argsort(-(confusion.sum(axis=0) + confusion.sum(axis=1)), kind="stable")[:MATRIX_CLASSES])
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    return {
        "names": [task.class_names[i] for i in kept],
        "rows": [{"name": task.class_names[i], "cells": [_cell(shares[i, j]) for j in kept]} for i in kept],
        "left_out": task.num_classes - len(kept),
    }


def _reliability(task: SegmentationTask, scored: Scored) -> dict[str, Any] | None:
    measured = scored.calibration
    if measured is None:
        return None
    if task.kind == "binary":
        claimed, true = "predicted foreground probability", "share of pixels that are foreground"
    else:
        claimed, true = "probability of the predicted class", "share of pixels that are right"
    return {
        "chart": reliability_chart(measured.curve, x_title=claimed, y_title=true),
        "error": f"{measured.ece:.4f}",
        "note": f"The curve is the {true}, by {claimed}. On the dashed line probabilities mean what they say; below it "
        f"the segmentor is too sure of itself. Columns: how many pixels. Brier score {measured.brier:.4f}, negative "
        f"log-likelihood {measured.nll:.4f}.",
    }


def _training(plan: Plan, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves of loss, validation metric and learning rate, and the history as a table."""
    history = record.get("history") or []
    columns = list(dict.fromkeys(key for entry in history for key in entry))
    best = record.get("best_epoch", -1)
    titles = {"train_loss": "training loss", plan.validation_metric: f"validation {plan.validation_metric}"}
    curves = []
    for key, title in (*titles.items(), ("lr", "learning rate")):
        points = [(_number(entry.get("epoch")), _number(entry.get(key))) for entry in history]
        marked = _number(best) if key == plan.validation_metric else None
        chart = curve_chart(points, title=title, x_title="epoch", marked=marked)
        if chart:
            curves.append({"title": title, "chart": chart})
    return {
        "curves": curves,
        "training_note": f"Stopped by {record.get('stopped_by')}; the weights of epoch {best} were kept (ring), with "
        f"{plan.validation_metric} {_figure(_number(record.get('best_score')))} in validation."
        + (f" It took {foretold}." if (foretold := compared(record.get("forecast", {}))) else ""),
        "history": {
            "columns": columns,
            "rows": [[f"{_number(entry.get(key)):.6g}" for key in columns] for entry in history],
        },
    }


def _search(plan: Plan, search: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what raced, the winner first; None for a fit that did not search."""
    if not search:
        return None
    lines = sorted(search["candidates"], key=lambda line: bool(line["candidate"] != search["winner"]))
    return {
        "told": [f"{told[:1].upper()}{told[1:]}." for told in (search["verdict"], search["prediction"])],
        "metric": plan.validation_metric,
        "rows": [
            {
                "name": line["candidate"],
                "settings": ", ".join(f"{name}={value}" for name, value in line["settings"].items()),
                "score": _figure(_number(line["score"])),
                "steps": line["steps"],
                "seconds": f"{_number(line['seconds']):.0f}",
                "ended": "won" if line["candidate"] == search["winner"] else line["left"],
            }
            for line in lines
        ],
    }


def _experts(usage: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    if not usage:
        return None
    most = max(len(counts) for counts in usage.values())
    return {
        "summary": usage_summary(usage),
        "columns": range(1, most + 1),
        "rows": [
            {
                "name": label,
                "cells": [_cell(count / max(1, sum(counts))) for count in (*counts, *[0] * (most - len(counts)))],
                "effective": f"{effective_number(counts):.1f}",
                "collapsed": is_collapsed(counts),
            }
            for label, counts in zip(layer_labels(usage), usage.values(), strict=True)
        ],
    }


def _fingerprints(
    task: SegmentationTask, record: Mapping[str, Any], checks: Sequence[RowCheck] | None
) -> list[dict[str, Any]]:
    fitted = read_fingerprint(record.get("data"))
    entries = [] if fitted is None else [("Fitted to", fitted)]
    if checks:
        entries.append(("Judged in this report", fingerprint(task, checks)))
    return [
        {
            "title": title,
            "text": _data_text(data),
            "classes": [
                {
                    "name": each.name,
                    "label": each.label,
                    "share": _share(each.share),
                    "images": f"{each.images} of {data.rows}",
                    "colour": _colour_of(task, index),
                }
                for index, each in enumerate(data.classes)
            ],
        }
        for title, data in entries
    ]


def _data_text(data: Fingerprint) -> str:
    rows = f"{data.rows} images" if data.rows > 1 else "1 image"
    if data.validation_rows is not None:
        rows += f", {data.validation_rows} of them only for validation"
    sizes = [f"{height} × {width}" for height, width in (data.smallest, data.largest, data.middle)]  # noqa: RUF001
    span = f"{sizes[0]} pixels" if data.smallest == data.largest else f"{sizes[0]} to {sizes[1]} pixels (height × width), median {sizes[2]}"  # noqa: E501, RUF001
    unlabelled = f"; {_share(data.unlabelled)} of the pixels have no label" if data.unlabelled else ""
    return f"{rows}; {span}{unlabelled}."


def _plan(plan: Plan) -> list[dict[str, str]]:
    return [
        {"name": name, "value": str(value), "reason": plan.reasons.get(name, "")}
        for name, value in plan.model_dump(exclude={"reasons"}).items()
    ]


def _data_uri(picture: NDArray[np.uint8]) -> str:
    # Full chroma: halved, it blurs the borders of coloured areas.
    full = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    ok, coded = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY, *full])
    if not ok:
        raise DataError(f"OpenCV could not encode a picture of shape {picture.shape} as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()


def _colour_of(task: SegmentationTask, index: int) -> str:
    """Return the colour of a class in pictures, as CSS; the background of a binary task has none."""
    if task.kind == "binary" and index == 0:
        return "transparent"
    red, green, blue = PALETTE[(index - (1 if task.kind == "binary" else 0)) % len(PALETTE)].tolist()
    return f"rgb({red}, {green}, {blue})"


def _cell(share: float) -> dict[str, Any]:
    percent = 100 * share
    text = "" if share == 0 else "<1" if percent < 0.5 else f"{percent:.0f}"
    return {"share": float(share), "text": text}


def _figure(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else _UNKNOWN


def _interval(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return _UNKNOWN
    return f"{interval.low:.4f} to {interval.high:.4f}"


def _share(share: float) -> str:
    return f"{share:.2%}" if math.isfinite(share) else _UNKNOWN


def _number(value: object) -> float:
    """Return a number of a saved record, NaN where it holds none."""
    return float(value) if isinstance(value, int | float) else math.nan
