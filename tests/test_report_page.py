"""The report: it says what was measured, hostile names stay text, it keeps to its time, and it never costs a fit."""

from __future__ import annotations

import base64
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from semseg_automl import SemanticSegmentor, draw_dataset, report_page
from semseg_automl.build import seeded_model
from semseg_automl.bundle import Bundle
from semseg_automl.data.checks import RowCheck
from semseg_automl.data.encodings import MaskEncoding
from semseg_automl.data.table import read_table
from semseg_automl.errors import BundleError, ConfigError, DataError
from semseg_automl.fingerprint import fingerprint, read_fingerprint
from semseg_automl.report_charts import curve_chart, interval_chart, nice_ticks
from semseg_automl.report_page import seconds_of_fit, write_fit_report
from semseg_automl.report_scores import choose_cases, draw_cases, score_rows, spread_order
from semseg_automl.task import SegmentationTask

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "none",
}
SHORT: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "logger": False}
HOSTILE = "<script>alert('1')</script>\" onload=\"x & y"
BEST_TWO = [("best", 0), ("best", 1)]
VOID = {"meta", "img", "br", "link", "input"}
HISTORY = [
    {"epoch": 0, "step": 3, "seconds": 1.0, "lr": 0.001, "score": 0.25, "train_loss": 1.5},
    {"epoch": 1, "step": 6, "seconds": 2.0, "lr": 0.0005, "score": 0.5, "train_loss": 0.75},
    {"epoch": 2, "step": 9, "seconds": 3.0, "lr": 0.0001, "score": 0.4},
]


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text; unbalanced elements are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Return the attributes of the elements of a name that have these."""
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    @property
    def ids(self) -> list[str]:
        return [str(found["id"]) for _, found in self.elements if "id" in found]


@dataclass
class Ready:
    """An untrained segmentor in the state that `fit` leaves, and the folder of its data."""

    segmentor: SemanticSegmentor
    data: Path

    @property
    def bundle(self) -> Bundle:
        return self.segmentor._bundle

    def write(self, path: Path, **judging: Any) -> Page:
        self.segmentor.report(self.data / "test.csv", path, **judging)
        return Page(path)


def ready(folder: Path, kind: Any, names: dict[int, str]) -> Ready:
    data = draw_dataset(folder / "data", kind=kind, train=4, val=3, test=7, size=(40, 48))
    segmentor = SemanticSegmentor(path=folder / "b", hyperparameters=SETTINGS, class_names=names, verbosity=0)
    segmentor.fit(data / "train.csv", data / "val.csv", dry_run=True)
    metric = segmentor.plan_.validation_metric
    record = {
        "threshold": 0.5,
        "best_epoch": 1,
        "best_score": 0.5,
        "stopped_by": "max_epochs",
        "expert_usage": {"blocks.0.attn.qkv": [40, 0], "blocks.1.attn.qkv": [10, 30]},
        "history": [{metric if key == "score" else key: value for key, value in entry.items()} for entry in HISTORY],
    }
    segmentor.path_ = folder / "b"
    segmentor._adopt(Bundle(seeded_model(segmentor.plan_), segmentor.plan_, segmentor.task_, record))
    return Ready(segmentor, data)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return ready(tmp_path_factory.mktemp("binary"), "binary", {0: "ground", 255: HOSTILE})


@pytest.fixture(scope="module")
def multiclass(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return ready(tmp_path_factory.mktemp("multi"), "multiclass", {0: "a", 1: "b", 2: "c", 3: "d"})


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_report__either_task__says_what_evaluate_measures(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    given: Ready = request.getfixturevalue(kind)
    page = given.write(tmp_path / "new" / "report.html")
    figures = given.segmentor.evaluate(given.data / "test.csv", intervals=True)
    for name, row in figures.iterrows():
        if not np.isfinite(row["low"]):
            continue
        assert f"{row['low']:.4f} to {row['high']:.4f}" in page.text, name
        assert f"{row['value']:.4f}" in page.text
    measured = given.segmentor.calibration(given.data / "test.csv")
    assert f"{measured.ece:.4f}" in page.text
    assert "7 of 7" in page.text
    assert all(reason in page.text for reason in given.segmentor.plan_.reasons.values())
    assert set(page.ids) >= {"scores", "images", "confusion", "reliability", "training", "experts", "data", "plan"}
    assert ("classes" in page.ids) == (kind == "multiclass")
    assert len(page.ids) == len(set(page.ids))


def test_report__page__stands_alone_and_names_what_belongs_together(multiclass: Ready, tmp_path: Path) -> None:
    page = multiclass.write(tmp_path / "report.html", pictures=2)
    links = [found.get(key) for _, found in page.elements for key in ("src", "href") if key in found]
    assert links
    assert all(str(link).startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert {str(link)[1:] for link in links if str(link).startswith("#")} <= set(page.ids)
    (policy,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")
    for key in ("aria-controls", "aria-labelledby"):
        named = [found[key] for _, found in page.elements if key in found]
        assert named
        assert set(named) <= set(page.ids)
    assert len(page.of("img")) == 2 * 3 * 5
    for found in page.of("img"):
        coded = base64.b64decode(str(found["src"]).partition(",")[2])
        picture = cv2.imdecode(np.frombuffer(coded, np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        assert picture.shape[:2] == (40, 48) == (int(str(found["height"])), int(str(found["width"])))
        assert found["alt"]


def test_report__hostile_names__stay_text(binary: Ready, tmp_path: Path) -> None:
    frame = pd.read_csv(binary.data / "test.csv").map(lambda cell: str(binary.data / cell))
    frame.index = pd.Index([f"{HOSTILE} {i}\udcff" for i in range(len(frame))])
    path = binary.segmentor.report(frame, tmp_path / "report.html")
    page = Page(path)
    assert len(page.of("script")) == 1
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    assert f"row {HOSTILE}" in page.text
    assert page.text.count(HOSTILE) > len(page.of("img")) / 5, "the class is called so, too"


def test_report__history__is_drawn_with_the_best_epoch_ringed(binary: Ready, tmp_path: Path) -> None:
    page = binary.write(tmp_path / "report.html", pictures=0)
    assert page.of("img") == []
    assert "images" not in page.ids
    curves = [str(found["aria-label"]) for found in page.of("svg", **{"class": "chart"})]
    assert curves[1:] == [
        "training loss, from 1.5 to 0.75",
        "validation iou, from 0.25 to 0.4",
        "learning rate, from 0.001 to 0.0001",
    ]
    assert len(page.of("circle", **{"class": "dot best"})) == 1
    assert "the weights of epoch 1 were kept" in page.text


def test_report__experts__mark_the_layer_that_collapsed(binary: Ready, tmp_path: Path) -> None:
    page = binary.write(tmp_path / "report.html", pictures=0)
    assert len(page.of("td", **{"class": "collapsed"})) == 1
    assert {"block 0", "block 1"} <= set(page.text.split("\n")) | set(re.findall(r"block \d", page.text))


def test_report__more_classes_than_the_matrix_shows__keeps_the_largest(
    multiclass: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "MATRIX_CLASSES", 2)
    page = multiclass.write(tmp_path / "report.html", pictures=0)
    assert "The 2 classes with the most pixels; 2 are left out" in page.text
    confusion = np.array([[0, 0, 0, 0], [0, 6, 2, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    matrix = report_page._matrix(multiclass.segmentor.task_, confusion)
    assert matrix["names"] == ["b", "c"]
    assert [[cell["text"] for cell in row["cells"]] for row in matrix["rows"]] == [["75", "25"], ["", "100"]]


@pytest.mark.parametrize("pictures", [-1, 21, True])
def test_report__pictures_out_of_range__is_refused(binary: Ready, tmp_path: Path, pictures: int) -> None:
    with pytest.raises(ConfigError, match="0 to 20"):
        binary.write(tmp_path / "report.html", pictures=pictures)
    assert list(tmp_path.iterdir()) == []


def test_report__place_that_cannot_be_written__is_an_error_of_ours(binary: Ready, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        binary.write(tmp_path / "file" / "report.html", pictures=0)


def test_report__masks_of_other_values__are_refused(binary: Ready, multiclass: Ready, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="values that no class has"):
        binary.segmentor.report(multiclass.data / "test.csv", tmp_path / "report.html")


def stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the clock take a second."""
    ticks: Iterator[int] = count()
    monkeypatch.setattr("semseg_automl.report_scores.time.monotonic", lambda: float(next(ticks)))


