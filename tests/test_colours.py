"""Colour maps in the forms people have them, and which colours of a set of masks are classes, background, void."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semseg_automl.data.colours import pack, parse_colour, read_color_map, spell, unpack
from semseg_automl.data.encodings import MaskEncoding
from semseg_automl.data.images import read_mask, write_png
from semseg_automl.errors import DataError
from semseg_automl.task import SegmentationTask, infer_task

COLOURS = MaskEncoding(colours=True)
BLACK, GREY, RED, WHITE = 0, 0x808080, 0xFF0000, 0xFFFFFF


def coloured(*colours: int, **given: Any) -> SegmentationTask:
    """The task of one mask with ten pixels of each colour, the first on a hundred."""
    counts = {colour: 10 if position else 100 for position, colour in enumerate(colours)}
    return infer_task([counts], encodings=[COLOURS], **given)


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=20))
def test_pack__any_colours__spelled_parsed_and_unpacked_are_the_same(colours: list[tuple[int, int, int]]) -> None:
    packed = pack(np.array([colours], np.uint8))
    assert packed.shape == (1, len(colours))
    assert unpack(packed)[0].tolist() == [list(colour) for colour in colours]
    for colour, number in zip(colours, packed[0].tolist(), strict=True):
        assert parse_colour(colour) == parse_colour(spell(number)) == parse_colour(list(colour)) == number


@pytest.mark.parametrize("colour", ["red", "#ff", "#gg0000", (1, 2), (1, 2, 256), (1, 2, -1), (0.5, 1, 1), 7, None])
def test_parse_colour__no_colour__says_how_to_write_one(colour: object) -> None:
    with pytest.raises(DataError, match=r"is no colour; write '#rrggbb' or \(r, g, b\)"):
        parse_colour(colour)


@pytest.mark.parametrize(
    "text",
    [
        "name,r,g,b\nsky,128,128,128\nroad, 255, 0, 0\n",
        "\ufeffname,r,g,b\r\nsky,128,128,128\r\n\r\nroad,255,0,0\r\n",
        "r,g,b,name\n128,128,128,sky\n255,0,0,road\n",
        "id,name,R,G,B\n0,sky,128,128,128\n1,road,255,0,0\n",
        "sky,128,128,128\nroad,255,0,0",
        "# label:color_rgb:parts:actions\nsky:128,128,128::\nroad:255,0,0::\n",
        'name,r,g,b\n"sky",128,128,128\n"road",255,0,0\n',
    ],
)
def test_read_color_map__files_of_several_tools__give_the_same_map(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.csv"
    path.write_bytes(text.encode())
    assert read_color_map(path) == {GREY: "sky", RED: "road"}
    assert read_color_map({"#808080": "sky", (255, 0, 0): "road"}) == read_color_map(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,r,g,b\nsky,128,128\n", r"line 2: \['sky', '128', '128'\] is not a name and three numbers"),
        ("sky:128,128,256::", "line 1: .* three numbers from 0 to 255"),
        ("sky,-1,0,0", "three numbers from 0 to 255"),
        (",1,0,0", "is not a name and three numbers"),
        ("sky,1,2,3\nroad,1,2,3", "line 2: #010203 is named twice, sky and road"),
        ("# nothing\n", "a color_map without a colour"),
        ("one,two,r,g,b\n", "which column has the names is not clear"),
        ("x" * 2**20 + "x", "more than 1,048,576 bytes"),
        ("\xff\xfe".encode("latin-1"), "the color_map cannot be read"),
    ],
)
def test_read_color_map__file_that_is_none__says_where(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "labelmap.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_color_map(path)


def test_read_color_map__no_file_and_no_map__raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: the color_map cannot be read"):
        read_color_map(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="a color_map of type list"):
        read_color_map(["#ff0000"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'red' is no colour"):
        read_color_map({"red": "road"})


@pytest.mark.parametrize(
    ("colours", "given", "values", "why"),
    [
        ((WHITE, RED, BLACK), {}, (BLACK, RED, WHITE), "#000000 is the background because it is black"),
        ((WHITE, GREY, RED), {}, (WHITE, GREY, RED), "#ffffff is the background because most pixels have it"),
        ((WHITE, RED), {}, (WHITE, RED), "#ffffff is the background because most"),
        ((WHITE, RED), {"color_map": {RED: "Background", WHITE: "car"}}, (RED, WHITE), "the background by name"),
    ],
)
def test_infer_task__colours__put_the_background_first_and_say_why(
    colours: tuple[int, ...], given: dict[str, Any], values: tuple[int, ...], why: str
) -> None:
    task = coloured(*colours, **given)
    assert task.values == values
    assert why in task.reasons[-1]
    assert task.labels == tuple(spell(value) for value in values)
    assert "colours are the classes" in str(task)
    assert task.decode(np.array([[0, 1]])).tolist() == [unpack(values[:2]).tolist()]


def test_infer_task__color_map__names_absent_classes_and_void() -> None:
    names = {BLACK: "ground", RED: "car", GREY: "tree", WHITE: "Unlabelled"}
    task = coloured(BLACK, RED, WHITE, color_map=names)
    assert dict(zip(task.labels, task.class_names, strict=True)) == {
        "#000000": "ground",
        "#808080": "tree",
        "#ff0000": "car",
    }
    assert task.ignore_values == (WHITE,)
    assert "#ffffff is ignored because the color_map calls it Unlabelled" in task.reasons
    assert "ignored: #ffffff" in str(task)
    assert task.encode(unpack(np.array([[WHITE, RED, BLACK]]))).tolist() == [[255, 2, 0]]


@pytest.mark.parametrize("label", ["#ffffff", (255, 255, 255)])
def test_infer_task__ignore_label_as_colour__is_taken(label: Any) -> None:
    task = coloured(BLACK, RED, WHITE, ignore_label=label)
    assert (task.values, task.ignore_values) == ((BLACK, RED), (WHITE,))
    palette = (BLACK, RED, GREY, WHITE)
    by_index = infer_task([{0: 5, 1: 5, 3: 5}], encodings=[MaskEncoding(palette=palette)], ignore_label=label)
    assert (by_index.values, by_index.ignore_values, by_index.palette) == ((0, 1), (3,), palette)


def test_infer_task__color_map_of_palette_masks__names_indices_and_keeps_the_palette() -> None:
    encoding = MaskEncoding(palette=(BLACK, RED, GREY, WHITE, BLACK))
    task = infer_task(
        [{0: 5, 1: 5, 3: 2}],
        encodings=[encoding],
        color_map={BLACK: "ground", RED: "car", GREY: "tree", WHITE: "void"},
    )
    assert (task.values, task.class_names) == ((0, 1, 2), ("ground", "car", "tree"))
    assert (task.ignore_values, task.palette) == ((3,), encoding.palette)
    with pytest.raises(DataError, match="the palette of the masks lacks #00ff00 of the color_map"):
        infer_task([{0: 5, 1: 5}], encodings=[encoding], color_map={BLACK: "a", RED: "b", 0x00FF00: "c"})


def test_infer_task__names_in_a_list_and_grey_masks_with_a_map__are_colours_too() -> None:
    assert coloured(BLACK, RED, WHITE, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    grey = infer_task([{0: 5, 255: 5}], color_map={BLACK: "a", WHITE: "b"})
    assert (grey.labels, grey.colours) == (("#000000", "#ffffff"), True)


def test_infer_task__palettes_that_disagree__make_colours_the_classes() -> None:
    first, second = MaskEncoding(palette=(BLACK, RED)), MaskEncoding(palette=(BLACK, GREY))
    task = infer_task([{0: 5, 1: 5}, {0: 5, 1: 5}], encodings=[first, second])
    assert task.values == (BLACK, GREY, RED)
    assert "one index has different colours" in task.reasons[0]
    unused = infer_task([{0: 5, 1: 5}, {0: 5}], encodings=[first, second])  # they differ where no pixel is
    assert (unused.values, unused.palette) == ((0, 1), first.palette)
    short = infer_task([{0: 5, 1: 5}], encodings=[first], num_classes=4)
    assert (short.values, short.palette) == ((0, 1, 2, 3), ())
    assert "the palette lacks a colour for some class and is left out" in short.reasons


@pytest.mark.parametrize(
    ("colours", "given", "message"),
    [
        ((RED,), {}, r"one class only: all masks together hold nothing but #ff0000 \(100 pixels\)"),
        ((RED, WHITE), {"ignore_label": "#ffffff"}, "one class only"),
        ((RED, WHITE, GREY), {"color_map": {RED: "a", WHITE: "b"}}, r"hold #808080 \(10 pixels\), which the color_map"),
        ((RED, WHITE, GREY), {"num_classes": 2}, "3 colours, .* but 2 classes were given"),
        ((RED, WHITE), {"num_classes": 3}, "2 colours, .* but 3 classes were given"),
        ((RED, WHITE), {"color_map": {RED: "a", WHITE: "b"}, "num_classes": 3}, "num_classes=3 but 2 classes in the"),
        ((RED, WHITE), {"color_map": {RED: "a", WHITE: "b"}, "class_names": ["a", "b"]}, "are both given"),
        ((RED, WHITE), {"ignore_label": 255}, "ignore_label=255, but colours are the classes; give a colour"),
        ((RED, WHITE), {"color_map": {RED: "a", WHITE: "b"}, "ignore_label": "#ffffff"}, "also named in the color_map"),
        (tuple(range(0, 6500, 100)), {}, "65 different colours, most often #000000 .*like photographs"),
    ],
)
def test_infer_task__colours_that_cannot_be_a_task__say_what_to_do(
    colours: tuple[int, ...], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        coloured(*colours, **given)


def test_infer_task__colour_or_encoding_that_does_not_fit__raises() -> None:
    with pytest.raises(DataError, match="a colour that no palette of the masks has; give a number"):
        infer_task([{0: 5, 1: 5}], ignore_label="#ff0000")
    one_of_ids = [{0: 5, 1: 5, 2: 5}] * 3
    with pytest.raises(DataError, match=r"mask 0 of the table holds the numbers 1, 2, but 1 of 4 masks store colours"):
        infer_task([*one_of_ids, {0: 5, RED: 5}], encodings=[MaskEncoding()] * 3 + [COLOURS])
    with pytest.raises(DataError, match="mask 1 of the table holds the numbers 300"):
        infer_task([{0: 5, RED: 5}, {300: 5}], encodings=[COLOURS, MaskEncoding()])
    with pytest.raises(DataError, match="mask 1 of the table: a mask with the number 300 among colour masks"):
        infer_task([{RED: 5}, {300: 5}], encodings=[COLOURS, MaskEncoding()], color_map={BLACK: "a", RED: "b"})
    grey_too = infer_task([{RED: 5, GREY: 5}, {0x80: 5}, {255: 5}], encodings=[COLOURS, MaskEncoding(), MaskEncoding()])
    assert grey_too.values == (GREY, RED, WHITE)  # one file all grey, one all white
    with pytest.raises(DataError, match="1 encodings for 2 masks"):
        infer_task([{0: 5}, {1: 5}], encodings=[COLOURS])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colours": "yes"}, "give true or false"),
        ({"snapped": 1}, "give true or false"),
        ({"palette": [0, "1"]}, "give a list of int"),
        ({"palette": [0]}, "a palette of 1 colours for 0, 1; each index needs one"),
        ({"palette": [0, 1 << 24]}, "each is r << 16"),
        ({"colours": True, "values": [0, 1 << 24]}, "each is r << 16"),
        ({"colours": True, "values": [0, 5, 3], "kind": "multiclass", "class_names": ["a", "b", "c"]}, "increasing"),
        ({"colours": True, "values": [5, 5]}, "increasing order"),
    ],
)
def test_from_dict__colours_that_contradict__raise(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SegmentationTask.from_dict({**infer_task([{0: 5, 1: 5}]).to_dict(), **change})


def test_from_dict__task_saved_before_there_were_colours__loads() -> None:
    task = infer_task([{0: 5, 255: 5}])
    old = {k: v for k, v in task.to_dict().items() if k not in ("colours", "palette", "snapped")}
    assert SegmentationTask.from_dict(old) == task


def test_write_png__palette_that_does_not_fit__raises(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 0]], np.uint8)
    write_png(tmp_path / "a.png", indices, palette=(RED, GREY, WHITE))
    assert np.array_equal(read_mask(tmp_path / "a.png"), indices)
    assert np.array_equal(read_mask(tmp_path / "a.png", colours=True), np.array([[RED, GREY], [WHITE, RED]]))
    for array, palette in ((indices, (RED, GREY)), (indices.astype(np.uint16), (RED,) * 3), (indices, (RED,) * 257)):
        with pytest.raises(DataError, match=r"pass uint8 .* and a colour for each index, at most 256"):
            write_png(tmp_path / "b.png", array, palette=palette)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
