"""What the preset "auto" stands for on this machine: the largest encoder that fits and whose weights are at hand.

Nothing is downloaded for it: a preset that would have to fetch weights is never chosen, only named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from semseg_automl.config import Hyperparameters, flatten
from semseg_automl.hardware import Hardware
from semseg_automl.models.downloads import OFFICIAL, cache_folder

AUTO = "auto"

LARGE_FIRST: tuple[tuple[str, str, int], ...] = (
    ("best_quality", "sam_vit_h", 24),
    ("high_quality", "sam_vit_l", 12),
    ("medium_quality", "sam_vit_b", 6),
)
"""Presets with their encoder and the GiB of an accelerator that training at 1024 pixels takes, with some to spare."""

NAMED_BY_USER = ("model.encoder", "model.checkpoint")


@dataclass(frozen=True)
class Choice:
    """What "auto" comes to.

    Attributes:
        preset: name of another preset.
        reason: why, as a sentence.
        settings: over the preset, below what the user asked.
        by_user: whether the user named the encoder or its weights.
    """

    preset: str
    reason: str
    settings: dict[str, Any]
    by_user: bool = False


def choose_preset(hardware: Hardware, asked: Hyperparameters, *, folder: Path | None = None) -> Choice:
    """Choose a preset by device, memory and the weights in the cache folder.

    Args:
        hardware: the machine.
        asked: the user's settings; one that names the encoder or its weights leaves nothing to choose.
        folder: of weights; None for `cache_folder`.

    Raises:
        ConfigError: a setting is unknown.
    """
    named = [key for key in flatten(asked) if key in NAMED_BY_USER]
    if named:
        return Choice("fast", f"{' and '.join(named)} given, the rest as the plan has it", {}, True)
    folder = cache_folder() if folder is None else folder
    gib = hardware.memory / 2**30
    if hardware.device != "cpu":
        fitting = [(preset, encoder) for preset, encoder, needed in LARGE_FIRST if gib >= needed]
        for preset, encoder in fitting:
            name = OFFICIAL[encoder].name
            if (folder / name).is_file():
                return Choice(preset, f"{hardware.name} has {gib:.0f} GiB, and {name} is at hand", {})
    small = _plain_vits(folder)
    if small:
        return Choice("fast", f"{small[0].name} is at hand in {folder}", {"model.checkpoint": str(small[0])})
    if hardware.device == "cpu":
        return Choice("fast", "no accelerator, and no checkpoint of a small ViT at hand: from scratch", {})
    offer = f"; presets='{fitting[0][0]}' fetches weights" if fitting else ""
    return Choice("fast", f"{hardware.name} has {gib:.0f} GiB, but no checkpoint is at hand in {folder}{offer}", {})


def encoders_at_hand(hardware: Hardware, *, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return the settings of every encoder whose weights lie in the cache folder and that the machine can train.

    Args:
        hardware: the machine.
        folder: of weights; None for `cache_folder`.
    """
    folder = cache_folder() if folder is None else folder
    found: dict[str, dict[str, Any]] = {}
    if hardware.device != "cpu":
        for _, encoder, needed in LARGE_FIRST:
            if hardware.memory / 2**30 >= needed and (folder / OFFICIAL[encoder].name).is_file():
                found[encoder] = {"model.encoder": encoder, "model.checkpoint": None}
    for path in _plain_vits(folder):
        found[path.stem] = {"model.encoder": "tiny_vit", "model.checkpoint": str(path)}
    return found


def _plain_vits(folder: Path) -> list[Path]:
    """Return the plain ViTs in timm's naming among the safetensors files of a folder, the smallest first."""
    found: list[Path] = []
    if not folder.is_dir():
        return found
    for path in sorted(folder.glob("*.safetensors"), key=lambda each: (each.stat().st_size, each.name)):
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
        except (OSError, SafetensorError):
            continue  # not whole, or not ours to judge: it is not at hand
        if {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"} <= names:
            found.append(path)
    return found
