"""COCO's JSON as a table: values, names, order, every flaw at once, and a fit on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from semseg_automl import SemanticSegmentor, cli, draw_dataset, read_annotations
from semseg_automl.data import annotated
from semseg_automl.data.annotated import check_names, class_values, named
from semseg_automl.data.images import read_mask, write_png
from semseg_automl.data.table import read_images, read_table
from semseg_automl.errors import ConfigError, DataError

SMALL: dict[str, Any] = {
    "model.input_size": 64,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "flip",
}


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def coco(**changes: Any) -> dict[str, Any]:
    """Two images of 8 x 10 with three objects of two categories, and an empty one."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 10} for i in (1, 2, 3)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 10, "image_id": 1, "category_id": 3, "segmentation": [square(1, 1, 2)]},
            {"id": 11, "image_id": 1, "category_id": 7, "segmentation": [square(0, 0, 5)]},
            {"id": 12, "image_id": 2, "category_id": 7, "iscrowd": 1, "segmentation": {"size": [8, 10], "counts": "8"}},
        ],
    } | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, in a folder of images."""
    for i in (1, 2, 3):
        write_png(tmp_path / f"images/{i}.png", np.full((8, 10, 3), 40 * i, np.uint8))
    return tmp_path


def written(folder: Path, document: Any, name: str = "annotations.json") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def masks(frame: pd.DataFrame) -> list[NDArray[Any]]:
    return [read_mask(label) for label in frame["label"]]


def test_read_annotations__coco__keeps_ids_and_draws_smaller_objects_last(folder: Path) -> None:
    document = coco()
    document["annotations"][2]["segmentation"]["counts"] = [8, 12, 60]
    frame = read_annotations(written(folder, document))
    assert [Path(path).name for path in frame["image"]] == ["1.png", "2.png", "3.png"]
    assert frame.attrs["class_names"] == {0: "background", 3: "cat", 7: "dog"}
    first, second, third = masks(frame)
    expected = np.zeros((8, 10), np.uint8)
    expected[:5, :5] = 7
    expected[1:3, 1:3] = 3
    np.testing.assert_array_equal(first, expected)
    assert (second[:, 1] == 7).all()
    assert second.sum() == 7 * 12
    assert not third.any()  # nothing was annotated: all background, and it counts
    assert str(frame["label"][2]) == "annotations.json, 3.png"


def test_read_annotations__category_0__shifts_all_by_one_and_says_so(folder: Path) -> None:
    document = coco(categories=[{"id": 0, "name": "cat"}, {"id": 2, "name": "cat"}])
    for annotation in document["annotations"]:
        annotation["category_id"] = 0
    document["annotations"][2]["segmentation"]["counts"] = [0, 80]
    frame = read_annotations(written(folder, document))
    assert frame.attrs["class_names"] == {0: "background", 1: "cat", 3: "cat (3)"}
    assert masks(frame)[1].tolist() == [[1] * 10] * 8
    assert "one is added to the category ids" in frame.attrs["notes"][0]


def test_read_annotations__classes__number_the_names(folder: Path) -> None:
    document = coco(annotations=coco()["annotations"][:2])
    path = written(folder, document)
    listed = read_annotations(path, classes=["dog", "cat", "cow"])
    assert listed.attrs["class_names"] == {0: "background", 1: "dog", 2: "cat"}
    assert np.unique(masks(listed)[0]).tolist() == [0, 1, 2]
    mapped = read_annotations(path, classes={"cat": 500, "dog": 255})
    assert np.unique(masks(mapped)[0]).tolist() == [0, 255, 500]
    with pytest.raises(DataError, match=r"annotation 11: the category 'dog', which classes= does not name"):
        read_annotations(path, classes=["cat"])


@pytest.mark.parametrize("place", ["annotations.json", "annotations/instances_val.json", "images/_a.coco.json"])
def test_read_annotations__json_anywhere_near__finds_the_images(folder: Path, place: str) -> None:
    path = written(folder, coco(annotations=[]), place)
    frame = read_annotations(path)
    assert list(frame["image"]) == [str(folder / f"images/{i}.png") for i in (1, 2, 3)]
    elsewhere = written(folder, coco(annotations=[]), "far/deep.json").rename(folder / "deep.json")
    assert list(read_annotations(elsewhere, images=folder / "images")["image"]) == list(frame["image"])


def test_read_annotations__folder_of_images_and_one_json__is_coco(folder: Path) -> None:
    written(folder, coco(annotations=[]), "images/_annotations.coco.json")
    assert len(read_annotations(folder / "images")) == 3
    assert len(read_annotations(folder / "images", format="coco")) == 3


def test_read_annotations__no_sizes_in_the_json__takes_them_from_the_images(folder: Path) -> None:
    document = coco(annotations=coco()["annotations"][:2])
    for image in document["images"]:
        del image["height"], image["width"]
    assert [label.size for label in read_annotations(written(folder, document))["label"]] == [(8, 10)] * 3


def test_read_annotations__many_flaws__lists_them_all_at_once(folder: Path) -> None:
    document = coco()
    document["images"] += [
        {"id": 4, "file_name": "4.png", "height": 8, "width": 10},
        {"id": 5, "file_name": "../../5.png", "height": 8, "width": 10},
        {"id": 6, "file_name": "/etc/passwd", "height": 8, "width": 10},
        {"id": 7, "file_name": "1.png", "height": 8, "width": 10},
        {"id": 8, "height": 8, "width": 10},
        "nine",
    ]
    document["annotations"] += [
        {"id": 13, "image_id": 99, "category_id": 3, "segmentation": [square(1, 1, 2)]},
        {"id": 14, "image_id": 1, "category_id": 4, "segmentation": [square(1, 1, 2)]},
        {"id": 15, "image_id": 1, "category_id": 3, "segmentation": [square(1, 1, 30)]},
        {"id": 16, "image_id": 1, "category_id": 3, "segmentation": [[1, 1, 2, 2]]},
        {"id": 17, "image_id": 1, "category_id": 3, "segmentation": [[1, 1, 2, 2, float("nan"), 3]]},
        {"id": 18, "image_id": 1, "category_id": 3, "segmentation": []},
        {"id": 19, "image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2]},
        {"id": 20, "image_id": 1, "category_id": 3, "segmentation": {"size": [10, 8], "counts": [80]}},
        {"id": 21, "image_id": 4, "category_id": 3, "segmentation": [square(1, 1, 2)]},
    ]
    with pytest.raises(DataError) as raised:
        read_annotations(written(folder, document))
    text = str(raised.value)
    assert text.startswith(f"{folder / 'annotations.json'} cannot be used, 15 problems; correct or remove:")
    for line in (
        f"image 4: {folder / 'images/4.png'} is not on disk",
        "image 5: the file_name '../../5.png' leads out of the folder of images",
        "image 6: the file_name '/etc/passwd' leads out of the folder of images",
        "image 7: '1.png' or its id is there twice, also as image 1",
        "image 8: the id 8 and the file_name None",
        "image at position 8: a str instead of an object",
        "annotation 12: its counts sum to",
        "annotation 13: the image_id 99, which no image has",
        "annotation 14: the category_id 4, which no category has",
        "annotation 15: a polygon from (1, 1) to (31, 31) outside the image of 10 x 8",
        "annotation 16: a polygon with 2 points",
        "annotation 17: a polygon with a coordinate that is not finite",
        "annotation 18: no segmentation",
        "annotation 19: no segmentation",
        "annotation 20: run lengths of the size [10, 8], but the image is [8, 10]",
    ):
        assert f"\n- {line}" in text
    assert "annotation 21" not in text  # its image is on the list


def test_read_annotations__more_flaws_than_are_listed__are_counted(folder: Path) -> None:
    bad = [{"id": i, "image_id": 99} for i in range(30)]
    with pytest.raises(DataError, match=r"30 problems(.|\n)*annotation 19(.|\n)*\.\.\. and 10 more") as raised:
        read_annotations(written(folder, coco(annotations=bad)))
    assert "annotation 20" not in str(raised.value)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 10**6, "width": 10**6}, "1000000 x 1000000 pixels .* are more than the"),
        ({"height": 0, "width": 10}, "height 0 and width 10; give both as positive whole numbers"),
        ({"height": 8.5, "width": 10}, r"height 8\.5 and width 10"),
        ({"height": None, "width": 10}, "height None and width 10"),
    ],
)
def test_read_annotations__impossible_size__is_refused(folder: Path, size: dict[str, Any], message: str) -> None:
    document = coco(annotations=[])
    document["images"][1] |= size
    with pytest.raises(DataError, match=f"image 2: '2.png': {message}"):
        read_annotations(written(folder, document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": []}, "no list of categories"),
        ({"categories": [{"id": -1, "name": "a"}]}, "category at position 0: the id -1"),
        ({"categories": [{"id": 2**40, "name": "a"}]}, "category at position 0: the id 1099511627776"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "the id 1 is also a's"),
        ({"categories": ["cat"]}, "category at position 0: the id None"),
        ({"images": []}, "names no image"),
        ({"images": {}}, "neither COCO .* nor LabelMe"),
    ],
)
def test_read_annotations__unusable_lists__say_why(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_annotations(written(folder, coco(annotations=[], **changes)))


def test_read_annotations__images_nowhere__says_where_it_looked(tmp_path: Path) -> None:
    path = written(tmp_path, coco())
    with pytest.raises(DataError, match=r"such as '1\.png', is on disk; looked in .*images.*Give their folder as"):
        read_annotations(path)
    with pytest.raises(DataError, match=r"images=nowhere: no such folder"):
        read_annotations(path, images="nowhere")


def test_read_annotations__no_json_or_too_large__says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "a.json"
    for content, message in (
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "it has list"),
        (b'{"a": 1}', "it has a"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_annotations(path)
    with pytest.raises(DataError, match="not COCO's annotations"):
        read_annotations(path, format="coco")
    monkeypatch.setattr(annotated.read_text, "__defaults__", (4,))
    with pytest.raises(DataError, match="more than 4 bytes"):
        read_annotations(path)


def test_read_annotations__nothing_that_is_known__lists_what_is(folder: Path) -> None:
    (folder / "a.txt").write_text("x")
    for source, message in (
        (folder / "missing.json", "no such file or folder"),
        (folder / "a.txt", "annotations of this kind are not read; give a JSON file of COCO, a data.yaml of YOLO"),
        (folder, "no annotations that are read here"),
    ):
        with pytest.raises(DataError, match=message):
            read_annotations(source)
    with pytest.raises(DataError, match="annotations of type int"):
        read_annotations(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="format is 'voc'; allowed: coco, yolo, labelme, pairs"):
        read_annotations(folder, format="voc")  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", ["cat", [], {}, ["cat", "cat"], {"cat": -1}, {"cat": 1.0}, {1: 1}, 5])
def test_class_values__unusable__says_why(classes: Any) -> None:
    with pytest.raises(DataError, match="classes"):
        class_values(classes)


def test_class_values__background_first__begins_at_0() -> None:
    assert class_values(["background", "cat"]) == {"background": 0, "cat": 1}
    assert class_values(["cat", "background"]) == {"cat": 1, "background": 2}
    assert named({1: "background"}) == {0: "background", 1: "background (1)"}


def test_check_names__other_numbers_or_names__is_refused_or_warned_about() -> None:
    known = {0: "background", 1: "cat", 2: "dog"}
    check_names(known, {0: "background", 2: "dog", 9: "cow"}, "t")
    check_names({}, known, "t")
    with pytest.raises(DataError, match="t numbers its classes otherwise: dog is 1 instead of 2"):
        check_names(known, {1: "dog"}, "t")
    with pytest.warns(UserWarning, match="t has other class names, and values decide: 1 is horse instead of cat"):
        check_names(known, {0: "ground", 1: "horse"}, "t")


def test_read_table__annotations_and_other_column_names__are_one_table(folder: Path) -> None:
    path = written(folder, coco(annotations=coco()["annotations"][:2]))
    table = read_table(path, image_column="photo", label_column="truth", base_dir="elsewhere")
    frame = read_annotations(path)
    assert table.images == tuple(frame["image"])
    assert table.class_names == frame.attrs["class_names"]
    assert table.mask_name(0) == "annotations.json, 1.png"
    assert table.take([1]).class_names == table.class_names
    part = read_table(frame.iloc[[2, 0]])
    assert part.images == (frame["image"][2], frame["image"][0])
    assert part.class_names == frame.attrs["class_names"]
    assert read_images(path).images == table.images
    with pytest.raises(DataError, match=r"holds no image in rows 0 \(DrawnMask\)"):
        read_table(frame.rename(columns={"image": "label", "label": "image"}))
    frame.attrs["class_names"] = ["cat"]
    with pytest.raises(DataError, match=r"attrs\['class_names'\] of the DataFrame is \['cat'\]"):
        read_table(frame)


def test_read_images__folder__takes_npy_images_and_no_other_arrays(folder: Path) -> None:
    images = folder / "images"
    np.save(images / "4.npy", np.zeros((4, 5, 3), np.uint8))
    np.save(images / "5.npy", np.zeros((4, 5), np.uint16))
    np.save(images / "6.npy", np.zeros((4, 5), np.float32))
    np.save(images / "7.npy", np.zeros((4, 5, 70), np.uint8))
    np.save(images / "70.npy", np.zeros((4, 5, 7), np.uint8))  # an image of seven channels, to be chosen from
    (images / "8.npy").write_bytes((images / "4.npy").read_bytes()[:-1])  # truncated: told when it is read
    (images / "9.npy").write_bytes(b"nothing")
    (images / "A.npy").mkdir()
    found = [Path(str(path)).name for path in read_images(images).images]
    assert found == ["1.png", "2.png", "3.png", "4.npy", "5.npy", "70.npy", "8.npy"]
    assert len(read_images(folder)) == 7  # the images of a folder that has them in images/


def test_coco_of_real_masks__drawn__are_nearly_the_masks(shared: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared("data/nuclei")
    rows = pd.read_csv(source / "test.csv")[:12]
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "nucleus"}]}
    truth = []
    for number, row in rows.iterrows():
        mask = read_mask(source / row["label"]) > 0
        truth.append(mask)
        document["images"].append({"id": number, "file_name": Path(row["image"]).name})
        # Four times as large, so that outlines run along the borders of pixels and not through their centres.
        large = np.kron(mask.astype(np.uint8), np.ones((4, 4), np.uint8)).astype(np.uint8)
        for outline in cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
            corners = ((outline[:, 0].astype(float) + 0.5) / 4).ravel().tolist()
            document["annotations"].append({"image_id": number, "category_id": 5, "segmentation": [corners]})
    frame = read_annotations(written(tmp_path, document), images=source / "images")
    overlap = [np.sum((m == 5) & t) / np.sum((m == 5) | t) for m, t in zip(masks(frame), truth, strict=True)]
    assert min(overlap) > 0.95
    assert np.mean(overlap) > 0.98


@pytest.fixture(scope="module")
def drawn_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set of four classes as COCO's JSON files, one for each part, ids 1 to 3 as 10, 20, 30."""
    folder = draw_dataset(tmp_path_factory.mktemp("set"), kind="multiclass", train=6, val=2, test=2, size=(48, 64))
    names = {10: "disk", 20: "box", 30: "other"}
    for part in ("train", "val", "test"):
        document: dict[str, Any] = {"images": [], "annotations": []}
        document["categories"] = [{"id": number, "name": name} for number, name in names.items()]
        for number, row in pd.read_csv(folder / f"{part}.csv").iterrows():
            mask = read_mask(folder / row["label"])
            document["images"].append({"id": number, "file_name": row["image"]})
            for value in (1, 2, 3):
                flat = np.concatenate(([0], (mask == value).T.ravel(), [0])).astype(int)
                edges = np.flatnonzero(np.diff(flat))
                counts = np.diff(np.concatenate(([0], edges, [mask.size]))).tolist()
                outline = {"size": [*mask.shape], "counts": counts}
                document["annotations"].append({"image_id": number, "category_id": 10 * value, "segmentation": outline})
        written(folder, document, f"{part}.json")
    return folder