def test_score_rows__time_for_some__judges_those_spread_over_the_table(
    multiclass: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_table(multiclass.data / "test.csv")
    arguments: dict[str, Any] = {"metrics": ["miou"], "threshold": 0.5}
    whole = score_rows(multiclass.segmentor._predictor, table, multiclass.segmentor.task_, **arguments)
    assert whole.rows == list(range(7))
    stepping(monkeypatch)
    part = score_rows(multiclass.segmentor._predictor, table, multiclass.segmentor.task_, **arguments, deadline=3.0)
    assert part.rows == spread_order(7)[:3].tolist()
    assert part.confusion.sum() == 3 * 40 * 48
    np.testing.assert_allclose(part.ranking, whole.ranking[part.rows], atol=1e-6)
    cases = draw_cases(
        multiclass.segmentor._predictor, table, multiclass.segmentor.task_, whole, threshold=0.5, each=2, deadline=6.0
    )
    assert 0 < len(cases) < 6
    assert cases[0].group == "worst", "the extremes come first"


@pytest.mark.parametrize("rows", [1, 2, 10, 97])
def test_spread_order__every_beginning__leaves_no_wide_gap(rows: int) -> None:
    order = spread_order(rows)
    assert sorted(order.tolist()) == list(range(rows))
    for taken in range(1, rows + 1):
        places = [-1, *sorted(order[:taken].tolist()), rows]
        assert max(after - before for before, after in pairwise(places)) <= 3 * rows / taken + 1


@pytest.mark.parametrize(
    ("ranking", "each", "expected"),
    [
        ([], 3, []),
        ([np.nan], 3, []),
        ([0.5], 3, [("worst", 0)]),
        ([0.5, 0.1], 3, [("worst", 1), ("best", 0)]),
        ([0.5, 0.1, 0.9], 3, [("worst", 1), ("median", 0), ("best", 2)]),
        ([4, 3, 2, 1], 2, [("worst", 3), ("median", 2), ("best", 0)]),
        ([6, 5, 4, 3, 2, 1], 2, [*[("worst", i) for i in (5, 4)], *[("median", i) for i in (3, 2)], *BEST_TWO]),
        ([1, 2, 3], 0, []),
    ],
)
def test_choose_cases__few_and_many_images__shows_each_once(
    ranking: list[float], each: int, expected: list[tuple[str, int]]
) -> None:
    assert choose_cases(np.array(ranking, dtype=float), each) == expected


def test_score_rows__a_metric_where_less_is_better__ranks_the_other_way(binary: Ready) -> None:
    table = read_table(binary.data / "test.csv")
    scored = score_rows(binary.segmentor._predictor, table, binary.segmentor.task_, metrics=["mae"], threshold=0.5)
    images = binary.segmentor.evaluate(binary.data / "test.csv", "mae", return_per_image=True)["mae"].to_numpy()
    cases = draw_cases(binary.segmentor._predictor, table, binary.segmentor.task_, scored, threshold=0.5, each=1)
    assert [case.score for case in cases] == pytest.approx([images.max(), np.median(images), images.min()])


def test_report__fit_that_searched__lists_what_raced_with_the_winner_first(binary: Ready, tmp_path: Path) -> None:
    lines = [
        {"candidate": "baseline", "settings": {}, "score": 0.25, "seconds": 12.34, "steps": 9, "left": "round 1"},
        {"candidate": HOSTILE, "settings": {"optim.lr": 0.01}, "score": 0.5, "seconds": 60.0, "steps": 40, "left": ""},
        {"candidate": "late", "settings": {}, "score": float("nan"), "seconds": 0, "steps": 0, "left": "no time"},
    ]
    search = {"winner": HOSTILE, "verdict": "it won", "prediction": "as the plan has it", "candidates": lines}
    binary.bundle.record["search"] = search
    try:
        page = binary.write(tmp_path / "report.html", pictures=0)
    finally:
        del binary.bundle.record["search"]
    table = page.text[page.text.index("differs from the plan in") :]
    places = [table.index(text) for text in (HOSTILE, "optim.lr=0.01", "0.5000", "won", "baseline", "0.2500", "late")]
    assert places == sorted(places)
    assert "It won.As the plan has it." in page.text
    assert ("a", {"href": "#search"}) in page.elements
    assert ("a", {"href": "#search"}) not in binary.write(tmp_path / "without.html", pictures=0).elements


def test_write_fit_report__no_time_or_an_interrupt__judges_nothing_and_still_draws_the_curves(
    binary: Ready, tmp_path: Path
) -> None:
    table = read_table(binary.data / "val.csv")
    interrupted = Bundle(
        binary.bundle.model, binary.bundle.plan, binary.bundle.task, binary.bundle.record | {"stopped_by": "interrupt"}
    )
    for bundle, seconds in ((binary.bundle, 0.0), (interrupted, 60.0)):
        write_fit_report(tmp_path, bundle, binary.segmentor._predictor, table, ["iou"], seconds)
        page = Page(tmp_path / "report.html")
        assert "No image was judged" in page.text
        assert "0 of 3" in page.text
        assert set(page.ids) & {"scores", "images", "confusion", "reliability"} == set()
        assert {"training", "plan"} <= set(page.ids)


def test_seconds_of_fit__limits__keep_a_twentieth_and_five_seconds_at_most() -> None:
    assert [seconds_of_fit(limit) for limit in (None, 10.0, 100.0, 1e6)] == [5.0, 0.5, 5.0, 5.0]


@pytest.fixture(scope="module")
def fit_folder(binary: Ready, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit one epoch, silently, and return the bundle's folder."""
    folder = tmp_path_factory.mktemp("fit") / "polyps & co"
    segmentor = SemanticSegmentor(path=folder, hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(binary.data / "train.csv", binary.data / "val.csv", **SHORT)
    return folder


def test_fit__silent__leaves_a_report_of_its_validation_rows(fit_folder: Path) -> None:
    page = Page(fit_folder / "report.html")
    assert "Segmentation report: polyps & co" in page.text
    assert "3 of 3" in page.text
    assert "7 images, 3 of them only for validation; 40 × 48 pixels." in page.text  # noqa: RUF001


def test_report__loaded_segmentor__knows_the_data_of_its_fit(fit_folder: Path, binary: Ready, tmp_path: Path) -> None:
    loaded = SemanticSegmentor.load(fit_folder)
    page = Page(loaded.report(binary.data / "test.csv", tmp_path / "report.html", pictures=0))
    assert page.text.count("Fitted to") == page.text.count("Judged in this report") == 1
    loaded._bundle.record.pop("data")
    older = Page(loaded.report(binary.data / "test.csv", tmp_path / "report.html", pictures=0))
    assert "Fitted to" not in older.text
    loaded._bundle.record["data"] = {"rows": "many"}
    with pytest.raises(BundleError, match="'data' is no summary"):
        loaded.report(binary.data / "test.csv", tmp_path / "report.html", pictures=0)


def test_fit__disk_full_at_the_report__warns_and_keeps_the_fit(
    binary: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield path

    monkeypatch.setattr(report_page, "replaced", full)
    segmentor = SemanticSegmentor(path=tmp_path / "b", hyperparameters=SETTINGS, verbosity=0)
    with pytest.warns(UserWarning, match=r"the fit is saved, but its report .*report\.html.*No space left"):
        segmentor.fit(binary.data / "train.csv", binary.data / "val.csv", **SHORT)
    assert not (tmp_path / "b" / "report.html").exists()
    assert len(SemanticSegmentor.load(tmp_path / "b").predict(binary.data / "test.csv")) == 7


def test_fingerprint__masks_with_ignored_and_unknown_values__counts_pixels_and_images() -> None:
    task = SegmentationTask("multiclass", (0, 3, 7), ("a", "b", "c"), ignore_values=(255,))
    checks = [RowCheck((2, 5), {0: 4, 3: 4, 255: 2}), RowCheck((4, 4), {0: 12, 9: 4}), RowCheck((2, 2), {3: 4})]
    found = fingerprint(task, checks, validation_rows=1)
    assert (found.rows, found.validation_rows) == (3, 1)
    assert (found.smallest, found.middle, found.largest) == ((2, 2), (2, 4), (4, 4))
    assert [(each.label, each.images) for each in found.classes] == [(0, 2), (3, 2), (7, 0)]
    assert [each.share for each in found.classes] == pytest.approx([16 / 24, 8 / 24, 0])
    assert found.unlabelled == pytest.approx(6 / 30)
    assert read_fingerprint(yaml.safe_load(yaml.safe_dump(found.model_dump(mode="json")))) == found


def test_fingerprint__coloured_masks__are_counted_by_class() -> None:
    task = SegmentationTask("binary", (0, 0xFF0000), ("a", "b"), colours=True)
    check = RowCheck((1, 4), {0: 1, 0xFF0000: 3}, MaskEncoding(colours=True))
    assert [each.share for each in fingerprint(task, [check]).classes] == [0.25, 0.75]


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (-3.0, 17.0), (0.61, 0.64), (1e-6, 4e-4), (5.0, 5.0)])
def test_nice_ticks__any_range__are_few_even_and_inside(low_high: tuple[float, float]) -> None:
    low, high = low_high
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 11
    assert low - 1e-9 <= ticks[0] <= ticks[-1] <= high + 1e-9
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[:1].repeat(len(steps)), rtol=1e-6)


def points_of(svg: str) -> list[list[float]]:
    (found,) = re.findall(r'polyline class="line" points="([^"]*)"', svg)
    return [[float(part) for part in pair.split(",")] for pair in found.split()]


def test_curve_chart__points__rise_to_the_right_and_skip_what_is_not_finite() -> None:
    svg = str(curve_chart([(0, 1.0), (1, np.nan), (2, 3.0), (3, 5.0)], title="<t>", x_title="&x", marked=2))
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg)
    assert x0 < x1 < x2
    assert y0 > y1 > y2, "SVG counts downwards"
    assert x1 - x0 == pytest.approx(2 * (x2 - x1), abs=0.3)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.3)
    assert svg.count('class="dot best"') == 1
    assert "&lt;t&gt;" in svg
    assert "<t>" not in svg


