"""What a fit will take, before it begins: added up right, close to what it takes, said and kept."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.data.table import read_table
from semseg_automl.forecast import Forecast, Loading, compared, duration, forecast, loading_cost, taken
from semseg_automl.memory import begun_with
from semseg_automl.plan import Plan
from semseg_automl.probing import Probe
from semseg_automl.rehearsal import Trial

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.precision": "32-true",
    "env.batch_size": 4,
}
NOON = datetime(2026, 1, 1, 12, 0)
FOUND = Probe("measured", 2**30, image_seconds=0.5, frozen_seconds=0.0, validation_seconds=0.25)
LOADING = Loading(first=0.2, again=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set."""
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=12, val=4, test=1, size=(48, 64))


def segmentor_of(path: Path, **settings: Any) -> SemanticSegmentor:
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return SemanticSegmentor(path=path, hyperparameters={**SETTINGS, **changed}, verbosity=1)


@pytest.fixture(scope="module")
def dry(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    path = tmp_path_factory.mktemp("dry") / "b"
    return segmentor_of(path).fit(data / "train.csv", data / "val.csv", dry_run=True, max_epochs=3)


@pytest.fixture(scope="module")
def plan(dry: SemanticSegmentor) -> Plan:
    """Six steps of four images an epoch, for ten epochs."""
    return dry.plan_.model_copy(
        update={"batch_size": 4, "micro_batch_size": 4, "views": 1, "max_epochs": 10, "num_workers": 0}
    )


def ahead(plan: Plan, found: Probe = FOUND, loading: Loading = LOADING, *, rows: int = 26) -> Forecast:
    return forecast(plan, found, loading, rows=rows, validation_rows=8, memory_bytes=2**33, now=NOON)


# adding up


def test_forecast__epochs__add_up_steps_loading_and_validation(plan: Plan) -> None:
    told = ahead(plan)
    assert told.steps == 6
    assert told.epoch_seconds == pytest.approx(24 * 0.6 + 8 * 0.35)
    assert told.seconds == pytest.approx(10 * 17.2 + 34 * 0.1)
    assert told.epochs == 10
    assert told.finish == datetime(2026, 1, 1, 12, 2, 55, 400000)
    assert str(told) == (
        "predicted: peak memory 1 GiB of 8, 17 s per epoch of 6 steps, 10 epochs at most, done in about 3 min, at 12:02"
    )


def test_forecast__time_limit__counts_the_epochs_that_fit(plan: Plan) -> None:
    told = ahead(plan.model_copy(update={"time_limit": 60.0}))
    assert (told.epochs, told.seconds) == (3, 60.0)
    ample = ahead(plan.model_copy(update={"time_limit": 6000.0}))
    assert ample.epochs == 10
    assert ample.seconds is not None
    assert ample.seconds < 200


def test_forecast__loader_processes__load_while_the_device_computes(plan: Plan) -> None:
    told = ahead(plan.model_copy(update={"num_workers": 2}))
    assert told.epoch_seconds == pytest.approx(24 * 0.5 + 8 * 0.25)
    slow = ahead(plan.model_copy(update={"num_workers": 2}), loading=Loading(3.0, 2.0))
    assert slow.epoch_seconds == pytest.approx(24 * 1.0 + 8 * 1.0)


def test_forecast__cached_features__are_computed_once_per_view(plan: Plan) -> None:
    cached = plan.model_copy(update={"cached_views": 2})
    with_frozen = ahead(cached, replace(FOUND, frozen_seconds=0.1))
    assert with_frozen.epoch_seconds == pytest.approx(24 * 0.6 + 8 * 0.25)
    assert with_frozen.epoch_seconds is not None
    assert with_frozen.seconds == pytest.approx(10 * with_frozen.epoch_seconds + 3.4 + 0.1 * (2 * 26 + 8))


def test_forecast__nobody_knows_the_seconds__says_what_is_known(plan: Plan) -> None:
    unknown = replace(FOUND, image_seconds=None, validation_seconds=None, note="no step fits")
    told = ahead(plan, unknown)
    assert (told.epoch_seconds, told.seconds, told.finish) == (None, None, None)
    assert str(told) == "predicted: peak memory 1 GiB of 8, 10 epochs at most (no step fits)"
    limited = ahead(plan.model_copy(update={"time_limit": 60.0, "max_epochs": 10_000}), unknown)
    assert (limited.seconds, limited.epochs, limited.finish) == (60.0, None, datetime(2026, 1, 1, 12, 1))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, ""),
        (None, ""),
        ([1], ""),
        ({"predicted": 3, "actual": "x"}, ""),
        ({"predicted": {"seconds": None}, "actual": {"seconds": 3.0}}, ""),
        (
            {"predicted": {"peak_bytes": 2**30, "seconds": 700}, "actual": {"peak_bytes": 2**29, "seconds": 650}},
            "0.5 GiB of memory (1 GiB predicted), 11 min in all (12 min predicted)",
        ),
    ],
)
def test_compared__what_a_file_may_hold__is_said_or_left_out(record: object, said: str) -> None:
    assert compared(record) == said


