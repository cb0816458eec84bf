"""Steps taken to see what they take: a training step and a validation step that leave no trace.

They run on the largest shapes that a fit will see. Weights, statistics, gradients, modes, what layers noted of their
last pass, and torch's random state are as they were afterwards. What follows is :mod:`semseg_automl.probing`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.func import functional_call

from semseg_automl.data.transforms import Geometry
from semseg_automl.hardware import Hardware
from semseg_automl.losses import CRITERIA
from semseg_automl.meters import CudaMeter, TensorMeter, resident_bytes
from semseg_automl.metrics import build_metrics
from semseg_automl.models.layers import running_statistics
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels, semantic_scores
from semseg_automl.plan import Plan
from semseg_automl.task import SegmentationTask
from semseg_automl.tiling import join, tile_grid

Size = tuple[int, int]
MEMORY_SHARE = 0.9
"""Of the machine's memory that a fit may take in all; the rest is for what nobody thought of."""
UNCOUNTABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What torch raises where an operation needs values, or is not known to work without."""
CHEAP = 0.1
"""Share of the time for probing that a second look may take."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Surroundings:
    """Where and for how long is probed.

    Attributes:
        device: that trains.
        hardware: the machine.
        largest: height and width of the largest image, in pixels.
        cached_bytes: that caches will take beside the steps, of RAM.
        seconds: for probing, at most.
    """

    device: torch.device
    hardware: Hardware
    largest: Size
    cached_bytes: int
    seconds: float

    def held(self) -> int:
        """Return the bytes that are taken already."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return resident_bytes() or 0

    def room(self) -> int:
        """Return the bytes that a fit may still take: a share of the machine's, and never more than is free."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            return min(free, round(MEMORY_SHARE * total))
        share = round(MEMORY_SHARE * self.hardware.memory) - self.held()
        return max(0, min(share, self.hardware.host_free) - self.cached_bytes)


