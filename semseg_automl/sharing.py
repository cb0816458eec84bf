"""Frozen weights shared out among the processes that train one network: Lightning's strategy ``fsdp`` here.

Of a frozen ViT-H each process holds its part, and gathers a block's weights when it runs that block (FSDP, Zhao et al.,
VLDB 2023, arXiv 2304.11277, as PyTorch's ``fully_shard``). What trains is small and stays whole everywhere: its
gradients are averaged as with ``ddp``, so that averaged weights, states to go on with and the saved folder are what
they are there. Not here: how the processes come to be (:mod:`semseg_automl.processes`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from semseg_automl.errors import UnsupportedCombination
from semseg_automl.third_party import lightning


class SharedBlock:
    """A block of an encoder whose frozen weights are shared out, in place, and what it is to become again.

    Args:
        block: on the processor, before anything of it was moved to a device.
        mesh: of the processes.
    """

    def __init__(self, block: nn.Module, mesh: DeviceMesh) -> None:
        kept: dict[int, Any] = {}
        for tensor in [*block.parameters(), *block.buffers()]:
            frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            # The same memory, but a tensor of its own, which stays where it is when the block goes to a device.
            kept[id(tensor)] = nn.Parameter(tensor.data, requires_grad=False) if frozen else tensor
        self.whole = copy.deepcopy(block, kept)
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        self.frozen = {name: p for name, p in self.whole.named_parameters() if not p.requires_grad}
        # Told to: a block by itself would count as the outermost module, which keeps its weights after a forward pass.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        # A partial, since torch puts a mark on it, which a method would not take.
        block.register_state_dict_post_hook(functools.partial(self._tell_whole))
        self.shared: Any = block  # an `FSDPModule` now, too

    def _tell_whole(self, _: nn.Module, state: dict[str, Tensor], prefix: str, __: Mapping[str, Any]) -> None:
        """Let a state dict have the frozen weights whole, for the folder that is saved."""
        state.update({f"{prefix}{name}": weight.data for name, weight in self.frozen.items()})

    def pass_by(self) -> None:
        """Lend this process's part to the others, without running the block."""
        self.shared.unshard()
        self.shared.reshard()

    def restored(self) -> nn.Module:
        """Return the block as it was, with what has been trained since."""
        trained = dict(self.shared.named_buffers())
        for name, buffer in self.whole.named_buffers():
            buffer.copy_(trained[name])
        return self.whole


class FrozenSharing(lightning.pytorch.strategies.DDPStrategy):
    """``ddp`` in which the frozen weights of the encoder's blocks are shared out until training is over.

    Each process keeps a copy in its main memory, for the files it writes and for the time after training; what is
    saved is the memory of the devices.

    Attributes:
        used: whether this process has trained so. PyTorch cannot undo `fully_shard`: what it made keeps the group of
            processes, and with it the address, so that these processes cannot form another one.
    """

    used = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.blocks: list[SharedBlock] = []

    def model_to_device(self) -> None:
        """Share the blocks out one by one, then move what is left, so that no device ever holds all."""
        module: Any = self.lightning_module
        if self.world_size > 1:
            encoder = module.model.encoder
            FrozenSharing.used = True
            mesh = init_device_mesh(self.root_device.type, (self.world_size,))
            self.blocks = [SharedBlock(block, mesh) for block in encoder.blocks]
            names = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
        super().model_to_device()

    def teardown(self) -> None:
        """Make the network whole again, on the processor, as Lightning leaves it."""
        module: Any = self.lightning_module
        if self.blocks:
            blocks = module.model.encoder.blocks
            for place, shared in enumerate(self.blocks):
                blocks[place] = shared.restored()
            self.blocks = []
            module._ddp_params_and_buffers_to_ignore = []
        super().teardown()


class Company(lightning.Callback):
    """Keeps a process that has no validation batch left at the disposal of the others, which still need its part.

    Args:
        encoder: whose blocks are shared out.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.hook: Any = None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell the others of each pass from now on."""
        if _shared_blocks(trainer):
            self.hook = self.encoder.blocks[0].register_forward_pre_hook(self._announce, prepend=True)

    def _announce(self, *_: Any) -> None:
        _count_running(self.encoder.blocks[0], True)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Go through the blocks with the others until none has a batch left."""
        if self.hook is None:
            return
        self.hook.remove()
        self.hook = None
        while _count_running(self.encoder.blocks[0], False):
            for block in _shared_blocks(trainer):
                block.pass_by()


def companions(settings: Mapping[str, Any], encoder: Any, *, cached: bool) -> list[lightning.Callback]:
    """Return the callbacks that a trainer of these settings needs besides, which must come first.

    Args:
        settings: of the trainer.
        encoder: its fine-tuning method applied.
        cached: the plan keeps the features of frozen first blocks.

    Raises:
        UnsupportedCombination: the settings share out weights, and those of this encoder cannot be.
    """
    if not isinstance(settings.get("strategy"), FrozenSharing):
        return []
    _check_shareable(encoder, cached=cached and encoder.frozen_stage() > 0)
    return [Company(encoder)]


def _shared_blocks(trainer: lightning.Trainer) -> list[SharedBlock]:
    """Return the blocks that are shared out now."""
    return trainer.strategy.blocks if isinstance(trainer.strategy, FrozenSharing) else []


def _count_running(block: nn.Module, runs: bool) -> int:
    """Return how many processes are about to run a forward pass; all must call this."""
    device = next(block.parameters()).device
    count = torch.tensor(int(runs), device=device)
    distributed.all_reduce(count)
    return int(count)


def _check_shareable(encoder: Any, *, cached: bool) -> None:
    """Refuse encoders of which no frozen weights can be shared out block by block.

    Args:
        encoder: its fine-tuning method applied.
        cached: features are computed once per image, at times that differ from process to process.

    Raises:
        UnsupportedCombination: it is one.
    """
    frozen = sum(p.numel() for p in encoder.blocks.parameters() if not p.requires_grad)
    if not frozen:
        what = "has no transformer blocks" if not len(encoder.blocks) else "trains in all of its blocks"
        raise UnsupportedCombination(
            f"strategy 'fsdp' shares out the frozen weights of transformer blocks, but this encoder {what}. Use "
            "strategy='ddp'."
        )
    if cached:
        raise UnsupportedCombination(
            "strategy 'fsdp' needs all processes in each block at the same time, but the plan computes features once "
            "per image. Set env.feature_cache='off', or use strategy='ddp'."
        )
