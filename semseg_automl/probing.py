"""The micro-batch that fits, and seconds per image, found by taking steps before training begins.

Where that would take too long, memory is counted without computing anything, and time is extrapolated from one forward
pass; where there is no time for that either, memory is what :mod:`semseg_automl.capacity` says by rule.

Not here: the steps themselves (:mod:`semseg_automl.rehearsal`), what follows for the whole fit
(:mod:`semseg_automl.forecast`), running out of memory all the same (:mod:`semseg_automl.memory`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from semseg_automl.capacity import step_bytes
from semseg_automl.memory import is_out_of_memory
from semseg_automl.models.facts import EncoderFacts
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft import trainable_parameters
from semseg_automl.plan import Plan
from semseg_automl.rehearsal import Seconds, Surroundings, Trial, counted_bytes, on_device, undisturbed
from semseg_automl.task import SegmentationTask

How = Literal["measured", "counted", "by rule"]

HEAD_ROOM = 1.3
"""What a process takes over the tensors that were counted: 1.24 times them, beside `OVERHEAD_BYTES`, for DeiT-Tiny by
``python -m benchmarks.probe`` (benchmarks/LOG.md)."""
OVERHEAD_BYTES = 64 * 2**20
"""That libraries take at their first use, whatever the number of images; 34 MiB there."""
KEPT_COPIES = 5
"""Copies of what trains, beside the weights: gradients, AdamW's two, the average, and one while they are updated."""
TIME_SHARE = 0.05
"""Of the time limit, at most, for probing."""
MAX_SECONDS = 20.0
"""For probing, at most."""
STEPS_TRIED = 9.0
"""Forward passes in the time of the steps of one and of two images."""
STEP_FORWARDS = 3.0
"""Forward passes in the time of a training step: the backward pass takes about two."""
COUNTING_SECONDS = 10.0
"""That must be left for counting without computing: about what SAM takes on one busy core."""
ROUGH_FLOPS = 5e9
"""Of a forward pass, below which it is run without asking how long it may take."""


@dataclass(frozen=True)
class Probe:
    """What a step takes.

    Attributes:
        how: ``measured`` on real steps; ``counted`` without computing; ``by rule`` where neither was possible.
        peak_bytes: that a fit holds at most, in all: of the accelerator, or of this process in RAM.
        image_seconds: of training, per image; None where nobody knows.
        frozen_seconds: of computing the frozen first blocks, per image, where later epochs skip that; else 0.
        validation_seconds: per image at the largest size; None where nobody knows.
        note: what was not done, and why; empty if everything was.
    """

    how: How
    peak_bytes: int
    image_seconds: float | None
    frozen_seconds: float
    validation_seconds: float | None
    note: str = ""


def probing_seconds(time_limit: float | None) -> float:
    """Return the seconds that probing may take.

    >>> probing_seconds(None), probing_seconds(120.0)
    (20.0, 6.0)
    """
    return MAX_SECONDS if time_limit is None else min(MAX_SECONDS, TIME_SHARE * time_limit)


def largest_that_fits(
    peak: Callable[[int], int],
    sizes: Sequence[int],
    room: int,
    *,
    has_time: Callable[[int], bool] = lambda images: True,
) -> tuple[int, int] | None:
    """Return the largest number of images whose step fits, and its bytes; None if none does.

    Bytes grow by the same amount with every image: one and two are measured, the choice is tried, and where it takes
    more than the line says, the next smaller number is.

    Args:
        peak: runs a step of so many images and returns the bytes that it needs; it may run out of memory.
        sizes: to choose from, descending.
        room: bytes.
        has_time: whether the choice of so many images is tried; otherwise the line is believed.
    """
    known: dict[int, float] = {}

    def needed(images: int) -> float:
        if images not in known:
            try:
                known[images] = peak(images)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                known[images] = math.inf
        return known[images]

    if len(sizes) == 1:
        return (sizes[0], round(needed(sizes[0]))) if needed(sizes[0]) <= room else None
    if needed(1) > room:
        return None
    slope = max(0.0, needed(2) - needed(1))
    for size in sizes:
        expected = needed(1) + (size - 1) * slope
        if expected > room:
            continue
        if size not in known and not has_time(size):
            return size, round(expected)
        if needed(size) <= room:
            return size, round(needed(size))
    return 1, round(needed(1))


