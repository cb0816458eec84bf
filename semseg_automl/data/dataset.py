"""From a table to batches: datasets and the Lightning data module.

Which image a batch holds and how it is augmented follows from the seed alone, whatever the number of loader processes.
Reading, encoding, augmenting and choosing rows are done by the modules below this one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from semseg_automl.data.cache import ImageCache
from semseg_automl.data.crops import CropRule, cut, draw_corner
from semseg_automl.data.kept import DecodedFiles, image_of, mask_of
from semseg_automl.data.parallel import each_row
from semseg_automl.data.sampling import ViewSampler
from semseg_automl.data.table import MaskTable
from semseg_automl.data.transforms import Geometry, augment, resize, resize_mask
from semseg_automl.hardware import usable_cores
from semseg_automl.processes import ALONE
from semseg_automl.task import IGNORE_INDEX, SegmentationTask
from semseg_automl.third_party import lightning
from semseg_automl.tiling import TileGrid, tile_grid

T = TypeVar("T")

PROBE_SIZE = (256, 256)
"""Input size that reading is timed at: the plan, which chooses the size, wants to know before."""
_NO_MASK = np.zeros((0, 0), np.uint8)
_CROPS = 1  # not 0, which a seed would not tell from nothing


@dataclass
class Sample:
    """One row, ready for the network.

    Attributes:
        image: ``(h, w, 3)`` uint8 at the input size.
        mask: ``(h, w)`` uint8 class indices at the input size.
        geometry: how to get back to the image's own size.
        native_mask: ``(H, W)`` uint8 class indices at the image's own size; of a training crop, at the crop's.
        index: item of the dataset this is, ``view * rows + row``.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    geometry: Geometry
    native_mask: NDArray[np.uint8]
    index: int


@dataclass
class TiledSample:
    """One whole row in tiles, to be validated on.

    Attributes:
        images: ``(T, h, w, 3)`` uint8, every tile at the input size, in the order of the grid's corners.
        grid: where they lie.
        native_mask: as for `Sample`, of the whole image.
        index: as for `Sample`.
    """

    images: NDArray[np.uint8]
    grid: TileGrid
    native_mask: NDArray[np.uint8]
    index: int


@dataclass
class Batch:
    """What the network is trained and validated on: images or crops, or all the tiles of one image.

    Attributes:
        image: ``(B, 3, h, w)`` uint8 RGB.
        mask: ``(B, h, w)`` uint8 class indices, 255 where unknown; none for tiles, which are validated on. The loss
            wants int64: eight times the bytes, which neither loader processes nor the device are to be sent.
        geometry: one per image, or tile.
        native_masks: ``(H, W)`` uint8 class indices at each image's own size; none in training.
        index: ``(B,)`` int64 items of the dataset, always on the CPU.
        grid: where the tiles lie, if they are tiles.
    """

    image: Tensor
    mask: Tensor
    geometry: list[Geometry]
    native_masks: list[Tensor]
    index: Tensor
    grid: TileGrid | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move what the network reads to `device`; Lightning calls this."""
        return Batch(
            self.image.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
            self.geometry,
            [mask.to(device, non_blocking=non_blocking) for mask in self.native_masks],
            self.index,
            self.grid,
        )


def collate_tiles(samples: list[TiledSample]) -> Batch:
    """Make a batch of the tiles of one image."""
    (sample,) = samples
    count, height, width, _ = sample.images.shape
    geometry = Geometry(original_size=sample.grid.tile, input_size=(height, width))
    return Batch(
        _planes(sample.images),
        torch.empty(0, height, width, dtype=torch.uint8),
        [geometry] * count,
        [torch.tensor(sample.native_mask)],  # as in `collate`
        torch.tensor([sample.index]),
        sample.grid,
    )


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one input size into a batch."""
    return Batch(
        _planes([s.image for s in samples]),
        torch.from_numpy(np.stack([s.mask for s in samples])),
        [s.geometry for s in samples],
        [torch.tensor(s.native_mask) for s in samples],  # a copy: the cache's own is read-only
        torch.tensor([s.index for s in samples]),
    )


