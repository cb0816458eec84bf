"""Where a fit is followed: TensorBoard, MLflow, Weights & Biases or a CSV file, all through Lightning's loggers.

`build_trackers` turns a user's choice into loggers, `RunLog` gives them what Lightning does not log by itself: the
plan, loss and learning rate between epochs, and pictures of a few validation images whenever the score gets better.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.callbacks import TrainingResult
from semseg_automl.data.images import read_image
from semseg_automl.errors import ConfigError, check_known
from semseg_automl.plan import Plan
from semseg_automl.processes import ALONE, Processes
from semseg_automl.report import TILE, overlay_grid
from semseg_automl.third_party import lightning

if TYPE_CHECKING:
    from semseg_automl.data.dataset import MaskDataset

TRACKERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "csv": (),
}
"""Name of a tracker to the packages of which it needs one."""

DEFAULT_TRACKER = "tensorboard"
PROJECT = "semseg_automl"
LOG_FOLDER = "logs"
LOG_EVERY = 10
"""Optimizer steps from one logged loss to the next."""
PREVIEWS = 4
"""Validation images that are drawn when the score gets better."""


def chosen_trackers(choice: Any) -> list[Any]:
    """Return a choice as a list of names and of Lightning's loggers, ``[]`` for none; nothing is opened.

    Args:
        choice: a key of `TRACKERS`, a logger of Lightning's, several in a list, False for none; True or None for
            `DEFAULT_TRACKER`.

    Raises:
        ConfigError: a name is unknown, its package is not installed, or the choice is something else.

    >>> chosen_trackers(False), chosen_trackers("csv"), chosen_trackers(None)
    ([], ['csv'], ['tensorboard'])
    """
    if choice is None or isinstance(choice, bool):
        return [] if choice is False else [DEFAULT_TRACKER]
    chosen = list(choice) if isinstance(choice, list | tuple) else [choice]
    for each in chosen:
        if isinstance(each, str):
            check_known("logger", each, TRACKERS)
            packages = TRACKERS[each]
            if packages and not any(importlib.util.find_spec(package) for package in packages):
                raise ConfigError(
                    f"logger is '{each}', and the package {packages[0]} is not installed. Run pip install "
                    f"{packages[0]}, or choose another of {', '.join(TRACKERS)}, or logger=False."
                )
        elif not isinstance(each, lightning.pytorch.loggers.Logger):
            raise ConfigError(
                f"logger is {each!r}; allowed: {', '.join(TRACKERS)}, a logger of lightning.pytorch.loggers, a list of "
                "these, or False for none."
            )
    return chosen


def build_trackers(choice: Any, folder: Path) -> list[lightning.pytorch.loggers.Logger]:
    """Return the loggers of a fit; those given by name write below ``folder/logs``, MLflow where its server is.

    Args:
        choice: as for `chosen_trackers`.
        folder: of the fit, after which runs are named.

    Raises:
        ConfigError: as for `chosen_trackers`, or an installed package is one that Lightning cannot use.
    """
    loggers, logs, name = lightning.pytorch.loggers, folder / LOG_FOLDER, folder.resolve().name
    server = os.environ.get("MLFLOW_TRACKING_URI")  # first, as everywhere in MLflow
    place: dict[str, Any] = {
        "tracking_uri": server or f"sqlite:///{logs.resolve() / 'mlflow.db'}",
        "artifact_location": None if server else (logs.resolve() / "mlflow").as_uri(),
    }
    makers: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: loggers.TensorBoardLogger(logs, name="", default_hp_metric=False),
        "csv": lambda: loggers.CSVLogger(logs, name="", flush_logs_every_n_steps=LOG_EVERY),
        "mlflow": lambda: loggers.MLFlowLogger(experiment_name=PROJECT, run_name=name, **place),
        "wandb": lambda: loggers.WandbLogger(project=PROJECT, name=name, save_dir=logs),
    }
    built = []
    for each in chosen_trackers(choice):
        try:
            if isinstance(each, str):
                logs.mkdir(parents=True, exist_ok=True)
                built.append(makers[each]())
            else:
                built.append(each)
        except ModuleNotFoundError as error:
            raise ConfigError(f"logger '{each}' cannot be used: {error}. Install or update it with pip.") from error
        except OSError as error:
            raise ConfigError(
                f"cannot write '{logs}' ({error}). Check space and permissions, or use another path."
            ) from error
    return built


class Previews:
    """A few fixed validation images, and what the network last made of them.

    Args:
        dataset: of the validation; one item per image.
        binary: leave class 0 uncoloured.
        every: only each so-manieth image can be drawn; the others are validated on by other processes.
    """

    def __init__(self, dataset: MaskDataset, *, binary: bool, every: int = 1) -> None:
        self.dataset = dataset
        self.binary = binary
        seen = np.arange(0, len(dataset), every)
        rows = seen[np.linspace(0, len(seen) - 1, min(PREVIEWS, len(seen))).round().astype(int)]
        self.labels: dict[int, NDArray[np.uint8]] = dict.fromkeys(rows.tolist(), np.zeros((0, 0), np.uint8))
        self._kept: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}

    def keep(self, row: int, labels: Tensor, truth: Tensor) -> None:
        """Note what the network made of a row, ``labels (H, W)``, if it is one of those drawn; else do nothing."""
        if row not in self.labels:
            return
        self.labels[row] = _small(labels)
        if row not in self._kept:
            table = self.dataset.table
            image = read_image(table.images[row], name=table.row_name(row), channels=table.channels)
            height, width = self.labels[row].shape
            small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
            self._kept[row] = small, _small(truth)

    def draw(self) -> dict[str, NDArray[np.uint8]]:
        """Return ``image | truth | prediction`` of each image that was predicted, RGB, by a name that never changes."""
        return {
            f"image_{place}": overlay_grid([(*self._kept[row], labels)], binary=self.binary)
            for place, (row, labels) in enumerate(self.labels.items())
            if labels.size
        }


class RunLog(lightning.Callback):
    """Logs the plan, loss and learning rate per step, and pictures of validation images when the score gets better.

    It has to come after the callback that fills in `result`.

    Args:
        plan: logged as hyperparameters.
        result: what the training has reached so far.
        previews: the images to draw; None draws none.
    """

    def __init__(self, plan: Plan, result: TrainingResult, previews: Previews | None) -> None:
        self.plan = plan
        self.result = result
        self.previews = previews
        self.logged_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the plan."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self._settings())

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log loss and learning rate of every so many optimizer steps."""
        step, every = trainer.global_step, getattr(trainer, "log_every_n_steps")  # noqa: B009
        if step == self.logged_step or not (step == 1 or (every and step % every == 0)):
            return
        self.logged_step = step
        group = trainer.optimizers[0].param_groups[0]
        # Lightning has divided the loss by the batches that make up a step.
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        for logger in trainer.loggers:
            logger.log_metrics({"train_loss_step": loss, "lr": group["lr"] / group["lr_ratio"]}, step=step)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the pictures if this validation was the best so far."""
        if self.previews is None or self.result.best_epoch != trainer.current_epoch or not trainer.is_global_zero:
            return
        pictures = self.previews.draw()
        for logger in trainer.loggers:
            log_pictures(logger, pictures, trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give TensorBoard the score that it can compare plans by."""
        score = self.result.best_score
        for logger in trainer.loggers:
            if isinstance(logger, lightning.pytorch.loggers.TensorBoardLogger) and math.isfinite(score):
                logger.log_hyperparams(self._settings(), {f"best_{self.plan.validation_metric}": score})

    def _settings(self) -> dict[str, Any]:
        """Return the plan as plain values; lists as text, which every tracker can show."""
        values = self.plan.model_dump(mode="json", exclude={"reasons"})
        return {name: str(value) if isinstance(value, list | dict) else value for name, value in values.items()}


