"""Trackers: the choice of one, what they are given of a fit, read back where that is possible, and pictures."""

from __future__ import annotations

import importlib.util
import struct
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tensorboardX.proto.event_pb2 import Event

from semseg_automl import SemanticSegmentor, draw_dataset, trackers
from semseg_automl.callbacks import TrainingResult
from semseg_automl.data.dataset import MaskDataset
from semseg_automl.data.table import read_table
from semseg_automl.errors import ConfigError
from semseg_automl.plan import Plan
from semseg_automl.report import HEADER, TILE
from semseg_automl.task import SegmentationTask
from semseg_automl.third_party import lightning
from semseg_automl.trackers import Previews, RunLog, build_trackers, chosen_trackers, log_pictures, run_log
from semseg_automl.trainer_options import check_trainer_options

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "none",
}
LOGGERS = lightning.pytorch.loggers
TASK = SegmentationTask("binary", (0, 255), ("ground", "blob"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=4, val=6, test=1, size=(40, 48))


def fit(data: Path, folder: Path, **options: Any) -> SemanticSegmentor:
    segmentor = SemanticSegmentor(path=folder, hyperparameters=SETTINGS, verbosity=0)
    return segmentor.fit(
        data / "train.csv", data / "val.csv", max_epochs=2, limit_train_batches=3, log_every_n_steps=2, **options
    )


def events_of(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Read TensorBoard's files: records of a length, its checksum, the event and its checksum."""
    found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for path in folder.rglob("events.out.tfevents.*"):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            start += 16 + length
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                found[value.tag].append((event.step, value.simple_value if kind == "simple_value" else kind))
    return found


def test_fit__no_logger_named__writes_tensorboard_files_into_its_folder(data: Path, tmp_path: Path) -> None:
    segmentor = fit(data, tmp_path / "b")
    events = events_of(tmp_path / "b" / "logs")
    history = segmentor.history_
    assert events["iou"] == [(step - 1, pytest.approx(score)) for step, score in history[["step", "iou"]].to_numpy()]
    assert [value for _, value in events["train_loss"]] == pytest.approx(history["train_loss"].tolist(), rel=1e-5)
    assert [step for step, _ in events["train_loss_step"]] == [1, 2, 4, 6]
    assert 0 < max(value for _, value in events["lr"]) <= segmentor.plan_.lr
    better = history["iou"].cummax().diff().fillna(1) > 0
    for place in range(4):
        assert events[f"validation/image_{place}"] == [(step, "image") for step in history["step"][better]]
    assert "validation/image_4" not in events
    assert events["best_iou"][-1][1] == pytest.approx(history["iou"].max())
    assert "_hparams_/experiment" in events


def test_fit__csv__writes_metrics_and_the_plan(data: Path, tmp_path: Path) -> None:
    segmentor = fit(data, tmp_path / "b", logger="csv")
    (folder,) = (tmp_path / "b" / "logs").iterdir()
    table = pd.read_csv(folder / "metrics.csv")
    assert table["train_loss_step"].dropna().size == 4
    assert table["iou"].dropna().tolist() == pytest.approx(segmentor.history_["iou"].tolist())
    settings = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
    assert settings["lr"] == segmentor.plan_.lr
    assert settings["input_size"] == "[32, 32]"
    assert "reasons" not in settings


def test_fit__without_a_logger__writes_no_logs_and_learns_the_same(data: Path, tmp_path: Path) -> None:
    silent = fit(data, tmp_path / "a", logger=False)
    logged = fit(data, tmp_path / "b", logger=["csv", "tensorboard"])
    assert not (tmp_path / "a" / "logs").exists()
    assert len(list((tmp_path / "b" / "logs").iterdir())) == 2
    for column in ("train_loss", "iou", "lr"):
        assert silent.history_[column].tolist() == logged.history_[column].tolist()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ["tensorboard"]),
        (True, ["tensorboard"]),
        (False, []),
        ([], []),
        ("csv", ["csv"]),
        (("csv", "tensorboard"), ["csv", "tensorboard"]),
    ],
)
def test_chosen_trackers__names__are_listed(choice: Any, expected: list[str]) -> None:
    assert chosen_trackers(choice) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("", "unknown logger"),
        (["csv", "neptune"], "unknown logger 'neptune'"),
        (7, "logger is 7; allowed: tensorboard, mlflow"),
        (object, "allowed: tensorboard"),
    ],
)
def test_chosen_trackers__something_else__is_an_error_before_the_fit(choice: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_trainer_options({"logger": choice})


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_chosen_trackers__package_missing__names_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        SemanticSegmentor().fit("absent.csv", logger=name)


class Recorder:
    """Stands in for a logger that needs a package or a server, and notes what it was built with and told."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options
        self.told: list[tuple[Any, ...]] = []
        self.run_id = "run 7"
        self.experiment = SimpleNamespace(log_image=lambda *told: self.told.append(told))

    def log_image(self, key: str, images: list[Any], step: int, caption: list[str]) -> None:
        self.told.append((key, len(images), step, caption))


def test_build_trackers__mlflow__keeps_its_runs_in_the_folder_unless_there_is_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.setattr(LOGGERS, "MLFlowLogger", Recorder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (local,) = cast(list[Recorder], build_trackers("mlflow", tmp_path / "polyp"))
    logs = tmp_path / "polyp" / "logs"
    assert local.options == {
        "experiment_name": "semseg_automl",
        "run_name": "polyp",
        "tracking_uri": f"sqlite:///{logs / 'mlflow.db'}",
        "artifact_location": (logs / "mlflow").as_uri(),
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    (remote,) = cast(list[Recorder], build_trackers("mlflow", tmp_path / "polyp"))
    assert (remote.options["tracking_uri"], remote.options["artifact_location"]) == ("http://tracker:5000", None)
    log_pictures(cast(Any, local), {"image_0": np.zeros((2, 3, 3), np.uint8)}, 12)
    ((run, picture, name),) = local.told
    assert (run, picture.shape, name) == ("run 7", (2, 3, 3), "validation/image_0/step_000012.png")


def test_build_trackers__wandb__is_asked_for_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.setattr(LOGGERS, "WandbLogger", Recorder)
    (logger,) = cast(list[Recorder], build_trackers("wandb", tmp_path / "polyp"))
    assert logger.options == {"project": "semseg_automl", "name": "polyp", "save_dir": tmp_path / "polyp" / "logs"}
    log_pictures(cast(Any, logger), dict.fromkeys(("image_0", "image_1"), np.zeros((2, 3, 3), np.uint8)), 12)
    assert logger.told == [("validation", 2, 12, ["image_0", "image_1"])]


def test_build_trackers__package_that_lightning_cannot_use__is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_old(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met")

    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.setattr(LOGGERS, "WandbLogger", too_old)
    with pytest.raises(ConfigError, match=r"wandb>=0\.12\.10"):
        build_trackers("wandb", tmp_path)


def test_build_trackers__folder_that_cannot_be_made__is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        build_trackers("csv", tmp_path)


def test_build_trackers__logger_object__is_used_as_it_is(tmp_path: Path) -> None:
    logger = LOGGERS.CSVLogger(str(tmp_path / "mine"))
    assert build_trackers(logger, tmp_path / "b") == [logger]
    assert not (tmp_path / "b").exists()


def dataset_of(data: Path) -> MaskDataset:
    return MaskDataset(read_table(data / "val.csv"), TASK, (32, 32))


def test_previews__four_fixed_rows__are_drawn_with_what_was_last_predicted(data: Path) -> None:
    previews = Previews(dataset_of(data), binary=True)
    assert list(previews.labels) == [0, 2, 3, 5]
    assert previews.draw() == {}
    truth = torch.zeros(40, 48, dtype=torch.uint8)
    for row in range(6):
        previews.keep(row, truth.long(), truth)
    before = previews.draw()
    assert list(before) == ["image_0", "image_1", "image_2", "image_3"]
    assert {picture.shape for picture in before.values()} == {(HEADER + TILE, 3 * TILE, 3)}
    previews.keep(2, torch.ones(40, 48, dtype=torch.int64), truth)
    after = previews.draw()
    assert [bool((before[name] == after[name]).all()) for name in before] == [True, False, True, True]
    changed = (before["image_1"] != after["image_1"]).any(axis=(0, 2))
    assert not changed[: 2 * TILE].any(), "image and truth stay"
    assert changed[2 * TILE :].any()


def test_previews__large_prediction__is_kept_small(data: Path) -> None:
    previews = Previews(dataset_of(data), binary=True)
    large = torch.zeros(3000, 1000, dtype=torch.int64)
    previews.keep(0, large, large)
    assert max(previews.labels[0].shape) <= 2 * TILE


def trainer_of(logger: Any, **attributes: Any) -> Any:
    """Stand in for Lightning's trainer: what the callback reads of it."""
    group = {"lr": 0.02, "lr_ratio": 4.0}
    start = {"global_step": 0, "current_epoch": 0, "log_every_n_steps": 10, "accumulate_grad_batches": 2}
    optimizer = SimpleNamespace(param_groups=[group])
    return SimpleNamespace(loggers=[logger], optimizers=[optimizer], is_global_zero=True, **{**start, **attributes})


def test_run_log__accumulated_steps__logs_each_step_once_with_the_loss_of_a_batch() -> None:
    told: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: told.append((metrics, step)))
    log = RunLog(cast(Plan, None), TrainingResult(), None)
    for batch in range(2 * 21):
        trainer = trainer_of(logger, global_step=(batch + 1) // 2)
        log.on_train_batch_end(trainer, cast(Any, None), {"loss": torch.tensor(0.25)}, None, batch)
    assert [step for _, step in told] == [1, 10, 20]
    assert told[0][0] == {"train_loss_step": 0.5, "lr": 0.005}


def test_run_log__epoch_that_is_not_the_best__draws_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(trackers, "log_pictures", lambda logger, pictures, step: drawn.append(step))
    result = TrainingResult()
    log = RunLog(cast(Plan, None), result, Previews(dataset_of(data), binary=True))
    for epoch, best in enumerate((0, 0, 2)):
        result.best_epoch = best
        log.on_validation_end(trainer_of(None, current_epoch=epoch, global_step=10 * epoch), cast(Any, None))
    assert drawn == [0, 20]


def test_run_log__csv_alone__prepares_no_pictures(data: Path, tmp_path: Path) -> None:
    csv, board = (build_trackers(name, tmp_path) for name in ("csv", "tensorboard"))
    assert run_log(csv, cast(Plan, None), TrainingResult(), dataset_of(data)).previews is None
    assert run_log([*csv, *board], cast(Plan, None), TrainingResult(), dataset_of(data)).previews is not None
