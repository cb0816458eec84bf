"""From a table to batches: datasets, the sampler of views, and the Lightning data module.

Which image a batch holds and how it is augmented follows from the seed alone, whatever the number of loader processes.
Reading, encoding and augmenting are done by the modules below this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from semseg_automl.data.images import read_image, read_mask
from semseg_automl.data.table import MaskTable
from semseg_automl.data.transforms import Geometry, augment, resize, resize_mask
from semseg_automl.task import SegmentationTask
from semseg_automl.third_party import lightning

CACHE_BYTES = 2 * 2**30
"""Decoded images kept in memory at most; reading a JPEG costs several times the augmentation."""


@dataclass
class Sample:
    """One row, ready for the network.

    Attributes:
        image: ``(h, w, 3)`` uint8 at the input size.
        mask: ``(h, w)`` uint8 class indices at the input size.
        geometry: how to get back to the image's own size.
        native_mask: ``(H, W)`` uint8 class indices at the image's own size.
        index: item of the dataset this is, ``view * rows + row``.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    geometry: Geometry
    native_mask: NDArray[np.uint8]
    index: int


@dataclass
class Batch:
    """What the network is trained and validated on.

    Attributes:
        image: ``(B, 3, h, w)`` uint8 RGB.
        mask: ``(B, h, w)`` int64 class indices, 255 where unknown.
        geometry: one per image.
        native_masks: ``(H, W)`` uint8 class indices at each image's own size.
        index: ``(B,)`` int64 items of the dataset, always on the CPU.
    """

    image: Tensor
    mask: Tensor
    geometry: list[Geometry]
    native_masks: list[Tensor]
    index: Tensor

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
        )


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one input size into a batch."""
    return Batch(
        torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack([s.mask for s in samples]).astype(np.int64)),
        [s.geometry for s in samples],
        [torch.from_numpy(s.native_mask) for s in samples],
        torch.tensor([s.index for s in samples]),
    )


@dataclass
class MaskDataset(Dataset[Sample]):
    """Rows of a table as samples. Item ``view * rows + i`` is row i, augmented as that view of it.

    Args:
        table: images and masks.
        task: encodes the masks.
        input_size: height and width of the samples in pixels.
        augmentation: strength of the augmentation; ``none`` only resizes.
        seed: of the augmentation.
    """

    table: MaskTable
    task: SegmentationTask
    input_size: tuple[int, int]
    augmentation: str = "none"
    seed: int = 0
    _cache: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=dict, repr=False)
    _cached_bytes: int = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        """Return one view of one row."""
        view, row = divmod(index, len(self.table))
        image, mask = self._decoded(row)
        if self.augmentation == "none":
            resized, geometry = resize(image, self.input_size)
            return Sample(resized, resize_mask(mask, self.input_size), geometry, mask, index)
        rng = np.random.default_rng([self.seed, view, row])
        geometry = Geometry(original_size=(image.shape[0], image.shape[1]), input_size=self.input_size)
        return Sample(*augment(image, mask, self.input_size, self.augmentation, rng), geometry, mask, index)

    def _decoded(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read image and encoded mask of a row, from memory where they fit."""
        if row in self._cache:
            return self._cache[row]
        if self.table.masks is None:
            raise ValueError("MaskDataset needs a table with masks")
        name = self.table.row_name(row)
        image = read_image(self.table.images[row], name=name)
        stored = read_mask(self.table.masks[row], name=name, colours=self.task.colours)
        mask = self.task.encode(stored, name=name)
        if self._cached_bytes + image.nbytes + mask.nbytes <= CACHE_BYTES:
            self._cache[row] = image, mask
            self._cached_bytes += image.nbytes + mask.nbytes
        return image, mask


class ViewSampler(Sampler[int]):
    """Every row `views` times an epoch, shuffled anew; the indices name views of the rows (see `MaskDataset`).

    Args:
        rows: rows of the table.
        views: times each row is shown per epoch.
        seed: of the order.
        cached_views: different views of a row in the whole training, which come round and round; 0 for new ones
            every epoch.
    """

    def __init__(self, rows: int, views: int, seed: int, cached_views: int = 0) -> None:
        self.rows = rows
        self.views = views
        self.seed = seed
        self.cached_views = cached_views
        self.epoch = 0

    def __len__(self) -> int:
        """Return the samples of one epoch."""
        return self.rows * self.views

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch to draw next; Lightning calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the epoch's indices."""
        rng = np.random.default_rng([self.seed, self.epoch])
        first_view = self.epoch * self.views
        for view in range(first_view, first_view + self.views):
            shown = view % self.cached_views if self.cached_views else view
            yield from (shown * self.rows + rng.permutation(self.rows)).tolist()


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
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.batch_size = batch_size
        self.views = views
        self.num_workers = num_workers
        self.seed = seed
        self.cached_views = cached_views

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled batches; a last incomplete one is left out, its rows come in other epochs."""
        sampler = ViewSampler(len(self.train), self.views, self.seed, self.cached_views)
        return self._loader(self.train, min(self.batch_size, len(sampler)), sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the validation rows in order."""
        return self._loader(self.validation, self.batch_size, sampler=None, drop_last=False)

    def _loader(
        self, data: MaskDataset, batch_size: int, *, sampler: Sampler[int] | None, drop_last: bool
    ) -> DataLoader[Sample]:
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
        )
