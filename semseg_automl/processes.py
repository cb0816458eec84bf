"""Several processes that train one network: which of them this is, what they tell one another, and how they part.

Each process runs the same script up to `fit`, under Lightning's own launcher, torchrun or SLURM. Lightning forms the
group and averages the gradients (DistributedDataParallel). Not here: which samples a process gets
(:mod:`semseg_automl.data.dataset`), and which micro-batch (:mod:`semseg_automl.memory`).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.sharing import FrozenSharing
from semseg_automl.third_party import lightning

STRATEGIES = {
    "ddp": None,
    "ddp_find_unused_parameters_true": True,
    "ddp_find_unused_parameters_false": False,
    "fsdp": None,
}
"""Names that `fit` takes: whether parameters without a gradient are looked for in every step, None for where the
network has such. Not looking for them is faster, and an error in the first step if there are any. ``fsdp`` is
:class:`semseg_automl.sharing.FrozenSharing`, not Lightning's, which would share out what trains, too."""

# Buffers are not broadcast: that happens in each forward pass, of which validation has not the same number in each
# process. The only ones that change, those of batch norms, are averaged before each validation. torch 2.13 has a new
# name for it, and warns of the old one.
_NAMES = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"

_PROBED = ("accelerator", "devices", "num_nodes", "strategy", "plugins")


@dataclass(frozen=True)
class Processes:
    """The processes that train one network together.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        on_machine: of those on this machine.
    """

    rank: int = 0
    count: int = 1
    on_machine: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.count > 1


ALONE = Processes()


def arrange(options: Mapping[str, Any]) -> tuple[Processes, dict[str, Any]]:
    """Say which of how many processes this is going to be; starts none.

    Args:
        options: of Lightning's trainer. Without ``devices``, ``num_nodes`` and ``strategy`` one device trains.

    Returns:
        The processes, and the options with the strategy, or the one device, filled in.

    Raises:
        UnsupportedCombination: the strategy is one that cannot work here; those that can are named.
        ConfigError: Lightning refuses the options, or the surroundings speak against them.
    """
    arranged = {name: value for name, value in options.items() if name not in _PROBED or value is not None}
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ConfigError(
            "torch.distributed is initialised already, by something other than fit, which forms and leaves the group "
            "of its processes itself. Call torch.distributed.destroy_process_group() before."
        )
    strategy = arranged.get("strategy", "auto")
    if not {"devices", "num_nodes"} & set(arranged) and strategy == "auto":
        _check_alone()
        return ALONE, arranged | {"devices": 1}
    processes, arranged["plugins"] = _probe(arranged)
    if processes.are_several and strategy == "auto":
        arranged["strategy"] = "ddp"
        processes, arranged["plugins"] = _probe(arranged)
    if processes.are_several and FrozenSharing.used:
        raise ConfigError(
            "these processes have trained with strategy='fsdp', after which they cannot come together again. Fit "
            "again in a new run of the script, or with strategy='ddp' throughout."
        )
    return processes, arranged