@pytest.mark.parametrize(("ends", "epoch"), [([], None), ([7.0], 7.0), ([9.0, 12.0, 15.0], 3.0)])
def test_taken__history__gives_the_middle_epoch_and_the_end(ends: list[float], epoch: float | None) -> None:
    found = taken([{"seconds": end} for end in ends], 5)
    assert found == {"peak_bytes": 5, "epoch_seconds": epoch, "seconds": ends[-1] if ends else None}


def test_duration__long__is_in_hours() -> None:
    assert duration(6000) == "1.7 h"


def test_loading_cost__kept_images__are_faster_the_second_time(data: Path, dry: SemanticSegmentor) -> None:
    table = read_table(data / "train.csv")
    kept = loading_cost(table, dry.task_, dry.plan_, 1.0)
    assert 0 < kept.again < kept.first < 5
    never = loading_cost(table, dry.task_, dry.plan_.model_copy(update={"image_cache": 0}), 1.0)
    assert never.first == never.again
    assert loading_cost(table.take([0]), dry.task_, dry.plan_, 0.0).again > 0


# of a fit


def test_fit__dry_run__says_and_sets_the_forecast(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = torch.get_rng_state()
    segmentor = segmentor_of(tmp_path / "b").fit(data / "train.csv", data / "val.csv", dry_run=True, max_epochs=3)
    assert torch.equal(torch.get_rng_state(), random)
    told = segmentor.forecast_
    assert told.epochs == 3
    assert told.seconds is not None
    assert 0 < told.seconds < 600
    assert 2**20 < told.peak_bytes < told.memory_bytes
    assert str(told) in capsys.readouterr().out
    assert segmentor.plan_.reasons["micro_batch_size"].startswith("tried: ")
    assert not (tmp_path / "b").exists()


def test_fit__dry_run_of_an_encoder_not_at_hand__needs_no_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path / "empty"))
    segmentor = SemanticSegmentor(
        verbosity=0, presets="medium_quality", hyperparameters={"model.input_size": 1024, "env.batch_size": 2}
    )
    segmentor.fit(data / "train.csv", data / "val.csv", dry_run=True, time_limit=20.0)
    assert segmentor.plan_.encoder == "sam_vit_b"
    assert "a step was not tried" in segmentor.forecast_.note
    assert "by rule" in segmentor.forecast_.note
    assert segmentor.forecast_.epoch_seconds is not None
    assert not (tmp_path / "empty").exists()


def test_fit__record__holds_what_was_predicted_and_what_it_took(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segmentor = segmentor_of(tmp_path / "b")
    segmentor.fit(data / "train.csv", data / "val.csv", max_epochs=3, enable_progress_bar=False)
    record = segmentor.fit_summary()["forecast"]
    predicted, actual = record["predicted"], record["actual"]
    # Loosely: a machine that does other things, too, is slower by a factor at times.
    assert 1 / 8 < actual["epoch_seconds"] / predicted["epoch_seconds"] < 8
    assert 1 / 8 < actual["seconds"] / predicted["seconds"] < 8
    if actual["peak_bytes"] is not None:
        assert actual["peak_bytes"] < 1.2 * predicted["peak_bytes"]
        assert predicted["peak_bytes"] < 4 * actual["peak_bytes"]
    said = capsys.readouterr().out
    assert said.index("predicted: peak memory") < said.index("epoch 0")
    assert "it took" in said
    saved = yaml.safe_load((tmp_path / "b" / "bundle.yaml").read_text())
    assert saved["forecast"] == record
    assert SemanticSegmentor.load(tmp_path / "b").fit_summary()["forecast"] == record


def test_fit__given_plan__keeps_its_micro_batch(data: Path, dry: SemanticSegmentor, tmp_path: Path) -> None:
    edited = dry.plan_.model_copy(update={"micro_batch_size": 2, "max_epochs": 1})
    segmentor = SemanticSegmentor(path=tmp_path / "b", verbosity=0)
    segmentor.fit(data / "train.csv", data / "val.csv", plan=edited, dry_run=True)
    assert segmentor.plan_ == edited
    assert math.isfinite(segmentor.forecast_.seconds or math.nan)


def test_fit__memory_runs_out_while_probing__trains_with_less(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trial.train

    def hungry(self: Trial, images: int) -> float:
        if images > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, images)

    monkeypatch.setattr(Trial, "train", hungry)
    segmentor = segmentor_of(tmp_path / "b")
    segmentor.fit(data / "train.csv", data / "val.csv", max_epochs=1, enable_progress_bar=False)
    assert segmentor.plan_.micro_batch_size == 2
    assert segmentor.plan_.batch_size == 4


def test_begun_with__micro_batch_of_the_state__is_taken_unless_another_was_asked(plan: Plan) -> None:
    assert begun_with(plan, 2).micro_batch_size == 2
    assert begun_with(plan, 3) == plan  # does not divide the batch
    asked = plan.model_copy(update={"reasons": {"micro_batch_size": "as asked"}})
    assert begun_with(asked, 2) == asked
    assert begun_with(plan, 4) == plan