def _planes(images: Iterable[NDArray[np.uint8]]) -> Tensor:
    """Return images ``(h, w, 3)`` as ``(B, 3, h, w)``; OpenCV takes channels apart in half of PyTorch's time."""
    planes = torch.from_numpy(np.stack([plane for image in images for plane in cv2.split(image)]))
    return planes.view(-1, 3, *planes.shape[1:])


def collate_for_training(samples: list[Sample]) -> Batch:
    """Stack samples as `collate` does, without the masks at the images' own size, which only validation reads."""
    return replace(collate([replace(sample, native_mask=_NO_MASK) for sample in samples]), native_masks=[])


@dataclass
class MaskDataset(Dataset[Sample]):
    """Rows of a table as samples. Item ``view * rows + i`` is row i, augmented as that view of it.

    Args:
        table: images and masks.
        task: encodes the masks.
        input_size: height and width of the samples in pixels.
        augmentation: strength of the augmentation; ``none`` only resizes.
        seed: of the augmentation, and of the crops.
        crops: how a view is cut out of its image; None shows whole images.
        cache: keeps decoded images; None decodes them every time.
        first_entry: of this table in the cache, which other tables may share.
    """

    table: MaskTable
    task: SegmentationTask
    input_size: tuple[int, int]
    augmentation: str = "none"
    seed: int = 0
    crops: CropRule | None = None
    cache: ImageCache | None = None
    first_entry: int = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        """Return one view of one row."""
        view, row = divmod(index, len(self.table))
        image, mask = self._decoded(row)
        if self.crops is not None:
            # Another stream than the augmentation's, which then draws the same with crops and without.
            corner = draw_corner(mask, self.crops, np.random.default_rng([self.seed, view, row, _CROPS]))
            image = cut(image, corner, self.crops.size)
            mask = cut(mask, corner, self.crops.size, fill=IGNORE_INDEX)
        if self.augmentation == "none":
            resized, geometry = resize(image, self.input_size)
            return Sample(resized, resize_mask(mask, self.input_size), geometry, mask, index)
        rng = np.random.default_rng([self.seed, view, row])
        geometry = Geometry(original_size=(image.shape[0], image.shape[1]), input_size=self.input_size)
        return Sample(*augment(image, mask, self.input_size, self.augmentation, rng), geometry, mask, index)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return several samples; PyTorch's loader asks for a batch at once.

        Decoding and resampling let other threads run, so all cores take part, unless loader processes do already.
        """
        threads = 1 if get_worker_info() is not None else min(usable_cores(), len(indices))
        if threads == 1:
            return [self[index] for index in indices]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.__getitem__, indices))

    def adopt(self, kept: DecodedFiles) -> None:
        """Move what was decoded of these rows before into the cache, masks encoded, as long as there is room.

        Before loader processes are started: forked ones inherit it, others would not find it, so that nothing is moved
        then. Images go over one by one: memory never holds one twice.

        Args:
            kept: What a check decoded.

        Raises:
            DataError: A mask holds a value that the task does not know.
        """
        if self.cache is None or not self.cache.found_by_loaders:
            return
        rows = [row for row in range(len(self.table)) if kept.holds(self.table, row)]
        each_row(lambda i: self._decoded(rows[i], kept), len(rows), workers=None, progress=False)

    def classes(self, kept: DecodedFiles | None = None) -> NDArray[np.bool_]:
        """Return which classes the mask of each row holds, ``(rows, classes)``; masks in memory are not opened again.

        Args:
            kept: What was decoded before and is not wanted afterwards.

        Raises:
            DataError: A mask cannot be read, or holds a value that the task does not know.
        """

        def present(row: int) -> NDArray[np.bool_]:
            decoded = None if self.cache is None else self.cache.get(self.first_entry + row)
            mask = self._mask(row, kept) if decoded is None else decoded[1]
            return np.bincount(mask.ravel(), minlength=self.task.num_classes)[: self.task.num_classes] > 0

        return np.stack(each_row(present, len(self), workers=None, progress=False))

    def _mask(self, row: int, before: DecodedFiles | None) -> NDArray[np.uint8]:
        stored = mask_of(self.table, row, colours=self.task.colours, kept=before)
        return self.task.encode(stored, name=self.table.row_name(row))

    def _decoded(self, row: int, before: DecodedFiles | None = None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read image and encoded mask of a row, from memory where they fit, or were decoded before."""
        kept = None if self.cache is None else self.cache.get(self.first_entry + row)
        if kept is not None:
            return kept
        image = image_of(self.table, row, before)
        mask = self._mask(row, before)
        if self.cache is not None:
            self.cache.put(self.first_entry + row, image, mask, inherited=before is not None)
        return image, mask


