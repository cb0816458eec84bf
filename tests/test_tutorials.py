"""Every tutorial runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.py"))


def test_tutorials__folder__is_not_empty() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial__run_as_a_user_would__gives_scores(path: Path, tmp_path: Path) -> None:
    scores = runpy.run_path(str(path))["main"](tmp_path)
    assert 0 <= scores["iou"] <= 1
