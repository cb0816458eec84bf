"""Reading weight files without running code from them: safetensors, or torch files with ``weights_only``."""

from __future__ import annotations

import struct
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from semseg_automl.errors import CheckpointError

# torch's unpickler for weights reads bytes as they come: on a file that was cut off it fails with whatever is next.
_UNREADABLE = (
    *(SafetensorError, UnpicklingError, OSError, EOFError, RuntimeError, struct.error),
    *(LookupError, ValueError, TypeError, AttributeError, AssertionError),
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a file.

    Args:
        path: ``.safetensors``, or a torch file holding a state dict (also under the key "model" or "state_dict").

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights at '{path}'. Give model.checkpoint the path of an existing file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(f"'{path}' cannot be read as weights ({error}). Fetch it again.") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"'{path}' does not hold named tensors. Give a state dict.")
    return state
