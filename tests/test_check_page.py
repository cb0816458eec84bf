"""The page: text stays text, nothing is fetched, pictures are small and show image and mask."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from semseg_automl.check_page import SIDE, Card, Page, PageTable, View, picture_of, write_page
from semseg_automl.checking import check_data
from semseg_automl.data.images import write_png
from semseg_automl.errors import DataError
from semseg_automl.task import SegmentationTask

BINARY = SegmentationTask("binary", values=(0, 255), class_names=("background", "polyp"))
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>.png"


class Tags(HTMLParser):
    """Collects what a browser would see: tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.depth: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.depth.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 100, np.uint8)


def decoded(coded: bytes | None) -> NDArray[np.uint8]:
    assert coded is not None
    found = cv2.imdecode(np.frombuffer(coded, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert found is not None
    return found.astype(np.uint8)


def page_of(*cards: Card, **changes: object) -> Page:
    values: dict[str, object] = {
        "title": "Data check", "verdict": "1 error", "level": "error", "lines": ("train: 1 row",),
        "tables": (PageTable("Rows", pd.DataFrame({"rows": [1]})),), "cards": cards, **changes,
    }  # fmt: skip
    return Page(**values)  # type: ignore[arg-type]


def test_picture_of__large_image_with_mask__is_small_and_painted_where_the_mask_is() -> None:
    mask = np.zeros((600, 900), np.uint8)
    mask[:, :450] = 255
    picture = decoded(picture_of(View("a", grey(600, 900), mask), BINARY))
    assert picture.shape == (160, SIDE, 3)
    left, right = picture[80, 40].astype(int), picture[80, 200].astype(int)
    assert np.abs(right - 100).max() <= 4
    assert np.abs(left - (50, 107, 139)).max() <= 6


def test_picture_of__small_image__is_not_enlarged() -> None:
    assert decoded(picture_of(View("a", grey(20, 30), None), BINARY)).shape == (20, 30, 3)
    assert decoded(picture_of(View("a", grey(1, 3000), None), None)).shape == (1, SIDE, 3)


@pytest.mark.parametrize("mask", ["nowhere.png", np.full((20, 30), 7, np.uint8), np.full((9, 9), 255, np.uint8)])
def test_picture_of__mask_that_is_wrong__shows_the_image(mask: str | NDArray[np.uint8]) -> None:
    picture = decoded(picture_of(View("a", grey(20, 30), mask), BINARY))
    assert np.abs(picture.astype(int) - 100).max() <= 2


def test_picture_of__image_that_cannot_be_read__is_none(tmp_path: Path) -> None:
    assert picture_of(View("a", tmp_path / "gone.png", None), BINARY) is None


def test_write_page__text_that_looks_like_html__stays_text(tmp_path: Path) -> None:
    card = Card(EVIL, EVIL, EVIL, (View(EVIL, grey(8, 8), None), View(EVIL, "gone.png", None)))
    table = PageTable(EVIL, pd.DataFrame({EVIL: [EVIL]}), level=EVIL)
    tables = (table, PageTable("x", table.frame))
    page = page_of(card, title=EVIL, verdict=EVIL, level=EVIL, lines=(EVIL,), tables=tables)
    seen = Tags(write_page(page, tmp_path / "p.html", None).read_text(encoding="utf-8"))
    names = {tag for tag, _ in seen.tags}
    assert "script" not in names
    (source,) = (str(attributes.get("src")) for tag, attributes in seen.tags if tag == "img")
    assert source.startswith("data:image/jpeg;base64,")
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert seen.text.count("<script>alert(1)</script>") >= 8
    assert seen.depth == []


def test_write_page__any_page__fetches_nothing(tmp_path: Path) -> None:
    card = Card("note", "k", "t", (View("v", grey(8, 8), None),))
    text = write_page(page_of(card), tmp_path / "p.html", None).read_text()
    assert re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", text)) is None
    policy = [attributes for tag, attributes in Tags(text).tags if tag == "meta" and "http-equiv" in attributes]
    assert "default-src 'none'" in str(policy[0]["content"])
    for words in ("prefers-color-scheme: dark", "@media print", 'name="viewport"'):
        assert words in text


def test_write_page__control_characters__are_shown_as_boxes(tmp_path: Path) -> None:
    page = page_of(lines=("a\x00b\u202ec\ud800d",))
    text = write_page(page, tmp_path / "p.html", None).read_text(encoding="utf-8")
    assert "a\ufffdb\ufffdc\ufffdd" in text


def test_write_page__folder_that_is_a_file__is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_page(page_of(), tmp_path / "taken" / "p.html", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_check_data__file_named_like_a_script__is_escaped_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path / "cache"))
    name = "<script>alert(1)<!--.png"
    rng = np.random.default_rng(0)
    for image in (name, "b.png"):
        write_png(tmp_path / image, rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
        write_png(tmp_path / f"mask_{image}", np.eye(16, dtype=np.uint8))
    write_png(tmp_path / f"mask_{name}", np.zeros((16, 16), np.uint8))
    frame = pd.DataFrame({"image": [name, "b.png", "<b>gone.png"], "label": [f"mask_{name}", "mask_b.png", "x.png"]})
    check_data(frame, base_dir=tmp_path, path=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    seen = Tags(text)
    assert "<script>alert(1)<!--.png" in seen.text
    assert "<b>gone.png" in seen.text
    assert not {"script", "b"} & {tag for tag, _ in seen.tags}
    (picture,) = re.findall(r"base64,([^\"]+)\"", text)
    assert decoded(base64.b64decode(picture)).shape == (16, 16, 3)
