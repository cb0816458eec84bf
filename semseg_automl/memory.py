"""The same batch in smaller pieces: when memory runs out in the middle of training, and for several processes.

The effective batch stays as it was, so that what is learned stays the same, up to rounding and to what a method
computes over a micro-batch (the balancing loss and the noise of Conv-LoRA's experts).
"""

from __future__ import annotations

import torch

from semseg_automl.errors import UnsupportedCombination
from semseg_automl.plan import Plan
from semseg_automl.processes import Processes, divided_micro_batch, fair_share

_TOLD = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's allocators of accelerators, of Linux and of Windows say, where they have no exception of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch could not allocate a tensor.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD)


def smaller(plan: Plan, *, can_recompute: bool) -> Plan | None:
    """Return the plan with half the micro-batch or, at one image, recomputed activations; None where neither helps.

    Args:
        plan: what did not fit.
        can_recompute: whether the encoder has blocks whose activations can be computed again.
    """
    micro = plan.micro_batch_size
    if micro > 1:
        half = next(size for size in range(micro // 2, 0, -1) if plan.batch_size % size == 0)
        changed: dict[str, int | bool] = {"micro_batch_size": half}
    elif can_recompute and not plan.checkpointing:
        changed = {"checkpointing": True}
    else:
        return None
    reasons = plan.reasons | dict.fromkeys(changed, "memory ran out while training")
    return plan.model_copy(update={**changed, "reasons": reasons})


def begun_with(plan: Plan, micro_batch_size: int) -> Plan:
    """Return the plan with the micro-batch that a fit was begun with, which rounds alike, unless another was asked for.

    Args:
        plan: of the fit that goes on.
        micro_batch_size: of its state.
    """
    name = "micro_batch_size"
    same = plan.micro_batch_size == micro_batch_size
    if same or plan.reasons.get(name) == "as asked" or plan.batch_size % micro_batch_size:
        return plan
    reasons = plan.reasons | {name: "the fit was begun with it"}
    return plan.model_copy(update={name: micro_batch_size, "reasons": reasons})


def shared_plan(plan: Plan, processes: Processes, *, rows: int, validation_rows: int) -> Plan:
    """Return the plan as each of several processes carries it out: together they take the batch it names.

    Args:
        plan: made for one process.
        processes: that train together.
        rows: of training.
        validation_rows: of validation.

    Raises:
        UnsupportedCombination: the batch, or the rows, cannot be divided among them.
    """
    count = processes.count
    if count == 1:
        return plan
    micro = divided_micro_batch(plan.batch_size, plan.micro_batch_size, count)
    if validation_rows < count or rows * plan.views < micro * count:
        raise UnsupportedCombination(
            f"{count} processes cannot share {rows * plan.views} training samples an epoch, of which each takes "
            f"{micro} at a time, and {validation_rows} validation rows. Use fewer devices, or give more rows."
        )
    changed = {"micro_batch_size": micro, "image_cache": fair_share(plan.image_cache, processes)}
    if plan.reasons.get("num_workers") != "as asked":
        changed["num_workers"] = fair_share(plan.num_workers, processes)
    changed = {name: value for name, value in changed.items() if value != getattr(plan, name)}
    told = dict.fromkeys(changed, f"{count} processes, {processes.on_machine} of them on a machine")
    return plan.model_copy(update={**changed, "reasons": plan.reasons | told})
