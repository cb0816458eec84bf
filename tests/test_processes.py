"""Which of how many processes this is, what is refused, and how they share samples, batch and machine."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed, nn

from semseg_automl import SemanticSegmentor
from semseg_automl.callbacks import ExpertUsage, TrainingResult, WeightKeeper
from semseg_automl.data.dataset import MaskDataModule, MaskDataset
from semseg_automl.data.sampling import ViewSampler
from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.memory import shared_plan
from semseg_automl.plan import Plan
from semseg_automl.processes import ALONE, Processes, arrange, built_strategy, divided_micro_batch, first_says, parting
from semseg_automl.third_party import lightning
from semseg_automl.trackers import Previews
from semseg_automl.trainer_options import trainer_processes

SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "fit",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "first,second",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "7",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "7007",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what started the tests themselves."""
    for name in [*SLURM, *TORCHRUN, "GROUP_RANK", "NODE_RANK"]:
        monkeypatch.delenv(name, raising=False)


def environ(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set environment variables as a launcher does."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_arrange__nothing_asked__is_one_device() -> None:
    assert arrange({"precision": "32-true"}) == (ALONE, {"precision": "32-true", "devices": 1})
    assert arrange({"strategy": "auto", "devices": None}) == (ALONE, {"strategy": "auto", "devices": 1})


def test_arrange__two_devices__are_two_processes_of_which_this_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, options = trainer_processes({"accelerator": "cpu", "devices": 2})
    assert processes == Processes(0, 2, 2)
    assert options["strategy"] == "ddp"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert arrange({"accelerator": "cpu", "devices": 2})[0] == Processes(1, 2, 2)
    assert arrange({"accelerator": "cpu", "devices": 1})[0] == ALONE


@pytest.mark.parametrize("variables", [SLURM, TORCHRUN], ids=["slurm", "torchrun"])
def test_arrange__started_by_a_launcher__finds_rank_and_count(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    environ(monkeypatch, variables)
    processes, options = arrange({"accelerator": "cpu", "devices": 2, "num_nodes": 2})
    assert processes == Processes(3, 4, 2)
    requeues = [getattr(plugin, "auto_requeue", None) for plugin in options["plugins"]]
    assert requeues == ([False] if variables is SLURM else []), "requeued fits go on by resume=True"


def test_arrange__launcher_started_others_and_nothing_asked__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environ(monkeypatch, TORCHRUN)
    with pytest.raises(ConfigError, match="one of several processes"):
        arrange({})
    with pytest.raises(ConfigError, match="world size"):  # that of torchrun is another
        arrange({"accelerator": "cpu", "devices": 3})


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("ddp_spawn", "cannot hand the fitted segmentor back"),
        ("ddp_notebook", "cannot hand the fitted segmentor back"),
        ("fsdp_cpu_offload", "must be whole in each process"),
        ("dpp", "no strategy of that name"),
        (lightning.pytorch.strategies.DDPStrategy(start_method="spawn"), "cannot hand the fitted segmentor back"),
        (lightning.pytorch.strategies.DDPStrategy(broadcast_buffers=True), "can hang"),
    ],
)
def test_arrange__strategy_that_cannot_work__is_refused(strategy: Any, why: str) -> None:
    with pytest.raises(UnsupportedCombination, match=why):
        arrange({"accelerator": "cpu", "devices": 2, "strategy": strategy})


def test_arrange__what_lightning_refuses__is_our_error() -> None:
    with pytest.raises(ConfigError, match="Lightning does not take"):
        arrange({"accelerator": "cpu", "devices": -3})


def test_arrange__no_script_to_start_again__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(ConfigError, match="no script is running"):
        arrange({"accelerator": "cpu", "devices": 2})


def test_arrange__group_of_somebody_else__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="destroy_process_group"):
        arrange({})


def test_fit__several_processes_without_a_path__is_refused() -> None:
    with pytest.raises(ConfigError, match="path="):
        SemanticSegmentor(verbosity=0).fit("train.csv", accelerator="cpu", devices=2)


@pytest.mark.parametrize(("name", "searches"), [("ddp", True), ("ddp_find_unused_parameters_false", False)])
def test_built_strategy__some_unused__searches_unless_told_not_to(name: str, searches: bool) -> None:
    assert built_strategy(name, some_unused=True)._ddp_kwargs["find_unused_parameters"] is searches
    assert built_strategy(name, some_unused=False)._ddp_kwargs["find_unused_parameters"] is False