def shows_pictures(logger: lightning.pytorch.loggers.Logger) -> bool:
    """Tell whether `log_pictures` has a way to log pictures there."""
    loggers = lightning.pytorch.loggers
    return isinstance(logger, loggers.TensorBoardLogger | loggers.MLFlowLogger | loggers.WandbLogger)


def log_pictures(
    logger: lightning.pytorch.loggers.Logger, pictures: dict[str, NDArray[np.uint8]], step: int
) -> None:
    """Log pictures by name, where the logger can show any: a CSV file cannot, and other loggers are the user's."""
    loggers = lightning.pytorch.loggers
    if isinstance(logger, loggers.TensorBoardLogger):
        for name, picture in pictures.items():
            logger.experiment.add_image(f"validation/{name}", picture, step, dataformats="HWC")
    elif isinstance(logger, loggers.MLFlowLogger):
        for name, picture in pictures.items():
            logger.experiment.log_image(logger.run_id, picture, f"validation/{name}/step_{step:06d}.png")
    elif isinstance(logger, loggers.WandbLogger):
        logger.log_image("validation", list(pictures.values()), step=step, caption=list(pictures))


def run_log(
    loggers: Sequence[lightning.pytorch.loggers.Logger],
    plan: Plan,
    result: TrainingResult,
    dataset: MaskDataset,
    processes: Processes = ALONE,
) -> RunLog:
    """Return the callback for these loggers; it draws pictures only where one of them can show them.

    Args:
        loggers: at least one.
        plan: of the fit.
        result: filled in as training goes.
        dataset: of the validation.
        processes: that share it.
    """
    drawn = any(shows_pictures(logger) for logger in loggers)
    binary = dataset.task.kind == "binary"
    return RunLog(plan, result, Previews(dataset, binary=binary, every=processes.count) if drawn else None)


def _small(labels: Tensor) -> NDArray[np.uint8]:
    """Shrink ``(H, W)`` class indices to what fits into a tile of the picture, on the CPU."""
    stride = max(1, math.ceil(max(labels.shape) / (2 * TILE)))
    return labels[::stride, ::stride].to(torch.uint8).cpu().numpy()
