"""A slice of a training: ended after some seconds, in a state that a later fit goes on from as if nothing had been.

How states are kept and found again: :mod:`semseg_automl.resume`. Who shares the time out: :mod:`semseg_automl.race`.
"""

from __future__ import annotations

import math
import time
from typing import Any

from semseg_automl.resume import StateKeeper
from semseg_automl.third_party import lightning


class Slice(lightning.Callback):
    """Ends training after some seconds or steps such that a later fit goes on from exactly there.

    The weights are validated first, and what that found belongs to the state. Must come last of the callbacks.

    Args:
        states: saves the state.
        seconds: of training, after which the next optimizer step ends the slice; None for any.
        steps: of the optimizer, after which it ends; None for any.

    Attributes:
        over: whether the slice ended, and not the training.
    """

    def __init__(self, states: StateKeeper, *, seconds: float | None = None, steps: int | None = None) -> None:
        self.states = states
        self.seconds = math.inf if seconds is None else seconds
        self.steps = math.inf if steps is None else steps
        self.over = False
        self._batches: int | None = None
        self._trained = False
        self._start, self._first = time.monotonic(), 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock, and count steps from here."""
        self._start, self._first = time.monotonic(), trainer.global_step

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        long = time.monotonic() - self._start >= self.seconds or trainer.global_step - self._first >= self.steps
        return self._trained and not self.over and long

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End a slice whose time ran out with an epoch: this batch is trained on, and will be again."""
        if batch_idx == 0 and self._is_due(trainer):
            self.states.save(trainer, 0)
            self.over = trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the slice behind an optimizer step; after the last one of an epoch Lightning counts the epoch first."""
        self._trained = True
        batches = batch_idx + 1
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self._is_due(trainer) and not last and batches % trainer.accumulate_grad_batches == 0:
            self._batches = batches
            self.over = trainer.should_stop = True

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save, now that the others have taken the validation in."""
        if self._batches is not None:
            self.states.save(trainer, self._batches)
