"""A fit that searches, end to end on a small set: what races, what is saved, and what is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from semseg_automl import SemanticSegmentor, cli, draw_dataset
from semseg_automl.errors import BundleError, ConfigError, UnsupportedCombination
from semseg_automl.searching import tune_settings

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "optim.max_epochs": 2,
    "env.precision": "32-true",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set."""
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=12, val=4, test=3, size=(40, 40))


@pytest.fixture(scope="module")
def searched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    """Search among three configurations."""
    path = tmp_path_factory.mktemp("run")
    segmentor = SemanticSegmentor(path=path, presets="fast", hyperparameters=SETTINGS, verbosity=0)
    return segmentor.fit(
        data / "train.csv", data / "val.csv", hyperparameter_tune_kwargs={"num_trials": 3}, logger=False
    )


def test_fit__with_a_search__fits_the_winner_and_keeps_the_others(searched: SemanticSegmentor) -> None:
    search = searched.fit_summary()["search"]
    names = [line["candidate"] for line in search["candidates"]]
    assert names == ["plan", "baseline", "faster_rate"]
    assert [bool(line["left"]) for line in search["candidates"]].count(False) == 1
    winner = next(line for line in search["candidates"] if not line["left"])
    assert winner["candidate"] == search["winner"]
    assert winner["steps"] == 50  # both epochs; the others stopped after the first round
    assert "baseline" in search["verdict"]
    assert all((searched.path_ / "search" / name / "bundle.yaml").is_file() for name in names)
    assert not (searched.path_ / "search" / search["winner"] / "resume").exists()


def test_fit__with_a_search__saves_what_it_predicts_with(searched: SemanticSegmentor, data: Path) -> None:
    loaded = SemanticSegmentor.load(searched.path_)
    assert loaded.evaluate(data / "test.csv") == searched.evaluate(data / "test.csv")
    assert (loaded.threshold_, loaded.plan_.mirrored) == (searched.threshold_, searched.plan_.mirrored)
    assert loaded.leaderboard().equals(searched.leaderboard())
    # How it predicts was chosen on the validation rows: there it scores no less than the best epoch did.
    score = searched.evaluate(data / "val.csv", "iou")["iou"]
    assert score >= searched.fit_summary()["best_score"] - 1e-6


def test_leaderboard__with_rows__judges_every_candidate_on_them(searched: SemanticSegmentor, data: Path) -> None:
    board = searched.leaderboard(data / "test.csv")
    assert board.index[0] == searched.fit_summary()["search"]["winner"]
    assert set(board.index) == {"plan", "baseline", "faster_rate"}
    assert (board["iou_low"] <= board["iou"]).all()
    assert (board["iou"] <= board["iou_high"]).all()
    assert (board[["ms_per_image", "megabytes", "training_peak_mb"]] > 0).all(axis=None)
    assert board["iou"].iloc[0] == pytest.approx(searched.evaluate(data / "test.csv", "iou")["iou"])
    assert board.loc["faster_rate", "changed"] == "optim.lr=0.003"


def test_leaderboard__from_a_shell__prints_and_writes_the_table(
    searched: SemanticSegmentor, data: Path, tmp_path: Path
) -> None:
    arguments = ["leaderboard", str(searched.path_), str(data / "test.csv"), "--csv", str(tmp_path / "board.csv")]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "faster_rate" in result.output
    assert pd.read_csv(tmp_path / "board.csv")["candidate"].tolist() == searched.leaderboard().index.tolist()