def test_divided_micro_batch__batch_not_divisible__names_what_is() -> None:
    with pytest.raises(UnsupportedCombination, match=r"env.batch_size=6 or 9, or train with 1, 2, 4, 8 processes"):
        divided_micro_batch(8, 8, 3)
    assert divided_micro_batch(24, 5, 2) == 4


@pytest.mark.parametrize(("rows", "views", "done"), [(7, 3, 0), (8, 2, 0), (20, 1, 8), (9, 2, 4)])
def test_sampler__processes_in_turns__see_what_one_sees(rows: int, views: int, done: int) -> None:
    def samples(processes: Processes) -> list[int]:
        sampler = ViewSampler(rows, views, 0, batch_size=2, processes=processes)
        whole = len(list(sampler))
        assert len(sampler) == whole
        sampler.start_at(3, done)
        return list(sampler)

    single = samples(ALONE)
    first, second = (samples(Processes(rank, 2, 2)) for rank in range(2))
    assert len(first) == len(second) == len(single) // 4 * 2
    in_turns = [index for at in range(0, len(first), 2) for index in (*first[at : at + 2], *second[at : at + 2])]
    assert in_turns == single[: len(in_turns)]


def test_validation__rows__go_to_one_process_each() -> None:
    dataset = cast(MaskDataset, range(7))
    data = MaskDataModule(dataset, dataset, batch_size=2, views=1, num_workers=0, seed=0)
    seen: Counter[int] = Counter()
    for rank in range(3):
        data.processes = Processes(rank, 3, 3)
        seen.update(cast(Any, data.val_dataloader().sampler))
    assert seen == Counter(range(7))


def plan_of(**updates: Any) -> Plan:
    """Make a plan of what `shared_plan` reads."""
    values = {"batch_size": 8, "micro_batch_size": 8, "image_cache": 100, "num_workers": 5, "views": 1, "reasons": {}}
    return Plan.model_construct(**{**values, **updates})


def test_shared_plan__two_processes__share_batch_and_machine() -> None:
    plan = shared_plan(plan_of(), Processes(1, 4, 2), rows=20, validation_rows=4)
    assert (plan.batch_size, plan.micro_batch_size, plan.image_cache, plan.num_workers) == (8, 2, 50, 2)
    assert set(plan.reasons) == {"micro_batch_size", "image_cache", "num_workers"}
    asked = plan_of(num_workers=0, micro_batch_size=1, reasons={"num_workers": "as asked"})
    assert shared_plan(asked, Processes(1, 2, 2), rows=20, validation_rows=4).num_workers == 0
    assert shared_plan(asked, ALONE, rows=1, validation_rows=1) is asked


@pytest.mark.parametrize(("rows", "validation_rows"), [(7, 4), (8, 3)])
def test_shared_plan__too_few_rows__is_refused(rows: int, validation_rows: int) -> None:
    with pytest.raises(UnsupportedCombination, match="fewer devices"):
        shared_plan(plan_of(), Processes(0, 4, 4), rows=rows, validation_rows=validation_rows)


def test_first_says__one_process__says_what_it_is_told() -> None:
    assert first_says(0.25) == 0.25


def test_parting__group_formed_within__is_left_even_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with parting():
            distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not distributed.is_initialized()


def test_previews__rows_shared_among_processes__are_the_first_ones() -> None:
    dataset: Any = type("Rows", (), {"__len__": lambda self: 11})()
    assert list(Previews(dataset, binary=True, every=3).labels) == [0, 3, 6, 9]
    assert list(Previews(dataset, binary=True).labels) == [0, 3, 7, 10]


def test_weight_keeper__network_moves__keeps_the_statistics_of_where_it_is() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1))
    plan = cast(Plan, SimpleNamespace(ema=0.0, validation_metric="iou"))
    keeper = WeightKeeper(network, plan, TrainingResult(), ExpertUsage(network), print, print)
    assert keeper.current()["0.running_mean"].dtype == torch.float32
    network.double()  # makes new buffers, as a move to another device does
    network[0].get_buffer("running_mean").fill_(3.0)
    assert keeper.current()["0.running_mean"] == torch.tensor([3.0], dtype=torch.float64)
