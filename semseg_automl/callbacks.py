"""What happens around the training steps: schedule and clock, averaged weights, expert usage, and what is kept.

Nothing here knows a loss or a batch: the callbacks see the trainer, the plan and the network's parameters. Which
callbacks a training has, and in what order, is `training`'s to say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from semseg_automl.errors import TrainingError
from semseg_automl.models.layers import running_statistics
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.usage import ExpertCounter
from semseg_automl.plan import Plan
from semseg_automl.processes import first_says, in_group, summed
from semseg_automl.soup import Ingredient, Weights, greedy_soup, keep_best
from semseg_automl.third_party import lightning


@dataclass
class TrainingResult:
    """What a training run leaves.

    Attributes:
        history: one entry per validation: epoch, step, seconds, train_loss, lr, and the validation metric by name.
        best_score: the best validation score, that of a soup if there is one; NaN if none was reached.
        best_epoch: the epoch it was reached in, -1 if none was.
        stopped_by: ``max_epochs``, ``patience``, ``time_limit``, ``interrupt`` or, of a part, ``slice``.
        expert_usage: validation images (windows, where a layer sees each alone) that each expert got in the best
            epoch, by layer; empty without experts, or before a validation.
        validation_seconds: that the last validation took.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_score: float = math.nan
    best_epoch: int = -1
    stopped_by: str = "max_epochs"
    expert_usage: dict[str, list[int]] = field(default_factory=dict)
    validation_seconds: float = 0.0


