"""Going on after a kill: the same weights as without, damaged and missing states, and what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl import bundle as bundle_module
from semseg_automl import resume as resume_module
from semseg_automl.errors import BundleError, ConfigError
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.third_party import lightning

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.micro_batch_size": 2,
    "env.precision": "32-true",
    "env.state_seconds": 0,
    "data.augmentation": "medium",
    "optim.lr": 0.01,
    "optim.max_epochs": 3,
    "optim.lora.experts": 3,
}
BATCHES = 4  # per epoch, two of them to an optimizer step


class Killed(BaseException):
    """Stands for the end of the process: nothing of the package catches it."""


class Kill(lightning.Callback):
    """Ends the process, as it were, at a batch of an epoch, or at its validation."""

    def __init__(self, epoch: int, batch: int | None = None) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Die after a batch."""
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise Killed

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Die after a validation."""
        if trainer.current_epoch == self.epoch and self.batch is None:
            raise Killed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set."""
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=12, val=2, test=2, size=(40, 40))


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Write a small plain ViT in timm's names, with random weights, for all fits: Conv-LoRA's experts draw noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = TinyViT(embed_dim=64, depth=2, num_heads=1, grid=4)
    state = {name.replace(".mlp.lin", ".mlp.fc"): t for name, t in vit.state_dict().items() if "neck." not in name}
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    SETTINGS["model.checkpoint"] = str(path)


