"""Forms of PNG: what a mask's file is, and the same written again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from semseg_automl.data.forms import FORMS, form_of, form_png, form_to_write
from semseg_automl.data.images import read_mask, read_stored_mask, write_png
from semseg_automl.errors import DataError
from semseg_automl.task import SegmentationTask, infer_task

TOPS = {"1": 1, "2": 3, "4": 15, "I;16": 65_535, "LA": 255, "RGB": 255, "RGBA": 255}


@given(form=st.sampled_from(sorted(FORMS)), height=st.integers(1, 9), width=st.integers(1, 19), seed=st.integers(0, 99))
def test_form_png__numbers_of_any_size__come_back_in_the_form(form: str, height: int, width: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, TOPS[form] + 1, (height, width))
    data = form_png(numbers, form, 77, "a.png")
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert form_of(image.mode, data) == form
        stored = read_stored_mask(image) if form not in ("2", "4") else None
        assert image.mode == ("L" if form in ("2", "4") else form)
        if form in ("LA", "RGBA"):
            assert (np.asarray(image)[:, :, -1] == 77).all()
    if stored is not None:
        assert np.array_equal(stored.as_numbers("a"), numbers)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_write_png__every_form__is_read_back(tmp_path: Path, form: str) -> None:
    numbers = np.random.default_rng(0).integers(0, TOPS[form] + 1, (7, 13)).astype(np.uint16)
    write_png(tmp_path / "a.png", numbers, form=form, alpha=9)
    assert np.array_equal(read_mask(tmp_path / "a.png"), numbers)
    stored = read_stored_mask(tmp_path / "a.png")
    assert (stored.form, stored.alpha) == (form, 9 if form in ("LA", "RGBA") else 255)


def test_write_png__colours_with_alpha__keep_their_order(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    write_png(tmp_path / "a.png", colours, form="RGBA", alpha=3)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.dstack([colours, np.full((5, 6), 3, np.uint8)]))


@pytest.mark.parametrize(
    ("array", "form"),
    [
        (np.full((2, 2), 2, np.uint16), "1"),
        (np.full((2, 2), 4, np.uint16), "2"),
        (np.full((2, 2), 16, np.uint16), "4"),
        (np.full((2, 2), 256, np.uint16), "LA"),
        (np.full((2, 2), 256, np.uint16), "RGB"),
        (np.zeros((2, 2, 3), np.uint8), "LA"),
        (np.zeros((2, 2, 3), np.uint8), "4"),
        (np.zeros((2, 2), np.uint8), "CMYK"),
    ],
)
def test_write_png__what_a_form_cannot_hold__is_refused_and_nothing_is_written(
    tmp_path: Path, array: Any, form: str
) -> None:
    with pytest.raises(DataError, match=r"a\.png: an array of .* cannot be written as PNG of the form"):
        write_png(tmp_path / "a.png", array, form=form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("array", [np.full((2, 2), 65_536), np.full((2, 2), -1), np.zeros((0, 2), np.uint8)])
def test_form_png__what_no_form_holds__is_refused(array: Any) -> None:
    for form in FORMS:
        with pytest.raises(DataError, match=r"a\.png: .* cannot be written as PNG of the form"):
            form_png(array, form, 255, "a.png")


@pytest.mark.parametrize(
    ("form", "top", "colours", "written"),
    [
        ("L", 255, False, ""),
        ("I;16", 300, False, ""),
        ("I;16", 2, False, "I;16"),
        ("1", 1, False, "1"),
        ("1", 2, False, ""),
        ("4", 16, False, ""),
        ("LA", 300, False, ""),
        ("RGB", 9, False, "RGB"),
        ("RGB", 0xFF0000, True, ""),
        ("RGBA", 0xFF0000, True, "RGBA"),
        ("L", 0xFFFFFF, True, ""),
        ("", 1, False, ""),
    ],
)
def test_form_to_write__form_and_values__is_kept_where_it_holds_them(
    form: str, top: int, colours: bool, written: str
) -> None:
    assert form_to_write(form, top=top, colours=colours) == written


@pytest.mark.parametrize(("form", "alpha"), [("1", 255), ("LA", 256), ("LA", -1), ("CMYK", 255), ("L", 255)])
def test_task__form_that_cannot_hold_its_values__is_refused(form: str, alpha: int) -> None:
    data = {"kind": "binary", "values": [0, 2], "class_names": ["a", "b"]}
    with pytest.raises(DataError, match=r"the form '.*' with alpha -?\d+ of a task's masks cannot hold"):
        SegmentationTask.from_dict({**data, "form": form, "alpha": alpha})


@pytest.mark.parametrize("wrong", [{"form": 1}, {"alpha": "255"}, {"alpha": True}, {"form": None}])
def test_task__form_of_another_type__is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="form and alpha of a task are"):
        SegmentationTask.from_dict({"kind": "binary", "values": [0, 2], "class_names": ["a", "b"], **wrong})


def test_infer_task__masks_of_one_form__says_so_and_mixed_ones_do_not(tmp_path: Path) -> None:
    numbers = np.eye(8, dtype=np.uint8)
    surveys = []
    for form, alpha in (("LA", 9), ("LA", 9), ("LA", 8), ("", 255)):
        write_png(tmp_path / "a.png", numbers, form=form, alpha=alpha)
        surveys.append(read_stored_mask(tmp_path / "a.png").survey())
    first, second, other, plain = surveys

    def task(*chosen: Any) -> SegmentationTask:
        return infer_task([counts for counts, _ in chosen], encodings=[encoding for _, encoding in chosen])

    assert (task(first, second).form, task(first, second).alpha) == ("LA", 9)
    assert "predictions are PNG of grey and alpha, as the masks are" in str(task(first, second))
    assert (task(first, other).form, task(first, other).alpha) == ("LA", 255)
    assert (task(first, plain).form, task(first, plain).alpha) == ("", 255)
