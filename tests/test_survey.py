"""The survey: every file seen once, bad ones told with their row, and what is known of unchanged files reused."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from semseg_automl.data import parallel
from semseg_automl.data import survey as module
from semseg_automl.data.images import read_stored_mask, write_png
from semseg_automl.data.survey import FileNotes, ImageFacts, MaskFacts, RowSurvey, survey_tables
from semseg_automl.data.table import MaskTable, read_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pairs of 12 x 16; mask i has i + 1 pixels of 255."""
    rng = np.random.default_rng(0)
    for i in range(4):
        mask = np.zeros((12, 16), np.uint8)
        mask[3, : i + 1] = 255
        write_png(tmp_path / f"image_{i}.png", rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
        write_png(tmp_path / f"mask_{i}.png", mask)
    return tmp_path


def table_of(folder: Path, rows: int = 4) -> MaskTable:
    paths = {"image": [f"image_{i}.png" for i in range(rows)], "label": [f"mask_{i}.png" for i in range(rows)]}
    return read_table(pd.DataFrame(paths, index=[f"r{i}" for i in range(rows)]), base_dir=folder)


def huge_png() -> bytes:
    """Return a PNG whose header promises 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a file was opened")


def test_survey__good_rows__gives_what_is_in_both_files(folder: Path) -> None:
    (rows,) = survey_tables([table_of(folder)], workers=2)
    assert [row.flaws for row in rows] == [()] * 4
    third = rows[2]
    assert third.image is not None
    assert third.mask is not None
    assert third.image.size == third.mask.size == (12, 16)
    assert third.mask.counts == {0: 189, 255: 3}
    assert third.mask.objects is not None
    assert [255, 1, 3, 1] in third.mask.objects.tolist()
    assert len({row.image.digest for row in rows if row.image is not None}) == 4
    check = third.check
    assert check is not None
    assert (check.size, check.value_counts) == ((12, 16), {0: 189, 255: 3})


@pytest.mark.parametrize("which", ["image", "mask"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "dangling link", "folder", "zero bytes", "huge", "no image"])
def test_survey__file_that_cannot_be_used__is_told_with_its_row(folder: Path, which: str, fault: str) -> None:
    path = folder / f"{which}_1.png"
    data = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(data[:-20])
    elif fault == "dangling link":
        path.symlink_to(folder / "nowhere.png")
    elif fault == "folder":
        path.mkdir()
    elif fault == "zero bytes":
        path.write_bytes(b"")
    elif fault == "huge":
        path.write_bytes(huge_png())
    elif fault == "no image":
        path.write_bytes(b"hello, I am a text" * 10)
    (rows,) = survey_tables([table_of(folder)])
    assert [bool(row.flaws) for row in rows] == [False, True, False, False]
    (kind, message), *others = rows[1].flaws
    assert kind == ("missing file" if fault in ("missing", "dangling link") else "unreadable file")
    assert "row r1" in message
    assert path.name in message
    assert not others
    assert rows[1].check is None


def test_survey__both_files_of_a_row_bad__tells_both(folder: Path) -> None:
    for name in ("image_0.png", "mask_0.png"):
        (folder / name).unlink()
    assert [kind for kind, _ in survey_tables([table_of(folder)])[0][0].flaws] == ["missing file"] * 2


def test_survey__sizes_differ__is_told(folder: Path) -> None:
    write_png(folder / "mask_3.png", np.zeros((16, 12), np.uint8))
    row = survey_tables([table_of(folder)])[0][3]
    assert row.flaws[0][0] == "size mismatch"
    assert "16 x 12" in row.flaws[0][1]
    assert "turned" in row.flaws[0][1]
    assert row.check is None


def areas(surveys: list[list[RowSurvey]]) -> list[object]:
    """Return what was measured in the mask of each row; facts are compared without."""
    masks = [row.mask for rows in surveys for row in rows]
    return [None if mask is None or mask.objects is None else mask.objects.tolist() for mask in masks]


def test_survey__in_processes_and_in_threads__is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for i in range(48):
        write_png(tmp_path / f"image_{i}.png", rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
        write_png(tmp_path / f"mask_{i}.png", np.kron(rng.integers(0, 2 + i, (3, 2)), np.ones((4, 8))).astype(np.uint8))
    (tmp_path / "image_7.png").write_bytes((tmp_path / "image_7.png").read_bytes()[:90])
    (tmp_path / "mask_30.png").unlink()
    write_png(tmp_path / "mask_41.png", np.zeros((16, 12), np.uint8))
    tables = [table_of(tmp_path, 40), table_of(tmp_path, 48)]
    forked: list[int] = []
    helpers = parallel._Helpers.__init__

    def counted(self: parallel._Helpers[object], work: Callable[[int], object], parts: Sequence[range], n: int) -> None:
        forked.append(n)
        helpers(self, work, parts, n)

    monkeypatch.setattr(parallel._Helpers, "__init__", counted)
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # tests before may have left some
    found = survey_tables(tables, workers=2)
    assert forked == ([1] if sys.platform == "linux" else []), "once for all tables"
    monkeypatch.setattr(parallel, "_may_fork", lambda: False)
    in_threads = survey_tables(tables, workers=2)
    assert in_threads == found
    assert [[row for row, seen in enumerate(rows) if seen.check is None] for rows in found] == [[7, 30], [7, 30, 41]]
    assert areas(in_threads) == areas(found)
    assert sum(area is not None for area in areas(found)) > 60


def test_survey__file_in_several_tables__is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(table: MaskTable, row: int, file: object) -> object:
        opened.append(str(file))
        return look(table, row, file)  # type: ignore[arg-type]

    look = module._look
    monkeypatch.setattr(module, "_look", counted)
    first, second = survey_tables([table_of(folder), table_of(folder, 3)])
    assert len(opened) == len(set(opened)) == 8
    assert first[:3] == second


def test_survey__pixels_in_memory_of_several_tables__are_those_of_each_row() -> None:
    def table(level: int) -> MaskTable:
        image, mask = np.full((8, 9, 3), level, np.uint8), np.full((8, 9), level, np.uint8)
        return read_table(pd.DataFrame({"image": [image], "label": [mask]}))

    found = survey_tables([table(3), table(4)], workers=1)
    assert [row.mask.counts for rows in found for row in rows if row.mask is not None] == [{3: 72}, {4: 72}]


def test_survey__mask_of_many_values__has_no_objects() -> None:
    mask = np.arange(2500, dtype=np.uint8).reshape(50, 50) % 100
    frame = pd.DataFrame({"image": [np.zeros((50, 50, 3), np.uint8)], "label": [mask]})
    ((row,),) = survey_tables([read_table(frame)], None)
    assert row.mask is not None
    assert row.mask.objects is None


def test_notes__second_survey__opens_nothing_and_sees_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.zeros((12, 16, 3), np.uint8)
    colours[2:5, 2:9] = (200, 10, 20)
    write_png(folder / "mask_2.png", colours)
    write_png(folder / "mask_1.png", np.ones((12, 16), np.uint8), palette=[0, 0xFF0000])
    first = FileNotes(folder / "notes")
    (seen,) = survey_tables([table_of(folder)], first)
    first.close()
    monkeypatch.setattr(module, "glance", refuse)
    monkeypatch.setattr(module, "read_stored_mask", refuse)
    second = FileNotes(folder / "notes")
    assert survey_tables([table_of(folder)], second) == [seen]
    assert second.trouble == first.trouble == ""


def test_notes__changed_file__is_opened_again(folder: Path) -> None:
    notes = FileNotes(folder / "notes")
    survey_tables([table_of(folder)], notes)
    notes.close()
    write_png(folder / "mask_0.png", np.full((12, 16), 255, np.uint8))
    stamp = os.stat(folder / "mask_1.png")
    os.utime(folder / "mask_1.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    opened: list[str] = []

    def counted(source: str, *, name: str) -> object:
        opened.append(os.path.basename(source))
        return read_stored_mask(source, name=name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_stored_mask", counted)
        (rows,) = survey_tables([table_of(folder)], FileNotes(folder / "notes"))
    assert sorted(opened) == ["mask_0.png", "mask_1.png"]
    assert rows[0].mask is not None
    assert rows[0].mask.counts == {255: 192}


def test_notes__file_that_is_gone__is_forgotten_and_told(folder: Path) -> None:
    notes = FileNotes(folder / "notes")
    survey_tables([table_of(folder)], notes)
    notes.close()
    (folder / "image_2.png").unlink()
    write_png(folder / "image_0.png", np.zeros((12, 16), np.uint8))
    notes = FileNotes(folder / "notes")
    (rows,) = survey_tables([table_of(folder)], notes)
    notes.close()
    assert rows[2].flaws[0][0] == "missing file"
    (file,) = (folder / "notes").iterdir()
    assert "image_2.png" not in json.loads(file.read_text())["files"]


def test_notes__same_file_as_image_and_mask__has_both_facts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"image": ["mask_0.png"], "label": ["mask_0.png"]})
    notes = FileNotes(folder / "notes")
    (seen,) = survey_tables([read_table(frame, base_dir=folder)], notes)
    notes.close()
    monkeypatch.setattr(module, "glance", refuse)
    monkeypatch.setattr(module, "read_stored_mask", refuse)
    assert survey_tables([read_table(frame, base_dir=folder)], FileNotes(folder / "notes")) == [seen]


def no_json(data: dict[str, object]) -> str:
    return json.dumps(data)[:-40]


def no_folder_entry(data: dict[str, object]) -> str:
    return json.dumps({**data, "files": [1, 2]})


def nested(_: dict[str, object]) -> str:
    return "[" * 100_000


@pytest.mark.parametrize("damage", [no_json, no_folder_entry, nested])
def test_notes__damaged_file__are_said_once_and_everything_is_opened(
    folder: Path, damage: Callable[[dict[str, object]], str]
) -> None:
    notes = FileNotes(folder / "notes")
    (seen,) = survey_tables([table_of(folder)], notes)
    notes.close()
    (file,) = (folder / "notes").iterdir()
    file.write_text(damage(json.loads(file.read_text())))
    notes = FileNotes(folder / "notes")
    assert survey_tables([table_of(folder)], notes) == [seen]
    notes.close()
    assert "damaged" in notes.trouble
    assert "every file was opened" in notes.trouble
    mended = FileNotes(folder / "notes")
    assert survey_tables([table_of(folder)], mended) == [seen]
    assert mended.trouble == ""


@pytest.mark.parametrize(
    ("key", "part", "value"),
    [
        ("image", "picture", "AAAA"),
        ("image", "picture", "no base64!"),
        ("image", "size", [0, 4]),
        ("image", "size", "ab"),
        ("mask", "counts", [[1]]),
        ("mask", "objects", "AAAA"),
        ("mask", "areas", 7),
        ("mask", "size", [1e999, 1]),
    ],
)
def test_notes__damaged_entry__is_opened_again(folder: Path, key: str, part: str, value: object) -> None:
    notes = FileNotes(folder / "notes")
    (seen,) = survey_tables([table_of(folder)], notes)
    notes.close()
    (file,) = (folder / "notes").iterdir()
    data = json.loads(file.read_text())
    data["files"][f"{key}_1.png"][key][part] = value
    file.write_text(json.dumps(data))
    notes = FileNotes(folder / "notes")
    assert survey_tables([table_of(folder)], notes) == [seen]
    assert "damaged" in notes.trouble


def test_notes__another_format__are_not_used(folder: Path) -> None:
    notes = FileNotes(folder / "notes")
    survey_tables([table_of(folder)], notes)
    notes.close()
    (file,) = (folder / "notes").iterdir()
    data = json.loads(file.read_text())
    data["format"] += 1
    data["files"]["mask_0.png"]["mask"]["counts"] = [[3, 192]]
    file.write_text(json.dumps(data))
    (rows,) = survey_tables([table_of(folder)], FileNotes(folder / "notes"))
    assert rows[0].mask is not None
    assert rows[0].mask.counts == {0: 191, 255: 1}


def test_notes__file_that_changes_while_it_is_read__is_opened_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = folder / "mask_2.png"
    look = module._look

    def overtaken(table: MaskTable, row: int, file: module._File) -> object:
        facts = look(table, row, file)
        if file.source == str(changed):
            write_png(changed, np.zeros((12, 16), np.uint8))
            os.utime(changed, ns=(7, 7))
        return facts

    monkeypatch.setattr(module, "_look", overtaken)
    notes = FileNotes(folder / "notes")
    (before,) = survey_tables([table_of(folder)], notes)
    notes.close()
    monkeypatch.undo()
    (after,) = survey_tables([table_of(folder)], FileNotes(folder / "notes"))
    assert before[2].mask is not None
    assert after[2].mask is not None
    assert (before[2].mask.counts, after[2].mask.counts) == ({0: 189, 255: 3}, {0: 192})


def test_notes__too_large_file__is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = FileNotes(folder / "notes")
    survey_tables([table_of(folder)], notes)
    notes.close()
    monkeypatch.setattr(module, "MAX_NOTES", 100)
    notes = FileNotes(folder / "notes")
    survey_tables([table_of(folder)], notes)
    assert "damaged" in notes.trouble


def test_notes__folder_that_cannot_be_made__is_said_once(folder: Path) -> None:
    (folder / "taken").write_text("a file where the folder should be")
    notes = FileNotes(folder / "taken" / "checks")
    (rows,) = survey_tables([table_of(folder)], notes)
    notes.close()
    assert all(row.check is not None for row in rows)
    assert "cannot be" in notes.trouble


def test_facts__to_json_and_back__are_the_same(folder: Path) -> None:
    for row in survey_tables([table_of(folder)])[0]:
        assert row.image is not None
        assert row.mask is not None
        assert ImageFacts.from_json(json.loads(json.dumps(row.image.to_json()))) == row.image
        mask = MaskFacts.from_json(json.loads(json.dumps(row.mask.to_json())))
        assert mask == row.mask
        assert mask.objects is not None
        assert row.mask.objects is not None
        assert mask.objects.dtype == row.mask.objects.dtype
        assert mask.objects.tolist() == row.mask.objects.tolist()
