"""What fits the machine: micro-batch, recomputed activations, cached features, number format, loader processes.

Estimates, by rule; nothing is probed here. None of these decisions changes which function is learned from how many
images per step; `Plan` fixes that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from semseg_automl.config import Config
from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.hardware import Hardware
from semseg_automl.models.facts import EncoderFacts

PATCH_AREA_BYTES = 4  # float32 activations; autocast keeps half of them so
BLOCK_WIDTHS = 16
"""Activations kept per token and block, in token widths: normalised and residual tokens, qkv, attention, the MLP's
hidden layer. ``python -m benchmarks.speed``: 2.5 GiB for the 12 blocks of ViT-B at 1024 px, above 0.8 before."""
RECOMPUTED_WIDTHS = 64
"""The same where they are recomputed, for the one block at hand with its gradients, beside one width per block: 1.1
GiB in that benchmark."""
DECODER_BYTES_PER_PIXEL = 600
"""Of a training step besides the encoder's blocks: image, embeddings, upscaled maps, loss."""
MEMORY_SHARE = 0.5
"""Of the machine's memory for activations; the rest is for weights, optimizer, data and the allocator."""
CACHE_SHARE = 0.25
"""Of the machine's memory for cached features, at most."""
STEP_SECONDS = 0.02
"""Of an optimizer step on an accelerator, at least, so that loading a batch faster gains nothing."""
MAX_PROCESSES = 8
IMAGES_SHARE = 0.25
"""Of the memory that is free for decoded images, at most."""
DISK_BYTES = 20 * 10**9
"""Of cached features on disk, at most."""


@dataclass(frozen=True)
class Capacity:
    """Decisions that the machine takes part in; names as in `Plan`."""

    micro_batch_size: int
    checkpointing: bool
    feature_cache: str
    cached_views: int
    precision: str
    num_workers: int
    image_cache: int


def step_bytes(encoder: EncoderFacts, size: tuple[int, int], *, checkpointing: bool) -> int:
    """Estimate the activations of a training step on one image of `size` pixels, in bytes."""
    pixels = size[0] * size[1]
    per_block = pixels / encoder.stride**2 * encoder.embed_dim * PATCH_AREA_BYTES
    blocks = (encoder.depth + RECOMPUTED_WIDTHS) if checkpointing else encoder.depth * BLOCK_WIDTHS
    return round(pixels * DECODER_BYTES_PER_PIXEL + per_block * blocks)


def fit_to_machine(
    config: Config,
    hardware: Hardware,
    encoder: EncoderFacts,
    *,
    batch_size: int,
    input_size: tuple[int, int],
    rows: int,
    frozen_prefix: bool,
    grids_read: int,
    image_bytes: int,
    loading_seconds: float | None,
    reasons: dict[str, str],
) -> Capacity:
    """Decide what the machine decides, and note why in `reasons`.

    Args:
        config: what was asked.
        hardware: the machine.
        encoder: the encoder.
        batch_size: images per optimizer step.
        input_size: of the images, in pixels.
        rows: training images.
        frozen_prefix: whether the first trained block, if any, has frozen ones before it.
        grids_read: token grids that what follows the frozen blocks reads.
        image_bytes: of all decoded images and masks, of training and validation.
        loading_seconds: that one thread takes to read and augment an image, or None if unknown.
        reasons: added to.

    Raises:
        ConfigError: the micro-batch does not divide the batch.
        UnsupportedCombination: recomputing or caching is asked for where there is nothing to recompute or to cache.
    """
    micro, checkpointing = _micro_batch(config, hardware, encoder, batch_size, input_size, reasons)
    cache, views = _feature_cache(config, hardware, encoder, input_size, rows, frozen_prefix, grids_read, reasons)
    precision = config.env.precision
    reasons["precision"] = "as asked"
    if precision == "auto":
        precision = "bf16-mixed" if hardware.bf16 else "32-true"
        reasons["precision"] = f"bfloat16 is {'fast' if hardware.bf16 else 'not fast'} on {hardware.name}"
    workers = _loader_processes(config, hardware, batch_size, loading_seconds, reasons)
    images = _image_cache(config, hardware, image_bytes, reasons)
    return Capacity(micro, checkpointing, cache, views, precision, workers, images)