@dataclass
class TileDataset(Dataset[TiledSample]):
    """Rows of a table in tiles that cover each image, in order, not augmented.

    Args:
        rows: whole images; also reads them.
        tile: height and width of a tile in pixels of an image.
    """

    rows: MaskDataset
    tile: tuple[int, int]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> TiledSample:
        """Return all tiles of one row."""
        image, mask = self.rows._decoded(index)
        grid = tile_grid((image.shape[0], image.shape[1]), self.tile)
        size = self.rows.input_size
        tiles = [resize(cut(image, corner, self.tile), size)[0] for corner in grid.corners()]
        return TiledSample(np.stack(tiles), grid, mask, index)


def loading_seconds(table: MaskTable, task: SegmentationTask, *, limit: float = 1.0) -> float:
    """Measure what one thread takes to read and augment a row: the median of as many rows as fit in `limit` seconds.

    Args:
        table: with masks; its first rows are read.
        task: encodes the masks.
        limit: in seconds; one row is read at least.
    """
    data = MaskDataset(table, task, PROBE_SIZE, "medium")
    seconds: list[float] = []
    start = time.perf_counter()
    for row in range(len(table)):
        before = time.perf_counter()
        data[row]
        seconds.append(time.perf_counter() - before)
        if time.perf_counter() - start >= limit:
            break
    return statistics.median(seconds)


class MaskDataModule(lightning.LightningDataModule):
    """Loaders of training and validation batches.

    Args:
        train: shuffled, augmented.
        validation: in order, only resized.
        batch_size: images per forward pass.
        views: times each training row is shown per epoch.
        num_workers: loader processes.
        seed: of the order.
        cached_views: see `ViewSampler`.
        tile: height and width, in pixels of an image, of the tiles it is validated in; None for whole images.
        repeats: see `ViewSampler`.
    """

    def __init__(
        self,
        train: MaskDataset,
        validation: MaskDataset,
        *,
        batch_size: int,
        views: int,
        num_workers: int,
        seed: int,
        cached_views: int = 0,
        tile: tuple[int, int] | None = None,
        repeats: NDArray[np.float64] | None = None,
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.batch_size = batch_size
        self.views = views
        self.num_workers = num_workers
        self.seed = seed
        self.cached_views = cached_views
        self.tile = tile
        self.repeats = repeats
        self.start = 0, 0
        """Epoch, and samples of it that were trained on before: where `train_dataloader` begins."""
        self.processes = ALONE
        """Those that share the samples, of which each loads its own."""

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled batches; a last incomplete one is left out, its rows come in other epochs."""
        shown = len(self.train), self.views, self.seed, self.cached_views
        sampler = ViewSampler(*shown, self.batch_size, self.processes, self.repeats)
        sampler.start_at(*self.start)
        size = min(self.batch_size, len(sampler))
        return self._loader(self.train, size, sampler=sampler, drop_last=True, collate_fn=collate_for_training)

    def val_dataloader(self) -> DataLoader[Sample] | DataLoader[TiledSample]:
        """Return the validation rows in order, each to one process; in tiles, the tiles of one row are a batch."""
        rows = range(self.processes.rank, len(self.validation), self.processes.count)
        if self.tile is not None:
            tiles = TileDataset(self.validation, self.tile)
            return self._loader(tiles, 1, sampler=rows, drop_last=False, collate_fn=collate_tiles)
        return self._loader(self.validation, self.batch_size, sampler=rows, drop_last=False)

    def _loader(
        self,
        data: Dataset[T],
        batch_size: int,
        *,
        sampler: Iterable[int],
        drop_last: bool,
        collate_fn: Callable[[list[Any]], Batch] = collate,
    ) -> DataLoader[T]:
        # No cv2.setNumThreads in `worker_init_fn`, where it is often called: in a process that was forked after OpenCV
        # had worked in several threads it waits for ever. Left alone, OpenCV works there in the one thread there is.
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=collate_fn,
            persistent_workers=self.num_workers > 0,
        )
