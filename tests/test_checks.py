"""Rows that cannot be used: refused together, or dropped and named, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.data.checks import check_rows, usable_rows
from semseg_automl.data.images import write_png
from semseg_automl.data.table import read_table
from semseg_automl.errors import ConfigError, DataError

FAST: dict[str, Any] = {
    "model.input_size": 64,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "flip",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Draw a data set; its third training image is missing, the mask of its fifth has another size."""
    drawn = draw_dataset(tmp_path / "drawn", kind="binary", train=8, val=3, test=1, size=(64, 80))
    train, val = pd.read_csv(drawn / "train.csv"), pd.read_csv(drawn / "val.csv")
    (drawn / train["image"][2]).unlink()
    write_png(drawn / train["label"][4], np.zeros((9, 9), np.uint8))
    (drawn / val["label"][0]).write_bytes(b"")
    return drawn


def test_usable_rows__some_bad__keeps_the_others_in_order_and_names_the_bad(folder: Path) -> None:
    table = read_table(folder / "train.csv")
    usable, checks, dropped = usable_rows(table)
    assert usable.index.tolist() == [0, 1, 3, 5, 6, 7]
    assert checks == check_rows(usable)
    assert len(dropped) == 2
    assert "row 2" in dropped[0]
    assert "no such file" in dropped[0]
    assert "row 4" in dropped[1]
    assert "9 x 9" in dropped[1]


def test_usable_rows__all_good__is_the_table_itself(folder: Path) -> None:
    table = read_table(folder / "test.csv")
    usable, checks, dropped = usable_rows(table)
    assert usable is table
    assert (len(checks), dropped) == (1, [])


def test_usable_rows__fewer_than_two_left__is_an_error_with_the_reasons(folder: Path) -> None:
    table = read_table(folder / "train.csv").take([2, 3, 4])
    with pytest.raises(DataError, match=r"1 of 3 rows can be used, and two are needed") as caught:
        usable_rows(table)
    assert "row 2" in str(caught.value)
    assert "row 4" in str(caught.value)


def test_fit__bad_rows_dropped__trains_on_the_rest_names_them_and_remembers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segmentor = SemanticSegmentor(path=tmp_path / "b", hyperparameters=FAST, verbosity=1)
    segmentor.fit(folder / "train.csv", folder / "val.csv", on_bad_rows="drop", max_epochs=1)
    printed = capsys.readouterr().out
    assert "2 of 8 rows cannot be used and are left out" in printed
    assert "1 of 3 rows cannot be used and are left out" in printed
    assert all(f"- row {row}" in printed for row in (0, 2, 4))
    assert len(segmentor.dropped_rows_) == 3
    record = yaml.safe_load((tmp_path / "b" / "bundle.yaml").read_text())
    assert record["dropped_rows"] == segmentor.dropped_rows_
    assert SemanticSegmentor.load(tmp_path / "b").dropped_rows_ == segmentor.dropped_rows_


def test_fit__bad_rows__are_refused_by_default_and_by_evaluate(folder: Path, tmp_path: Path) -> None:
    segmentor = SemanticSegmentor(path=tmp_path / "b", hyperparameters=FAST, verbosity=0)
    with pytest.raises(DataError, match="2 rows of 8 cannot be used"):
        segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=1)
    with pytest.raises(ConfigError, match="drop"):
        segmentor.fit(folder / "train.csv", on_bad_rows="dorp", max_epochs=1)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_fit__bad_rows_dropped_and_no_validation_rows__holds_out_usable_ones(folder: Path, tmp_path: Path) -> None:
    segmentor = SemanticSegmentor(path=tmp_path / "b", hyperparameters=FAST, verbosity=0)
    segmentor.fit(folder / "train.csv", on_bad_rows="drop", dry_run=True)
    assert len(segmentor.dropped_rows_) == 2
