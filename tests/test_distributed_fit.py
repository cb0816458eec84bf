"""Two processes that fit together do what one does alone: losses, weights, scores, files, and going on after a kill."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl import estimator as estimator_module
from semseg_automl import plan as plan_module
from semseg_automl.callbacks import ExpertUsage, TrainingResult, WeightKeeper
from semseg_automl.errors import ConfigError, SemsegError, TrainingError
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import METHODS
from semseg_automl.plan import Plan
from semseg_automl.third_party import lightning
from semseg_automl.training import FineTuneModule

WORLD = 2
STEPS = 3
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
    "optim.max_epochs": 2,
    "optim.lora.experts": 3,
}
# Batches of 2 to a step of 4: each process takes one of them. Of 1: each accumulates two.
FITS: dict[str, dict[str, Any]] = {
    "decoder_only": {"optim.peft": "decoder_only", "optim.loss": "balanced_bce"},
    "conv_lora": {"env.micro_batch_size": 1},
}


class Killed(BaseException):
    """Stands for the end of the process: nothing of the package catches it."""


class Watch(lightning.Callback):
    """Notes the loss and the learning rate of every batch, and ends the process, as it were, where it is told."""

    def __init__(self, kill: tuple[int, int] | None = None) -> None:
        self.kill = kill
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note, and perhaps die."""
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if (trainer.current_epoch, batch_idx) == self.kill:
            raise Killed


def fit(folder: Path, name: str, processes: int, watch: Watch, **arguments: Any) -> SemanticSegmentor:
    """Fit two epochs of three steps as one of `processes`."""
    settings = {**SETTINGS, "model.checkpoint": str(folder / "vit.safetensors"), **arguments.pop("settings", {})}
    segmentor = SemanticSegmentor(
        path=folder / name, hyperparameters=settings, verbosity=1, validation_metric="s_measure"
    )
    per_step = SETTINGS["env.batch_size"] // settings["env.micro_batch_size"] // processes
    together = {"accelerator": "cpu", "devices": processes, "strategy": "ddp"} if processes > 1 else {}
    given = {"limit_train_batches": STEPS * per_step, "enable_progress_bar": False, **together, **arguments}
    return segmentor.fit(folder / "data/train.csv", folder / "data/val.csv", callbacks=watch, **given)


def outcome(segmentor: SemanticSegmentor, watch: Watch) -> dict[str, Any]:
    """Gather what a process has after a fit, in what ``torch.save`` keeps without code."""
    history = segmentor.history_.drop(columns="seconds")
    return {
        "losses": watch.losses,
        "rates": watch.rates,
        "history": history.to_dict("list"),
        "weights": dict(segmentor._bundle.model.state_dict()),
        "experts": segmentor._bundle.record["expert_usage"],
        "in_group": distributed.is_initialized(),
    }


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an epoch have a few steps, whatever the rows."""
    monkeypatch.setattr(plan_module, "MIN_STEPS_PER_EPOCH", STEPS)


def said(call: Any) -> str:
    """Return what one of our errors says."""
    try:
        call()
    except SemsegError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def work(rank: int, folder: Path, port: int) -> None:
    """Be one of two processes: run everything they do together, and save what came of it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    written: list[str] = []
    if rank:
        sys.addaudithook(lambda event, args: note_writing(folder, written, event, args))
    spoken = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(spoken):
        prepare(patched)
        found: dict[str, Any] = {}
        for name, settings in FITS.items():
            watch = Watch()
            segmentor = fit(folder, name, WORLD, watch, settings=settings)
            found[name] = outcome(segmentor, watch)
        if rank:  # by itself: it must not wait for the other one
            found["score"] = segmentor.evaluate(folder / "data/test.csv", "s_measure")["s_measure"]
        found |= gone_on(folder)
        found["clock"] = timed(folder, rank)
        patched.setattr(estimator_module, "write_fit_report", lambda *_: None)  # slow, and seen before
        found["methods"] = {method: method_losses(folder, method) for method in METHODS}
        found["errors"] = errors(folder, rank, patched)
    found |= {"written": written, "spoken": spoken.getvalue(), "statistics": statistics(rank, folder)}
    torch.save(found, folder / f"{rank}.pt")