def built_strategy(asked: Any, *, some_unused: bool) -> Any:
    """Return Lightning's strategy for what was asked, new if it was asked for by name.

    Args:
        asked: a key of `STRATEGIES`, ``auto``, or a strategy.
        some_unused: whether the network has parameters that train and get no gradient.

    Raises:
        UnsupportedCombination: it cannot work with `fit`.
    """
    known = lightning.pytorch.strategies
    if asked == "auto" or isinstance(asked, known.SingleDeviceStrategy):
        return asked
    if isinstance(asked, str) and asked in STRATEGIES:
        search = STRATEGIES[asked]
        buffers: dict[str, Any] = {_BUFFERS: False}
        kind = FrozenSharing if asked == "fsdp" else known.DDPStrategy
        return kind(find_unused_parameters=some_unused if search is None else search, **buffers)
    if type(asked) is known.DDPStrategy and asked._start_method == "popen":
        given = asked._ddp_kwargs
        if any(given.get(name) for name in (_BUFFERS, "broadcast_buffers")):
            raise UnsupportedCombination(
                "strategy is a DDPStrategy that broadcasts buffers, under which validation can hang. Leave that option "
                "out."
            )
        if "broadcast_buffers" not in given:
            given[_BUFFERS] = False
        return asked
    name = asked if isinstance(asked, str) else getattr(asked, "_start_method", type(asked).__name__)
    why = "what trains must be whole in each process, for averaged weights and the saved folder"
    if any(word in str(name) for word in ("spawn", "fork", "notebook")):
        why = "a forked or spawned process ends with training and cannot hand the fitted segmentor back"
    elif isinstance(asked, str) and asked not in known.StrategyRegistry:
        why = "Lightning has no strategy of that name"
    raise UnsupportedCombination(
        f"strategy is {asked!r}, but {why}. Allowed: {', '.join(STRATEGIES)}, a DDPStrategy, with the code as a "
        "script that each process runs; or leave out strategy, devices and num_nodes for one device."
    )


def _probe(options: Mapping[str, Any]) -> tuple[Processes, list[Any]]:
    """Ask a trainer that never trains what Lightning makes of the options and of the environment's variables.

    Returns:
        The processes, and the plugins; under SLURM with one more, against the requeueing that writes files of its own.

    Raises:
        ConfigError: Lightning refuses, or its launcher has no script to start.
    """
    plugins = options.get("plugins", [])
    plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    environments: Any = lightning.fabric.plugins.environments  # which exports nothing by name
    given = [plugin for plugin in plugins if isinstance(plugin, environments.ClusterEnvironment)]
    torchrun = environments.TorchElasticEnvironment.detect()
    if not given and not torchrun and environments.SLURMEnvironment.detect():
        plugins.append(environments.SLURMEnvironment(auto_requeue=False))
    # Copied: a trainer writes into its strategy, which another one then refuses.
    asked = {name: copy.copy(options[name]) for name in _PROBED if name in options} | {"plugins": plugins}
    asked["strategy"] = built_strategy(asked.get("strategy", "auto"), some_unused=False)
    silent = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    quiet: dict[str, Any] = dict.fromkeys(silent, False)
    refusals = (lightning.fabric.utilities.exceptions.MisconfigurationException, ValueError, TypeError, RuntimeError)
    try:
        trainer = lightning.Trainer(**asked, **quiet)
        count = int(trainer.world_size)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if count > 1 and environment is not None:
            environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except refusals as error:
        raise ConfigError(
            f"Lightning does not take these arguments of fit: {error} Check accelerator, devices, num_nodes, strategy, "
            "and how the script was started."
        ) from error
    outside = environment is not None and environment.creates_processes_externally
    if trainer.num_devices > 1 and not outside and not _is_script():
        raise ConfigError(
            f"devices={trainer.num_devices} starts the running script again, once per device, but no script is "
            "running. Put the code into a file, and run that; in a notebook or shell, use devices=1."
        )
    return Processes(int(trainer.global_rank), count, int(trainer.num_devices)), plugins


def _is_script() -> bool:
    """Whether what runs can be started again: a file, or a module (``python -m``)."""
    main = sys.modules.get("__main__")
    return getattr(main, "__spec__", None) is not None or Path(sys.argv[0]).is_file()


def _check_alone() -> None:
    """Refuse to train alone by default where a launcher started several processes: each would write the same folder.

    Raises:
        ConfigError: it did.
    """
    count = int(os.environ.get("WORLD_SIZE", 1)) if distributed.is_torchelastic_launched() else 1
    if count > 1 or os.environ.get("LOCAL_RANK", "0") != "0":
        raise ConfigError(
            "this is one of several processes of the same script, but fit was not told how they train. Use fit(devices="
            "<processes on a machine>, num_nodes=<machines>, strategy='ddp') to train one network together, or devices"
            "=1 to fit in each process by itself, each with its own path."
        )


