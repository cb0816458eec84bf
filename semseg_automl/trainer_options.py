"""Options of Lightning's trainer: which of them there are, which processes follow from them, and what it may say."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from semseg_automl.errors import ConfigError, nearest
from semseg_automl.processes import Processes, arrange
from semseg_automl.third_party import lightning
from semseg_automl.trackers import chosen_trackers

_TALKATIVE = ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.distributed")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advertisements, and its doubts about what the plan decided, from the user's screen."""
    talk = [logging.getLogger(f"lightning.{name}") for name in _TALKATIVE]
    levels = [each.level for each in talk]
    for each in talk:
        each.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Loader processes are the plan's decision, and so is an epoch of few batches.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            # A fit that is gone on with: the sampler begins where it was.
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
            # Lightning 2.6 with torch 2.13, on torch's own tree specs.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        for each, level in zip(talk, levels, strict=True):
            each.setLevel(level)


def listed(value: Any) -> list[Any]:
    """Return a list as it is, a tuple as one, None as an empty one, and anything else as its only entry."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def trainer_processes(options: dict[str, Any]) -> tuple[Processes, dict[str, Any]]:
    """Return which of how many processes this is with these options, and the options with what follows from it.

    Raises:
        ConfigError: as for `check_trainer_options` and `semseg_automl.processes.arrange`.
    """
    checked = check_trainer_options(options)
    with quiet_lightning():
        return arrange(checked)


def check_trainer_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `options` if Lightning's trainer knows them all; None and single callbacks become lists.

    Raises:
        ConfigError: an option is unknown; the nearest known one is named.
    """
    known = inspect.signature(lightning.Trainer.__init__).parameters
    for name in options:
        if name not in known or name == "self":
            raise ConfigError(f"fit has no argument '{name}', nor has Lightning's Trainer{nearest(name, known)}.")
    checked = dict(options)
    callbacks = checked.get("callbacks")
    if "callbacks" in checked and not isinstance(callbacks, list):
        checked["callbacks"] = [] if callbacks is None else [callbacks]
    chosen_trackers(checked.get("logger", False))
    return checked
