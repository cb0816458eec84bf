"""Every error a user of semseg_automl can meet.

Each message says what we got, what is allowed, and what to do. Each class is also a builtin ``ValueError`` or
``RuntimeError``, so that code which knows nothing of this package can still catch it. The one error that is
scikit-learn's too, ``NotFittedError``, stands beside the fitted segmentor, so that this module imports nothing heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SemsegError(Exception):
    """Base of all errors raised on purpose by semseg_automl."""


class DataError(SemsegError, ValueError):
    """A table, an image or a mask cannot be used as it is; the message names the row and the path."""


class ConfigError(SemsegError, ValueError):
    """A setting is unknown or out of range; the message names the nearest known one or the allowed values."""


class UnsupportedCombination(ConfigError):
    """Two settings cannot work together; the message names those that can."""


class CheckpointError(SemsegError, RuntimeError):
    """A file of weights is missing, damaged, or belongs to another model."""


class BundleError(SemsegError, RuntimeError):
    """A saved segmentor cannot be read: files missing, damaged, or written by an incompatible version."""


class TrainingError(SemsegError, RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or an empty string.

    >>> nearest("optim.lrr", ["optim.lr", "optim.loss"])
    "; did you mean 'optim.lr'?"
    >>> nearest("zzz", ["optim.lr"])
    ''
    """
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def check_known(setting: str, name: str, known: Iterable[str]) -> None:
    """Raise `ConfigError` naming the nearest unless `name` is known.

    >>> check_known("optim.peft", "lora", ["lora", "full"])
    """
    names = list(known)
    if name not in names:
        raise ConfigError(f"unknown {setting} '{name}'{nearest(name, names)}. Known: {', '.join(names)}.")
