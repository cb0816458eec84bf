"""Masks as people have them: each kind through file, reading, inference, encoding, decoding and back to a file."""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from semseg_automl import SemanticSegmentor
from semseg_automl.data.checks import RowCheck, check_rows
from semseg_automl.data.colours import parse_colour, unpack
from semseg_automl.data.encodings import MaskEncoding
from semseg_automl.data.images import ImageSource, read_image, read_mask, write_png
from semseg_automl.data.splits import split_holdout
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import DataError
from semseg_automl.evaluation import check_values
from semseg_automl.task import IGNORE_INDEX, SegmentationTask, infer_task

Indices = NDArray[np.uint8]
Write = Callable[[Indices, Path], ImageSource]

SIZE = (72, 96)
RED, GREEN, BLUE, WHITE, BLACK = (200, 0, 0), (0, 200, 0), (10, 20, 250), (255, 255, 255), (0, 0, 0)
VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]


def drawn(classes: int, seed: int) -> Indices:
    """Class 0 with two ellipses of every other class; of more than a dozen classes a board, none hidden."""
    rng = np.random.default_rng(seed)
    if classes > 12:
        board = rng.permutation(96).reshape(8, 12) % classes
        return np.kron(board, np.ones((9, 8))).astype(np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    for index in [*range(1, classes)] * 2:
        centre = (int(rng.integers(SIZE[1])), int(rng.integers(SIZE[0])))
        cv2.ellipse(mask, centre, (int(rng.integers(5, 20)), int(rng.integers(5, 20))), 0, 0, 360, index, -1)
    return mask


def drawn_set(classes: int) -> list[Indices]:
    """Masks with all classes, an empty one, and one that is all of the last class."""
    return [
        *(drawn(classes, seed) for seed in range(5)),
        np.zeros(SIZE, np.uint8),
        np.full(SIZE, classes - 1, np.uint8),
    ]


def as_file(suffix: str, values: Any, dtype: Any = np.uint8, mode: str | None = None) -> Write:
    """Write values or colours by Pillow or, as ``.npy``, by NumPy."""

    def write(mask: Indices, stem: Path) -> Path:
        array = np.array(values, dtype)[mask]
        path = stem.with_suffix(suffix)
        if suffix == ".npy":
            np.save(path, array)
        elif dtype == np.uint16:
            path.write_bytes(cv2.imencode(suffix, array)[1].tobytes())
        else:
            image = Image.fromarray(array)
            image = image.convert(mode) if mode else image
            image.save(path, lossless=True) if suffix == ".webp" else image.save(path)
        return path

    return write


def as_palette(values: list[int], colours: dict[int, tuple[int, int, int]], suffix: str = ".png") -> Write:
    def write(mask: Indices, stem: Path) -> Path:
        image = Image.frombytes("P", mask.shape[::-1], np.array(values, np.uint8)[mask].tobytes())
        entries = [colours.get(index, (index, index, 7)) for index in range(max(values) + 1)]
        image.putpalette([part for entry in entries for part in entry])
        image.save(stem.with_suffix(suffix))
        return stem.with_suffix(suffix)

    return write


def as_own_palette(colours: list[tuple[int, int, int]]) -> Write:
    """Each file has a palette of the colours it holds, so that an index means nothing across files."""

    def write(mask: Indices, stem: Path) -> Path:
        held = sorted(np.unique(mask).tolist(), key=lambda index: (index * 7 + int(stem.name)) % 5)
        position = {index: place for place, index in enumerate(held)}
        indices = np.vectorize(position.__getitem__, otypes=[np.uint8])(mask)
        image = Image.frombytes("P", mask.shape[::-1], indices.tobytes())
        image.putpalette([part for index in held for part in colours[index]])
        image.save(stem.with_suffix(".png"))
        return stem.with_suffix(".png")

    return write


def with_alpha(values: Any, alpha: int) -> Write:
    """Write grey or colours with one transparency everywhere."""

    def write(mask: Indices, stem: Path) -> Path:
        painted = np.array(values, np.uint8)[mask]
        Image.fromarray(np.dstack([painted, np.full(mask.shape, alpha, np.uint8)])).save(stem.with_suffix(".png"))
        return stem.with_suffix(".png")

    return write


def in_few_bits(depth: int) -> Write:
    def write(mask: Indices, stem: Path) -> Path:
        width = mask.shape[1]
        packed = np.zeros((mask.shape[0], width * depth // 8), np.uint8)
        for part in range(8 // depth):
            packed |= mask[:, part :: 8 // depth] << (8 - depth * (part + 1))
        rows = np.hstack([np.zeros((mask.shape[0], 1), np.uint8), packed]).tobytes()
        header = struct.pack(">IIBBBBB", width, mask.shape[0], depth, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        data = b"".join(struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
        stem.with_suffix(".png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        return stem.with_suffix(".png")

    return write


def smoothed(values: Any, scale: float) -> Write:
    def write(mask: Indices, stem: Path) -> Path:
        painted = np.array(values, np.uint8)[mask]
        small = cv2.resize(painted, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_NEAREST)
        image = cv2.resize(small, SIZE[::-1], interpolation=cv2.INTER_LINEAR)
        Image.fromarray(image).save(stem.with_suffix(".png"))
        return stem.with_suffix(".png")

    return write


def as_jpeg(values: Any, quality: int) -> Write:
    def write(mask: Indices, stem: Path) -> Path:
        Image.fromarray(np.array(values, np.uint8)[mask]).save(stem.with_suffix(".jpg"), quality=quality)
        return stem.with_suffix(".jpg")

    return write


def mixed(first: Write, second: Write) -> Write:
    """Every other file by another writer."""
    return lambda mask, stem: (first if int(stem.name) % 2 else second)(mask, stem)


@dataclass(frozen=True)
class Case:
    """`values` or colours in class order, void last; `mode` is Pillow's of the files predicted."""

    write: Write
    values: tuple[Any, ...]
    ignored: tuple[Any, ...] = ()
    mode: str = "L"
    lossless: bool = True


IDS, SHADES = tuple(range(64)), (0, 128, 255)
CASES = {
    "0_and_1": Case(as_file(".png", (0, 1)), (0, 1)),
    "0_and_255": Case(as_file(".png", (0, 255)), (0, 255)),
    "any_two_greys": Case(as_file(".png", (38, 75)), (38, 75)),
    "ids_from_0": Case(as_file(".png", range(11)), tuple(range(11))),
    "ids_with_gaps": Case(as_file(".png", (0, 7, 26)), (0, 7, 26)),
    "ids_0_to_63": Case(as_file(".png", IDS), IDS),
    "ids_and_void_255": Case(as_file(".png", (0, 1, 2, 255)), (0, 1, 2), (255,)),
    "greys_by_equal_steps": Case(as_file(".png", (0, 85, 170, 255)), (0, 85, 170, 255)),
    "bits": Case(as_file(".png", (False, True), bool), (0, 1), mode="1"),
    "bits_as_tiff": Case(as_file(".tiff", (False, True), bool), (0, 1), mode="1"),
    "bits_and_bytes": Case(mixed(as_file(".png", (False, True), bool), as_file(".png", (0, 1))), (0, 1), mode="P"),
    "two_bits": Case(in_few_bits(2), (0, 1, 2, 3)),
    "four_bits": Case(in_few_bits(4), tuple(range(12))),
    "sixteen_bit_ids": Case(as_file(".png", (0, 300, 40_000), np.uint16), (0, 300, 40_000), mode="I;16"),
    "sixteen_bits_small_ids": Case(as_file(".png", (0, 1, 2), np.uint16), (0, 1, 2), mode="I;16"),
    "sixteen_bit_white": Case(as_file(".png", (0, 65_535), np.uint16), (0, 65_535), mode="I;16"),
    "sixteen_bit_tiff": Case(as_file(".tiff", (0, 1, 999), np.uint16), (0, 1, 999), mode="I;16"),
    "tiff": Case(as_file(".tif", (0, 4, 5)), (0, 4, 5)),
    "bmp": Case(as_file(".bmp", (0, 255)), (0, 255)),
    "grey_written_as_rgb": Case(as_file(".png", (0, 1, 2), mode="RGB"), (0, 1, 2), mode="RGB"),
    "grey_written_as_rgba": Case(as_file(".png", (0, 255), mode="RGBA"), (0, 255), mode="RGBA"),
    "grey_half_transparent": Case(with_alpha((0, 9, 99), 128), (0, 9, 99), mode="LA"),
    "grey_with_alpha": Case(as_file(".png", (0, 255), mode="LA"), (0, 255), mode="LA"),
    "palette": Case(as_palette([0, 1, 2, 3], dict(enumerate(VOC))), (0, 1, 2, 3), mode="P"),
    "palette_and_void_255": Case(
        as_palette([0, 1, 2, 255], {**dict(enumerate(VOC)), 255: (224, 224, 192)}), (0, 1, 2), (255,), mode="P"
    ),
    "palette_of_two": Case(as_palette([0, 1], {0: WHITE, 1: RED}), (0, 1), mode="P"),
    "palette_tiff": Case(as_palette([0, 5], {0: BLACK, 5: RED}, ".tiff"), (0, 5), mode="P"),
    "palette_per_file": Case(as_own_palette([BLACK, BLUE, RED]), (BLACK, BLUE, RED), mode="RGB"),
    "two_colours": Case(as_file(".png", (BLACK, RED)), (BLACK, RED), mode="RGB"),
    "colours": Case(as_file(".png", (BLACK, GREEN, BLUE, RED, WHITE)), (BLACK, GREEN, BLUE, RED, WHITE), mode="RGB"),
    "colours_on_white": Case(as_file(".png", (WHITE, BLUE, RED)), (WHITE, BLUE, RED), mode="RGB"),
    "colours_with_alpha": Case(as_file(".png", (BLACK, BLUE, RED), mode="RGBA"), (BLACK, BLUE, RED), mode="RGBA"),
    "colours_half_transparent": Case(with_alpha((BLACK, BLUE, RED), 128), (BLACK, BLUE, RED), mode="RGBA"),
    "colours_with_and_without_alpha": Case(
        mixed(as_file(".png", (BLACK, RED)), with_alpha((BLACK, RED), 128)), (BLACK, RED), mode="RGB"
    ),
    "sixteen_bits_half_of_them": Case(
        mixed(as_file(".png", (0, 1, 2), np.uint16), as_file(".png", (0, 1, 2))), (0, 1, 2)
    ),
    "colours_as_bmp": Case(as_file(".bmp", (BLACK, RED)), (BLACK, RED), mode="RGB"),
    "colours_as_webp": Case(as_file(".webp", (BLACK, BLUE, RED)), (BLACK, BLUE, RED), mode="RGB"),
    "colours_and_palettes": Case(
        mixed(as_file(".png", (BLACK, BLUE, RED)), as_own_palette([BLACK, BLUE, RED])), (BLACK, BLUE, RED), mode="RGB"
    ),
    "npy_bools": Case(as_file(".npy", (False, True), bool), (0, 1)),
    "npy_and_void_-1": Case(as_file(".npy", (0, 1, 2, -1), np.int64), (0, 1, 2), (-1,)),
    "npy_colours": Case(as_file(".npy", (BLACK, BLUE, RED)), (BLACK, BLUE, RED), mode="RGB"),
    "array": Case(lambda mask, _: mask.astype(bool), (0, 1)),
    "pillow_image": Case(lambda mask, _: Image.fromarray(mask * np.uint8(255)), (0, 255)),
    "jpeg": Case(as_jpeg((0, 255), 75), (0, 255), lossless=False),
    "jpeg_of_quality_95": Case(as_jpeg((0, 255), 95), (0, 255), lossless=False),
    "jpeg_of_three_shades": Case(as_jpeg(SHADES, 80), SHADES, lossless=False),
    "jpeg_of_colours": Case(as_jpeg((BLACK, GREEN, RED), 90), (BLACK, GREEN, RED), mode="RGB", lossless=False),
    "anti_aliased": Case(smoothed((0, 255), 3), (0, 255), lossless=False),
    "anti_aliased_shades": Case(smoothed(SHADES, 3), SHADES, lossless=False),
    "anti_aliased_colours": Case(smoothed((WHITE, RED), 3), (WHITE, RED), mode="RGB", lossless=False),
}


MIXED = {
    "bits_and_bytes", "sixteen_bits_half_of_them", "palette_per_file", "colours_and_palettes",
    "colours_with_and_without_alpha",
}  # fmt: skip


def made(case: Case, folder: Path) -> tuple[MaskTable, list[Indices]]:
    """Write the masks of a case and return their table and what was drawn."""
    truth = drawn_set(len(case.values) + len(case.ignored))
    if case.ignored:
        truth = truth[:-1]  # a mask of void alone says nothing
    masks = tuple(case.write(mask, folder / str(position)) for position, mask in enumerate(truth))
    image = np.zeros((*SIZE, 3), np.uint8)
    return MaskTable((image,) * len(masks), masks, pd.RangeIndex(len(masks))), truth


def task_of(checks: list[RowCheck], **given: Any) -> SegmentationTask:
    return infer_task([c.value_counts for c in checks], encodings=[c.encoding for c in checks], **given)


def as_packed(values: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(parse_colour(value) if isinstance(value, tuple) else value for value in values)


@pytest.mark.parametrize("kind", CASES)
def test_encoding__of_every_kind__is_understood_and_written_back(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    table, truth = made(case, tmp_path)
    checks = check_rows(table, workers=1)
    if case.lossless:
        task = task_of(checks)
    else:
        with pytest.warns(UserWarning, match=r"\d% of the pixels lie between the values .* taken as the nearest"):
            task = task_of(checks)
    assert (task.values, task.ignore_values) == (as_packed(case.values), as_packed(case.ignored))
    assert task.kind == ("binary" if len(case.values) == 2 else "multiclass")
    assert task.snapped is not case.lossless
    assert len(str(task).splitlines()) == 5
    assert SegmentationTask.from_dict(yaml.safe_load(yaml.safe_dump(task.to_dict()))) == task
    check_values(task, table, checks)
    decoded = []
    for source, drawing in zip(table.masks or (), truth, strict=True):
        encoded = task.encode(read_mask(source, colours=task.colours))
        expected = np.where(drawing < len(case.values), drawing, IGNORE_INDEX)
        agreement = float((encoded == expected).mean())
        assert agreement == 1 if case.lossless else agreement > 0.93
        decoded.append(task.decode(np.where(encoded == IGNORE_INDEX, 0, encoded)))
    for row, (mask, drawing, source) in enumerate(zip(decoded, truth, table.masks or (), strict=True)):
        written = tmp_path / "out" / f"{row}.png"
        write_png(written, mask, **task.written_as())
        with Image.open(written) as image:
            assert image.mode == case.mode
            if isinstance(source, Path) and source.suffix == ".png" and case.lossless and kind not in MIXED:
                with Image.open(source) as label:
                    assert image.mode == label.mode
                    assert image.getpalette() == label.getpalette()
                    kept = drawing < len(case.values)  # a network predicts no void
                    assert np.array_equal(np.asarray(image)[kept], np.asarray(label)[kept])
                assert written.read_bytes()[24:26] == source.read_bytes()[24:26]  # bits and kind of colours
        again = task.encode(read_mask(written, colours=task.colours))
        assert np.array_equal(task.decode(again), mask)


COLOUR = st.tuples(*[st.integers(0, 255)] * 3)


@settings(max_examples=25, deadline=None)
@given(
    colours=st.lists(COLOUR, min_size=2, max_size=40, unique=True),
    indexed=st.booleans(),
    mode=st.sampled_from(["RGB", "RGBA"]),
    seed=st.integers(0, 9),
)
def test_encoding__of_random_colours__comes_back_pixel_by_pixel(
    colours: list[tuple[int, int, int]], indexed: bool, mode: str, seed: int
) -> None:
    drawing = np.random.default_rng(seed).integers(0, len(colours), (9, 13)).astype(np.uint8)
    drawing.ravel()[: len(colours)] = np.arange(len(colours))
    write = as_palette([*range(len(colours))], dict(enumerate(colours))) if indexed else as_file(".png", colours)
    with tempfile.TemporaryDirectory() as folder:
        label: Any = write(drawing, Path(folder) / "label")
        if mode == "RGBA" and not indexed:
            label = as_file(".png", colours, mode="RGBA")(drawing, Path(folder) / "label")
        table = MaskTable((np.zeros((9, 13), np.uint8),), (label,), pd.RangeIndex(1))
        task = task_of(check_rows(table, workers=1))
        mask = task.decode(task.encode(read_mask(label, colours=task.colours)))
        written = Path(folder) / "out.png"
        write_png(written, mask, **task.written_as())
        with Image.open(written) as image, Image.open(label) as stored:
            assert image.mode == stored.mode
        assert np.array_equal(read_image(written), read_image(label))
        assert np.array_equal(read_image(label), np.array(colours, np.uint8)[drawing])


@settings(max_examples=40, deadline=None)
@given(
    values=st.sets(st.integers(0, 65_535), min_size=2, max_size=64),
    suffix=st.sampled_from([".npy", ".png", ".tiff"]),
    seed=st.integers(0, 9),
)
def test_encoding__of_random_numbers__comes_back_pixel_by_pixel(values: set[int], suffix: str, seed: int) -> None:
    listed = sorted(values)
    drawing = np.random.default_rng(seed).integers(0, len(listed), (9, 13)).astype(np.uint8)
    drawing.ravel()[: len(listed)] = np.arange(len(listed))
    with tempfile.TemporaryDirectory() as folder:
        label = as_file(suffix, listed, np.uint16)(drawing, Path(folder) / "label")
        table = MaskTable((np.zeros((9, 13), np.uint8),), (label,), pd.RangeIndex(1))
        task = task_of(check_rows(table, workers=1), class_names={value: f"n{value}" for value in listed})
        stored = read_mask(label)
        assert np.array_equal(stored, np.array(listed)[drawing])
        mask = task.decode(task.encode(stored))
        write_png(Path(folder) / "out.png", mask)
        assert np.array_equal(read_mask(Path(folder) / "out.png"), stored)


def test_check_values__colours_of_no_class__are_named_with_their_rows(tmp_path: Path) -> None:
    table, _ = made(CASES["colours_on_white"], tmp_path)
    task = task_of(check_rows(table))
    strange = np.full((*SIZE, 3), WHITE, np.uint8)
    strange[:2, :3] = (1, 2, 3)
    wrong = MaskTable(table.images[:2], (strange, np.zeros(SIZE, np.uint8)), pd.Index(["a", "b"]))
    with pytest.raises(DataError, match="2 masks hold values that no class has; known are #ffffff, #0a14fa") as caught:
        check_values(task, wrong, check_rows(wrong))
    assert "row a (array in memory): #010203 (6 pixels)" in str(caught.value)
    assert f"row b (array in memory): #000000 ({SIZE[0] * SIZE[1]} pixels)" in str(caught.value)
    with pytest.raises(DataError, match=r"^m: the mask holds #010203 \(6 pixels\), .* fit with color_map="):
        task.encode(strange, name="m")
    numbers = infer_task([{0: 9, 5: 9}])
    assert numbers.unknown_values({5: 3}, MaskEncoding(colours=True)) == {"#000005": 3}  # blue is not the number 5
    with pytest.raises(DataError, match=r"a mask of shape \(72, 96, 3\)"):
        numbers.encode(strange)


def test_split_holdout__colours_and_grey_files_of_one_set__count_the_same_background() -> None:
    empty, marked = np.full((*SIZE, 3), WHITE, np.uint8), np.full((*SIZE, 3), WHITE, np.uint8)
    marked[:, :48] = RED
    table = MaskTable((empty,) * 8, (*[empty] * 4, *[marked] * 4), pd.RangeIndex(8))  # an all-white mask is grey
    checks = check_rows(table)
    assert [check.encoding.colours for check in checks] == [False] * 4 + [True] * 4
    task = infer_task([check.value_counts for check in checks], encodings=[check.encoding for check in checks])
    for seed in range(4):
        held = split_holdout(table, checks, frac=0.25, seed=seed, task=task)[1]
        assert sorted(index >= 4 for index in held.index) == [False, True]


@pytest.mark.parametrize("kind", ["bits", "palette", "colours_half_transparent"])
def test_segmentor__masks_of_colours__fits_scores_and_writes_the_same_kind(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    rows = []
    for position in range(8):
        drawing = drawn(len(case.values), position)
        write_png(tmp_path / f"{position}_image.png", unpack(as_packed((BLACK, RED, GREEN, BLUE, WHITE)))[drawing])
        label = case.write(drawing, tmp_path / str(position))
        rows.append({"image": str(tmp_path / f"{position}_image.png"), "label": str(label)})
    frame = pd.DataFrame(rows)
    tiny = {"model.input_size": 64, "model.decoder_dim": 32, "model.detail": False, "env.batch_size": 2}
    segmentor = SemanticSegmentor(
        path=tmp_path / "b", hyperparameters={**tiny, "env.precision": "32-true"}, verbosity=0
    )
    segmentor.fit(frame[:6], frame[6:], max_epochs=1, limit_train_batches=2)
    loaded = SemanticSegmentor.load(tmp_path / "b")
    assert loaded.task_ == segmentor.task_
    metric = "iou" if kind == "bits" else "miou"
    assert 0 <= loaded.evaluate(frame[6:], metric)[metric] <= 1
    masks = loaded.predict(frame[6:])
    saved = loaded.predict(frame[6:], save_to=tmp_path / "out")
    for mask, path in zip(masks, saved["mask"], strict=True):
        with Image.open(path) as image:
            assert image.mode == case.mode
            opaque = np.asarray(image)
            if case.mode in ("LA", "RGBA"):
                assert (opaque[:, :, -1] == 128).all()
                opaque = opaque[:, :, :-1].squeeze()
            assert np.array_equal(opaque, mask)
        if kind in ("palette", "colours_half_transparent"):
            colours = {tuple(colour) for colour in read_image(path).reshape(-1, 3).tolist()}
            assert colours <= ({*VOC} if kind == "palette" else {*case.values})
