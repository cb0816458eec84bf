"""The benchmark of choosing by itself: its rows, its verdicts, and what it takes up again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import automl


def row(name: str, system: str, score: float, high: float, seconds: float = 119.0, limit: int = 120) -> dict[str, str]:
    """Return a row as the file holds it."""
    values = {"set": name, "limit": limit, "system": system, "seed": 0, "seconds": seconds, "steps": 9, "metric": "iou"}
    values |= {"score": score, "low": score - 0.1, "high": high, "validation": score, "plan": "lora"}
    return {key: str(value) for key, value in values.items()}


ROWS = [
    row("polyps", "auto", 0.70, 0.75),
    row("polyps", "recipe", 0.72, 0.77),  # within auto's interval
    row("polyps", "unet", 0.40, 0.45, seconds=140.0),  # not one of ours: its clock is not judged
    row("roads", "auto", 0.60, 0.62),
    row("roads", "recipe", 0.65, 0.68),  # beyond auto's interval
    row("nuclei", "auto", 0.80, 0.82, seconds=127.5),
    row("nuclei", "unet", 0.70, 0.75),
    row("camvid", "recipe", 0.30, 0.35),  # not judged: auto is missing
]


def test_verdict__best_and_within_the_interval__are_counted_apart() -> None:
    told = automl.verdict(ROWS, "auto", ["recipe", "unet"])
    assert told == "auto against recipe, unet: best in 1, best or within its interval in 2 of 3"


def test_table__rows__are_sorted_and_the_clock_is_judged() -> None:
    lines = automl.table(ROWS).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:10]] == [
        "recipe", "auto", "unet", "auto", "recipe", "unet", "auto", "recipe",
    ]  # fmt: skip
    assert lines[-1].endswith("7.5; 1 off by more than 2 % and 5 s")
    assert "from -1.0 to" in lines[-1]


def test_run__cells_in_the_file__are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        system = command[command.index("--worker") + 1]
        if system == "unet":
            return subprocess.CompletedProcess(command, 1, "", "no such package")
        found = {"seconds": 60.0, "steps": 5, "metric": "iou", "score": 0.5, "low": 0.4, "high": 0.6}
        return subprocess.CompletedProcess(command, 0, json.dumps(found | {"validation": 0.5, "plan": "lora"}), "")

    monkeypatch.setattr(subprocess, "run", answer)
    out = tmp_path / "automl.csv"
    arguments = ["run", "--data", str(tmp_path), "--weights", str(tmp_path), "--out", str(out), "--limits", "60"]
    automl.main([*arguments, "--sets", "polyps", "roads"])
    assert len(ran) == 2 * len(automl.SYSTEMS)
    assert [(each["set"], each["system"]) for each in automl.read_rows(out)] == [
        (name, system) for name in ("polyps", "roads") for system in ("auto", "auto_scratch", "recipe")
    ]
    assert "no such package" in capsys.readouterr().err
    ran.clear()
    automl.main([*arguments, "--sets", "polyps", "roads"])
    assert [command[command.index("--worker") + 1] for command in ran] == ["unet", "unet"]  # what failed is tried again
