"""Samples and batches: views, seeds, loader processes, the cache's budget, and what a batch holds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from semseg_automl.data import dataset as dataset_module
from semseg_automl.data import kept as kept_module
from semseg_automl.data.cache import ImageCache
from semseg_automl.data.checks import check_rows
from semseg_automl.data.dataset import (
    Batch,
    MaskDataModule,
    MaskDataset,
    Sample,
    collate,
    loading_seconds,
)
from semseg_automl.data.images import ImageSource, read_image, write_png
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.sampling import ViewSampler
from semseg_automl.data.table import MaskTable
from semseg_automl.data.transforms import resize, resize_mask
from semseg_automl.task import IGNORE_INDEX, SegmentationTask

TASK = SegmentationTask("binary", (0, 255), ("background", "leaf"), ignore_values=(100,))
SIZE = (16, 24)


def draw_table(rows: int = 5) -> MaskTable:
    """Draw images of different sizes whose masks hold background, foreground and an ignored value."""
    rng = np.random.default_rng(0)
    images: list[ImageSource] = []
    masks: list[ImageSource] = []
    for row in range(rows):
        shape = (20 + 2 * row, 30 - row)
        images.append(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        masks.append(rng.choice(np.array([0, 255, 100], dtype=np.uint8), shape))
    return MaskTable(tuple(images), tuple(masks), pd.RangeIndex(rows))


def draw_dataset(rows: int = 5, augmentation: str = "none", seed: int = 0) -> MaskDataset:
    """Make a dataset of such a table."""
    return MaskDataset(draw_table(rows), TASK, SIZE, augmentation, seed)


def draw_module(rows: int = 5, budget: int = 0, **options: Any) -> MaskDataModule:
    """Make a data module, strongly augmented, over such tables; its datasets share a cache of `budget` bytes."""
    settings = {"batch_size": 2, "views": 3, "num_workers": 0, "seed": 4, **options}
    cache = ImageCache(2 * rows, budget, shared=settings["num_workers"] > 0) if budget else None
    train = replace(draw_dataset(rows, "strong"), cache=cache)
    held = replace(draw_dataset(rows), table=draw_table(rows).take(range(rows)[::-1]), cache=cache, first_entry=rows)
    return MaskDataModule(train, held, **settings)


def same(a: Sample, b: Sample) -> bool:
    """Whether two samples are equal bit for bit."""
    return np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask) and a.geometry == b.geometry


def assert_same_batches(got: Iterable[Batch], expected: Iterable[Batch]) -> None:
    """Compare batches bit for bit."""
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.mask, b.mask)
        assert a.geometry == b.geometry
        assert torch.equal(a.index, b.index)
        for mine, theirs in zip(a.native_masks, b.native_masks, strict=True):
            assert torch.equal(mine, theirs)


def test_dataset__same_seed__gives_the_same_samples_in_any_order() -> None:
    first, second = draw_dataset(augmentation="strong"), draw_dataset(augmentation="strong")
    forwards = [first[index] for index in range(15)]
    backwards = [second[index] for index in reversed(range(15))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not same(draw_dataset(augmentation="strong", seed=1)[0], forwards[0])


def test_dataset__other_view_of_a_row__is_augmented_otherwise() -> None:
    data = draw_dataset(augmentation="strong")
    views = [data[5 * view + 2] for view in range(4)]
    assert not any(same(views[0], view) for view in views[1:])
    assert all(np.array_equal(view.native_mask, views[0].native_mask) for view in views)
    assert all(view.geometry == views[0].geometry for view in views)
    assert [view.index for view in views] == [2, 7, 12, 17]


def test_dataset__no_augmentation__only_resizes_whatever_the_view() -> None:
    data = draw_dataset()
    image = cast(NDArray[np.uint8], data.table.images[3])
    native = TASK.encode(cast(NDArray[np.uint8], cast(tuple[ImageSource, ...], data.table.masks)[3]))
    assert set(np.unique(native)) == {0, 1, IGNORE_INDEX}
    for index in (3, 8):
        sample = data[index]
        assert np.array_equal(sample.image, resize(image, SIZE)[0])
        assert np.array_equal(sample.mask, resize_mask(native, SIZE))
        assert np.array_equal(sample.native_mask, native)
        assert sample.geometry.original_size == native.shape
        assert sample.geometry.input_size == SIZE


def test_dataset__table_without_masks__is_refused() -> None:
    table = draw_table(2)
    with pytest.raises(ValueError, match="masks"):
        MaskDataset(MaskTable(table.images, None, table.index), TASK, SIZE)[0]


@pytest.mark.parametrize(("budget_rows", "reads"), [(0, 9), (1, 7), (2, 5), (3, 3)])
def test_dataset__cache_budget__holds_as_many_rows_as_fit(
    budget_rows: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw_dataset(3, augmentation="light")
    expected = [data[index] for index in range(9)]
    row_bytes = [4 * sample.native_mask.size for sample in expected[:3]]  # three channels and the mask
    cache = ImageCache(3, sum(row_bytes[:budget_rows]))
    names: list[str | None] = []

    def counting_read(source: ImageSource, *, name: str | None = None, **rest: Any) -> NDArray[np.uint8]:
        names.append(name)
        return read_image(source, name=name, **rest)

    monkeypatch.setattr(kept_module, "read_image", counting_read)
    fresh = replace(draw_dataset(3, augmentation="light"), cache=cache)
    got = [fresh[index] for index in range(9)]
    assert len(names) == reads
    assert cache.used == sum(row_bytes[:budget_rows])
    assert all(same(a, b) for a, b in zip(got, expected, strict=True)), "cached or read: the same samples"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("budget", [0, 8_000, 10**6], ids=["no cache", "some rows fit", "all rows fit"])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_data_module__cache_and_loader_processes__change_no_sample(
    num_workers: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "usable_cores", lambda: 1)
    alone = draw_module().train_dataloader()
    monkeypatch.setattr(dataset_module, "usable_cores", lambda: 3)
    module = draw_module(budget=budget, num_workers=num_workers)
    together = module.train_dataloader()
    for epoch in range(2):
        for loader in (alone, together):
            cast(ViewSampler, loader.sampler).set_epoch(epoch)
        assert_same_batches(list(together), list(alone))
    assert_same_batches(list(module.val_dataloader()), list(draw_module().val_dataloader()))
    if module.train.cache is not None:
        assert (module.train.cache.used > 0.9 * budget) == (budget == 8_000), "the processes filled one cache"


def test_data_module__training__leaves_out_only_the_last_incomplete_batch() -> None:
    batches = list(draw_module(rows=5, views=3, batch_size=4).train_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 4]


def test_data_module__batch_larger_than_the_table__is_filled_with_views() -> None:
    batches = list(draw_module(rows=2, views=6, batch_size=6).train_dataloader())
    assert [len(batch) for batch in batches] == [6, 6]
    few = list(draw_module(rows=2, views=1, batch_size=6).train_dataloader())
    assert [len(batch) for batch in few] == [2], "an epoch smaller than a batch is still a step"


def test_data_module__validation__keeps_all_rows_in_order() -> None:
    module = draw_module(rows=5, batch_size=2)
    batches = list(module.val_dataloader())
    assert [len(batch) for batch in batches] == [2, 2, 1]
    got = torch.cat([batch.image for batch in batches])
    assert torch.equal(got, collate([module.validation[row] for row in range(5)]).image)


def test_collate__samples_of_different_sizes__have_the_documented_shapes_and_types() -> None:
    data = draw_dataset()
    samples = [data[0], data[4]]
    batch = collate(samples)
    assert len(batch) == 2
    assert (batch.image.shape, batch.image.dtype) == ((2, 3, *SIZE), torch.uint8)
    assert (batch.mask.shape, batch.mask.dtype) == ((2, *SIZE), torch.uint8)
    assert batch.image.is_contiguous()
    assert [tuple(mask.shape) for mask in batch.native_masks] == [(20, 30), (28, 26)]
    assert all(mask.dtype == torch.uint8 for mask in batch.native_masks)
    assert [geometry.original_size for geometry in batch.geometry] == [(20, 30), (28, 26)]
    assert (batch.index.tolist(), batch.index.dtype) == ([0, 4], torch.int64)
    assert np.array_equal(batch.image[1].permute(1, 2, 0).numpy(), samples[1].image)
    assert np.array_equal(batch.mask[1].numpy(), samples[1].mask)
    assert set(batch.mask.unique().tolist()) == {0, 1, IGNORE_INDEX}


def test_batch__to_another_device__moves_all_tensors_and_keeps_the_geometry() -> None:
    batch = collate([draw_dataset()[0], draw_dataset()[1]])
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, Batch)
    assert {t.device.type for t in (moved.image, moved.mask, *moved.native_masks)} == {"meta"}
    assert moved.geometry == batch.geometry
    assert (moved.index.device.type, moved.index.tolist()) == ("cpu", [0, 1])
    assert batch.image.device.type == "cpu"


def test_data_module__training__sends_no_masks_of_the_images_own_size() -> None:
    module = draw_module()
    assert all(batch.native_masks == [] for batch in module.train_dataloader())
    assert [len(batch.native_masks) for batch in module.val_dataloader()] == [2, 2, 1]


@pytest.mark.parametrize(("limit", "rows"), [(0.0, 1), (60.0, 5)])
def test_loading_seconds__time_given__reads_a_row_at_least_and_each_once_at_most(
    limit: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = MaskDataset.__getitem__

    def slow(self: MaskDataset, index: int) -> Sample:
        read.append(index)
        time.sleep(0.02)
        return plain(self, index)

    monkeypatch.setattr(MaskDataset, "__getitem__", slow)
    assert 0.02 <= loading_seconds(draw_table(), TASK, limit=limit) < 1
    assert read == list(range(rows))


@pytest.mark.parametrize("budget", [0, 4_000, 10**6], ids=["no cache", "some rows fit", "all rows fit"])
@pytest.mark.parametrize("checked", [False, True])
def test_dataset__classes_of_the_rows__are_those_of_the_masks_and_no_image_is_read(
    checked: bool, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = [np.full((8, 8), value, np.uint8) for value in (0, 255, 100)]
    masks.append(np.where(np.eye(8, dtype=bool), 255, 0).astype(np.uint8))
    for row, mask in enumerate(masks):
        write_png(tmp_path / f"{row}.png", np.zeros((8, 8, 3), np.uint8))
        write_png(tmp_path / f"mask{row}.png", mask)
    names = [str(tmp_path / f"{row}.png") for row in range(4)]
    table = MaskTable(tuple(names), tuple(str(tmp_path / f"mask{row}.png") for row in range(4)), pd.RangeIndex(4))
    kept = DecodedFiles(10**6)
    if checked:
        check_rows(table, keep=kept)
        monkeypatch.setattr(kept_module, "read_mask", None)  # nothing is opened again
    cache = ImageCache(4, budget) if budget else None
    data = MaskDataset(table, TASK, SIZE, cache=cache)
    if checked:
        data.adopt(kept)
    monkeypatch.setattr(kept_module, "read_image", None)
    assert data.classes(kept).tolist() == [[True, False], [False, True], [False, False], [True, True]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_data_module__repeats_and_loader_processes__show_the_same_samples_rare_rows_more_often() -> None:
    repeats = np.array([4.0, 1.0, 1.0, 1.0, 1.0])
    modules = [draw_module(views=4, num_workers=workers, repeats=repeats) for workers in (0, 2)]
    first, second = (list(module.train_dataloader()) for module in modules)
    assert_same_batches(first, second)
    shown = torch.cat([batch.index for batch in first])
    assert len(shown) == len(shown.unique()) == 20
    assert (shown % 5 == 0).sum() == 10