def _swapped(peak: Callable[[int, bool], int], recompute: bool, images: int) -> int:
    return peak(images, recompute)


def decide(
    plan: Plan,
    peak: Callable[[int, bool], int],
    room: int,
    *,
    can_recompute: bool,
    how: str = "tried",
    has_time: Callable[[int], bool] = lambda images: True,
) -> tuple[Plan, int | None]:
    """Choose the micro-batch, and whether activations are recomputed: only where not one image fits without.

    What the settings fixed (``as asked`` in the reasons) stays.

    Args:
        plan: batch size, and the reasons.
        peak: bytes of a step of so many images, with activations recomputed or not.
        room: bytes there are.
        can_recompute: whether the encoder has blocks.
        how: the bytes were found, for the reasons.
        has_time: as for `largest_that_fits`.

    Returns:
        The plan, and the bytes of its step; None where even the smallest does not fit.
    """
    fixed = {name for name in ("micro_batch_size", "checkpointing") if plan.reasons.get(name) == "as asked"}
    sizes = [size for size in range(plan.batch_size, 0, -1) if plan.batch_size % size == 0]
    if "micro_batch_size" in fixed:
        sizes = [plan.micro_batch_size]
    options = [plan.checkpointing] if "checkpointing" in fixed else [False, True] if can_recompute else [False]
    found = None
    for recompute in options:
        found = largest_that_fits(partial(_swapped, peak, recompute), sizes, room, has_time=has_time)
        if found is not None:
            break
    micro, needed = (sizes[-1], None) if found is None else found
    there = f"of {room / 2**30:.3g} that are free for it"
    why = f"{how}: more than {there}" if needed is None else f"{how}: a step takes {needed / 2**30:.2g} GiB {there}"
    told = {
        "micro_batch_size": why,
        "checkpointing": f"{how}: not one image fits without" if recompute else f"{how}: it fits without",
    }
    reasons = plan.reasons | {name: reason for name, reason in told.items() if name not in fixed}
    return plan.model_copy(
        update={"micro_batch_size": micro, "checkpointing": recompute, "reasons": reasons}
    ), needed


def with_head_room(tensors: int) -> int:
    """Return the bytes that a step takes, from those of its tensors."""
    return round(HEAD_ROOM * tensors) + OVERHEAD_BYTES


def resting_bytes(model: SegmentationModel) -> int:
    """Return the bytes that training holds between steps beside the weights: `KEPT_COPIES` of what trains."""
    return KEPT_COPIES * sum(p.nbytes for p in trainable_parameters(model).values())


