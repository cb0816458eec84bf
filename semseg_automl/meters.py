"""How many bytes a piece of work takes at its peak: counted tensor by tensor, asked of CUDA, or read off the system.

Facts only. What is run, and what follows from its peak, is :mod:`semseg_automl.probing`'s.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # what Linux wants to read there (man proc_pid_clear_refs)


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, on any device; a freed storage leaves the count.

    With a limit it is an allocator of that size. What an operation takes and gives back within itself is not seen, nor
    what an allocator keeps for later: see `semseg_automl.probing.HEAD_ROOM`.

    Args:
        limit: bytes; None for no limit.
        known: tensors that were there before, which do not count.

    >>> with TensorMeter() as meter:
    ...     x = torch.zeros(10) + torch.ones(10)
    >>> meter.peak, meter.live
    (120, 40)
    """

    def __init__(self, limit: int | None = None, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.live = 0
        self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            self._note(tensor, counts=False)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made.

        Raises:
            torch.OutOfMemoryError: that is more than the limit.
        """
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self.peak = max(self.peak, self.live)
        if self.limit is not None and self.live > self.limit:
            raise torch.OutOfMemoryError(
                f"{self.live / 2**30:.2f} GiB of tensors are more than {self.limit / 2**30:.2f} GiB"
            )
        return made

    def _note(self, tensor: Tensor, *, counts: bool = True) -> None:
        # torch keeps one Python object per storage for as long as the storage lives, whoever holds on to it.
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._seen:
            size = storage.nbytes() if counts else 0
            self._seen[key] = weakref.ref(storage, partial(self._freed, key, size))
            self.live += size

    def _freed(self, key: int, size: int, _: object) -> None:
        self._seen.pop(key, None)
        self.live -= size


class CudaMeter(AbstractContextManager["CudaMeter"]):
    """Asks CUDA's allocator, and leaves its cache empty.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0
        self._before = 0

    def __enter__(self) -> Self:
        """Note what is allocated."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        """Read the peak."""
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        torch.cuda.empty_cache()


def resident_bytes() -> int | None:
    """Return the memory that this process holds now; None where the system does not say (other than Linux)."""
    return _status("VmRSS")


def forget_peak(device: torch.device) -> bool:
    """Let `peak_bytes` count from now on; return whether it can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu" or not _CLEAR.exists():
        return False
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:
        return False  # not allowed in some containers
    return True


def peak_bytes(device: torch.device) -> int | None:
    """Return the most that was held since `forget_peak`: tensors on CUDA, else all of this process's memory.

    None where the system does not say (other than Linux).
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(entry: str) -> int | None:
    found = re.search(rf"^{entry}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    return None if found is None else 1024 * int(found[1])
