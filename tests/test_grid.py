"""The grid of methods: its columns and rows, both formats, and what is refused before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semseg_automl import SemanticSegmentor, comparison_grid, draw_dataset
from semseg_automl.build import seeded_model
from semseg_automl.bundle import Bundle
from semseg_automl.data.images import read_image
from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination
from semseg_automl.fitted import NotFittedError
from semseg_automl.report import HEADER, TILE

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.precision": "32-true",
}


def adopted(data: Path, threshold: float) -> SemanticSegmentor:
    """Return an untrained segmentor in the state that `fit` leaves."""
    segmentor = SemanticSegmentor(hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(data / "train.csv", data / "val.csv", dry_run=True)
    record = {"threshold": threshold, "history": []}
    segmentor._adopt(Bundle(seeded_model(segmentor.plan_), segmentor.plan_, segmentor.task_, record))
    return segmentor


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("binary"), kind="binary", train=3, val=2, test=5, size=(48, 48))


@pytest.fixture(scope="module")
def methods(binary: Path) -> dict[str, SemanticSegmentor]:
    """One that calls everything foreground, and one that calls nothing so."""
    return {"all": adopted(binary, 0.0), "none": adopted(binary, 1.0)}


def test_comparison_grid__png__shows_image_truth_and_each_method(
    binary: Path, methods: dict[str, SemanticSegmentor], tmp_path: Path
) -> None:
    path = comparison_grid(binary / "test.csv", methods, tmp_path / "new" / "grid.png", rows=3)
    grid = read_image(path)
    assert grid.shape == (HEADER + 3 * TILE + HEADER, 4 * TILE, 3)
    image, _, everything, nothing = (grid[HEADER : HEADER + TILE, i * TILE : (i + 1) * TILE] for i in range(4))
    inside = np.s_[4:-4, 4:-4]
    np.testing.assert_array_equal(image, nothing)
    assert (everything[inside] != image[inside]).any(axis=-1).all(), "all of it is painted"
    assert not np.array_equal(grid[HEADER : HEADER + TILE], grid[HEADER + TILE : HEADER + 2 * TILE])


def test_comparison_grid__pdf__is_one_page_of_its_size(
    binary: Path, methods: dict[str, SemanticSegmentor], tmp_path: Path
) -> None:
    path = comparison_grid(binary / "test.csv", methods, tmp_path / "grid.pdf", rows=2)
    content = path.read_bytes()
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    assert b"/Count 1" in content
    assert f"/Width {4 * TILE}".encode() in content
    assert [each.name for each in tmp_path.iterdir()] == ["grid.pdf"]


def test_comparison_grid__more_rows_than_images__shows_each_once(
    binary: Path, methods: dict[str, SemanticSegmentor], tmp_path: Path
) -> None:
    path = comparison_grid(binary / "test.csv", {"all": methods["all"]}, tmp_path / "grid.png", rows=50)
    assert read_image(path).shape == (2 * HEADER + 5 * TILE, 3 * TILE, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "grid.svg"}, r"\.png or \.pdf"),
        ({"path": "grid"}, r"\.png or \.pdf"),
        ({"segmentors": {}}, "segmentors is empty"),
        ({"rows": 0}, "1 to 100"),
        ({"rows": 101}, "1 to 100"),
        ({"rows": True}, "1 to 100"),
    ],
)
def test_comparison_grid__senseless_arguments__are_refused(
    binary: Path, methods: dict[str, SemanticSegmentor], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"segmentors": methods, "path": "grid.png", "rows": 2} | changes
    with pytest.raises(ConfigError, match=message):
        comparison_grid(binary / "test.csv", **(arguments | {"path": tmp_path / arguments["path"]}))
    assert list(tmp_path.iterdir()) == []


def test_comparison_grid__segmentors_of_other_classes__are_named(
    binary: Path, methods: dict[str, SemanticSegmentor], tmp_path: Path
) -> None:
    other = adopted(draw_dataset(tmp_path / "multi", kind="multiclass", train=4, val=1, test=1, size=(48, 48)), 0.5)
    with pytest.raises(UnsupportedCombination, match=r"'all' was fitted to binary .* 'several'"):
        comparison_grid(binary / "test.csv", {**methods, "several": other}, tmp_path / "grid.png")


def test_comparison_grid__not_fitted_or_no_place__is_an_error(
    binary: Path, methods: dict[str, SemanticSegmentor], tmp_path: Path
) -> None:
    with pytest.raises(NotFittedError):
        comparison_grid(binary / "test.csv", {"new": SemanticSegmentor()}, tmp_path / "grid.png")
    (tmp_path / "file").write_text("")
    for suffix in ("png", "pdf"):
        with pytest.raises(DataError, match="cannot be written"):
            comparison_grid(binary / "test.csv", methods, tmp_path / "file" / f"grid.{suffix}", rows=1)