def test_fit__coco_files__gives_what_the_mask_files_give(drawn_set: Path, tmp_path: Path) -> None:
    fits = {}
    for kind in ("csv", "json"):
        segmentor = SemanticSegmentor(path=tmp_path / kind, hyperparameters=SMALL, verbosity=0)
        fits[kind] = segmentor.fit(drawn_set / f"train.{kind}", drawn_set / f"val.{kind}", max_epochs=1)
    by_name = fits["json"]
    assert by_name.task_.class_names == ("background", "disk", "box", "other")
    assert by_name.task_.values == (0, 10, 20, 30)
    assert "the class names are those of the annotations" in by_name.task_.reasons
    assert by_name.evaluate(drawn_set / "test.json", "miou") == fits["csv"].evaluate(drawn_set / "test.csv", "miou")
    predicted = by_name.predict(drawn_set / "test.json")
    assert len(predicted) == 2
    for ours, theirs in zip(predicted, fits["csv"].predict(drawn_set / "test.csv"), strict=True):
        np.testing.assert_array_equal(ours, theirs * 10)
    loaded = SemanticSegmentor.load(tmp_path / "json")
    assert loaded.task_.class_names == by_name.task_.class_names
    other = json.loads((drawn_set / "test.json").read_text())
    other["categories"][0]["id"], other["categories"][1]["id"] = 20, 10
    with pytest.raises(DataError, match="numbers its classes otherwise: box is 10 instead of 20"):
        loaded.evaluate(written(drawn_set, other, "swapped.json"))


