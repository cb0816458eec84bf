"""What a check of a table decoded, kept in memory for whoever reads the same files next.

`fit` and `evaluate` look at every file before they begin; without this they would decode all of them a second time. A
file that changes in between is not looked at again.

Not here: what is kept during a whole training (:mod:`semseg_automl.data.cache`), how large the budget is
(:mod:`semseg_automl.capacity`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.encodings import StoredMask
from semseg_automl.data.images import ImageSource, read_image, read_mask
from semseg_automl.data.table import MaskTable


class DecodedFiles:
    """Images and masks by path, as many as fit a budget, each until it is taken.

    Arrays in memory and masks drawn from annotations are not kept: to read them again costs next to nothing.

    Args:
        budget: Bytes they may take; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._used = 0
        self._images: dict[str, NDArray[np.uint8]] = {}
        self._masks: dict[str, StoredMask] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes in use."""
        with self._lock:
            return self._used

    def keep(self, table: MaskTable, row: int, image: NDArray[np.uint8], mask: StoredMask | None) -> None:
        """Keep what the files of a row hold, both or none; they are not to be changed afterwards."""
        image_path, mask_path = _paths(table, row)
        with self._lock:
            images = {image_path: image} if image_path and image_path not in self._images else {}
            masks = {mask_path: mask} if mask and mask_path and mask_path not in self._masks else {}
            size = sum(found.nbytes for found in images.values()) + sum(m.pixels.nbytes for m in masks.values())
            if self._used + size > self.budget:
                return
            self._used += size
            self._images |= images
            self._masks |= masks

    def holds(self, table: MaskTable, row: int) -> bool:
        """Return whether no file has to be opened to read a row."""
        image, mask = _paths(table, row)
        with self._lock:
            return (image is None or image in self._images) and (mask is None or mask in self._masks)

    def take_image(self, table: MaskTable, row: int) -> NDArray[np.uint8] | None:
        """Return the image of a row and forget it, or None where it is not kept."""
        path, _ = _paths(table, row)
        with self._lock:
            image = None if path is None else self._images.pop(path, None)
            self._used -= 0 if image is None else image.nbytes
        return image

    def take_mask(self, table: MaskTable, row: int) -> StoredMask | None:
        """Return the mask of a row and forget it, or None where it is not kept."""
        _, path = _paths(table, row)
        with self._lock:
            mask = None if path is None else self._masks.pop(path, None)
            self._used -= 0 if mask is None else mask.pixels.nbytes
        return mask

    def as_table(self, table: MaskTable) -> MaskTable:
        """Return the table with what is kept in the place of its paths, which still name the rows; nothing is left.

        Masks with a palette, which an array has not, stay paths, and so do images of which channels are chosen: those
        of an array, too, would be chosen from.
        """
        shown = self.shown_in(table)
        self.clear()
        return shown

    def shown_in(self, table: MaskTable) -> MaskTable:
        """Return what `as_table` does, and keep everything: for a short look."""
        images: list[ImageSource] = []
        masks: list[ImageSource] = []
        with self._lock:
            for row, source in enumerate(table.images):
                image_path, mask_path = _paths(table, row)
                stays = image_path is None or table.channels is not None
                images.append(source if stays else self._images.get(str(image_path), source))
                if table.masks is not None:
                    mask = None if mask_path is None else self._masks.get(mask_path)
                    masks.append(table.masks[row] if mask is None or mask.palette else mask.pixels)
        values = _values(table) | {"images": tuple(images), "masks": None if table.masks is None else tuple(masks)}
        return _NamedTable(**values, names=table)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._images.clear()
            self._masks.clear()
            self._used = 0


@dataclass(frozen=True)
class _NamedTable(MaskTable):
    """A table whose rows are called as in another one."""

    names: MaskTable = field(kw_only=True)

    def row_name(self, position: int) -> str:
        return self.names.row_name(position)

    def image_name(self, position: int) -> str:
        return self.names.image_name(position)

    def mask_name(self, position: int) -> str:
        return self.names.mask_name(position)

    def take(self, positions: Sequence[int] | NDArray[np.integer[Any]]) -> MaskTable:
        return _NamedTable(**_values(super().take(positions)), names=self.names.take(positions))


def _values(table: MaskTable) -> dict[str, Any]:
    return {column.name: getattr(table, column.name) for column in fields(MaskTable)}


def image_of(table: MaskTable, row: int, kept: DecodedFiles | None = None) -> NDArray[np.uint8]:
    """Return the image of a row as :func:`semseg_automl.data.images.read_image` does, decoded where it is not kept.

    Raises:
        DataError: As in :func:`semseg_automl.data.images.read_image`.
    """
    image = None if kept is None else kept.take_image(table, row)
    if image is not None:
        return image
    return read_image(table.images[row], name=table.row_name(row), channels=table.channels)


def mask_of(
    table: MaskTable, row: int, *, colours: bool, kept: DecodedFiles | None = None
) -> NDArray[np.uint8] | NDArray[np.int32]:
    """Return the mask of a row as :func:`semseg_automl.data.images.read_mask` does, decoded where it is not kept.

    Args:
        table: With masks.
        row: Position in the table.
        colours: As in :func:`semseg_automl.data.images.read_mask`.
        kept: What is decoded already.

    Raises:
        ValueError: The table has no masks.
        DataError: As in :func:`semseg_automl.data.images.read_mask`.
    """
    if table.masks is None:
        raise ValueError("a mask is asked for of a table without masks; read it with a label column")
    name, stored = table.row_name(row), None if kept is None else kept.take_mask(table, row)
    if stored is None:
        return read_mask(table.masks[row], name=name, colours=colours)
    called = f"{name}, {table.mask_name(row)}"
    return stored.as_colours(called) if colours else stored.as_numbers(called)


def _paths(table: MaskTable, row: int) -> tuple[str | None, str | None]:
    """Return the paths of image and mask, None for what is no file."""
    return _path(table.images[row]), None if table.masks is None else _path(table.masks[row])


def _path(source: ImageSource) -> str | None:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