def _weight_bytes(model: SegmentationModel, *, real: bool = False) -> int:
    """Return the bytes of all weights; of those that are `real`, which takes none on ``meta``."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if not (real and t.is_meta))


def rough_forward_seconds(model: SegmentationModel, plan: Plan, device: torch.device) -> float:
    """Return about how long a forward pass of one image takes on a processor; 0 where it is short, or elsewhere.

    Two operations per weight of the encoder and token, at the speed of a matrix product here.
    """
    tokens = plan.input_size[0] * plan.input_size[1] / model.encoder.stride**2
    flops = 2 * sum(p.numel() for p in model.encoder.parameters()) * tokens
    if device.type != "cpu" or flops < ROUGH_FLOPS:
        return 0.0
    matrix = torch.zeros(768, 768)
    matrix @ matrix
    start = time.perf_counter()
    matrix @ matrix
    return flops / (2 * 768**3 / (time.perf_counter() - start))


def probe(
    model: SegmentationModel,
    plan: Plan,
    task: SegmentationTask,
    around: Surroundings,
    *,
    may_change: bool = True,
) -> tuple[Plan, Probe]:
    """Find the micro-batch that fits, and what a step takes.

    Args:
        model: the network, its fine-tuning method applied; unchanged afterwards. On ``meta`` it cannot take steps.
        plan: micro-batch and recomputing are decided anew where the settings left them open (``plan.reasons``).
        task: what the masks hold.
        around: where, and for how long.
        may_change: False for a plan that was given as a whole, and is only measured.

    Returns:
        The plan, changed where need be, and what was found.
    """
    if not may_change:
        fixed = dict.fromkeys(("micro_batch_size", "checkpointing"), "as asked")
        measured = probe(model, plan.model_copy(update={"reasons": plan.reasons | fixed}), task, around)[1]
        return plan, measured
    forward = rough_forward_seconds(model, plan, around.device)
    held = around.held()
    if not _weight_bytes(model, real=True) or forward * STEPS_TRIED > around.seconds:
        return _without_steps(model, plan, task, around, forward, held)
    try:
        with undisturbed(model), on_device(model, around.device):
            room = around.room() - resting_bytes(model)
            trial = Trial(model, plan, task, around)
            forward = trial.first_forward(room)
            if forward * STEPS_TRIED <= around.seconds:
                return _with_steps(trial, room, held)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return _without_steps(model, plan, task, around, forward, held)


def _with_steps(trial: Trial, room: int, held: int) -> tuple[Plan, Probe]:
    """Decide and time by taking steps."""
    model = trial.model
    weights = _weight_bytes(model) if trial.around.device.type == "cuda" else 0
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)  # as between two micro-batches

    deadline = time.perf_counter() + trial.around.seconds
    seconds: dict[int, Seconds] = {}

    def peak(images: int, recompute: bool) -> int:
        model.encoder.checkpointing = recompute
        tensors, seconds[images] = trial.peak(images, max(0, round((room - OVERHEAD_BYTES) / HEAD_ROOM)))
        return with_head_room(tensors)

    def has_time(images: int) -> bool:
        return images * max(each.in_all for each in seconds.values()) < deadline - time.perf_counter()

    blocks = bool(model.encoder.seams())
    plan, needed = decide(trial.plan, peak, room, can_recompute=blocks, has_time=has_time)
    total = held + weights + resting_bytes(model) + trial.around.cached_bytes + (room if needed is None else needed)
    if needed is None:
        return plan, Probe("measured", total, None, 0.0, None, "no step fits")
    images = plan.micro_batch_size
    model.encoder.checkpointing = plan.checkpointing
    # Without a meter, which takes time of its own, where there is any left.
    taken = trial.timed(images) if has_time(images) else seconds[max(n for n in seconds if n <= images)]
    return plan, Probe("measured", total, taken.training, taken.frozen, taken.validation)


def _without_steps(
    model: SegmentationModel,
    plan: Plan,
    task: SegmentationTask,
    around: Surroundings,
    forward: float,
    held: int,
) -> tuple[Plan, Probe]:
    """Decide by counting, or leave it at the rule where there is no time for that; extrapolate the seconds."""
    note = f"a step was not tried: a forward pass takes about {forward:.2g} s"
    weights = 0 if _weight_bytes(model, real=True) else _weight_bytes(model)
    rest = weights + resting_bytes(model) + around.cached_bytes
    seconds = STEP_FORWARDS * forward, 0.0, forward
    how: How = "counted"
    try:
        if around.seconds < COUNTING_SECONDS:
            raise NotImplementedError("no time to count")
        counts: dict[bool, int] = {}

        def peak(images: int, recompute: bool) -> int:
            if recompute not in counts:
                counts[recompute] = counted_bytes(model, plan.model_copy(update={"checkpointing": recompute}), task, 1)
            return with_head_room(images * counts[recompute])

        room = around.room() - weights - resting_bytes(model)
        plan, needed = decide(plan, peak, room, can_recompute=bool(model.encoder.seams()), how="counted")
        needed = room if needed is None else needed
    except NotImplementedError as error:
        how, note = "by rule", f"{note}; memory is by rule: {error}"
        encoder = model.encoder
        facts = EncoderFacts(
            plan.encoder, "timm", {}, encoder.stride, encoder.embed_dim, len(encoder.blocks), None, "as built"
        )
        each = step_bytes(facts, plan.input_size, checkpointing=plan.checkpointing)
        needed = plan.micro_batch_size * each
    return plan, Probe(how, held + rest + needed, *seconds, note)
