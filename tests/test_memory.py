"""Running out of memory in the middle of a fit: the same result in smaller pieces, and an end where none fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl import plan as plan_module
from semseg_automl.errors import TrainingError
from semseg_automl.memory import is_out_of_memory
from semseg_automl.training import FineTuneModule

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.micro_batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "none",
    "optim.max_epochs": 2,
}


@pytest.fixture(scope="module", autouse=True)
def short_epochs() -> Iterator[None]:
    """Let an epoch have three steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_module, "MIN_STEPS_PER_EPOCH", 3)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set."""
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=12, val=2, test=1, size=(32, 32))


def fit(data: Path, path: Path, **settings: Any) -> SemanticSegmentor:
    """Fit two epochs of three steps."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    segmentor = SemanticSegmentor(path=path, hyperparameters={**SETTINGS, **changed}, verbosity=1)
    return segmentor.fit(data / "train.csv", data / "val.csv", enable_progress_bar=False)


def run_out(
    monkeypatch: pytest.MonkeyPatch, *, above: int, where: str = "training_step", recomputed_fits: bool = False
) -> None:
    """Let a step of more than `above` images find no memory, from the second optimizer step on."""
    real = getattr(FineTuneModule, where)

    def hungry(self: FineTuneModule, batch: Any, batch_index: int) -> Any:
        relieved = recomputed_fits and self.model.encoder.checkpointing
        if len(batch) > above and self.trainer.global_step >= 1 and not relieved:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 7 GiB")
        return real(self, batch, batch_index)

    monkeypatch.setattr(FineTuneModule, where, hungry)


def assert_close(path: Path, other: Path) -> None:
    """Compare what two fits learned, up to rounding."""
    ours, theirs = (load_file(each / "trained.safetensors") for each in (path, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit with enough memory."""
    path = tmp_path_factory.mktemp("whole") / "b"
    fit(data, path)
    return path


@pytest.mark.parametrize(("above", "micro"), [(2, 2), (1, 1)])
def test_fit__memory_runs_out_within_a_step__gives_the_same_result(
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    above: int,
    micro: int,
) -> None:
    run_out(monkeypatch, above=above)
    segmentor = fit(data, tmp_path / "b")
    assert_close(tmp_path / "b", whole)
    assert segmentor.plan_.micro_batch_size == micro
    assert segmentor.plan_.reasons["micro_batch_size"] == "memory ran out while training"
    said = capsys.readouterr().out
    assert said.count("memory ran out") == (2 if micro == 1 else 1)
    assert f"micro-batches of {micro}" in said
    assert segmentor.history_["step"].tolist() == [3, 6]


def test_fit__memory_runs_out_within_validation__gives_the_same_result(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, above=1, where="validation_step")
    segmentor = fit(data, tmp_path / "b")
    assert_close(tmp_path / "b", whole)
    assert len(segmentor.history_) == 2


def test_fit__not_one_image_fits__recomputes_activations(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, above=0, recomputed_fits=True)
    segmentor = fit(data, tmp_path / "b")
    assert_close(tmp_path / "b", whole)
    assert (segmentor.plan_.micro_batch_size, segmentor.plan_.checkpointing) == (1, True)


def test_fit__nothing_fits__raises_what_to_do(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out(monkeypatch, above=0)
    with pytest.raises(TrainingError, match="not one image at a time fits"):
        fit(data, tmp_path / "b")


def test_is_out_of_memory__other_errors__are_none() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(MemoryError("out of memory"))