def divided_micro_batch(batch_size: int, micro_batch_size: int, count: int) -> int:
    """Return the largest micro-batch, at most the one given, with which `count` processes make up the batch exactly.

    Args:
        batch_size: images per optimizer step, of all processes together.
        micro_batch_size: images per forward pass of one process.
        count: of processes.

    Raises:
        UnsupportedCombination: the batch cannot be divided among them.

    >>> divided_micro_batch(8, 8, 2), divided_micro_batch(12, 4, 2), divided_micro_batch(12, 5, 1)
    (4, 3, 4)
    """
    share, rest = divmod(batch_size, count)
    if rest:
        near = [size for size in (batch_size - rest, batch_size - rest + count) if size]
        fitting = [number for number in range(1, batch_size + 1) if batch_size % number == 0]
        raise UnsupportedCombination(
            f"a batch of {batch_size} images cannot be divided among {count} processes. Set env.batch_size="
            f"{' or '.join(map(str, near))}, or train with {', '.join(map(str, fitting))} processes."
        )
    return next(size for size in range(min(micro_batch_size, share), 0, -1) if share % size == 0)


def in_group() -> bool:
    """Whether this process trains with others now."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _device() -> torch.device:
    """Where numbers have to lie for the group to exchange them."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def first_says(value: float) -> float:
    """Return the first process's value in all of them, which must all call this."""
    if not in_group():
        return value
    told = torch.tensor([value], dtype=torch.float64, device=_device())
    distributed.broadcast(told, 0)
    return float(told)


def summed(numbers: Tensor) -> Tensor:
    """Return the sum over all processes, which must all call this; on the device of `numbers`."""
    if not in_group():
        return numbers
    total = numbers.detach().clone().to(_device())
    distributed.all_reduce(total)
    return total.to(numbers.device)


class Agreement(lightning.Callback):
    """Refuses to train when the processes were not given the same.

    Args:
        facts: what has to be the same, by what to call it.
    """

    def __init__(self, facts: Mapping[str, str]) -> None:
        self.facts = dict(facts)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compare, once the group is formed.

        Raises:
            ConfigError: something differs; it is named.
        """
        if not in_group():
            return
        # Seven bytes of a hash each: they fit into an integer with a sign.
        hashes = [hashlib.sha256(fact.encode()).digest()[:7] for fact in self.facts.values()]
        own = torch.tensor([int.from_bytes(each) for each in hashes], device=_device())
        everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everyone, own)
        differing = {
            name: [rank for rank, theirs in enumerate(everyone) if theirs[place] != everyone[0][place]]
            for place, name in enumerate(self.facts)
        }
        told = [f"{name} (process {', '.join(map(str, ranks))})" for name, ranks in differing.items() if ranks]
        if told:
            raise ConfigError(
                f"the processes were not given the same as process 0: {'; '.join(told)}. Run the same script with the "
                "same arguments on the same files in each, and fix the seed of anything random before fit."
            )


def meet() -> None:
    """Wait until all processes are here."""
    if not in_group():
        return
    device = _device()
    distributed.barrier(device_ids=None if device.type == "cpu" else [device.index])


@contextmanager
def parting() -> Iterator[None]:
    """Leave the group that is formed within; afterwards each process is on its own again, its metrics too."""
    before = distributed.is_available() and distributed.is_initialized()
    try:
        yield
    finally:
        if not before and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def fair_share(amount: int, processes: Processes) -> int:
    """Return what one process may take of what its machine has, at least 1 of anything.

    >>> fair_share(8, Processes(0, 4, 4)), fair_share(3, Processes(0, 4, 4)), fair_share(0, Processes(0, 4, 4))
    (2, 1, 0)
    """
    return max(1, amount // processes.on_machine) if amount else 0
