"""Tables in every form people have them, the check of all rows at once, and the hold-out split."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from semseg_automl.data.checks import RowCheck, check_rows
from semseg_automl.data.images import write_png
from semseg_automl.data.table import MaskTable, read_images, read_table
from semseg_automl.errors import DataError
from semseg_automl.task import infer_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of 8 x 10 with masks, and a table of them; image i has i foreground pixels of value 255."""
    rows = []
    for i in range(6):
        mask = np.zeros(80, np.uint8)
        mask[:i] = 255
        write_png(tmp_path / f"images/{i}.png", np.full((8, 10, 3), 40 * i, np.uint8))
        write_png(tmp_path / f"masks/{i}.png", mask.reshape(8, 10))
        rows.append({"image": f"images/{i}.png", "label": f"masks/{i}.png"})
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    return tmp_path


@pytest.mark.parametrize(
    "index",
    [
        [10, 20, 30, 40, 50, 60],
        list("abcdef"),
        ["same"] * 6,
        pd.date_range("2026-01-01", periods=6),
        pd.MultiIndex.from_product([["x", "y"], [1, 2, 3]]),
    ],
)
def test_read_table__any_index__is_kept(folder: Path, index: Any) -> None:
    frame = pd.read_csv(folder / "train.csv").set_index(pd.Index(index))
    table = read_table(frame, base_dir=folder)
    assert len(table) == 6
    pd.testing.assert_index_equal(table.index, frame.index)
    assert table.images[4] == str(folder / "images/4.png")
    assert table.masks is not None
    assert table.masks[4] == str(folder / "masks/4.png")
    assert table.row_name(4) == f"row {frame.index[4]} ({folder / 'images/4.png'})"
    assert len(check_rows(table)) == 6


def test_read_table__relative_paths__start_at_base_dir_or_the_csv_or_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = str(folder / "images/0.png")
    assert read_table(folder / "train.csv").images[0] == expected
    assert read_table(str(folder / "train.csv"), base_dir="/elsewhere").images[0] == "/elsewhere/images/0.png"
    frame = pd.DataFrame({"image": [expected, Path("images/0.png")], "label": ["masks/0.png"] * 2})
    assert read_table(frame, base_dir=folder).images == (expected, expected)
    monkeypatch.chdir(folder)
    here = read_table(frame)
    assert here.images[1] == "images/0.png"
    assert len(check_rows(here)) == 2


def test_read_table__names_like_numbers__stay_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label,note\n007,1e5,3\n")
    table = read_table(tmp_path / "t.csv")
    assert table.images == (str(tmp_path / "007"),)
    assert table.masks == (str(tmp_path / "1e5"),)


def test_read_table__arrays_and_pillow_images_in_cells__are_taken(folder: Path) -> None:
    image, mask = np.zeros((4, 5, 3), np.uint8), np.eye(4, 5, dtype=np.uint8)
    frame = pd.DataFrame({"image": [image, Image.fromarray(image)], "label": [mask, Image.fromarray(mask)]})
    table = read_table(frame)
    assert table.row_name(0) == "row 0 (array in memory)"
    assert table.row_name(1) == "row 1 (Pillow image in memory)"
    assert [(check.size, check.value_counts) for check in check_rows(table)] == [((4, 5), {0: 16, 1: 4})] * 2


