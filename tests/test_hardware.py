"""The machine's facts: memory limits of control groups count, and every field can be used as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from semseg_automl import hardware
from semseg_automl.hardware import detect_hardware

GIB = 2**30


@pytest.fixture
def without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor be what the network runs on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_detect_hardware__this_machine__gives_usable_facts() -> None:
    found = detect_hardware()
    assert found.device in ("cpu", "cuda", "mps")
    assert found.name
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert 64 * 2**20 < found.memory < 2**50
    assert isinstance(found.bf16, bool)


@pytest.mark.usefixtures("without_accelerator")
@pytest.mark.parametrize("both_versions", [False, True])
def test_detect_hardware__memory_limit_of_a_control_group__is_what_may_be_used(
    both_versions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, version_one = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    limit.write_text(f"{GIB // 4}\n")
    if both_versions:
        version_one.write_text("9223372036854771712\n")  # what version 1 shows where nothing is limited
    monkeypatch.setattr(hardware, "_CGROUP_LIMITS", (str(version_one), str(limit)))
    found = detect_hardware()
    assert found.device == "cpu"
    assert found.memory == GIB // 4


@pytest.mark.usefixtures("without_accelerator")
@pytest.mark.parametrize("content", [None, "max\n", f"{2**62}\n"])
def test_detect_hardware__no_limit__is_the_machines_memory(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    if content is not None:
        limit.write_text(content)
    monkeypatch.setattr(hardware, "_CGROUP_LIMITS", (str(limit),))
    assert detect_hardware().memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.usefixtures("without_accelerator")
@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 6 * GIB),
        ({"memory.max": "max", "memory.current": f"{2 * GIB}"}, 6 * GIB),
        ({"memory.max": f"{5 * GIB}", "memory.current": f"{3 * GIB}"}, 2 * GIB),
        (
            {"memory.max": f"{5 * GIB}", "memory.current": f"{3 * GIB}", "memory.stat": f"anon 7\ninactive_file {GIB}"},
            3 * GIB,
        ),
        ({"memory.max": f"{50 * GIB}", "memory.current": f"{3 * GIB}"}, 6 * GIB),
        ({"memory.max": f"{GIB}", "memory.current": f"{3 * GIB}"}, 0),
    ],
)
def test_detect_hardware__free_memory__is_the_machines_or_the_control_groups(
    group: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {6 * GIB // 1024} kB\n")
    for name, text in group.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    assert detect_hardware().free_ram == free


@pytest.mark.usefixtures("without_accelerator")
def test_detect_hardware__system_that_does_not_tell_free_memory__counts_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "absent")
    found = detect_hardware()
    assert found.free_ram is None
    assert found.host_free == found.host_memory


def test_hardware__more_free_than_may_be_used__counts_what_may() -> None:
    assert hardware.Hardware("cpu", "CPU", GIB, 1, bf16=False, free_ram=2 * GIB).host_free == GIB
    assert hardware.Hardware("cpu", "CPU", 3 * GIB, 1, bf16=False, free_ram=2 * GIB).host_free == 2 * GIB