def learning_rate_factor(progress: float, *, warmup: float, schedule: str) -> float:
    """Return the learning rate's share of its peak at `progress`, 0 to 1, through training.

    >>> [round(learning_rate_factor(p, warmup=0.1, schedule="cosine"), 3) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    rest = min(1.0, (progress - warmup) / (1 - warmup))
    return 1 - rest if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * rest))


class Clock(lightning.Callback):
    """Lets the learning rate follow progress through training, and ends training when the time is up.

    Progress is the share of the steps or, under a time limit, of the time, whichever is further. The last
    validation and the saving have to fit into the limit too; the time they need is kept back.

    Args:
        plan: peak learning rate and schedule. A parameter group's own peak is ``lr_ratio`` times it.
        deadline: `time.monotonic` seconds at which everything must be done, or None.
        stands: a fit that is gone on with has until then; otherwise what it took before counts, as if it had begun
            earlier by as much.
    """

    def __init__(self, plan: Plan, deadline: float | None, *, stands: bool = False) -> None:
        self.plan = plan
        self.deadline = deadline
        self.stands = stands
        self.start = time.monotonic()
        self.reserve = 0.1 * (deadline - self.start) if deadline is not None else 0.0
        self.validation_start = self.start
        self.out_of_time = False
        self.before = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return how long training took so far, for a fit that is gone on with."""
        return {"seconds": time.monotonic() - self.start, "reserve": self.reserve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count from where the fit was."""
        self.before, self.reserve = state_dict["seconds"], state_dict["reserve"]
        if self.deadline is not None and not self.stands:
            self.deadline -= self.before

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.start = time.monotonic() - self.before

    def progress(self, trainer: lightning.Trainer) -> float:
        """Return the share of training that is over, 0 to 1; several processes go by the first one's clock."""
        done = trainer.global_step / max(1.0, trainer.estimated_stepping_batches)
        if self.deadline is None:
            return done
        available = max(1e-3, self.deadline - self.reserve - self.start)
        return first_says(max(done, (time.monotonic() - self.start) / available))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate of the coming step; never quite zero, so that the first step moves."""
        factor = learning_rate_factor(
            self.progress(trainer) + 1e-3, warmup=self.plan.warmup, schedule=self.plan.schedule
        )
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.plan.lr * factor * group["lr_ratio"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when the time is up; Lightning then validates once more."""
        if self.deadline is not None and self.progress(trainer) >= 1:
            self.out_of_time = True
            trainer.should_stop = True

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Time the validation."""
        self.validation_start = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep back as much time as this validation took, half as much again, and a second for saving.

        A soup is validated once for each further ingredient.
        """
        validations = 1.5 + (self.plan.soup - 1)
        self.reserve = validations * (time.monotonic() - self.validation_start) + 1.0


class ExpertUsage(lightning.Callback):
    """Counts, over each validation, which experts the Conv-LoRA layers chose.

    What each layer noted of its last forward pass is read once per batch. So what runs a layer again, or not at all
    (recomputed activations, a cache of features), changes no count.

    Args:
        model: the network; without Conv-LoRA layers there is nothing to count.

    Attributes:
        latest: choices per layer and expert of the last complete validation, by the layer's name in `model`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counter = ExpertCounter(model)
        self.latest: dict[str, list[int]] = {}

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count from zero."""
        self.counter.reset()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch's choices, on the device."""
        self.counter.add()

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Bring the counts of all processes to the host, once; `WeightKeeper` wants them right after."""
        self.latest = {name: summed(torch.tensor(own)).tolist() for name, own in self.counter.counts().items()}


class WeightKeeper(lightning.Callback):
    """Averages the trainable weights over steps, validates the average, and keeps the best of them.

    The running mean decays by ``plan.ema``, faster in the first steps, and lives beside the weights that are
    optimised; they change places for each validation.

    Args:
        model: the network whose trainable weights are kept.
        plan: decay and validation metric.
        result: filled in with history, best score and its expert usage.
        usage: what the experts got in the validation that has just ended.
        on_best: called with the weights when they are the best so far.
        on_epoch: called with an epoch's entry of the history when it is complete.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        result: TrainingResult,
        usage: ExpertUsage,
        on_best: Callable[[Weights], None],
        on_epoch: Callable[[dict[str, float]], None],
    ) -> None:
        self.model = model
        self.parameters = trainable_parameters(model)
        self.plan = plan
        self.result = result
        self.usage = usage
        self.on_best = on_best
        self.on_epoch = on_epoch
        self.average = [p.detach().clone() for p in self.parameters.values()]
        self.average_in_place = False
        self.best: Weights | None = None
        self.top: list[Ingredient] = []
        self.steps = 0
        self.started = self.validation_start = time.monotonic()

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What batch norms count. Looked up: unlike parameters, buffers are other tensors on another device."""
        return running_statistics(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return averages, best weights and history, for a fit that is gone on with."""
        return {
            "average": self.average,
            "best": self.best,
            "top": [(each.score, each.epoch, each.weights) for each in self.top],
            "steps": self.steps,
            "seconds": time.monotonic() - self.started,
            "result": asdict(self.result),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.average, self.best, self.steps = state_dict["average"], state_dict["best"], state_dict["steps"]
        self.top = [Ingredient(*each) for each in state_dict["top"]]
        self.started = time.monotonic() - state_dict["seconds"]
        for name, value in state_dict["result"].items():
            setattr(self.result, name, value)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Average on the device that trains."""
        start = self.average if self.steps else self.parameters.values()
        devices = [p.device for p in self.parameters.values()]
        self.average = [p.detach().clone().to(device) for p, device in zip(start, devices, strict=True)]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a finished optimizer step into the average."""
        if trainer.global_step == self.steps:
            return  # gradients were only accumulated
        self.steps = trainer.global_step
        decay = min(self.plan.ema, (1 + self.steps) / (10 + self.steps)) if self.plan.ema else 0.0
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters.values()], 1 - decay)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average in place; of statistics, that of all processes, each of which counted its own images."""
        self.validation_start = time.monotonic()
        self._swap()
        for counted in self.statistics.values():
            if in_group() and counted.is_floating_point():
                counted.copy_(summed(counted) / trainer.world_size)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the epoch, keep the weights if they are the best so far, and put the optimised ones back."""
        self.result.validation_seconds = round(time.monotonic() - self.validation_start, 3)
        score = float(trainer.callback_metrics[self.plan.validation_metric])
        higher = bool(getattr(pl_module, "metric").higher_is_better)  # noqa: B009
        group = trainer.optimizers[0].param_groups[0]
        self.result.history.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "seconds": round(time.monotonic() - self.started, 2),
                "lr": float(group["lr"] / group["lr_ratio"]),
                self.plan.validation_metric: score,
            }
        )
        if self.plan.soup > 1:
            new = Ingredient(score, trainer.current_epoch, self.current())
            self.top = keep_best(self.top, new, most=self.plan.soup, higher_is_better=higher)
        best = self.result.best_score
        if self.best is None or math.isnan(best) or (score > best if higher else score < best):
            self.best = self.current()
            self.result.best_score, self.result.best_epoch = score, trainer.current_epoch
            self.result.expert_usage = self.usage.latest
            self.on_best(self.best)
        self._swap()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the epoch's loss, which Lightning knows only now.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss = float(trainer.callback_metrics["train_loss"])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the training loss became {loss} in epoch {trainer.current_epoch} with optim.lr={self.plan.lr}. "
                "Lower optim.lr, or set env.precision='32-true'."
            )
        if self.result.history:
            self.result.history[-1]["train_loss"] = loss
            self.on_epoch(self.result.history[-1])

    def current(self) -> Weights:
        """Copy the weights that are in place now."""
        return {name: t.detach().cpu().clone() for name, t in (self.parameters | self.statistics).items()}

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters.values(), self.average, strict=True):
            kept = parameter.data.clone()
            parameter.data.copy_(average)
            average.copy_(kept)
        self.average_in_place = not self.average_in_place

    def place(self, weights: Weights) -> None:
        """Put weights in place."""
        for name, tensor in (self.parameters | self.statistics).items():
            tensor.data.copy_(weights[name])

    def stir(self, judge: Callable[[], float], *, higher_is_better: bool) -> int:
        """Make the best weights the greedy soup of the best states, and return of how many they are the average.

        Args:
            judge: scores the weights in place.
            higher_is_better: of the score.
        """

        def judged(weights: Weights) -> float:
            self.place(weights)
            return judge()

        self.best, score, count = greedy_soup(self.top, judged, higher_is_better=higher_is_better)
        if count > 1:
            self.result.best_score = score
            self.on_best(self.best)
        return count

    def restore(self) -> None:
        """Put the best weights in place, or the average where no validation was reached."""
        if self.best is None:
            if not self.average_in_place:  # an interrupt during validation finds it there already
                self._swap()
            self.on_best(self.current())
            return
        self.place(self.best)