@pytest.mark.parametrize("points", [[], [(0, np.nan)], [(np.inf, 1.0)]])
def test_curve_chart__nothing_finite__is_empty(points: list[tuple[float, float]]) -> None:
    assert curve_chart(points, title="t", x_title="x") == ""


def test_curve_chart__one_point_or_a_constant__stays_inside() -> None:
    for points in ([(4.0, 0.0)], [(0.0, 2.0), (1.0, 2.0)]):
        for x, y in points_of(str(curve_chart(points, title="t", x_title="x"))):
            assert 0 < x < 360
            assert 0 < y < 210


@pytest.mark.parametrize("interval", [(0.5, np.nan, np.nan), (10.0, 7.0, 15.0), (0.5, -0.1, 0.7)])
def test_interval_chart__outside_of_its_scale__is_left_out(interval: tuple[float, float, float]) -> None:
    assert interval_chart(*interval) == ""
    assert "circle" in interval_chart(0.5, 0.4, 0.6)


@pytest.mark.parametrize(("threshold", "absent"), [(0.0, 0), (1.0, 1)])
def test_score_rows__threshold__decides_the_labels(binary: Ready, threshold: float, absent: int) -> None:
    table = read_table(binary.data / "test.csv")
    task, predictor = binary.segmentor.task_, binary.segmentor._predictor
    scored = score_rows(predictor, table, task, metrics=["iou"], threshold=threshold)
    assert scored.confusion.sum(axis=0)[absent] == 0
