"""What to do when memory runs out in the middle of training: the same batch in smaller pieces.

The effective batch stays as it was, so that what is learned stays the same, up to rounding and to what a method
computes over a micro-batch (the balancing loss and the noise of Conv-LoRA's experts).
"""

from __future__ import annotations

import torch

from semseg_automl.plan import Plan

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