def test_read_table__other_column_names__are_used(folder: Path) -> None:
    frame = pd.read_csv(folder / "train.csv").rename(columns={"image": "photo", "label": "truth"})
    table = read_table(frame, image_column="photo", label_column="truth", base_dir=folder)
    assert len(check_rows(table)) == 6


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"images": ["a"], "label": ["b"]}, "no column 'image'; did you mean 'images'.*columns are images, label"),
        ({"image": ["a"], 7: ["b"]}, "no column 'label'; its columns are image, 7"),
        ({"image": [], "label": []}, "the DataFrame has no rows"),
        ({}, "the DataFrame has no rows"),
        ({"image": ["a", None, "", "c"], "label": ["b"] * 4}, "column 'image' of the DataFrame is empty in rows 1, 2;"),
        ({"image": ["a"] * 3, "label": ["b", np.nan, pd.NA]}, "column 'label' of the DataFrame is empty in rows 1, 2;"),
        ({"image": ["a", 5], "label": ["b"] * 2}, r"holds no image in row 1 \(int\); use paths"),
        ({"image": ["a"] * 30, "label": [None] * 30}, r"rows 0, 1, .* 19 and 10 more"),
    ],
)
def test_read_table__unusable_frame__says_why(frame: dict[Any, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(pd.DataFrame(frame))


def test_read_table__column_named_twice__raises() -> None:
    frame = pd.DataFrame([["a", "b", "c"]], columns=["image", "image", "label"])
    with pytest.raises(DataError, match="2 columns named 'image'"):
        read_table(frame)


def test_read_table__unusable_csv__says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text("image,label\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00image")
    for name, message in {
        "missing.csv": r"missing\.csv: no such file",
        "empty.csv": r"empty\.csv: cannot be read as a CSV file",
        "header.csv": r"header\.csv has no rows",
        "binary.csv": r"binary\.csv: cannot be read as a CSV file",
        ".": "no annotations that are read here",
    }.items():
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / name)
    with pytest.raises(DataError, match="a table of type list; pass a pandas DataFrame"):
        read_table([1])  # type: ignore[arg-type]


def test_read_table__masks_not_required__are_read_only_where_there_is_a_column(folder: Path) -> None:
    frame = pd.read_csv(folder / "train.csv")
    assert read_table(frame, require_masks=False).masks is not None
    assert read_table(frame[["image"]], require_masks=False).masks is None


def test_take__positions__keep_rows_and_index_together(folder: Path) -> None:
    table = read_table(pd.read_csv(folder / "train.csv").set_index(pd.Index(list("abcdef"))), base_dir=folder)
    taken = table.take(np.array([4, 1]))
    assert list(taken.index) == ["e", "b"]
    assert taken.images == (table.images[4], table.images[1])
    assert taken.masks is not None
    assert taken.masks[0] == str(folder / "masks/4.png")
    assert table.take([]).images == ()


def test_mask_table__unequal_lengths__raise() -> None:
    with pytest.raises(DataError, match="2 images, 1 index values and no masks"):
        MaskTable(images=("a", "b"), masks=None, index=pd.RangeIndex(1))


def test_read_images__every_form__gives_the_same_images(folder: Path) -> None:
    paths = [str(folder / f"images/{i}.png") for i in range(6)]
    frame = pd.read_csv(folder / "train.csv")
    forms: list[Any] = [folder / "train.csv", folder / "images", str(folder / "images"), paths, tuple(map(Path, paths))]
    for form in forms:
        table = read_images(form)
        assert table.images == tuple(paths)
        assert table.masks is None
    assert read_images(frame, base_dir=folder).images == tuple(paths)
    assert read_images("images", base_dir=folder).images == tuple(paths)
    assert read_images([f"images/{i}.png" for i in range(6)], base_dir=folder).images == tuple(paths)
    series = pd.Series(paths, index=list("abcdef"))
    assert list(read_images(series).index) == list("abcdef")
    assert read_images(frame[["image"]].set_index(pd.Index(range(9, 3, -1)))).index[0] == 9


def test_read_images__single_image__is_one_row(folder: Path) -> None:
    array = np.zeros((4, 5, 3), np.uint8)
    for source in (folder / "images/0.png", str(folder / "images/0.png"), array, Image.fromarray(array)):
        table = read_images(source)
        assert len(table) == 1
        assert list(table.index) == [0]


def test_read_images__bad_paths_in_a_list__are_rows_for_later(folder: Path) -> None:
    table = read_images(["gone.png", folder / "images", folder / "images/0.png"])
    assert len(table) == 3
    with pytest.raises(DataError, match="2 rows of 3 cannot be used"):
        check_rows(table)


def test_read_images__folder__is_sorted_and_takes_images_only(folder: Path) -> None:
    (folder / "images/notes.txt").touch()
    (folder / "images/sub.png").mkdir()
    write_png(folder / "images/B.PNG", np.zeros((3, 3), np.uint8))
    names = [os.path.basename(str(p)) for p in read_images(folder / "images").images]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "B.PNG"]


