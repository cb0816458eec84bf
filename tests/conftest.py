"""Fixtures shared by all tests. Importing through the door first makes torchvision importable for every test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from semseg_automl import third_party

third_party.make_torchvision_importable()

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """``shared("golden/x.npz")``: a file beside the project; where it is absent the test is skipped by name.

    With ``CI=true`` the files are promised to be there, so an absent one is a failure.
    """

    def find(relative: str) -> Path:
        path = SHARED / relative
        if path.exists():
            return path
        message = f"needs shared/{relative} beside the project"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return find
