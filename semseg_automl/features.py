"""What the frozen part of the encoder computes is computed once: a cache per dataset item, in memory or on disk.

Where the frozen part ends is the encoder's to say (`Encoder.frozen_stage`), which items come again the sampler's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from semseg_automl.capacity import CACHE_SHARE, DISK_BYTES
from semseg_automl.data.dataset import MaskDataModule
from semseg_automl.errors import ConfigError
from semseg_automl.hardware import detect_hardware
from semseg_automl.models.encoder import EncoderState
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.plan import Plan
from semseg_automl.processes import fair_share


class FeatureCache:
    """What the encoder computed up to a stage, for each item of one dataset that came by.

    An item's value is the same at its first visit and at every later one: it is rounded to `dtype` before it is used.
    It equals what the batch at hand would have given up to rounding, since the batch it was computed in may have been
    of another size.

    Args:
        model: the network; nothing before `stage` may train.
        stage: where its encoder is cut.
        folder: holds a safetensors file per item; None keeps the items in memory.
        budget: bytes kept at most.
        dtype: number format items are kept in. Not float16: SAM's tokens may overflow it.
        on_full: called once, with what to tell the user, when no further item can be kept.

    Attributes:
        full: whether the budget, or the disk, is exhausted; items not kept by then are computed at every visit.
    """

    def __init__(
        self,
        model: SegmentationModel,
        stage: int,
        *,
        folder: Path | None,
        budget: int,
        dtype: torch.dtype,
        on_full: Callable[[str], None],
    ) -> None:
        self.model = model
        self.stage = stage
        self.folder = folder
        self.budget = budget
        self.dtype = dtype
        self.on_full = on_full
        self.full = False
        self._kept: dict[int, EncoderState | Path] = {}
        self._bytes = 0
        self._computed_dtypes: tuple[torch.dtype, ...] = ()

    def states(self, batch_index: Tensor, images: Tensor) -> EncoderState:
        """Return what ``model.begin(images, stage)`` gives, computing only the items that are not kept.

        Args:
            batch_index: ``(B,)`` items of the dataset, on the CPU.
            images: ``(B, 3, H, W)``, 0..255; the result is on their device.
        """
        items: list[int] = batch_index.tolist()
        missing = {item: row for row, item in enumerate(items) if item not in self._kept}
        computed = dict(zip(missing, self._compute(images[list(missing.values())]), strict=True)) if missing else {}
        for item, state in computed.items():
            self._keep(item, state)
        rows = [computed[item] if item in computed else self._fetch(item) for item in items]
        # To the device first: in the narrow format there is less to move.
        return tuple(
            torch.stack(parts).to(images.device).to(dtype)
            for parts, dtype in zip(zip(*rows, strict=True), self._computed_dtypes, strict=True)
        )

    def _compute(self, images: Tensor) -> list[EncoderState]:
        """Encode ``images (B, 3, H, W)`` as a frozen encoder should: in eval mode. One state per image, as kept."""
        modes = [(module, module.training) for module in self.model.encoder.modules()]
        self.model.encoder.eval()
        try:
            with torch.no_grad():
                state = self.model.begin(images, self.stage)
        finally:
            for module, training in modes:  # one by one: layers after the stage may stand otherwise than the encoder
                module.training = training
        self._computed_dtypes = tuple(part.dtype for part in state)
        # Copies, since a state may hold a tensor twice; contiguous, since a file gives them back so.
        parts = [part.to("cpu", self.dtype).clone(memory_format=torch.contiguous_format) for part in state]
        return list(zip(*parts, strict=True))

    def _keep(self, item: int, state: EncoderState) -> None:
        """Keep a state if there is room."""
        if self.full:
            return
        size = sum(part.nbytes for part in state)
        if self._bytes + size > self.budget:
            self._stop(f"{self.budget / 2**30:.2g} GiB are allowed")
            return
        try:
            self._kept[item] = state if self.folder is None else self._write(self.folder, item, state)
        except OSError as error:
            self._stop(str(error))
            return
        self._bytes += size

    def _stop(self, why: str) -> None:
        self.full = True
        where, or_else = ("in memory", ", or set env.feature_cache='disk'")
        if self.folder is not None:
            where, or_else = f"in '{self.folder}'", ""
        self.on_full(
            f"the cache of frozen features is full: {len(self._kept)} images, {self._bytes / 2**30:.2g} GiB {where} "
            f"({why}). Other images are encoded every time they are shown, which is slower but changes no result. "
            f"To make room, lower data.cached_views or model.input_size{or_else}."
        )

    @staticmethod
    def _write(folder: Path, item: int, state: EncoderState) -> Path:
        """Write an item's file; it appears whole or not at all."""
        path = folder / f"{item}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save({str(i): part for i, part in enumerate(state)}))
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise
        return path

    def _fetch(self, item: int) -> EncoderState:
        kept = self._kept[item]
        if not isinstance(kept, Path):
            return kept
        tensors = load_file(kept)
        return tuple(tensors[str(i)] for i in range(len(tensors)))


@contextmanager
def feature_caches(
    model: SegmentationModel,
    plan: Plan,
    data: MaskDataModule,
    folder: Path | None,
    on_notice: Callable[[str], None],
) -> Iterator[dict[str, FeatureCache]]:
    """Make the caches of a training: ``train``, unless every epoch has new views, and ``validation``.

    Args:
        model: the network, its fine-tuning method applied.
        plan: where to cache, and how many views.
        data: says how many items there are; the two share one budget accordingly, and so do the processes of a machine.
        folder: this process's alone, for a cache on disk; deleted at the end, whatever happens before.
        on_notice: called with what the user should know.

    Yields:
        The caches by name; none if the plan has none or the encoder trains from its first layer on.

    Raises:
        ConfigError: the plan caches on disk, and no folder is given.
    """
    stage = 0 if plan.feature_cache == "off" else model.encoder.frozen_stage()
    if not stage:
        yield {}
        return
    on_disk = plan.feature_cache == "disk"
    if on_disk and folder is None:
        raise ConfigError("the plan's feature_cache is 'disk', but no folder was given. Pass train(cache_folder=...).")
    room = DISK_BYTES if on_disk else int(detect_hardware().host_memory * CACHE_SHARE)
    budget = fair_share(room, data.processes)
    items = {"train": plan.cached_views * len(data.train), "validation": len(data.validation)}
    scratch = folder if on_disk else None
    try:
        yield {
            name: FeatureCache(
                model,
                stage,
                folder=scratch and scratch / name,
                budget=budget * count // sum(items.values()),
                dtype=torch.bfloat16 if plan.precision == "bf16-mixed" else torch.float32,
                on_full=on_notice,
            )
            for name, count in items.items()
            if count
        }
    finally:
        _delete(scratch, on_notice)


def _delete(folder: Path | None, on_notice: Callable[[str], None]) -> None:
    """Delete a folder, and the one above it if nothing is left there."""
    if folder is None or not folder.exists():
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:  # training is worth more than a tidy disk
        on_notice(f"cannot delete the cache of frozen features ({error}). Delete '{folder}' by hand.")
        return
    with suppress(OSError):  # other processes of the same training still keep theirs there
        folder.parent.rmdir()
