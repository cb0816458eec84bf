"""What a check decoded is taken instead of read again: same results, within the budget, each file opened once."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl import estimator as estimator_module
from semseg_automl.data import images as images_module
from semseg_automl.data.cache import ImageCache
from semseg_automl.data.checks import check_rows, usable_rows
from semseg_automl.data.dataset import Batch, MaskDataModule, MaskDataset
from semseg_automl.data.drawn import DrawnMask
from semseg_automl.data.images import read_image, read_mask, write_png
from semseg_automl.data.kept import DecodedFiles, image_of, mask_of
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.errors import DataError
from semseg_automl.task import SegmentationTask, infer_task
from semseg_automl.third_party import lightning
from semseg_automl.training import data_module

ROW = 4 * 40 * 48
"""Bytes of an image and its mask, one byte a pixel."""
FAST: dict[str, Any] = {
    "model.input_size": 64,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "env.num_workers": 0,
    "data.augmentation": "flip",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Draw a small binary data set of images of one size."""
    return draw_dataset(tmp_path / "drawn", kind="binary", train=6, val=3, test=4, size=(40, 48))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file has been decoded, by name."""
    counts: Counter[str] = Counter()
    plain = images_module._open

    def counted(path: Any, name: str) -> Any:
        counts[f"{Path(path).parent.name}/{Path(path).name}"] += 1
        return plain(path, name)

    monkeypatch.setattr(images_module, "_open", counted)
    return counts


def checked(table: MaskTable, budget: int = 10**6) -> tuple[SegmentationTask, DecodedFiles]:
    """Check a table; return its task and what was kept."""
    kept = DecodedFiles(budget)
    checks = check_rows(table, keep=kept, workers=1)
    return infer_task([c.value_counts for c in checks], encodings=[c.encoding for c in checks]), kept


def module_of(table: MaskTable, task: SegmentationTask, kept: DecodedFiles | None, workers: int) -> MaskDataModule:
    """A data module, augmented, whose cache takes in what was kept."""
    cache = ImageCache(len(table), 10**6, shared=workers > 0)
    data = MaskDataset(table, task, (32, 32), "strong", 3, cache=cache)
    if kept is not None:
        data.adopt(kept)
        kept.clear()
    return MaskDataModule(data, data, batch_size=2, views=2, num_workers=workers, seed=1)


def same(a: Batch, b: Batch) -> bool:
    """Whether batches are equal bit for bit."""
    return torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) and torch.equal(a.index, b.index)


def test_check_rows__keep__finds_the_same_and_keeps_what_reading_gives(folder: Path) -> None:
    table = read_table(folder / "train.csv")
    kept = DecodedFiles(10**6)
    assert check_rows(table, keep=kept) == check_rows(table)
    assert kept.used == 6 * ROW
    assert all(kept.holds(table, row) for row in range(6))
    for row in range(6):
        image, mask = kept.take_image(table, row), kept.take_mask(table, row)
        assert image is not None
        assert mask is not None
        assert np.array_equal(image, read_image(table.images[row]))
        assert np.array_equal(mask.pixels, read_mask(folder / "masks" / Path(table.mask_name(row)).name))
    assert kept.used == 0
    assert kept.take_image(table, 0) is None
    assert not kept.holds(table, 0)


@pytest.mark.parametrize(("budget", "rows"), [(0, 0), (ROW - 1, 0), (3 * ROW, 3), (3 * ROW + 5, 3)])
def test_check_rows__budget__keeps_the_first_rows_whole_and_no_byte_more(folder: Path, budget: int, rows: int) -> None:
    table = read_table(folder / "train.csv")
    kept = checked(table, budget)[1]
    assert kept.used == rows * ROW <= budget
    assert [kept.holds(table, row) for row in range(6)] == [row < rows for row in range(6)]


def test_check_rows__many_threads__keep_within_the_budget(folder: Path) -> None:
    table = read_table(folder / "train.csv")
    image, mask = read_image(table.images[0]), None
    many = MaskTable(tuple(f"{number}.png" for number in range(500)), None, pd.RangeIndex(500))
    kept = DecodedFiles(100 * image.nbytes)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: kept.keep(many, row, image, mask), range(500)))
    assert kept.used == kept.budget
    with ThreadPoolExecutor(8) as pool:
        taken = [found for found in pool.map(lambda row: kept.take_image(many, row), range(500)) if found is not None]
    assert (len(taken), kept.used) == (100, 0)


def test_usable_rows__bad_rows__are_not_kept_and_are_told_as_without(folder: Path) -> None:
    table = read_table(folder / "train.csv")
    write_png(str(table.masks[1]) if table.masks else "", np.zeros((9, 9), np.uint8))
    Path(str(table.images[3])).write_bytes(b"nothing")
    kept = DecodedFiles(10**6)
    usable, checks, dropped = usable_rows(table, keep=kept)
    assert (checks, dropped) == usable_rows(table)[1:]
    assert kept.used == len(usable) * ROW == 4 * ROW
    with pytest.raises(DataError, match="2 rows of 6 cannot be used"):
        check_rows(table, keep=kept)


def test_check_rows__without_masks_or_with_masks_in_memory__keeps_what_comes_from_files(folder: Path) -> None:
    images = read_table(folder / "train.csv").images
    kept = DecodedFiles(10**6)
    check_rows(MaskTable(images, None, pd.RangeIndex(6)), keep=kept)
    assert kept.used == 6 * ROW * 3 // 4
    kept.clear()
    drawn = tuple(DrawnMask((40, 48), (), f"mask {row}") for row in range(6))
    table = MaskTable(images, drawn, pd.RangeIndex(6))
    check_rows(table, keep=kept)
    assert kept.used == 6 * ROW * 3 // 4
    assert kept.holds(table, 2)
    assert kept.take_mask(table, 2) is None
    assert np.array_equal(mask_of(table, 2, colours=False, kept=kept), read_mask(drawn[2]))
    arrays = MaskTable(tuple(map(read_image, images)), None, pd.RangeIndex(6))
    kept.clear()
    check_rows(arrays, keep=kept)
    assert kept.used == 0


def test_check_rows__one_image_in_two_rows__is_counted_and_given_once(folder: Path, opened: Counter[str]) -> None:
    table = read_table(folder / "train.csv").take([0, 1, 0])
    kept = checked(table)[1]
    assert kept.used == 2 * ROW
    first, second = image_of(table, 0, kept), image_of(table, 2, kept)
    assert np.array_equal(first, second)
    assert first is not second
    assert kept.used == 2 * ROW - first.nbytes


def test_mask_of__palette_and_colours__are_what_reading_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 2, (40, 48), dtype=np.uint8), "L").convert("P")
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.save(tmp_path / "palette.png")
    write_png(tmp_path / "colours.png", rng.integers(0, 2, (40, 48, 3), dtype=np.uint8) * 255)
    masks = (str(tmp_path / "palette.png"), str(tmp_path / "colours.png"))
    table = MaskTable((np.zeros((40, 48, 3), np.uint8),) * 2, masks, pd.RangeIndex(2))
    for colours in (True, False):
        kept = DecodedFiles(10**6)
        check_rows(table, keep=kept)
        assert np.array_equal(mask_of(table, 0, colours=colours, kept=kept), read_mask(masks[0], colours=colours))
    assert np.array_equal(mask_of(table, 1, colours=True, kept=kept), read_mask(masks[1], colours=True))
    check_rows(table, keep=kept)
    with pytest.raises(DataError) as plain:
        mask_of(table, 1, colours=False)
    with pytest.raises(DataError) as from_kept:
        mask_of(table, 1, colours=False, kept=kept)
    assert str(from_kept.value) == str(plain.value)
    kept.clear()
    check_rows(table, keep=kept)
    named = kept.as_table(table)
    assert named.masks is not None
    for row in range(2):
        assert np.array_equal(read_mask(named.masks[row], colours=True), read_mask(masks[row], colours=True))


def test_mask_of__table_without_masks__says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match="without masks"):
        mask_of(MaskTable((str(folder),), None, pd.RangeIndex(1)), 0, colours=False)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="processes are not forked here"))])
def test_adopt__then_files_vanish__first_epoch_is_the_same_bit_for_bit(folder: Path, workers: int) -> None:
    table = read_table(folder / "train.csv")
    task, kept = checked(table)
    expected = list(module_of(table, task, None, 0).train_dataloader())
    for path in folder.rglob("*.*g"):
        path.unlink()
    module = module_of(table, task, kept, workers)
    got = list(module.train_dataloader())
    assert len(got) == len(expected) == 6
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert kept.used == 0


def test_adopt__some_rows_kept__reads_the_others(folder: Path, opened: Counter[str]) -> None:
    table = read_table(folder / "train.csv")
    task, kept = checked(table, budget=2 * ROW)
    opened.clear()
    got = list(module_of(table, task, kept, 0).train_dataloader())
    assert sum(opened.values()) == 2 * 4
    assert all(same(a, b) for a, b in zip(got, module_of(table, task, None, 0).train_dataloader(), strict=True))


def test_adopt__while_it_moves__memory_never_holds_more_than_the_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_table(folder / "train.csv")
    task, kept = checked(table, budget=5 * ROW)
    totals: list[int] = []
    plain = ImageCache.put

    def watched(self: ImageCache, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        totals.append(self.used + kept.used)

    monkeypatch.setattr(ImageCache, "put", watched)
    MaskDataset(table, task, (32, 32), cache=ImageCache(6, 5 * ROW)).adopt(kept)
    assert len(totals) == 5
    assert max(totals) <= 5 * ROW


def test_adopt__no_cache_or_processes_that_are_not_forked__moves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_table(folder / "train.csv")
    task, kept = checked(table)
    MaskDataset(table, task, (32, 32)).adopt(kept)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    shared, own = ImageCache(6, 10**6, shared=True), ImageCache(6, 10**6, shared=False)
    MaskDataset(table, task, (32, 32), cache=shared).adopt(kept)
    assert (shared.used, kept.used) == (0, 6 * ROW)
    MaskDataset(table, task, (32, 32), cache=own).adopt(kept)
    assert (own.used, kept.used) == (6 * ROW, 0)


def test_adopt__value_that_no_class_has__is_an_error_that_names_the_row(folder: Path) -> None:
    table = read_table(folder / "train.csv")
    kept = checked(table)[1]
    other = SegmentationTask("binary", (0, 7), ("background", "thing"))
    with pytest.raises(DataError, match="which no class has"):
        MaskDataset(table, other, (32, 32), cache=ImageCache(6, 10**6)).adopt(kept)


def test_fit__default__opens_each_file_once_until_it_has_trained(folder: Path, opened: Counter[str]) -> None:
    at_start: list[Counter[str]] = []

    class Noting(lightning.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            at_start.append(Counter(opened))

    segmentor = SemanticSegmentor(path=folder / "b", hyperparameters=FAST, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=1, callbacks=[Noting()], logger=False)
    assert len(at_start) == 1
    assert set(at_start[0].values()) == {1}
    assert len(at_start[0]) == 2 * 9


def test_fit__images_kept_or_not__gives_the_same_weights(folder: Path) -> None:
    weights = []
    for setting in ("auto", "off"):
        asked = {**FAST, "env.image_cache": setting}
        segmentor = SemanticSegmentor(path=folder / setting, hyperparameters=asked, verbosity=0)
        segmentor.fit(folder / "train.csv", holdout_frac=0.3, max_epochs=1, logger=False)
        weights.append(segmentor._bundle.model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(("asked", "kept_bytes"), [("auto", 9 * ROW), ("off", 0), (2 * ROW, 2 * ROW)])
def test_fit__env_image_cache__is_what_the_check_may_keep(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, kept_bytes: int
) -> None:
    seen: list[int] = []

    def noted(*arguments: Any, kept: DecodedFiles, **options: Any) -> None:
        seen.append(kept.used)
        raise KeyboardInterrupt

    monkeypatch.setattr(estimator_module, "fit_bundle", noted)
    setting = {**FAST, "env.image_cache": asked}
    segmentor = SemanticSegmentor(path=folder / "b", hyperparameters=setting, verbosity=0)
    with pytest.raises(KeyboardInterrupt):
        segmentor.fit(folder / "train.csv", folder / "val.csv")
    again = SemanticSegmentor(path=folder / "c", verbosity=0)
    with pytest.raises(KeyboardInterrupt):
        again.fit(folder / "train.csv", folder / "val.csv", plan=segmentor.plan_)
    assert seen == [kept_bytes, kept_bytes]


def test_data_module__what_was_kept__goes_to_training_and_validation_and_is_empty_then(
    folder: Path, opened: Counter[str]
) -> None:
    segmentor = SemanticSegmentor(path=folder / "b", hyperparameters=FAST, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True)
    tables = read_table(folder / "train.csv"), read_table(folder / "val.csv")
    kept = DecodedFiles(10**6)
    for table in tables:
        check_rows(table, keep=kept)
    opened.clear()
    data = data_module(segmentor.plan_, segmentor.task_, *tables, kept)
    assert kept.used == 0
    assert len(list(data.train_dataloader())) > 0
    assert len(list(data.val_dataloader())) == 1
    assert not opened


def test_evaluate__each_file__is_opened_once_and_figures_are_those_of_reading_twice(
    folder: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmentor = SemanticSegmentor(path=folder / "b", hyperparameters=FAST, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=1, logger=False)
    frame = pd.read_csv(folder / "test.csv").map(lambda cell: str(folder / cell))
    frame.index = pd.Index(list("wxyz"))
    opened.clear()
    images = segmentor.evaluate(frame, return_per_image=True)
    assert set(opened.values()) == {1}
    assert len(opened) == 8
    monkeypatch.setattr("semseg_automl.evaluation.KEPT_BYTES", 0)
    opened.clear()
    pd.testing.assert_frame_equal(images, segmentor.evaluate(frame, return_per_image=True), check_exact=True)
    assert set(opened.values()) == {2}


def test_as_table__rows__are_called_as_before_and_nothing_is_left(folder: Path) -> None:
    table = read_table(folder / "train.csv").take([4, 2, 0])
    kept = checked(table, budget=2 * ROW)[1]
    named = kept.as_table(table)
    assert kept.used == 0
    assert [isinstance(image, np.ndarray) for image in named.images] == [True, True, False]
    for part, whole, rows in ((named, table, [0, 1, 2]), (named.take([2, 1]), table.take([2, 1]), [0, 1])):
        for row in rows:
            assert part.row_name(row) == whole.row_name(row)
            assert (part.image_name(row), part.mask_name(row)) == (whole.image_name(row), whole.mask_name(row))
    assert named.index.equals(table.index)