def fit(data: Path, path: Path, *, resume: bool = False, kill: Kill | None = None, **settings: Any) -> Any:
    """Fit three epochs of two steps, perhaps only up to a point."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    segmentor = SemanticSegmentor(path=path, hyperparameters={**SETTINGS, **changed}, verbosity=0)
    callbacks = [kill] if kill else []
    arguments: dict[str, Any] = {"callbacks": callbacks, "limit_train_batches": BATCHES, "resume": resume}
    return segmentor.fit(data / "train.csv", data / "val.csv", **arguments)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Read what a fit learned."""
    return load_file(path / "trained.safetensors")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Fit without a break."""
    return fit(data, tmp_path_factory.mktemp("whole") / "b")


def assert_same(path: Path, whole: Any) -> None:
    """Compare weights bit for bit, and the history but for its clock and the mean loss of a broken epoch."""
    ours, theirs = weights(path), weights(whole.path_)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    left, right = (each.history_.drop(columns=["seconds", "train_loss"]) for each in (fitted_at(path), whole))
    pd.testing.assert_frame_equal(left, right)


def fitted_at(path: Path) -> SemanticSegmentor:
    """Load what a fit saved."""
    return SemanticSegmentor.load(path)


@pytest.mark.parametrize(
    "kill",
    [Kill(0, 0), Kill(0, 3), Kill(1, 2), Kill(1), Kill(2)],
    ids=lambda kill: f"{kill.epoch}-{kill.batch}",
)
def test_resume__killed_anywhere__gives_the_same_weights(data: Path, whole: Any, tmp_path: Path, kill: Kill) -> None:
    path = tmp_path / "b"
    with pytest.raises(Killed):
        fit(data, path, kill=kill)
    fit(data, path, resume=True)
    assert_same(path, whole)
    assert not (path / "resume").exists()


def test_resume__killed_twice__gives_the_same_weights(data: Path, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(data, tmp_path / "b", kill=Kill(0, 2))
    with pytest.raises(Killed):
        fit(data, tmp_path / "b", kill=Kill(1, 2), resume=True)
    fit(data, tmp_path / "b", resume=True)
    assert_same(tmp_path / "b", whole)


def test_resume__loader_processes__gives_the_same_weights(data: Path, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(data, tmp_path / "b", kill=Kill(1, 2), env__num_workers=1)
    fit(data, tmp_path / "b", resume=True, env__num_workers=1)
    assert_same(tmp_path / "b", whole)


def test_resume__cached_features__gives_the_same_weights(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim__peft": "decoder_only", "env__feature_cache": "memory"}
    fit(data, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        fit(data, tmp_path / "b", kill=Kill(1, 2), **settings)
    fit(data, tmp_path / "b", resume=True, **settings)
    ours, theirs = weights(tmp_path / "b"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume__goes_on__trains_only_what_is_left(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(data, tmp_path / "b", kill=Kill(1, 2))
    seen: list[tuple[int, int]] = []

    class Watch(Kill):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.current_epoch, batch_idx))

    fit(data, tmp_path / "b", kill=Watch(99), resume=True)
    assert seen == [(1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_resume__last_state_damaged__takes_the_one_before(
    data: Path, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b"
    with pytest.raises(Killed):
        fit(data, path, kill=Kill(1, 2))
    newest, before = resume_module.state_files(path / "resume")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said: list[str] = []
    assert resume_module.newest_state(path / "resume", said.append) == before
    assert "damaged" in said[0]
    assert newest.name in said[0]
    fit(data, path, resume=True)
    assert_same(path, whole)


def test_resume__all_states_damaged__begins_anew(data: Path, whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "b"
    with pytest.raises(Killed):
        fit(data, path, kill=Kill(1, 2))
    for state in resume_module.state_files(path / "resume"):
        os.truncate(state, 100)
    fit(data, path, resume=True)
    assert_same(path, whole)


def test_resume__nothing_there__begins(data: Path, whole: Any, tmp_path: Path) -> None:
    fit(data, tmp_path / "b", resume=True)
    assert_same(tmp_path / "b", whole)


def test_resume__fit_is_complete__trains_nothing(data: Path, whole: Any) -> None:
    before = (whole.path_ / "trained.safetensors").stat().st_mtime_ns
    again = fit(data, whole.path_, resume=True)
    assert (whole.path_ / "trained.safetensors").stat().st_mtime_ns == before
    assert again.predict(data / "test.csv")[0].shape == (40, 40)


def test_resume__fit_is_complete_but_of_another_plan__is_refused(data: Path, whole: Any) -> None:
    with pytest.raises(ConfigError, match="lr was"):
        fit(data, whole.path_, resume=True, optim__lr=0.5)


def test_resume__another_plan_or_data__is_refused_with_the_difference(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    copy = tmp_path / "data"
    draw_dataset(copy, kind="binary", train=12, val=2, test=2, size=(40, 40))
    with pytest.raises(Killed):
        fit(copy, path, kill=Kill(0, 2))
    with pytest.raises(ConfigError, match=r"plan: lr was 0\.0\d+, is 0\.5"):
        fit(copy, path, resume=True, optim__lr=0.5)
    table = pd.read_csv(copy / "train.csv")
    os.utime(copy / table["image"][3], ns=(1, 1))
    with pytest.raises(ConfigError, match="data: 1 rows of train are not what they were, at the positions 3"):
        fit(copy, path, resume=True)
    table[:-1].to_csv(copy / "train.csv", index=False)
    with pytest.raises(ConfigError, match="data: train had 12 rows, has 11"):
        fit(copy, path, resume=True)


def test_resume__another_micro_batch__goes_on_at_the_same_sample(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    with pytest.raises(Killed):
        fit(data, path, kill=Kill(1, 2))
    (newest, _) = resume_module.state_files(path / "resume")
    state = resume_module.read_state(newest)
    position = resume_module.prepare_state(state, 1, "Clock")
    assert (position.epoch, position.samples) == (1, 4)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 4


def test_resume__without_a_path__is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="path="):
        SemanticSegmentor(verbosity=0).fit(data / "train.csv", resume=True)


def test_fit__disk_is_full_for_states__goes_on_and_says_so_once(
    data: Path, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume_module, "save_file", full)
    segmentor = SemanticSegmentor(path=tmp_path / "b", hyperparameters=SETTINGS, verbosity=1)
    segmentor.fit(data / "train.csv", data / "val.csv", limit_train_batches=BATCHES, enable_progress_bar=False)
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert_same(tmp_path / "b", whole)


def test_fit__disk_is_full_at_a_better_epoch__goes_on(
    data: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = save_file, []

    def full_at_first(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) < 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(bundle_module, "save_file", full_at_first)
    fit(data, tmp_path / "b")
    assert_same(tmp_path / "b", whole)


def test_fit__disk_is_full_at_the_end__keeps_the_state_to_go_on_with(
    data: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(bundle_module, "save_file", full)
        with pytest.raises(BundleError, match="No space left"):
            fit(data, tmp_path / "b")
    fit(data, tmp_path / "b", resume=True)
    assert_same(tmp_path / "b", whole)


def test_read_state__foreign_file__is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"x{resume_module.SUFFIX}"
    path.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="no state of a fit"):
        resume_module.read_state(path)
