"""What this machine has: device, memory, cores, number formats. Facts only; what follows from them is the plan's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Device = Literal["cpu", "cuda", "mps"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Hardware:
    """The machine a plan is made for.

    Attributes:
        device: where the network runs.
        name: the device in words.
        memory: bytes the network may use in all: of the accelerator, or of RAM under any cgroup limit.
        cores: processor cores this process may use.
        bf16: whether matrix products in bfloat16 are faster than in float32 here.
        ram: bytes of RAM where `memory` is an accelerator's; None where they are the same.
        free_ram: bytes of RAM that nobody uses now; None where the system does not say.
    """

    device: Device
    name: str
    memory: int
    cores: int
    bf16: bool
    ram: int | None = None
    free_ram: int | None = None

    @property
    def host_memory(self) -> int:
        """Bytes of RAM that this process may use."""
        return self.memory if self.ram is None else self.ram

    @property
    def host_free(self) -> int:
        """Bytes of RAM that this process may still take, as far as the system says."""
        return self.host_memory if self.free_ram is None else min(self.free_ram, self.host_memory)


def usable_cores() -> int:
    """Return the processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def detect_hardware() -> Hardware:
    """Read the machine's facts; takes milliseconds, allocates nothing."""
    cores = usable_cores()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        bf16 = torch.cuda.is_bf16_supported()
        return Hardware("cuda", properties.name, properties.total_memory, cores, bf16, ram=_ram(), free_ram=_free_ram())
    if torch.backends.mps.is_available():
        return Hardware("mps", "Apple GPU", _ram(), cores, bf16=False)
    # Without these instructions oneDNN emulates bfloat16, slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Hardware("cpu", f"CPU with {cores} cores", _ram(), cores, bf16=native, free_ram=_free_ram())


def training_device(accelerator: object = None) -> torch.device:
    """Return where Lightning's trainer trains: on the processor if that is asked for, else on what there is.

    Args:
        accelerator: the trainer's option.

    >>> training_device("cpu")
    device(type='cpu')
    """
    return torch.device("cpu" if accelerator == "cpu" else detect_hardware().device)


def _ram() -> int:
    """Return the bytes of RAM this process may use: the machine's, or its control group's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CGROUP_LIMITS:
        path = Path(limit)
        if path.exists():
            text = path.read_text().strip()
            if text.isdigit():
                total = min(total, int(text))
    return total


def _free_ram() -> int | None:
    """Return the bytes of RAM nobody uses, in the machine or in its control group; memory of files counts as free.

    Read as Linux tells it (``/proc/meminfo``, and version 2 of control groups); None on other systems.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_MEMINFO), re.MULTILINE)
    if found is None:
        return None
    free = 1024 * int(found[1])
    limit, current = _text(_CGROUP / "memory.max").strip(), _text(_CGROUP / "memory.current").strip()
    if limit.isdigit() and current.isdigit():
        files = re.search(r"^inactive_file (\d+)", _text(_CGROUP / "memory.stat"), re.MULTILINE)
        free = min(free, max(0, int(limit) - int(current) + (int(files[1]) if files else 0)))
    return free


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
