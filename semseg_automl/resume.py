"""Going on after a kill: the state of a training, saved between two optimizer steps, and found again.

``resume/`` in a fit's folder holds ``run.json`` (plan, task, and a digest of every row) and the last two states. Each
state is one safetensors file with the hash of its content in its name; nothing in it can run. A state is taken before a
batch that starts an optimizer step, where the network, the averages and the counters belong together.

Not here: what the callbacks remember (each has ``state_dict``), which epoch's samples come next
(:mod:`semseg_automl.data.dataset`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from semseg_automl.data.images import ImageSource
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import ConfigError
from semseg_automl.files import replaced
from semseg_automl.memory import is_out_of_memory
from semseg_automl.plan import Plan
from semseg_automl.processes import first_says
from semseg_automl.task import SegmentationTask
from semseg_automl.third_party import lightning

FOLDER = "resume"
RUN = "run.json"
SUFFIX = ".state.safetensors"
KEPT = 2
"""States kept: the last may be torn by a failing disk."""
LEAST_SECONDS = 30.0
"""Between two states, where none is asked for: what a kill costs at most on a fast machine."""
LEAST_RATIO = 50.0
"""Time between two states over the time that saving one takes: it costs 2 % at most."""
MAX_LISTED = 10
MACHINE_DECIDES = {"micro_batch_size", "checkpointing", "num_workers", "image_cache", "reasons"}
"""Fields of a plan that may differ: they do not change what is learned from which images."""


@dataclass(frozen=True)
class Position:
    """Where in training a state was taken.

    Attributes:
        epoch: counted from 0.
        samples: of the epoch that have been trained on.
        seconds: of training before.
    """

    epoch: int
    samples: int
    seconds: float


class StateIO(lightning.fabric.plugins.TorchCheckpointIO):
    """Writes states for Lightning's trainer, and hands it the one to go on with; its own files stay its own.

    Args:
        state: what `read_state` and `prepare_state` made of the state to go on with, if there is one.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.state = state

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state under `path`, the hash of its content put in front of the ending."""
        if not str(path).endswith(SUFFIX):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_packed(checkpoint, tensors))
        unnamed = Path(path)
        unnamed.parent.mkdir(parents=True, exist_ok=True)
        with replaced(unnamed) as temporary:
            save_file(tensors, temporary, metadata={"tree": tree})
            digest = _digest(temporary)
        os.replace(unnamed, unnamed.with_name(unnamed.name.removesuffix(SUFFIX) + f"-{digest}{SUFFIX}"))

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """Return the state to go on with."""
        if not str(path).endswith(SUFFIX):
            return super().load_checkpoint(path, *arguments, **options)
        return self.state


class StateKeeper(lightning.Callback):
    """Saves the state of training now and then, and keeps the last two.

    Must come last of the callbacks, so that the others have done their part of the step before.

    Args:
        folder: of the states.
        micro_batch_size: images per batch, those of all processes together.
        interval: seconds between two states; None for `LEAST_SECONDS`, more where saving is slow.
        on_notice: called when a state cannot be saved; training goes on.
    """

    def __init__(
        self, folder: Path, *, micro_batch_size: int, interval: float | None, on_notice: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.micro_batch_size = micro_batch_size
        self.interval = LEAST_SECONDS if interval is None else interval
        self.fixed = interval is not None
        self.on_notice = on_notice
        self.last = time.monotonic()
        self.said = False
        self.rescued: dict[str, Any] | None = None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Keep the state in `rescued` where memory ran out within a step: gradients are lost, weights are whole."""
        if is_out_of_memory(exception) and getattr(pl_module, "in_step", False):
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            counts = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            begun = counts["current"]["completed"] % trainer.accumulate_grad_batches
            for each in ("current", "total"):
                counts[each]["completed"] -= begun
            tensors: dict[str, Tensor] = {}
            self.rescued = _unpacked(_packed(state, tensors), tensors)  # a copy that training cannot change

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how large the batches are that Lightning counts."""
        checkpoint["micro_batch_size"] = self.micro_batch_size

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save before a batch that starts an optimizer step, if it is time."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._is_due():
            self.save(trainer, batch_idx)

    def _is_due(self) -> bool:
        """Let the first of several processes decide for all: saving is a common step of theirs."""
        return bool(first_says(time.monotonic() - self.last >= self.interval))

    def save(self, trainer: lightning.Trainer, batches: int) -> None:
        """Write the state after `batches` batches of the epoch; a full disk is told once, and training goes on.

        Several processes have the same state, and the first one writes it. Not by Lightning's own ``save_checkpoint``,
        where all would wait for a first one that met a full disk.
        """
        if not trainer.is_global_zero:
            return
        start = time.monotonic()
        name = f"{trainer.current_epoch:06d}-{batches * self.micro_batch_size:09d}"
        try:
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            StateIO().save_checkpoint(state, self.folder / f"{name}{SUFFIX}")
        except (OSError, SafetensorError) as error:
            if not self.said:
                self.on_notice(f"the state for fit(resume=True) cannot be saved ({error}); training goes on without")
            self.said = True
        else:
            for old in state_files(self.folder)[KEPT:]:
                old.unlink(missing_ok=True)
        self.last = time.monotonic()
        if not self.fixed:
            self.interval = max(LEAST_SECONDS, LEAST_RATIO * (self.last - start))


def state_files(folder: Path) -> list[Path]:
    """Return the states in a folder, the furthest first."""
    return sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.name.split("-")[:2], reverse=True)


def newest_state(folder: Path, on_notice: Callable[[str], None]) -> Path | None:
    """Return the furthest state whose content has the hash in its name; each damaged one is told."""
    for path in state_files(folder):
        try:
            whole = path.name.removesuffix(SUFFIX).rpartition("-")[2] == _digest(path)
        except OSError as error:
            on_notice(f"'{path}' cannot be read ({error}); the state before it is taken")
            continue
        if whole:
            return path
        on_notice(f"'{path}' is damaged; the state before it is taken")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read a state.

    Raises:
        ConfigError: the file is none of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})["tree"])
            state = _unpacked(tree, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"'{path}' is no state of a fit ({error}). Delete it, or fit without resume=True.") from error
    if not isinstance(state, dict):
        raise ConfigError(f"'{path}' is no state of a fit. Delete it, or fit without resume=True.")
    return state


def prepare_state(state: dict[str, Any], micro_batch_size: int, seconds_key: str) -> Position:
    """Set a state's counters to the start of its step, for batches of `micro_batch_size`; return where it is.

    Lightning counts a batch as ready before it is trained on; here nothing of it has happened yet. An epoch's batches
    are counted anew where their size has changed.

    Args:
        state: from `read_state`; changed in place.
        micro_batch_size: images per batch from now on, those of all processes together.
        seconds_key: the callback in whose state ``seconds`` is the time that training took so far.
    """
    loop = state["loops"]["fit_loop"]
    progress, saved = loop["epoch_loop.batch_progress"], state["micro_batch_size"]
    samples = progress["current"]["completed"] * saved
    for counts, done in ((progress["current"], samples), (progress["total"], progress["total"]["completed"] * saved)):
        counts.update(dict.fromkeys(counts, done // micro_batch_size))
    progress["is_last_batch"] = False
    epoch = loop["epoch_progress"]["current"]["processed"]
    return Position(epoch, samples, state["callbacks"][seconds_key]["seconds"])


def begin_run(
    folder: Path, plan: Plan, task: SegmentationTask, tables: Mapping[str, MaskTable], *, resume: bool
) -> bool:
    """Note what is run in `folder`; say whether an earlier run of the same is there to go on with.

    Args:
        folder: of the states.
        plan: the decisions.
        task: what the masks hold.
        tables: rows by the name of their split.
        resume: go on with the run in the folder; otherwise what is there is deleted.

    Raises:
        ConfigError: the run in the folder has another plan, task or data; the message says what differs.
        OSError: the folder cannot be written.
    """
    record: dict[str, Any] = {
        "plan": plan.model_dump(mode="json", exclude=MACHINE_DECIDES),
        "task": task.to_dict(),
        "rows": {name: [row_digest(table, row) for row in range(len(table))] for name, table in tables.items()},
    }
    record = json.loads(json.dumps(record))
    path = folder / RUN
    if resume and path.is_file():
        _refuse(folder.parent, _differences(_read_run(path), record))
        return True
    end_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")
    return False


def check_same_plan(folder: Path, old: Plan, new: Plan) -> None:
    """Raise `ConfigError` with the differences if two plans would not learn the same."""
    plans = ({"plan": plan.model_dump(mode="json", exclude=MACHINE_DECIDES)} for plan in (old, new))
    _refuse(folder, _differences(*plans))


def _refuse(folder: Path, differences: list[str]) -> None:
    if differences:
        more = f"\n... and {len(differences) - MAX_LISTED} more" if len(differences) > MAX_LISTED else ""
        raise ConfigError(
            f"'{folder}' holds a fit of something else, so it cannot go on:\n- "
            + "\n- ".join(differences[:MAX_LISTED])
            + f"{more}\nUse what it was begun with, another path, or leave out resume=True to begin anew."
        )


def end_run(folder: Path) -> None:
    """Delete what `begin_run` and the states left."""
    if folder.exists():
        shutil.rmtree(folder)


def row_digest(table: MaskTable, row: int) -> str:
    """Return a short digest of a row: of its files' names, sizes and times of change, or of the pixels in memory."""
    digest = hashlib.sha256()
    for source in (table.images[row], *(() if table.masks is None else (table.masks[row],))):
        digest.update(_source_bytes(source))
    return digest.hexdigest()[:16]