class _Step(nn.Module):
    """One training step without its optimizer, as a module, so that `functional_call` can run it on other tensors."""

    def __init__(self, model: SegmentationModel, plan: Plan, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.criterion = CRITERIA[plan.loss]
        self.stage = 0 if plan.feature_cache == "off" else model.encoder.frozen_stage()
        self.autocast = autocast(plan, device)
        self.frozen_seconds = 0.0

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Run forward and backward on ``images (B, 3, H, W)`` and ``mask (B, H, W)``; return the loss."""
        with self.autocast:
            if self.stage:
                start = time.perf_counter()
                with torch.no_grad():
                    state = self.model.begin(images, self.stage)
                _wait(images.device)
                self.frozen_seconds = time.perf_counter() - start
                output = self.model.finish(state, self.stage, images)
            else:
                output = self.model(images)
            loss = self.criterion(output, mask) + self.model.aux_loss().to(mask.device)
        loss.backward()
        return loss.detach()


class Seconds(NamedTuple):
    """What one image takes."""

    training: float
    """Without the frozen part."""
    frozen: float
    """Of the first blocks, where their features are cached; else 0."""
    validation: float

    @property
    def in_all(self) -> float:
        """All of it."""
        return sum(self)


@dataclass
class Trial:
    """Steps of a network that is not to be changed."""

    model: SegmentationModel
    plan: Plan
    task: SegmentationTask
    around: Surroundings

    def __post_init__(self) -> None:
        self.step = _Step(self.model, self.plan, self.around.device)
        self.forward_seconds = 0.0
        tile = self.plan.tile
        self.grid = None if tile is None else tile_grid(self.around.largest, tile)
        name = self.plan.validation_metric
        metrics = build_metrics([name], kind=self.task.kind, num_classes=self.task.num_classes)
        self.metric = metrics[name].to(self.around.device)

    def batch(self, images: int) -> tuple[Tensor, Tensor]:
        """Return ``images (B, 3, H, W)`` and masks ``(B, H, W)`` that hold every class: the dearest for a loss."""
        height, width = self.plan.input_size
        pixels = torch.full((images, 3, height, width), 127, dtype=torch.uint8, device=self.around.device)
        stripes = torch.arange(height * width, device=self.around.device) * self.task.num_classes // (height * width)
        return pixels, stripes.view(1, height, width).expand(images, -1, -1).contiguous()

    def train(self, images: int) -> float:
        """Take a training step and return its seconds, without those of the frozen part."""
        batch = self.batch(images)
        start = time.perf_counter()
        self.step(*batch)
        _wait(self.around.device)
        return time.perf_counter() - start - self.step.frozen_seconds

    @torch.no_grad()
    def validate(self, images: int) -> float:
        """Validate on images of the largest size and return the seconds."""
        pixels, _ = self.batch(images)
        start = time.perf_counter()
        with _in_evaluation(self.model), self.step.autocast:
            scores = semantic_scores(self.model(pixels), self.plan.input_size)
            _wait(self.around.device)
            self.forward_seconds = time.perf_counter() - start
            for native in self._native(scores):
                labels = hard_labels(native)
                self.metric.update(native, labels, labels)
        self.metric.reset()
        _wait(self.around.device)
        return time.perf_counter() - start

    def _native(self, scores: Tensor) -> Iterator[Tensor]:
        """Yield scores ``(C, H, W)`` at the largest image's own size; tiles are blended into one."""
        if self.grid is None:
            geometry = Geometry(self.around.largest, self.plan.input_size)
            yield from (geometry.undo(each) for each in scores)
            return
        geometry = Geometry(self.grid.tile, self.plan.input_size)
        yield join(self.grid, (geometry.undo(scores[i % len(scores)]) for i in range(len(self.grid))))

    def first_forward(self, limit: int) -> float:
        """Validate on one image within a limit, twice where that is cheap: the first time takes longer."""
        with self._meter(limit):
            first = self.validate(1)
        return first if first > CHEAP * self.around.seconds else self.validate(1)

    def peak(self, images: int, limit: int | None = None) -> tuple[int, Seconds]:
        """Take both steps of so many images: the bytes of their tensors at most above what was there, and the time.

        Raises:
            torch.OutOfMemoryError: they take more than the limit, or than there is.
        """
        training, validation = self._meter(limit), self._meter(limit)
        with training:
            trained = self.train(images)
        with validation:
            validated = self.validate(images)
        return max(training.peak, validation.peak), self._per_image(images, trained, validated)

    def timed(self, images: int) -> Seconds:
        """Take both steps without a meter."""
        return self._per_image(images, self.train(images), self.validate(images))

    def _per_image(self, images: int, training: float, validation: float) -> Seconds:
        frozen = self.step.frozen_seconds / images
        if self.grid is None:
            return Seconds(training / images, frozen, validation / images)
        rest = validation - self.forward_seconds  # of all tiles of one image; the network has seen some of them
        return Seconds(training / images, frozen, self.forward_seconds * len(self.grid) / images + rest)

    def _meter(self, limit: int | None) -> TensorMeter | CudaMeter:
        if self.around.device.type == "cuda":
            return CudaMeter(self.around.device)
        grads = (p.grad for p in self.model.parameters() if p.grad is not None)
        return TensorMeter(limit, [*self.model.parameters(), *self.model.buffers(), *grads])


def counted_bytes(model: SegmentationModel, plan: Plan, task: SegmentationTask, images: int) -> int:
    """Count the bytes of a training step's tensors, weights left out, without computing anything.

    The same operations run on tensors without content (torch's fake tensors), as on a processor.

    Args:
        model: any device, ``meta`` too; nothing of it changes but what its layers note of their last pass.
        plan: loss, input size, number format, recomputed activations.
        task: says which classes there are.
        images: of the step.

    Raises:
        NotImplementedError: the loss depends on values that are not there.
    """
    device = torch.device("cpu")
    around = Surroundings(device, Hardware("cpu", "none", 0, 1, bf16=False), plan.input_size, 0, 0.0)
    trial = Trial(model, plan, task, around)
    with undisturbed(model), FakeTensorMode(allow_non_fake_inputs=True):
        model.encoder.checkpointing = plan.checkpointing
        weights = {
            name: torch.empty(t.shape, dtype=t.dtype, device=device).requires_grad_(t.requires_grad)
            for name, t in [*trial.step.named_parameters(), *trial.step.named_buffers()]
        }
        for weight in weights.values():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        known = [*weights.values(), *(w.grad for w in weights.values() if w.grad is not None)]
        meter = TensorMeter(known=known)
        with meter:
            try:
                functional_call(trial.step, weights, trial.batch(images))
            except UNCOUNTABLE as error:
                raise NotImplementedError(f"{plan.loss} cannot be counted without values") from error
    return meter.peak


@contextmanager
def undisturbed(model: SegmentationModel) -> Iterator[None]:
    """Give the network back as it was: modes, statistics, gradients, what layers noted; and torch's random state."""
    noted = [(module, dict(vars(module))) for module in model.modules()]
    statistics = {name: buffer.clone() for name, buffer in running_statistics(model).items()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, attributes in noted:
            vars(module).clear()
            vars(module).update(attributes)
        for name, buffer in running_statistics(model).items():
            buffer.copy_(statistics[name])
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def on_device(model: SegmentationModel, device: torch.device) -> Iterator[None]:
    """Bring the network to a device and back."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put every layer into evaluation mode, and back each into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def autocast(plan: Plan, device: torch.device) -> torch.autocast:
    """Return the context of the plan's number format, as Lightning makes it."""
    dtype = AUTOCAST.get(plan.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
