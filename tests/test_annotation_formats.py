"""YOLO's text files, LabelMe's JSON files and pairs of folders as tables; and telling the formats apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from semseg_automl import read_annotations
from semseg_automl.data import yolo
from semseg_automl.data.annotations import annotation_format
from semseg_automl.data.images import read_mask, write_png
from semseg_automl.data.table import read_images, read_table
from semseg_automl.errors import DataError

SQUARE = "0.2 0.25 0.4 0.25 0.4 0.75 0.2 0.75"
"""Of an image of 8 x 10: columns 2 and 3, rows 2 to 5."""


def images(folder: Path, *names: str) -> None:
    for name in names:
        write_png(folder / name, np.zeros((8, 10, 3), np.uint8))


def masks(frame: pd.DataFrame) -> list[NDArray[Any]]:
    return [read_mask(label) for label in frame["label"]]


def names(frame: pd.DataFrame) -> list[str]:
    return [Path(path).name for path in frame["image"]]


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def yolo_set(tmp_path: Path) -> Path:
    """Parts train and val of three and one images, a data.yaml, labels of two classes."""
    images(tmp_path, *(f"images/train/{n}.png" for n in "abc"), "images/val/d.png")
    text(tmp_path / "labels/train/a.txt", f"1 {SQUARE}", "0 0 0 1 0 1 1 0 1", "")
    text(tmp_path / "labels/train/b.txt")
    text(tmp_path / "labels/val/d.txt", f"0 {SQUARE}")
    text(tmp_path / "data.yaml", "path: .", "train: images/train", "val: images/val", "names: {0: cat, 1: dog}")
    return tmp_path


def test_yolo__data_yaml__gives_index_plus_one_and_smaller_objects_on_top(yolo_set: Path) -> None:
    frame = read_annotations(yolo_set / "data.yaml")
    assert names(frame) == ["a.png", "b.png", "c.png"]
    assert frame.attrs["class_names"] == {0: "background", 1: "cat", 2: "dog"}
    assert frame.attrs["notes"] == ["these are the images of train in data.yaml"]
    expected = np.ones((8, 10), np.uint8)
    expected[2:6, 2:4] = 2
    first, empty, missing = masks(frame)
    np.testing.assert_array_equal(first, expected)
    assert not empty.any()
    assert not missing.any()
    mapped = read_annotations(yolo_set / "data.yaml", classes={"dog": 9, "cat": 4})
    assert np.unique(masks(mapped)[0]).tolist() == [4, 9]
    assert mapped.attrs["class_names"] == {0: "background", 4: "cat", 9: "dog"}


def test_yolo__splits__are_chosen_in_order(yolo_set: Path) -> None:
    assert names(read_annotations(yolo_set, split=("test", "val"))) == ["d.png"]
    assert names(read_annotations(yolo_set, split="train")) == ["a.png", "b.png", "c.png"]
    assert len(read_table(yolo_set / "data.yaml", split=("val",))) == 1
    assert len(read_images(yolo_set / "data.yaml")) == 1  # no test: the validation part
    with pytest.raises(DataError, match=r"no test; it has train, val\. Choose one with read_annotations\(\.\.\., s"):
        read_annotations(yolo_set, split="test")


@pytest.mark.parametrize(
    "lines",
    [
        ["train: ../images/train", "names: [cat, dog]"],
        ["path: ../datasets/mine", "train: images/train", "names: [cat, dog]"],
        ["path: /datasets/mine", "train: [images/train]", "names: [cat, dog]"],
        ["path: images", "train: train", "names: [cat, dog]"],
        ["train: train.txt", "names: [cat, dog]"],
    ],
)
def test_yolo__data_yaml_of_another_place__finds_what_is_inside_its_folder(yolo_set: Path, lines: list[str]) -> None:
    text(yolo_set / "train.txt", "./images/train/a.png", "images/train/b.png", "", "images/train/c.png")
    frame = read_annotations(text(yolo_set / "data.yaml", *lines))
    assert names(frame) == ["a.png", "b.png", "c.png"]
    assert masks(frame)[0][3, 3] == 2
    moved = text(yolo_set / "configs/data.yaml", *lines)
    text(yolo_set / "configs/train.txt", "../images/train/a.png", "../images/train/b.png", "../images/train/c.png")
    assert len(read_annotations(moved, images=yolo_set)) == 3
    with pytest.raises(DataError, match="not inside"):
        read_annotations(moved)


def test_yolo__images_and_labels_beside_each_other_or_in_one_folder__are_found(tmp_path: Path) -> None:
    images(tmp_path, "set/images/a.png", "set/images/b.png", "flat/a.png", "flat/b.png")
    text(tmp_path / "set/labels/a.txt", f"1 {SQUARE}")
    text(tmp_path / "set/classes.txt", "cat", "dog")
    text(tmp_path / "flat/a.txt", f"1 {SQUARE}")
    text(tmp_path / "flat/readme.txt", "about")
    for folder, dog in (("set", "dog"), ("flat", "class_1")):
        frame = read_annotations(tmp_path / folder)
        assert names(frame) == ["a.png", "b.png"]
        assert [int(mask.sum()) for mask in masks(frame)] == [16, 0]
        assert frame.attrs["class_names"][2] == dog
    apart = read_annotations(tmp_path / "set", images=tmp_path / "flat", format="yolo")
    assert [int(mask.sum()) for mask in masks(apart)] == [16, 0]
    with pytest.raises(DataError, match=r"classes= is given, but no data\.yaml or classes\.txt names the classes"):
        read_annotations(tmp_path / "flat", classes=["cat"])


def test_yolo__many_flaws__lists_them_all_at_once(yolo_set: Path) -> None:
    text(
        yolo_set / "labels/train/a.txt",
        "0 0.5 0.5 0.2 0.2",
        "0 0.1 0.1 0.2",
        "2 " + SQUARE,
        "cat " + SQUARE,
        "0.0 " + SQUARE,
        "-1 " + SQUARE,
        "0 0.1 x 0.2 0.2 0.3 0.3",
        "0 0.1 nan 0.2 0.2 0.3 0.3",
        "0 20 25 40 25 40 75",
        "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4",
        "0 0.99 0.5 1.04 0.5 1.04 0.9",
    )
    text(yolo_set / "labels/train/orphan.txt", "0 " + SQUARE)
    (yolo_set / "images/train/c.png").write_bytes(b"nothing")
    (yolo_set / "labels/train/b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError) as raised:
        read_annotations(yolo_set)
    told = str(raised.value)
    for line in (
        "a.txt, line 1: 5 numbers, which is a box",
        "a.txt, line 2: a polygon of 3 coordinates",
        "a.txt, line 3: the class 2, and the names go from 0 to 1",
        "a.txt, line 4: the class 'cat'; begin each line with the index",
        "a.txt, line 5: the class '0.0'",
        "a.txt, line 6: the class '-1'",
        "a.txt, line 7: could not convert string to float: 'x'; write numbers from 0 to 1",
        "a.txt, line 8: a polygon with a coordinate that is not finite",
        "a.txt, line 9: a polygon from (200, 200) to (400, 600) outside the image",
        "a.txt, line 10: a polygon of 7 coordinates",
        "b.txt: ",
        "c.png: ",
        "orphan.txt: labels without an image",
    ):
        assert f"\n- {line}" in told
    assert "13 problems" in told  # line 11 is outside by less than half a pixel


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["train: images/train"], "names is 'None'; list the names"),
        (["names: []", "train: images/train"], "names is"),
        (["names: {a: b}", "train: images/train"], "names has 'a': 'b'"),
        (["names: [[1]]", "train: images/train"], r"names has 0: '\[1\]'"),
        (["names: [a, b, c]"], "no train; it has none"),
        (["names: [a]", "train: ../../elsewhere"], r"train: \.\./\.\./elsewhere: not inside"),
        (["names: [a]", "train: /etc"], "train: /etc: not inside"),
        (["names: [a]", "train: labels/train"], "no images in train, labels/train"),
        (["names: [a]", "train: list.txt"], r"list\.txt, line 2: '/etc/passwd' is not inside"),
        (["names: [a]", "train: images/empty"], "none of 1 images has a text file of labels"),
        (["- 1"], r"no data\.yaml of YOLO"),
        (["a: ["], "no YAML"),
        (["!!python/object/apply:os.getcwd []"], "no YAML"),
    ],
)
def test_yolo__unusable_data_yaml__says_why(yolo_set: Path, lines: list[str], message: str) -> None:
    text(yolo_set / "list.txt", "images/train/a.png", "/etc/passwd", "../x.png")
    images(yolo_set, "images/empty/e.png")
    with pytest.raises(DataError, match=message):
        read_annotations(text(yolo_set / "data.yaml", *lines))


def test_yolo__too_many_names_or_bytes__are_refused(yolo_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolo, "_MAX_CLASSES", 1)
    with pytest.raises(DataError, match="2 names; at most 1"):
        read_annotations(yolo_set)
    monkeypatch.setattr(yolo, "_MAX_YAML_BYTES", 5)
    with pytest.raises(DataError, match="more than 5 bytes"):
        read_annotations(yolo_set)


def labelme(name: str, *shapes: dict[str, Any], **changes: Any) -> str:
    document = {"imagePath": name, "imageHeight": 8, "imageWidth": 10, "shapes": list(shapes), "imageData": None}
    return json.dumps(document | changes)


def shape(label: str, *points: tuple[float, float], kind: str = "polygon") -> dict[str, Any]:
    return {"label": label, "points": [list(point) for point in points], "shape_type": kind}


WHOLE = ((0, 0), (10, 8))


def test_labelme__folder__numbers_sorted_names_and_draws_in_order(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    text(
        tmp_path / "a.json",
        labelme(
            "a.png",
            shape("zebra", (1, 1), (4, 1), (4, 4), (1, 4)),
            shape("ant", *WHOLE, kind="rectangle"),
            shape("zebra", (6, 2), (8, 2), (8, 4), (6, 4), kind="rotation"),
            shape("_background_", (0, 7), (10, 8), kind="rectangle"),
            shape("__ignore__", (9, 0), (10, 8), kind="rectangle"),
        ),
    )
    text(tmp_path / "b.json", labelme("b.png", imageHeight=None, imageWidth=None))
    frame = read_annotations(tmp_path)
    assert frame.attrs["class_names"] == {0: "background", 1: "ant", 2: "zebra"}
    expected = np.ones((8, 10), np.int32)
    expected[2:4, 6:8] = 2
    expected[7] = 0
    expected[:, 9] = -1
    np.testing.assert_array_equal(masks(frame)[0], expected)
    assert masks(frame)[1].shape == (8, 10)
    ordered = read_annotations(tmp_path, classes=["zebra", "ant", "cow"])
    assert ordered.attrs["class_names"] == {0: "background", 1: "zebra", 2: "ant", 3: "cow"}
    assert masks(ordered)[0][0, 0] == 2
    with pytest.raises(DataError, match="label 'zebra': not among classes=, which are ant"):
        read_annotations(tmp_path, classes=["ant"])


def test_labelme__circle__has_its_area(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((40, 50), np.uint8))
    circle = shape("x", (25, 20), (25, 35), kind="circle")
    text(tmp_path / "a.json", labelme("a.png", circle, imageHeight=40, imageWidth=50))
    mask = masks(read_annotations(tmp_path / "a.json"))[0]
    assert mask.sum() == pytest.approx(np.pi * 225, rel=0.03)
    assert mask[20, 25] == 1


def test_labelme__test_folder_without_all_names__keeps_the_numbers_of_the_training(tmp_path: Path) -> None:
    for part, labels in (("train", ("cat", "dog")), ("test", ("dog",))):
        images(tmp_path, f"{part}/a.png")
        text(tmp_path / part / "a.json", labelme("a.png", *(shape(each, *WHOLE, kind="rectangle") for each in labels)))
    known = read_table(tmp_path / "train").class_names
    assert known == {0: "background", 1: "cat", 2: "dog"}
    table = read_table(tmp_path / "test", known=known)
    assert table.masks is not None
    assert (read_mask(table.masks[0]) == 2).all()
    with pytest.raises(DataError, match="numbers its classes otherwise: dog is 1 instead of 2"):
        read_table(read_annotations(tmp_path / "test"), known=known)


def test_labelme__images_in_their_own_folder__are_found(tmp_path: Path) -> None:
    images(tmp_path, "images/a.png", "images/b.png", "images/c.png")
    text(tmp_path / "annotations/a.json", labelme("../images/a.png"))
    text(tmp_path / "annotations/b.json", labelme("..\\images\\b.png"))
    text(tmp_path / "annotations/c.json", labelme("c.png"))
    for source in (tmp_path, tmp_path / "annotations"):
        assert names(read_annotations(source)) == ["a.png", "b.png", "c.png"]
    (tmp_path / "images").rename(tmp_path / "photos")
    text(tmp_path / "annotations/b.json", labelme("b.png"))
    text(tmp_path / "annotations/a.json", labelme("a.png"))
    assert len(read_annotations(tmp_path / "annotations", images=tmp_path / "photos")) == 3


def test_labelme__image_without_a_file__is_left_out_with_a_warning(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    text(tmp_path / "a.json", labelme("a.png", shape("x", *WHOLE, kind="rectangle")))
    with pytest.warns(UserWarning, match=r"1 images of .* are left out.*: b\.png"):
        frame = read_annotations(tmp_path)
    assert names(frame) == ["a.png"]
    assert "left out" in frame.attrs["notes"][0]


def test_labelme__many_flaws__lists_them_all_at_once(tmp_path: Path) -> None:
    images(tmp_path, "set/a.png", "set/b.png", "outside.png")
    text(
        tmp_path / "set/a.json",
        labelme(
            "a.png",
            shape("x", (1, 1), (2, 2)),
            shape("x", (1, 1), (2, 2), kind="line"),
            shape("", *WHOLE, kind="rectangle"),
            shape("x", (1, 1), kind="circle"),
            shape("x", (5, 4), (50, 4), kind="circle"),
            {"label": "x"},
            "shape",  # type: ignore[arg-type]
        ),
    )
    text(tmp_path / "set/b.json", labelme("../outside.png"))
    text(tmp_path / "set/c.json", labelme("a.png"))
    text(tmp_path / "set/d.json", labelme("d.png"))
    text(tmp_path / "set/e.json", labelme("b.png", imageHeight=10**9, imageWidth=10**9))
    text(tmp_path / "set/f.json", labelme("b.png", imagePath=5))
    text(tmp_path / "set/g.json", "{}")
    text(tmp_path / "set/h.json", "{")
    with pytest.raises(DataError) as raised:
        read_annotations(tmp_path / "set")
    told = str(raised.value)
    for line in (
        "a.json, shape 0: a polygon with 2 points",
        "a.json, shape 1: the shape_type 'line'; polygon, rectangle and circle",
        "a.json, shape 2: the label ''",
        "a.json, shape 3: a circle of 1 points that are not two pairs",
        "a.json, shape 4: a polygon from",
        "a.json, shape 5: its points are a NoneType",
        "a.json, shape 6: the label None",
        "b.json: imagePath '../outside.png' leads out of the folder of images",
        "c.json: a.png has two files",
        "d.json: its image 'd.png' is not in",
        "e.json: 1000000000 x 1000000000 pixels",
        "f.json: imagePath is 5",
        "g.json: no file of LabelMe",
        "h.json: ",
    ):
        assert f"\n- {line}" in told
    assert "14 problems" in told


@pytest.mark.parametrize("folder", ["masks", "labels", "annotations", "gt"])
@pytest.mark.parametrize("ending", ["", "_mask", "-GT", "_label", "_L"])
def test_pairs__any_usual_name__is_paired(tmp_path: Path, folder: str, ending: str) -> None:
    images(tmp_path, "images/a.png", "images/b.b.png")
    for name in ("a", "b.b"):
        write_png(tmp_path / folder / f"{name}{ending}.png", np.full((8, 10), 3, np.uint8))
    np.save(tmp_path / "images/c.npy", np.zeros((8, 10), np.uint8))
    np.save(tmp_path / folder / f"c{ending}.npy", np.full((8, 10), 3))
    frame = read_annotations(tmp_path)
    assert names(frame) == ["a.png", "b.b.png", "c.npy"]
    assert [Path(path).stem for path in frame["label"]] == [f"{name}{ending}" for name in ("a", "b.b", "c")]
    assert "class_names" not in frame.attrs
    assert all((mask == 3).all() for mask in masks(frame))


def test_pairs__name_that_ends_like_a_mask__pairs_with_the_whole_name_first(tmp_path: Path) -> None:
    images(tmp_path, "images/a.png", "images/a_mask.png", "masks/a_mask.png", "masks/a_mask_mask.png", "masks/a.png")
    with pytest.raises(DataError, match=r"a_mask\.png: 2 masks: a_mask\.png, a_mask_mask\.png; keep one"):
        read_annotations(tmp_path)
    (tmp_path / "masks/a_mask_mask.png").unlink()
    assert [Path(path).name for path in read_annotations(tmp_path)["label"]] == ["a.png", "a_mask.png"]


def test_pairs__many_flaws__lists_them_all_at_once(tmp_path: Path) -> None:
    images(tmp_path, *(f"images/{name}.png" for name in "abcd"), "masks/a.png", "masks/a_gt.png", "masks/d.png")
    images(tmp_path, "masks/b_mask.png", "masks/x.png")
    (tmp_path / "images/d.jpg").write_bytes(b"x")
    with pytest.raises(DataError) as raised:
        read_annotations(tmp_path)
    told = str(raised.value)
    for line in (
        "a.png: 2 masks: a.png, a_gt.png; keep one",
        "c.png: no mask of this name",
        "d: 2 images of this name: d.jpg, d.png; keep one",
        "x.png: a mask without an image",
    ):
        assert f"\n- {line}" in told
    assert "4 problems" in told


def test_pairs__parts__are_paired_each(tmp_path: Path) -> None:
    images(tmp_path, "images/train/a.png", "images/valid/b.png", "masks/train/a.png", "masks/valid/b.png")
    assert names(read_annotations(tmp_path)) == ["a.png"]
    assert names(read_annotations(tmp_path, split="val")) == ["b.png"]
    with pytest.raises(DataError, match="nor in a subfolder test"):
        read_annotations(tmp_path, split="test")
    images(tmp_path, "images/test/c.png")
    with pytest.raises(DataError, match="no subfolder test of masks"):
        read_annotations(tmp_path, split="test")


def test_pairs__real_folder__is_the_table_of_its_csv_files(shared: Callable[[str], Path]) -> None:
    folder = shared("data/aerial_road")
    rows = pd.concat([pd.read_csv(folder / f"{part}.csv") for part in ("train", "val", "test")])
    frame = read_annotations(folder)
    expected = {(str(folder / image), str(folder / label)) for image, label in rows[["image", "label"]].to_numpy()}
    assert set(zip(frame["image"], frame["label"], strict=True)) == expected
    with pytest.raises(DataError, match="classes= is given, but masks have no names"):
        read_annotations(folder, classes=["road"])


def test_format__several_in_one_folder__are_named(tmp_path: Path) -> None:
    images(tmp_path, "images/a.png", "masks/a.png")
    text(tmp_path / "labels/a.txt", f"0 {SQUARE}")
    with pytest.raises(DataError, match=r"several formats \(yolo in .*, pairs in .*\); name one with format="):
        annotation_format(tmp_path)
    assert isinstance(read_annotations(tmp_path, format="pairs")["label"][0], str)
    assert read_annotations(tmp_path, format="yolo").attrs["class_names"] == {0: "background", 1: "class_0"}
    images(tmp_path, "labels/a.png")
    with pytest.raises(DataError, match="one folder of masks is needed beside images; there is masks, labels"):
        read_annotations(tmp_path, format="pairs")


def test_format__each__is_recognised(yolo_set: Path, tmp_path: Path) -> None:
    assert annotation_format(yolo_set) == "yolo"
    assert annotation_format(yolo_set / "data.yaml") == "yolo"
    assert annotation_format(text(tmp_path / "me/a.json", labelme("a.png"))) == "labelme"
    assert annotation_format(tmp_path / "me") == "labelme"
    assert annotation_format(text(tmp_path / "co/a.json", '{"images": [], "annotations": []}')) == "coco"
    assert annotation_format(tmp_path / "co") == "coco"
    text(tmp_path / "co/b.json", "{}")
    with pytest.raises(DataError, match=r"2 JSON files, a\.json, b\.json; give the path of one"):
        annotation_format(tmp_path / "co")