def row_name(table: MaskTable, row: int) -> str:
    """Return what a row is called wherever its files lie: the names of files; digests of pixels in memory."""
    sources = (table.images[row], *(() if table.masks is None else (table.masks[row],)))
    parts = [
        os.path.basename(source)
        if isinstance(source, (str, os.PathLike))
        else hashlib.sha256(_source_bytes(source)).hexdigest()[:16]
        for source in sources
    ]
    chosen = [] if table.channels is None else [f"channels {table.channels}"]
    return "/".join([*parts, *chosen])


def _source_bytes(source: ImageSource) -> bytes:
    if isinstance(source, (str, os.PathLike)):
        facts = os.stat(source)
        return f"{os.fspath(source)}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode()
    if isinstance(source, (np.ndarray, Image.Image)):
        pixels = np.ascontiguousarray(source)
        return f"{pixels.shape}{pixels.dtype}".encode() + pixels.tobytes()
    return repr(source).encode()


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(run[key], dict) for key in ("plan", "task", "rows")):
            raise ValueError("plan, task and rows are not what they should be")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is damaged ({error}). Delete it, or fit without resume=True.") from error
    checked: dict[str, Any] = run
    return checked


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say what differs between two runs, a line each."""
    lines = []
    for part in ("plan", "task"):
        before, after = old.get(part, {}), new.get(part, {})
        for key in dict.fromkeys([*before, *after]):
            was, now = before.get(key), after.get(key)
            if was != now:
                lines.append(f"{part}: {key} was {was}, is {now}")
    rows_before, rows_after = old.get("rows", {}), new.get("rows", {})
    for split in dict.fromkeys([*rows_before, *rows_after]):
        was, now = rows_before.get(split, []), rows_after.get(split, [])
        if len(was) != len(now):
            lines.append(f"data: {split} had {len(was)} rows, has {len(now)}")
            continue
        changed = [position for position, pair in enumerate(zip(was, now, strict=True)) if pair[0] != pair[1]]
        if changed:
            shown = ", ".join(map(str, changed[:MAX_LISTED]))
            lines.append(f"data: {len(changed)} rows of {split} are not what they were, at the positions {shown}")
    return lines


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn nested values into what JSON holds, tensors put aside under numbers.

    Raises:
        TypeError: a value is neither a tensor, a plain value nor a container of them.
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # shared memory is refused by safetensors
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be saved in the state of a fit")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    items = [_unpacked(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