def test_leaderboard__without_a_search__says_so(data: Path, tmp_path: Path) -> None:
    segmentor = SemanticSegmentor(path=tmp_path, presets="fast", hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(data / "train.csv", data / "val.csv", max_epochs=1, logger=False)
    with pytest.raises(ConfigError, match="fitted without a search"):
        segmentor.leaderboard()


def test_leaderboard__candidates_gone_or_tampered__is_refused(
    searched: SemanticSegmentor, data: Path, tmp_path: Path
) -> None:
    moved = SemanticSegmentor.load(shutil.copytree(searched.path_, tmp_path / "moved"))
    shutil.rmtree(tmp_path / "moved" / "search")
    with pytest.raises(BundleError, match="no saved segmentor"):
        moved.leaderboard(data / "test.csv")
    record = yaml.safe_load((searched.path_ / "bundle.yaml").read_text())
    for line in record["search"]["candidates"]:
        line["candidate"] = "../../elsewhere"
    shutil.copytree(searched.path_, tmp_path / "tampered")
    (tmp_path / "tampered" / "bundle.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(BundleError, match="none of ours"):
        SemanticSegmentor.load(tmp_path / "tampered").leaderboard(data / "test.csv")


def test_fit__search_done__resumes_to_the_same(searched: SemanticSegmentor, data: Path) -> None:
    again = SemanticSegmentor(path=searched.path_, presets="fast", hyperparameters=SETTINGS, verbosity=0)
    again.fit(
        data / "train.csv", data / "val.csv", hyperparameter_tune_kwargs={"num_trials": 3}, logger=False, resume=True
    )
    image = np.full((40, 40, 3), 90, np.uint8)
    assert np.array_equal(again.predict_proba(image), searched.predict_proba(image))
    assert [line["steps"] for line in again.fit_summary()["search"]["candidates"]] == [
        line["steps"] for line in searched.fit_summary()["search"]["candidates"]
    ]


def test_fit__dry_run_of_a_search__names_what_would_race(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segmentor = SemanticSegmentor(path=tmp_path / "run", presets="fast", verbosity=1)
    segmentor.fit(data / "train.csv", data / "val.csv", hyperparameter_tune_kwargs={"num_trials": 20}, dry_run=True)
    said = capsys.readouterr().out
    assert "search among 20 configurations: plan, baseline, larger_input, faster_rate" in said
    assert "that are drawn" in said
    assert not (tmp_path / "run").exists()


def test_fit__setting_of_the_user__is_left_alone_by_the_search(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {"optim.lr": 0.002, "data.augmentation": "light", "model.input_size": 64, "optim.loss": "structure"}
    segmentor = SemanticSegmentor(presets="fast", hyperparameters=fixed, verbosity=1)
    segmentor.fit(data / "train.csv", data / "val.csv", hyperparameter_tune_kwargs={"num_trials": 2}, dry_run=True)
    assert "search among 2 configurations: plan, baseline\n" in capsys.readouterr().out


def test_fit__search_of_several_processes__is_refused(data: Path, tmp_path: Path) -> None:
    segmentor = SemanticSegmentor(path=tmp_path, presets="fast", hyperparameters=SETTINGS, verbosity=0)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "dry_run": True}
    with pytest.raises(UnsupportedCombination, match="does not run in 2 processes"):
        segmentor.fit(data / "train.csv", data / "val.csv", hyperparameter_tune_kwargs="auto", **options)


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        (None, {}),
        ("auto", {"search.candidates": 8}),
        ({"searcher": "bayes"}, {"search.candidates": 8, "search.searcher": "tpe"}),
        (
            {"num_trials": 5, "scheduler": "ASHA", "share": 0.3, "storage": "sqlite:///x.db"},
            {"search.candidates": 5, "search.share": 0.3, "search.storage": "sqlite:///x.db"},
        ),
    ],
)
def test_tune_settings__words_of_autogluon__become_settings(asked: Any, settings: dict[str, Any]) -> None:
    assert tune_settings(asked) == settings


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("best", "unknown hyperparameter_tune_kwargs 'best'"),
        ({"searcher": "grid"}, "unknown searcher 'grid'"),
        ({"scheduler": "FIFO"}, "unknown scheduler 'FIFO'"),
        ({"num_trials": 0}, "asks for 0 trials"),
        ({"num_trials": 1}, "2 and more"),
        ({"num_trail": 4}, "unknown setting 'search.num_trail'"),
        ({"space": {"optim.lrr": [1]}}, "unknown setting 'optim.lrr'; did you mean 'optim.lr'"),
        ({"space": {"optim.lr": {"low": 1.0, "high": 0.1}}}, "low below high"),
        ({"space": {"optim.lr": {"low": 0.0, "high": 0.1, "log": True}}}, "above 0"),
        ({"space": {"optim.lr": 0.1}}, "give a list of values"),
    ],
)
def test_fit__search_that_makes_no_sense__is_refused(data: Path, asked: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SemanticSegmentor(presets="fast", verbosity=0).fit(
            data / "train.csv", data / "val.csv", hyperparameter_tune_kwargs=asked, dry_run=True
        )


def test_search__record__is_plain_values(searched: SemanticSegmentor) -> None:
    assert json.loads(json.dumps(searched.fit_summary()["search"])) == searched.fit_summary()["search"]