def _micro_batch(
    config: Config,
    hardware: Hardware,
    encoder: EncoderFacts,
    batch_size: int,
    input_size: tuple[int, int],
    reasons: dict[str, str],
) -> tuple[int, bool]:
    """Choose images per forward pass, and whether activations are recomputed: only where not one image fits without."""
    room = hardware.memory * MEMORY_SHARE
    asked = config.env.checkpointing
    if asked == "auto":
        needed = step_bytes(encoder, input_size, checkpointing=False)
        checkpointing = needed > room and encoder.depth > 0
        relation = "more" if needed > room else "less"
        reasons["checkpointing"] = f"an image needs about {needed / 2**30:.1f} GiB without, {relation} than there is"
    else:
        checkpointing = asked
        reasons["checkpointing"] = "as asked"
        if checkpointing and not encoder.depth:
            raise UnsupportedCombination(
                f"env.checkpointing is true, but {encoder.name} has no transformer blocks. Leave it out."
            )
    fits = max(1, int(room / step_bytes(encoder, input_size, checkpointing=checkpointing)))
    if config.env.micro_batch_size == "auto":
        micro = next(size for size in range(min(batch_size, fits), 0, -1) if batch_size % size == 0)
        reasons["micro_batch_size"] = f"{hardware.memory / 2**30:.0f} GiB of memory"
    else:
        micro = config.env.micro_batch_size
        reasons["micro_batch_size"] = "as asked"
    if batch_size % micro:
        raise ConfigError(f"env.micro_batch_size is {micro}; it must divide env.batch_size, {batch_size}.")
    return micro, checkpointing


def _feature_cache(
    config: Config,
    hardware: Hardware,
    encoder: EncoderFacts,
    input_size: tuple[int, int],
    rows: int,
    frozen_prefix: bool,
    grids_read: int,
    reasons: dict[str, str],
) -> tuple[str, int]:
    """Choose where features of the frozen blocks are kept, and how many augmented views of an image there are then."""
    asked, views = config.env.feature_cache, config.data.cached_views
    if not frozen_prefix:
        if asked not in ("auto", "off"):
            raise UnsupportedCombination(
                f"env.feature_cache is '{asked}', but the first block trains already. Use optim.peft=decoder_only "
                "or lst, or optim.lora.last_blocks."
            )
        reasons["feature_cache"] = "the first block trains already"
        return "off", 0
    if asked != "auto":
        reasons["feature_cache"] = "as asked"
        return asked, 0 if asked == "off" else views
    tokens = math.prod(input_size) / encoder.stride**2
    needed = rows * views * tokens * encoder.embed_dim * 4 * grids_read
    where = f"about {needed / 2**30:.1f} GiB for {views} views of each image"
    for place, room in (("memory", hardware.host_memory * CACHE_SHARE), ("disk", DISK_BYTES)):
        if needed <= room:
            reasons["feature_cache"] = f"{where}; later epochs skip the frozen blocks"
            return place, views
    reasons["feature_cache"] = f"{where}, more than fits memory or disk"
    return "off", views  # the same views as where they fit: the result does not depend on the machine


def _loader_processes(
    config: Config, hardware: Hardware, batch_size: int, seconds: float | None, reasons: dict[str, str]
) -> int:
    """Choose how many processes load images: none where the processor trains, else as many as keep up."""
    if config.env.num_workers != "auto":
        reasons["num_workers"] = "as asked"
        return config.env.num_workers
    if hardware.device == "cpu":
        reasons["num_workers"] = "the processor trains; between its steps all cores load"
        return 0
    most = min(MAX_PROCESSES, hardware.cores // 2)
    if seconds is None:
        reasons["num_workers"] = "half the cores"
        return most
    reasons["num_workers"] = f"one thread takes {1000 * seconds:.1f} ms to read and augment an image"
    return min(most, math.ceil(batch_size * seconds / STEP_SECONDS))


def images_room(asked: Literal["auto", "off"] | int, hardware: Hardware) -> int:
    """Return the bytes that decoded images may take at most.

    Args:
        asked: the setting ``env.image_cache``.
        hardware: the machine.
    """
    if asked == "auto":
        return round(hardware.host_free * IMAGES_SHARE)
    return 0 if asked == "off" else asked


def _image_cache(config: Config, hardware: Hardware, needed: int, reasons: dict[str, str]) -> int:
    """Choose the bytes for decoded images: what they need, within a share of the memory that is free."""
    asked = config.env.image_cache
    if asked != "auto":
        reasons["image_cache"] = "as asked"
        return images_room(asked, hardware)
    room = images_room(asked, hardware)
    sizes = f"decoded images take {needed / 1e9:.2g} GB, {hardware.host_free / 1e9:.2g} GB are free"
    reasons["image_cache"] = f"bytes; {sizes}"
    if needed > room:
        reasons["image_cache"] = f"bytes, a quarter; {sizes}, so {1 - room / needed:.0%} are decoded every time"
    return min(needed, room)