def test_fit__constructors_names_and_ignored_value__go_before_the_annotations(drawn_set: Path, tmp_path: Path) -> None:
    def fitted(**arguments: Any) -> SemanticSegmentor:
        segmentor = SemanticSegmentor(path=tmp_path, hyperparameters=SMALL, verbosity=0, **arguments)
        return segmentor.fit(drawn_set / "train.json", dry_run=True)

    assert fitted(class_names=["a", "b", "c", "d"]).task_.class_names == ("a", "b", "c", "d")
    ignoring = fitted(ignore_label=20).task_
    assert ignoring.class_names == ("background", "disk", "other")
    assert ignoring.ignore_values == (20,)
    with pytest.raises(DataError, match="numbers its classes otherwise: disk is 10 instead of 20"):
        fitted(class_names=["background", "box", "disk", "other"])


def test_cli__fit_on_annotations_with_ignored_label_and_color_map__passes_them_on(drawn_set: Path) -> None:
    options = [part for key, value in SMALL.items() for part in ("-s", f"{key}={json.dumps(value)}")]
    arguments = ["fit", str(drawn_set / "train.json"), "--dry-run", "--ignore-label", "30", *options]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert "ignored: 30" in result.output
    assert "disk" in result.output
    (drawn_set / "colours.csv").write_text("name,r,g,b\na,0,0,0\nb,1,1,1\nc,2,2,2\nrest,3,3,3\n")
    arguments = ["fit", str(drawn_set / "train.csv"), "--dry-run"]
    named_colours = ["--color-map", str(drawn_set / "colours.csv")]
    result = CliRunner().invoke(cli.app, [*arguments, *named_colours, *options], catch_exceptions=False)
    assert "rest" in result.output
    result = CliRunner().invoke(cli.app, [*arguments, "--ignore-label", "#030303", *options])
    assert isinstance(result.exception, DataError)  # a colour, and these masks hold numbers


def test_fit__labelme_folder_with_ignored_shapes__leaves_their_pixels_out(tmp_path: Path) -> None:
    for i in range(4):
        write_png(tmp_path / f"{i}.png", np.full((16, 16, 3), 40 * i, np.uint8))
        shapes = [
            {"label": label, "points": [[x, 0], [x + 4, 12]], "shape_type": "rectangle"}
            for x, label in ((0, "cat"), (4, "dog"), (8, "__ignore__"))
        ]
        written(tmp_path, {"imagePath": f"{i}.png", "imageHeight": 16, "imageWidth": 16, "shapes": shapes}, f"{i}.json")
    segmentor = SemanticSegmentor(path=tmp_path / "b", hyperparameters=SMALL, verbosity=0)
    task = segmentor.fit(tmp_path, holdout_frac=0.5, dry_run=True).task_
    assert task.class_names == ("background", "cat", "dog")
    assert task.ignore_values == (-1,)
