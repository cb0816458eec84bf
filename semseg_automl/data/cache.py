"""Decoded images and masks, kept in memory, once for all loader processes.

Without loader processes the decoded arrays themselves are kept. With them, what one process has decoded every other
finds: one mapping of anonymous shared memory, made before they are forked. It needs no file and no room in ``/dev/shm``
(64 MB in a container unless asked otherwise), costs nothing until it is written, and is gone with the last process.
Copying into it makes a first visit about a sixth dearer, so that it is not used where there is one process, nor for
what is decoded before the others are forked: they inherit the arrays themselves. Where processes are not forked (the
default on macOS and Windows, and from Python 3.14 on everywhere) each keeps its own share of the budget.

Not here: reading files (:mod:`semseg_automl.data.images`), how large the budget is (:mod:`semseg_automl.capacity`).
"""

from __future__ import annotations

import mmap
import multiprocessing
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from semseg_automl.errors import ConfigError, DataError

Decoded = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Image ``(H, W, 3)`` and mask ``(H, W)``, uint8."""

_ABSENT, _WRITING, _SHARED, _OWN = 0, 1, 2, 3
_CHANNELS = 3


class ImageCache:
    """Images and masks by number, as many as fit a budget; what does not fit is not kept.

    Nothing is ever thrown out: every image is wanted once an epoch, so that any order of throwing out loses.

    Args:
        entries: Images there are.
        budget: Bytes they may take. The memory is used as it is written.
        shared: Whether processes that are forked later are to share what is kept.

    Raises:
        ConfigError: The machine does not give that much memory.

    >>> cache = ImageCache(entries=2, budget=1000)
    >>> cache.put(1, np.zeros((4, 6, 3), np.uint8), np.ones((4, 6), np.uint8))
    >>> cache.get(0) is None, cache.get(1)[1].sum()
    (True, np.uint64(24))
    """

    def __init__(self, entries: int, budget: int, *, shared: bool = True) -> None:
        self.entries = entries
        self.budget = budget
        self.shared = shared
        self._own: dict[int, Decoded] = {}
        # State, start in bytes, height and width of each entry; in the last row, first column, the bytes in use.
        self._index = np.frombuffer(_shared(8 * 4 * (entries + 1)), np.int64).reshape(entries + 1, 4)
        self._pixels = np.frombuffer(_shared(budget if shared else 0), np.uint8)
        self._lock = multiprocessing.get_context().Lock()

    def get(self, entry: int) -> Decoded | None:
        """Return image and mask, read-only and not copied, or None where they are not kept."""
        with self._lock:
            state, start, height, width = self._index[entry].tolist()
        if state == _OWN:
            return self._own.get(entry)  # None in a process that was forked before it was put in
        if state != _SHARED:
            return None
        area = height * width
        image = self._pixels[start : start + _CHANNELS * area].reshape(height, width, _CHANNELS)
        mask = self._pixels[start + _CHANNELS * area : start + (_CHANNELS + 1) * area].reshape(height, width)
        return _read_only(image), _read_only(mask)

    def put(self, entry: int, image: NDArray[np.uint8], mask: NDArray[np.uint8], *, inherited: bool = False) -> None:
        """Keep an image and its mask, if there is room and nobody has; they are not to be changed afterwards.

        Args:
            entry: Their number.
            image: ``(H, W, 3)``.
            mask: ``(H, W)``.
            inherited: Whether the processes that are to find them are yet to be forked, so that nothing is copied.

        Raises:
            DataError: They are not of one size.
        """
        if image.shape != (*mask.shape, _CHANNELS):
            raise DataError(f"an image of shape {image.shape} beside a mask of {mask.shape}; make the sizes equal")
        size = image.nbytes + mask.nbytes
        with self._lock:
            start = int(self._index[-1, 0])
            if self._index[entry, 0] != _ABSENT or start + size > self.budget:
                return
            self._index[-1, 0] = start + size
            self._index[entry] = _WRITING, start, *mask.shape
        own = inherited or not self.shared
        if own:
            self._own[entry] = _read_only(image), _read_only(mask)
        else:
            self._pixels[start : start + image.nbytes] = image.reshape(-1)
            self._pixels[start + image.nbytes : start + size] = mask.reshape(-1)
        with self._lock:
            self._index[entry, 0] = _OWN if own else _SHARED

    @property
    def found_by_loaders(self) -> bool:
        """Whether what is put in now is there for loader processes that are started later."""
        return not self.shared or multiprocessing.get_start_method() == "fork"

    @property
    def used(self) -> int:
        """Bytes in use, by all processes."""
        with self._lock:
            return int(self._index[-1, 0])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory, which a process that was not forked cannot be given."""
        return {"entries": self.entries, "budget": self.budget, "shared": self.shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start empty, with this process's share of the budget."""
        worker = get_worker_info()
        processes = 1 if worker is None else worker.num_workers
        self.__init__(state["entries"], state["budget"] // processes, shared=state["shared"])  # type: ignore[misc]


def _read_only(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = array.view()
    view.flags.writeable = False
    return view


def _shared(size: int) -> mmap.mmap:
    """Map zeros that, unlike memory from an allocator, forked processes share."""
    try:
        return mmap.mmap(-1, max(size, 1))
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"no {size / 1e9:.1f} GB for decoded images are to be had ({error}); set env.image_cache to less, or to off"
        ) from error