def test_read_images__nothing_to_read__says_why(tmp_path: Path) -> None:
    for source, message in (
        (tmp_path, "no images in this folder .*suffixes looked for are"),
        ([], "an empty list of images"),
        (pd.DataFrame({"image": []}), "has no rows"),
        (pd.DataFrame({"img": ["a"]}), "no column 'image'"),
        (5, "images of type int; pass a DataFrame"),
        ([None], "the list is empty in row 0"),
        ([5], r"the list holds no image in row 0 \(int\)"),
    ):
        with pytest.raises(DataError, match=message):
            read_images(source)


def test_check_rows__good_rows__gives_sizes_and_counts_in_order(folder: Path) -> None:
    table = read_table(folder / "train.csv")
    checks = check_rows(table, workers=3)
    assert [check.size for check in checks] == [(8, 10)] * 6
    assert [check.value_counts.get(255, 0) for check in checks] == list(range(6))
    assert checks[2].value_counts == {0: 78, 255: 2}
    assert checks == check_rows(table, workers=1, progress=True)
    assert infer_task([check.value_counts for check in checks]).values == (0, 255)


def test_check_rows__without_masks__opens_the_images_only(folder: Path) -> None:
    checks = check_rows(read_images(folder / "images"))
    assert checks[0] == RowCheck(size=(8, 10), value_counts={})


def test_check_rows__values_beyond_eight_bits__are_counted() -> None:
    mask = np.array([[-1, 0], [70_000, 70_000]])
    frame = pd.DataFrame({"image": [np.zeros((2, 2), np.uint8)], "label": [mask]})
    assert check_rows(read_table(frame))[0].value_counts == {-1: 1, 0: 1, 70_000: 2}


def test_check_rows__many_bad_rows__are_all_named_in_one_error(folder: Path) -> None:
    (folder / "images/0.png").unlink()
    cut = (folder / "images/1.png").read_bytes()[:60]
    (folder / "images/1.png").write_bytes(cut)
    write_png(folder / "masks/2.png", np.zeros((5, 10), np.uint8))
    (folder / "masks/3.png").write_text("no image")
    write_png(folder / "masks/4.png", np.zeros((10, 8), np.uint8))
    table = read_table(pd.read_csv(folder / "train.csv").set_index(pd.Index(list("abcdef"))), base_dir=folder)
    with pytest.raises(DataError) as caught:
        check_rows(table)
    head, *lines = str(caught.value).splitlines()
    assert head == "5 rows of 6 cannot be used; correct or remove:"
    assert len(lines) == 5
    for line, (row, bad, problem) in zip(
        lines,
        [
            ("a", "images/0.png", "no such file; check the path"),
            ("b", "images/1.png", "truncated or damaged"),
            ("c", "masks/2.png", "the mask is 5 x 10 pixels but the image 8 x 10 (height x width); make the sizes"),
            ("d", "masks/3.png", "not an image that is read here"),
            ("e", "masks/4.png", "(turned: see the EXIF orientation of both)"),
        ],
        strict=True,
    ):
        assert line.startswith(f"- row {row} ({folder}/images/")
        assert bad in line
        assert problem in line


def test_check_rows__more_bad_rows_than_are_listed__counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as caught:
        check_rows(read_images([f"gone/{i}.png" for i in range(25)]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "25 rows of 25 cannot be used; correct or remove:"
    assert len(lines) == 22
    assert lines[-1] == "- ... and 5 more rows"


@pytest.mark.parametrize(
    ("name", "values", "ignored"),
    [("kvasir_polyp", (0, 255), ()), ("camvid", tuple(range(11)), (255,)), ("ultrasound_nerve", (0, 1, 2), ())],
)
def test_tables__of_real_data__are_read_checked_and_explained(
    shared: Callable[[str], Path], name: str, values: tuple[int, ...], ignored: tuple[int, ...]
) -> None:
    table = read_table(shared(f"data/{name}/val.csv"))
    task = infer_task([check.value_counts for check in check_rows(table)])
    assert (task.values, task.ignore_values) == (values, ignored)