def note_writing(folder: Path, written: list[str], event: str, args: tuple[Any, ...]) -> None:
    """Note each file below `folder` that Python creates, replaces or deletes."""
    if event == "open":
        path, mode, flags = args
        writes = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
    else:
        path, writes = (args or ("",))[0], event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    if writes and isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder)):
        written.append(f"{event} {path}")


class Holding(Watch):
    """Also notes how many frozen weights of the blocks this process holds between two steps, and how many there are."""

    held: tuple[int, int] = (0, 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        frozen = [p for p in pl_module.model.encoder.blocks.parameters() if not p.requires_grad]
        own = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
        self.held = sum(p.numel() for p in own), sum(p.numel() for p in frozen)


def share(rank: int, folder: Path, port: int, stage: str) -> None:
    """Be one of two processes that share the frozen weights out: `stage` is whole, killed or resumed."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    settings, watch = FITS["conv_lora"], Holding((1, 3) if stage == "killed" else None)
    shared: dict[str, Any] = {"settings": settings, "strategy": "fsdp", "resume": stage == "resumed"}
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()):
        prepare(patched)
        with contextlib.suppress(Killed):
            found = outcome(fit(folder, "shared" if stage == "whole" else "lost", WORLD, watch, **shared), watch)
            torch.save(found | {"held": watch.held}, folder / f"{stage}{rank}.pt")
        if stage == "whole":
            again = said(lambda: fit(folder, "again", WORLD, Watch(), settings=settings))
            (folder / f"again{rank}.txt").write_text(again)


def gone_on(folder: Path) -> dict[str, Any]:
    """Kill both processes within the second epoch, at the end of a step, where one cannot be ahead, and go on."""
    settings = FITS["conv_lora"]
    with contextlib.suppress(Killed):
        fit(folder, "killed", WORLD, Watch((1, 3)), settings=settings)
    watch = Watch()
    return {"resumed": outcome(fit(folder, "killed", WORLD, watch, settings=settings, resume=True), watch)}


def timed(folder: Path, rank: int) -> dict[str, Any]:
    """Fit until the time is up, which it is later for one process than for the other."""
    time.sleep(0.5 * rank)
    watch = Watch()
    return outcome(fit(folder, "clock", WORLD, watch, time_limit=2.5, max_epochs=50), watch)


def method_losses(folder: Path, method: str) -> list[float]:
    """Train a step of two batches by a fine-tuning method."""
    watch = Watch()
    settings = {"optim.peft": method, "optim.max_epochs": 1, "env.micro_batch_size": 1, "optim.lora.experts": 1}
    fit(folder, f"method_{method}", WORLD, watch, settings=settings, limit_train_batches=2, logger=False)
    return watch.losses


def errors(folder: Path, rank: int, patched: pytest.MonkeyPatch) -> dict[str, str]:
    """Collect what is refused, or ends, in both processes."""

    def no_memory(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    five = {"env.batch_size": 5, "env.micro_batch_size": 1}
    found = {
        "seeds": said(lambda: fit(folder, "refused", WORLD, Watch(), seed=rank)),
        "batch": said(lambda: fit(folder, "refused", WORLD, Watch(), settings=five)),
    }
    patched.setattr(FineTuneModule, "training_step", no_memory)
    return found | {"memory": said(lambda: fit(folder, "memory", WORLD, Watch()))}


def statistics(rank: int, folder: Path) -> list[float]:
    """Let each process count other batch statistics, and return what a validation sees of them."""
    norm = nn.BatchNorm2d(1)
    norm.get_buffer("running_mean").fill_(rank)
    network = nn.Sequential(norm, nn.Conv2d(1, 1, 1))
    plan = cast(Plan, SimpleNamespace(ema=0.0, validation_metric="iou"))
    keeper = WeightKeeper(network, plan, TrainingResult(), ExpertUsage(network), print, print)
    meeting = f"file://{folder}/meet"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    try:
        keeper.on_validation_start(cast(Any, SimpleNamespace(world_size=WORLD)), cast(Any, None))
    finally:
        distributed.destroy_process_group()
    return cast(list[float], norm.get_buffer("running_mean").tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set, and write a small ViT in timm's names, with random weights."""
    folder = tmp_path_factory.mktemp("fits")
    draw_dataset(folder / "data", kind="binary", train=12, val=3, test=2, size=(40, 40))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = TinyViT(embed_dim=64, depth=2, num_heads=1, grid=4)
    state = {name.replace(".mlp.lin", ".mlp.fc"): t for name, t in vit.state_dict().items() if "neck." not in name}
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "vit.safetensors")
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    """Run two processes, and return what each of them has to tell."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(work, args=(folder, port), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def shared(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Share frozen weights out: once through, and once killed and gone on with by new processes."""
    for stage in ("whole", "killed", "resumed"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(share, args=(folder, port, stage), nprocs=WORLD)
    return {
        stage: [torch.load(folder / f"{stage}{rank}.pt", weights_only=True) for rank in range(WORLD)]
        for stage in ("whole", "resumed")
    }


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """Run the same fits in this process."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        prepare(patched)
        for name, settings in FITS.items():
            watch = Watch()
            found[name] = outcome(fit(folder, f"alone_{name}", 1, watch, settings=settings), watch)
    return found


@pytest.mark.parametrize("name", FITS)
def test_fit__two_processes__have_the_losses_of_one(
    pair: list[dict[str, Any]], alone: dict[str, dict[str, Any]], name: str
) -> None:
    # One process sees the batches that two take in turns.
    in_turns = np.array([each[name]["losses"] for each in pair]).T.ravel()
    assert len(in_turns) == 2 * STEPS * 4 // (SETTINGS | FITS[name])["env.micro_batch_size"]
    np.testing.assert_allclose(in_turns, alone[name]["losses"], rtol=0, atol=1e-6)
    for each in pair:
        for key, values in alone[name]["history"].items():
            np.testing.assert_allclose(each[name]["history"][key], values, rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", FITS)
def test_fit__two_processes__have_the_weights_of_one(
    pair: list[dict[str, Any]], alone: dict[str, dict[str, Any]], name: str
) -> None:
    first, second = (each[name]["weights"] for each in pair)
    expected = alone[name]["weights"]
    assert first.keys() == second.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        # Adam divides by the gradient's size: where that is nothing but rounding, a step may differ.
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_fit__frozen_weights_shared_out__has_the_losses_and_weights_of_whole_ones(
    shared: dict[str, list[dict[str, Any]]], alone: dict[str, dict[str, Any]]
) -> None:
    # Of three validation rows one process has two, the other one: they run a different number of passes.
    expected = alone["conv_lora"]
    in_turns = np.array([each["losses"] for each in shared["whole"]]).T.ravel()
    np.testing.assert_allclose(in_turns, expected["losses"], rtol=0, atol=1e-6)
    for each in shared["whole"]:
        for key, values in expected["history"].items():
            np.testing.assert_allclose(each["history"][key], values, rtol=0, atol=1e-6, err_msg=key)
        assert each["experts"] == expected["experts"]
        assert each["weights"].keys() == expected["weights"].keys()
        for key, value in expected["weights"].items():
            torch.testing.assert_close(each["weights"][key], value, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.usefixtures("shared")
def test_fit__processes_that_shared_weights_out__do_not_wait_for_one_another_again(folder: Path) -> None:
    for rank in range(WORLD):
        assert "in a new run of the script" in (folder / f"again{rank}.txt").read_text()


def test_fit__frozen_weights_shared_out__are_held_in_parts(shared: dict[str, list[dict[str, Any]]]) -> None:
    (first, whole), (second, _) = (each["held"] for each in shared["whole"])
    assert first + second == whole > 0
    assert first == pytest.approx(second, rel=0.02)


def test_fit__frozen_weights_shared_out__are_saved_whole(
    shared: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    saved = SemanticSegmentor.load(folder / "shared")._bundle.model.state_dict()
    assert all(torch.equal(tensor, shared["whole"][1]["weights"][key]) for key, tensor in saved.items())


def test_resume__frozen_weights_shared_out__have_the_weights_of_no_kill(
    shared: dict[str, list[dict[str, Any]]]
) -> None:
    for whole, resumed in zip(shared["whole"], shared["resumed"], strict=True):
        assert len(resumed["losses"]) == 2 * STEPS - 2, "goes on within the second epoch"
        assert all(torch.equal(tensor, whole["weights"][key]) for key, tensor in resumed["weights"].items())


def test_fit__two_processes__count_the_experts_of_all_validation_rows(
    pair: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    usage = alone["conv_lora"]["experts"]
    assert {sum(counts) for counts in usage.values()} == {3}
    assert [each["conv_lora"]["experts"] for each in pair] == [usage, usage]


def test_fit__two_processes__only_the_first_writes_and_speaks(pair: list[dict[str, Any]], folder: Path) -> None:
    first, second = pair
    assert second["written"] == []
    assert second["spoken"] == ""
    assert first["spoken"].count("stopped by max_epochs") == len(FITS) + 1 + len(METHODS), "each fit's last line once"
    assert "2 processes train, each on 2 images at a time, 4 together per step" in first["spoken"]
    for name in FITS:
        assert {path.name for path in (folder / name).iterdir()} >= {"bundle.yaml", "plan.yaml", "report.html", "logs"}
        saved = load_file(folder / name / "trained.safetensors")
        assert all(torch.equal(tensor, first[name]["weights"][key]) for key, tensor in saved.items())


def test_fit__two_processes__are_on_their_own_afterwards(pair: list[dict[str, Any]], folder: Path) -> None:
    assert [each["conv_lora"]["in_group"] for each in pair] == [False, False]
    loaded = SemanticSegmentor.load(folder / "conv_lora")
    score = loaded.evaluate(folder / "data/test.csv", "s_measure")["s_measure"]
    assert pair[1]["score"] == pytest.approx(score, abs=1e-6)


def test_resume__two_processes_killed__have_the_weights_of_no_kill(pair: list[dict[str, Any]], folder: Path) -> None:
    whole = pair[0]["conv_lora"]["weights"]
    for each in pair:
        assert len(each["resumed"]["losses"]) == 2 * STEPS - 2, "goes on within the second epoch"
        assert all(torch.equal(tensor, whole[key]) for key, tensor in each["resumed"]["weights"].items())
    assert not (folder / "killed" / "resume").exists()


def test_fit__time_limit__is_the_first_processs_clock(pair: list[dict[str, Any]]) -> None:
    first, second = (each["clock"] for each in pair)
    assert first["rates"] == second["rates"]
    assert len(set(first["rates"])) > STEPS
    assert all(torch.equal(tensor, second["weights"][key]) for key, tensor in first["weights"].items())


def test_fit__every_method__runs_in_two_processes(pair: list[dict[str, Any]]) -> None:
    for each in pair:
        assert set(each["methods"]) == set(METHODS)
        assert all(len(losses) == 2 and np.isfinite(losses).all() for losses in each["methods"].values())


def test_fit__processes_that_differ__are_refused(pair: list[dict[str, Any]]) -> None:
    for each in pair:
        assert "the plan (process 1)" in each["errors"]["seeds"]
        assert each["errors"]["seeds"].startswith(ConfigError.__name__)


def test_fit__batch_that_cannot_be_divided__is_refused(pair: list[dict[str, Any]]) -> None:
    assert all("5 images cannot be divided among 2 processes" in each["errors"]["batch"] for each in pair)


def test_fit__memory_runs_out__ends_with_what_to_do(pair: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(pair):
        assert each["errors"]["memory"].startswith(f"{TrainingError.__name__}: memory ran out in process {rank}")
        assert "env.micro_batch_size, now 2" in each["errors"]["memory"]


def test_validation__batch_statistics__are_those_of_all_processes(pair: list[dict[str, Any]]) -> None:
    assert [each["statistics"] for each in pair] == [[0.5], [0.5]]
