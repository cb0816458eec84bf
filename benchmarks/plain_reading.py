"""How one reads images and masks at first: what ours is measured against, in `check_speed` and `loader`."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semseg_automl.data.table import MaskTable
from semseg_automl.third_party import make_torchvision_importable

SIZE = (256, 256)
BATCH = 8


class PlainDataset(Dataset[tuple[Tensor, Tensor]]):
    """Image and mask as Pillow and torchvision give them, flipped at random."""

    def __init__(self, tables: Sequence[MaskTable]) -> None:
        make_torchvision_importable()
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as transforms

        self.images = [str(path) for table in tables for path in table.images]
        self.masks = [str(path) for table in tables for path in table.masks or ()]
        self.transforms = transforms
        self.nearest = InterpolationMode.NEAREST

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image: Any = self.transforms.resize(Image.open(self.images[row]).convert("RGB"), list(SIZE))
        mask: Any = self.transforms.resize(Image.open(self.masks[row]), list(SIZE), self.nearest)
        if random.random() < 0.5:
            image, mask = self.transforms.hflip(image), self.transforms.hflip(mask)
        return self.transforms.to_tensor(image), torch.from_numpy(np.array(mask)).long()


def plain_loader(tables: Sequence[MaskTable], workers: int, *, drop_last: bool) -> DataLoader[Any]:
    """Return the loader one writes first."""
    return DataLoader(
        PlainDataset(tables),
        BATCH,
        shuffle=True,
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def exhaust(loader: Iterable[object]) -> None:
    """Take every batch."""
    for _ in loader:
        pass


def plain_check(tables: Sequence[MaskTable]) -> None:
    """Open every file and look at sizes and values, one after another."""
    paths = [pair for table in tables for pair in zip(table.images, table.masks or (), strict=True)]
    for image_path, mask_path in paths:
        image, mask = np.asarray(Image.open(str(image_path)).convert("RGB")), np.asarray(Image.open(str(mask_path)))
        if image.shape[:2] != mask.shape[:2]:
            raise ValueError(f"{mask_path}: {mask.shape} beside {image.shape}")
        np.unique(mask, return_counts=True)
