"""`check_data` and ``semseg-automl check``: a data set with every fault, one without, and the real ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from semseg_automl import DataReport, check_data, cli, draw_dataset
from semseg_automl.checking import MAX_PICTURES
from semseg_automl.data import survey as survey_module
from semseg_automl.data.images import write_png
from semseg_automl.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep notes out of the user's cache."""
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Draw a data set without a fault."""
    return draw_dataset(tmp_path / "drawn", kind="binary", train=8, val=3, test=3, size=(64, 80))


@pytest.fixture
def faulty(drawn: Path) -> Path:
    """Give a drawn data set one fault of each kind."""
    train, test = pd.read_csv(drawn / "train.csv"), pd.read_csv(drawn / "test.csv")
    (drawn / train["image"][0]).unlink()
    damaged = drawn / train["label"][1]
    damaged.write_bytes(damaged.read_bytes()[:-15])
    write_png(drawn / train["label"][2], np.zeros((20, 20), np.uint8))
    shutil.copy(drawn / train["image"][3], drawn / test["image"][0])
    picture = cv2.imread(str(drawn / train["image"][4]))
    assert picture is not None
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    (drawn / test["image"][1]).write_bytes(jpeg.tobytes())
    write_png(drawn / test["label"][2], np.full((64, 80), 9, np.uint8))
    return drawn


def check_folder(folder: Path) -> DataReport:
    return check_data(folder / "train.csv", folder / "val.csv", folder / "test.csv")


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a file was opened")


def scene(seed: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return cv2.resize(coarse, (48, 48), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def test_check_data__set_without_fault__is_ok_and_counts_everything(drawn: Path) -> None:
    report = check_folder(drawn)
    assert report.ok
    assert not (report.problems["level"] != "note").any()
    assert report.rows == {"train": (8, 8), "val": (3, 3), "test": (3, 3)}
    assert report.task is not None
    assert report.task.kind == "binary"
    assert report.sizes.values.tolist() == [["train", 64, 80, 8], ["val", 64, 80, 3], ["test", 64, 80, 3]]
    train = report.classes[report.classes["split"] == "train"]
    assert train["pixels"].sum() == 8 * 64 * 80
    assert train["pixel_share"].sum() == pytest.approx(1)
    assert train["objects"].isna().tolist() == [True, False]
    masks = [cv2.imread(str(drawn / path), cv2.IMREAD_GRAYSCALE) for path in pd.read_csv(drawn / "train.csv")["label"]]
    assert train["pixels"].tolist()[1] == sum(int((mask == 255).sum()) for mask in masks if mask is not None)
    text = str(report)
    assert "train: 8 rows; val: 3 rows; test: 3 rows" in text
    assert "foreground" in text
    assert "0 errors" in text


def test_check_data__set_with_every_fault__finds_each_with_its_row(faulty: Path) -> None:
    report = check_folder(faulty)
    errors = report.problems[report.problems["level"] == "error"]
    assert {(split, row, kind) for split, row, kind in errors[["split", "row", "kind"]].values.tolist()} == {
        ("train", 0, "missing file"),
        ("train", 1, "unreadable file"),
        ("train", 2, "size mismatch"),
        ("test", 0, "leak"),
        ("test", 1, "leak of a copy"),
        ("test", 2, "unknown value"),
    }
    assert not report.ok
    assert report.rows["train"] == (8, 5)
    assert list(report.problems.columns) == ["split", "row", "image", "level", "kind", "message"]
    levels = report.problems["level"].tolist()
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    text = str(report)
    for words in ("train: 8 rows, 5 usable", "error: leak of a copy", "9 (5120 pixels)", "correct the errors"):
        assert words in text


def test_check_data__second_time__opens_no_file_and_reports_the_same(
    faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check_data(faulty / "val.csv")
    monkeypatch.setattr(survey_module, "glance", refuse)
    monkeypatch.setattr(survey_module, "read_stored_mask", refuse)
    second = check_data(faulty / "val.csv")
    assert str(second) == str(first)
    assert second.notes == ()


def test_check_data__damaged_notes__goes_on_and_says_so_once(drawn: Path, own_cache: Path) -> None:
    check_folder(drawn)
    for path in (own_cache / "checks").iterdir():
        path.write_text("{")
    report = check_folder(drawn)
    assert report.ok
    assert len(report.notes) == 1
    assert str(report).count("every file was opened") == 1


def test_check_data__cache_folder_is_a_file__goes_on_and_says_so(drawn: Path, own_cache: Path) -> None:
    own_cache.write_text("no folder")
    report = check_data(drawn / "train.csv")
    assert report.ok
    assert "every file was opened" in str(report)


def test_check_data__arrays_with_an_index_of_names__are_checked(own_cache: Path) -> None:
    masks = [np.zeros((48, 48), np.uint8) for _ in range(3)]
    for shift, mask in enumerate(masks):
        mask[5 + shift : 20, 4:30] = 1
    frame = pd.DataFrame({"x": [scene(0), scene(1), scene(0)], "y": masks}, index=["a", "b", "c"])
    report = check_data(frame, image="x", label="y")
    found = report.problems[report.problems["level"] == "warning"]
    assert found[["row", "kind"]].values.tolist() == [["c", "conflicting masks"]]
    assert not own_cache.exists() or not any((own_cache / "checks").iterdir())


def test_check_data__no_usable_row__is_reported_not_raised(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ["gone.png"], "label": ["gone_too.png"]})
    report = check_data(frame, base_dir=tmp_path)
    assert set(report.problems["kind"]) == {"missing file", "no usable row"}
    assert report.task is None
    assert len(report.classes) == len(report.sizes) == 0
    assert "no usable row" in str(report)
    report.write_html(tmp_path / "page.html")


def test_check_data__one_class_only__is_reported_not_raised() -> None:
    frame = pd.DataFrame({"image": [scene(0), scene(1)], "label": [np.zeros((48, 48), np.uint8)] * 2})
    report = check_data(frame)
    assert report.problems["kind"].tolist() == ["classes not understood"]
    assert not report.ok


def test_check_data__value_only_in_validation__is_an_error() -> None:
    low, high = np.zeros((48, 48), np.uint8), np.zeros((48, 48), np.uint8)
    low[5:25, 5:25], high[5:25, 5:25] = 1, 2
    train = pd.DataFrame({"image": [scene(0)], "label": [low]})
    report = check_data(train, pd.DataFrame({"image": [scene(1)], "label": [high]}))
    errors = report.problems[report.problems["level"] == "error"]
    assert errors["kind"].tolist() == ["class not trained"]
    assert "value 2" in errors["message"].iloc[0]


def test_check_data__smoothed_masks__warns_and_measures_objects_all_the_same() -> None:
    images, masks = [scene(seed) for seed in range(6)], []
    for shift in range(6):
        mask = np.zeros((96, 96), np.uint8)
        mask[10 + shift : 40, 20:60] = 255
        mask[60:90, 50:80] = 255
        masks.append(cv2.resize(cv2.GaussianBlur(mask, (5, 5), 0), (48, 48), interpolation=cv2.INTER_LINEAR))
    report = check_data(pd.DataFrame({"image": images, "label": masks}))
    assert report.task is not None
    assert report.task.snapped
    assert "smoothed masks" in set(report.problems["kind"])
    assert report.classes["objects"].tolist()[1] == 12


def test_check_data__smoothed_training_masks_and_foreign_test_mask__is_an_error_not_raised() -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[10:40, 10:30] = 255
    soft = [cv2.GaussianBlur(np.roll(mask, shift, 0), (7, 7), 0) for shift in range(4)]
    train = pd.DataFrame({"image": [scene(seed) for seed in range(4)], "label": soft})
    report = check_data(train, test=pd.DataFrame({"image": [scene(9)], "label": [np.full((48, 48), 700, np.uint16)]}))
    assert report.task is not None
    assert report.task.snapped
    errors = report.problems[report.problems["level"] == "error"]
    assert errors[["split", "kind"]].values.tolist() == [["test", "unknown value"]]


def test_check_data__class_names_that_came_with_the_table__are_used() -> None:
    masks = [np.zeros((48, 48), np.uint8) for _ in range(2)]
    for value, mask in enumerate(masks, start=1):
        mask[5:25, 5:25] = value
    frame = pd.DataFrame({"image": [scene(0), scene(1)], "label": masks})
    frame.attrs["class_names"] = {0: "ground", 1: "cat", 2: "dog"}
    assert check_data(frame).classes["name"].tolist() == ["ground", "cat", "dog"]


def test_check_data__input_size__decides_which_objects_are_small(drawn: Path) -> None:
    whole = check_data(drawn / "train.csv", input_size=(64, 80))
    tiny = check_data(drawn / "train.csv", input_size=(4, 4))
    assert whole.classes["small_objects"].sum() < tiny.classes["small_objects"].sum()
    assert whole.input_size == (64, 80)


@pytest.mark.parametrize("size", [(0, 64), (64,), (64, 64, 3)])
def test_check_data__input_size_of_another_shape__is_refused(drawn: Path, size: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="input_size"):
        check_data(drawn / "train.csv", input_size=size)  # type: ignore[arg-type]


def test_check_data__tables_that_cannot_be_read__raise(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        check_data(pd.DataFrame({"image": [], "label": []}))
    with pytest.raises(DataError, match="label"):
        check_data(drawn / "train.csv", label="lable")
    with pytest.raises(DataError, match="no such file"):
        check_data(tmp_path / "gone.csv")


def test_write_html__more_findings_than_pictures__shows_every_kind(tmp_path: Path) -> None:
    count = MAX_PICTURES + 10
    mask = np.zeros((48, 48), np.uint8)
    mask[3:30, 3:30] = 1
    masks = [np.zeros((48, 48), np.uint8)] * count + [mask] * 2
    images = [scene(seed) for seed in range(count + 1)]
    report = check_data(pd.DataFrame({"image": [*images, images[0]], "label": masks}), path=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert (report.problems["kind"] == "empty mask").sum() == count
    assert page.count("<img ") <= MAX_PICTURES
    assert page.count("<img ") >= MAX_PICTURES - 1
    for kind in ("empty mask", "conflicting masks"):
        assert f'">{kind}</strong>' in page


def test_cli__check__prints_writes_the_page_and_fails_on_errors(faulty: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "check.html"
    arguments = ["check", str(faulty / "train.csv"), "--val", str(faulty / "val.csv")]
    arguments += ["--test", str(faulty / "test.csv"), "--html", str(page)]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "error: leak" in result.output
    assert page.read_text().startswith("<!doctype html>")
    fine = CliRunner().invoke(cli.app, ["check", str(faulty / "val.csv")], catch_exceptions=False)
    assert fine.exit_code == 0
    assert "0 errors" in fine.output


@pytest.mark.parametrize(
    ("name", "split", "row", "kind"),
    [
        ("road_crack", "train", 49, "repeated mask"),
        ("ultrasound_nerve", "test", 3, "leak of a copy"),
        ("kvasir_polyp", "train", 173, "near duplicate"),
    ],
)
def test_check_data__real_data__finds_what_is_wrong_with_it(
    shared: Callable[[str], Path], name: str, split: str, row: int, kind: str
) -> None:
    folder = shared(f"data/{name}")
    found = check_folder(folder).problems
    rows = found[~found["kind"].isin(["unusual share", "small objects", "near duplicate", "empty mask"])]
    assert len(rows) == (0 if kind == "near duplicate" else 1)
    assert ((found["split"] == split) & (found["row"] == row) & (found["kind"] == kind)).any()


def test_report__file_name_that_is_no_text__can_be_printed_and_written(drawn: Path) -> None:
    frame = pd.read_csv(drawn / "train.csv").map(lambda cell: str(drawn / cell))
    frame.loc[0, "image"] = f"{drawn}/\udcff\x1b[31mgone.png"
    report = check_data(frame, path=drawn / "check.html")
    assert "gone.png" in str(report)
    assert "\x1b" not in str(report)
    str(report).encode("utf-8")
    assert "gone.png" in (drawn / "check.html").read_text(encoding="utf-8")


def test_check_data__what_is_said_of_the_classes__counts_as_in_fit(tmp_path: Path) -> None:
    frame = _coloured(tmp_path)
    names = {"#000000": "ground", "#ff0000": "roof", "#0000ff": "void"}
    report = check_data(frame, color_map=names, input_size=(64, 64))
    assert report.task is not None
    assert (report.task.class_names, report.task.ignore_values) == (("ground", "roof"), (0x0000FF,))
    report = check_data(frame, ignore_label="#0000ff", input_size=(64, 64))
    assert report.task is not None
    assert report.task.labels == ("#000000", "#ff0000")
    for wrong, message in (
        ({"num_classes": 2}, "3 colours"),
        ({"class_names": ["a", "b"]}, "3 colours"),
        ({"color_map": {"#000000": "a", "#ff0000": "b"}}, "#0000ff"),
    ):
        report = check_data(frame, input_size=(64, 64), **wrong)
        assert not report.ok
        assert message in report.problems.set_index("kind")["message"]["classes not understood"]
    with pytest.raises(DataError, match="color_map cannot be read"):
        check_data(frame, color_map=tmp_path / "none.csv")


def test_cli__check_with_color_map_and_ignore_label__passes_them_on(tmp_path: Path) -> None:
    _coloured(tmp_path).to_csv(tmp_path / "train.csv", index=False)
    (tmp_path / "map.csv").write_text("ground,0,0,0\nroof,255,0,0\nwater,0,0,255\n", encoding="utf-8")
    command = ["check", str(tmp_path / "train.csv")]
    result = CliRunner().invoke(cli.app, [*command, "--color-map", str(tmp_path / "map.csv")])
    assert "#0000ff = water" in result.output
    result = CliRunner().invoke(cli.app, [*command, "--ignore-label", "#0000ff"])
    assert "ignored: #0000ff" in result.output


def test_check_data__annotations_with_parts__reads_the_part_of_each(tmp_path: Path) -> None:
    for part, shade in (("train", 40), ("val", 90), ("test", 160)):
        (tmp_path / "images" / part).mkdir(parents=True)
        (tmp_path / "labels" / part).mkdir(parents=True)
        for row in range(2):
            write_png(tmp_path / "images" / part / f"{part}{row}.png", np.full((24, 32), shade + 20 * row, np.uint8))
            (tmp_path / "labels" / part / f"{part}{row}.txt").write_text("0 .1 .1 .6 .1 .6 .7\n", encoding="utf-8")
    parts = "".join(f"{part}: images/{part}\n" for part in ("train", "val", "test"))
    (tmp_path / "data.yaml").write_text(f"names: [tree]\n{parts}", encoding="utf-8")
    source = tmp_path / "data.yaml"
    report = check_data(source, source, source, input_size=(64, 64))
    assert report.rows == {"train": (2, 2), "val": (2, 2), "test": (2, 2)}
    assert report.task is not None
    assert report.task.class_names == ("background", "tree")
    assert "leak" not in set(report.problems["kind"])


def _coloured(folder: Path) -> pd.DataFrame:
    """Four rows whose masks are black, red and blue."""
    rows = []
    for row in range(4):
        rng = np.random.default_rng(row)
        mask = np.zeros((24, 32, 3), np.uint8)
        mask[4 + row : 14, 3:12, 0] = 255
        mask[15:22, 12 + row : 28, 2] = 255
        write_png(folder / f"i{row}.png", rng.integers(0, 255, (24, 32, 3)).astype(np.uint8))
        write_png(folder / f"m{row}.png", mask)
        rows.append({"image": str(folder / f"i{row}.png"), "label": str(folder / f"m{row}.png")})
    return pd.DataFrame(rows)
