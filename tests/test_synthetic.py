"""Drawn data sets are whole, repeatable, and what they claim to be."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from semseg_automl.data.checks import check_rows
from semseg_automl.data.images import read_image, read_mask
from semseg_automl.data.synthetic import draw_dataset
from semseg_automl.data.table import read_table
from semseg_automl.errors import ConfigError
from semseg_automl.task import infer_task

KINDS: tuple[Literal["binary", "multiclass"], ...] = ("binary", "multiclass")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("kind", "values"), [("binary", (0, 255)), ("multiclass", (0, 1, 2, 3))])
def test_draw_dataset__each_kind__is_a_data_set_the_package_reads(
    tmp_path: Path, kind: Literal["binary", "multiclass"], values: tuple[int, ...]
) -> None:
    folder = draw_dataset(tmp_path / "new", kind=kind, train=6, val=3, test=3, size=(64, 96))
    assert folder == tmp_path / "new"
    for name, rows in {"train": 6, "val": 3, "test": 3}.items():
        table = read_table(folder / f"{name}.csv")
        checks = check_rows(table)
        assert [check.size for check in checks] == [(64, 96)] * rows
        task = infer_task([check.value_counts for check in checks])
        assert (task.kind, task.values, task.ignore_values) == (kind, values, ())
        assert all(len(check.value_counts) >= 2 for check in checks)
    with open(folder / "val.csv", newline="", encoding="utf-8") as stream:
        written = list(csv.reader(stream))
    assert written[:2] == [["image", "label"], ["images/val_000.png", "masks/val_000.png"]]
    assert len(files(folder)) == 2 * 12 + 3


def test_draw_dataset__same_seed__same_files_whatever_the_number(tmp_path: Path) -> None:
    few = files(draw_dataset(tmp_path / "few", kind="multiclass", train=2, val=1, test=1, size=(48, 48), seed=4))
    more = files(draw_dataset(tmp_path / "more", kind="multiclass", train=3, val=2, test=1, size=(48, 48), seed=4))
    other = files(draw_dataset(tmp_path / "other", kind="multiclass", train=2, val=1, test=1, size=(48, 48), seed=5))
    pictures = [name for name in few if name.endswith(".png")]
    assert all(few[name] == more[name] for name in pictures)
    assert all(few[name] != other[name] for name in pictures if name.startswith("images"))


def test_draw_dataset__splits__share_no_image(tmp_path: Path) -> None:
    drawn = files(draw_dataset(tmp_path, kind="binary", train=4, val=4, test=4, size=(48, 48)))
    images = [data for name, data in drawn.items() if name.startswith("images")]
    assert len(set(images)) == len(images) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_draw_dataset__share_of_foreground__is_neither_rare_nor_dominant(
    tmp_path: Path, kind: Literal["binary", "multiclass"]
) -> None:
    folder = draw_dataset(tmp_path, kind=kind, train=24, val=1, test=1, size=(80, 80))
    shares = [(read_mask(p) > 0).mean() for p in sorted((folder / "masks").iterdir())]
    assert 0.05 < np.mean(shares) < 0.3
    assert min(shares) > 0
    assert max(shares) < 0.7


def test_draw_dataset__colour_alone__does_not_solve_it(tmp_path: Path) -> None:
    """The best threshold on any one channel, chosen with the truth, stays far below what a network should reach."""
    folder = draw_dataset(tmp_path, kind="binary", train=12, val=1, test=1, size=(96, 96))
    table = read_table(folder / "train.csv")
    assert table.masks is not None
    pixels = np.concatenate([read_image(p).reshape(-1, 3) for p in table.images]).astype(int)
    truth = np.concatenate([read_mask(p).ravel() for p in table.masks]) > 0
    redness = pixels[:, 0] - pixels[:, 2]
    best = 0.0
    for feature in (*pixels.T, redness):
        for threshold in np.quantile(feature, np.linspace(0.02, 0.98, 33)):
            for guess in (feature > threshold, feature <= threshold):
                best = max(best, (guess & truth).sum() / (guess | truth).sum())
    assert 0.15 < best < 0.7


def test_draw_dataset__blobs__differ_from_the_ground_in_texture(tmp_path: Path) -> None:
    folder = draw_dataset(tmp_path, kind="binary", train=8, val=1, test=1, size=(96, 96))
    inside, outside = [], []
    for path in sorted((folder / "images").glob("train*")):
        image = read_image(path).astype(float).mean(axis=2)
        mask = read_mask(folder / "masks" / path.name) > 0
        detail = np.abs(image[:, 2:] - image[:, :-2])
        inside.append(detail[mask[:, 1:-1]].mean())
        outside.append(detail[~mask[:, 1:-1]].mean())
    assert np.mean(inside) > 1.2 * np.mean(outside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ternary"}, "use 'binary' or 'multiclass'"),
        ({"train": 0}, "draw at least one for each table"),
        ({"size": (160, 31)}, "images of 160 x 31 pixels; draw at least 32 a side"),
    ],
)
def test_draw_dataset__impossible_wish__raises_before_drawing(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_dataset(tmp_path / "new", **{"kind": "binary", **change})  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
