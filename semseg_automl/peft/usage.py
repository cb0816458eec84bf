"""Which experts the Conv-LoRA layers of a network really use: counting while it runs, and what the counts say.

A router may learn to send every image to the same expert; the others are then dead weight, and no loss shows it.
Layers and counts only: when to count is the training's to say, and pictures are `report`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.peft.conv_lora import ConvLoraLinear

COLLAPSED_SHARE = 0.99
"""Share of the choices above which one expert has taken over a layer."""

NAMED_LAYERS = 4
"""So many layers at most are named in a warning."""


def expert_layers(model: nn.Module) -> dict[str, ConvLoraLinear]:
    """Name the Conv-LoRA layers of `model`, from input to output."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ConvLoraLinear)}


class ExpertCounter:
    """Adds up how often each expert of each Conv-LoRA layer was chosen, on the device, without waiting for it.

    A choice is made per sample of the layer's input: an image, or a window where the layer sees each alone.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = expert_layers(model)
        self.reset()

    def reset(self) -> None:
        """Start from zero, on the device that the layers are on now."""
        self._totals: dict[str, Tensor] = {
            name: torch.zeros(layer.experts, dtype=torch.int64, device=layer.w_gate.device)
            for name, layer in self.layers.items()
        }

    def add(self) -> None:
        """Count the choices of the last forward pass, of layers in evaluation mode: in training, noise routes too."""
        for name, layer in self.layers.items():
            if not layer.training:
                # Not bincount: on CUDA it reads the largest index back to the host, whatever its minlength.
                chosen = F.one_hot(layer.chosen_expert, layer.experts).sum(dim=0)
                # Not in place: totals made in inference mode could not be changed outside of it.
                self._totals[name] = self._totals[name] + chosen

    def counts(self) -> dict[str, list[int]]:
        """Return the choices per layer and expert; waits for the device."""
        return {name: total.tolist() for name, total in self._totals.items()}


def effective_number(counts: Sequence[int]) -> float:
    """Return how many experts are used: exp of the entropy of their shares, 1 to ``len(counts)``; NaN without choices.

    >>> effective_number([5, 5, 0, 0]), effective_number([7, 0])
    (2.0, 1.0)
    """
    total = sum(counts)
    if not total:
        return math.nan
    return math.exp(-sum(count / total * math.log(count / total) for count in counts if count))


def is_collapsed(counts: Sequence[int]) -> bool:
    """Tell whether one of several experts gets nearly all choices; fewer choices than experts prove nothing."""
    total = sum(counts)
    return 1 < len(counts) <= total and max(counts) > COLLAPSED_SHARE * total


def layer_labels(names: Iterable[str]) -> list[str]:
    """Shorten the names of layers to their blocks, with the place inside the block where that is not always the same.

    >>> layer_labels(["encoder.blocks.0.attn.qkv", "encoder.blocks.11.attn.qkv"])
    ['block 0', 'block 11']
    >>> layer_labels(["encoder.blocks.0.attn.qkv", "encoder.blocks.0.mlp.fc1", "neck"])
    ['block 0 attn.qkv', 'block 0 mlp.fc1', 'neck']
    """
    found = [(name, re.search(r"\bblocks\.(\d+)\.(.+)", name)) for name in names]
    one_place = len({match[2] for _, match in found if match}) == 1
    return [
        name if match is None else f"block {match[1]}" if one_place else f"block {match[1]} {match[2]}"
        for name, match in found
    ]


def usage_summary(usage: Mapping[str, Sequence[int]]) -> str:
    """Say in one line how many experts are used, and name the layers in which one has taken over.

    Args:
        usage: choices per expert, by layer; at least one layer, all with the same number of experts.
    """
    mean = sum(effective_number(counts) for counts in usage.values()) / len(usage)
    experts = len(next(iter(usage.values())))
    layers = "1 layer" if len(usage) == 1 else f"{len(usage)} layers"
    line = f"experts: {layers}, {mean:.1f} of {experts} used per layer on average (exp of entropy, in validation)"
    labels = layer_labels(usage)
    collapsed = [label for label, counts in zip(labels, usage.values(), strict=True) if is_collapsed(counts)]
    if not collapsed:
        return line
    shown = ", ".join([*collapsed[:NAMED_LAYERS], *(["..."] if len(collapsed) > NAMED_LAYERS else [])])
    return (
        f"{line}. WARNING: more than {COLLAPSED_SHARE:.0%} of the choices fall on one expert in {len(collapsed)} of "
        f"{layers} ({shown}), so the others do nothing there; try another optim.lora.gate or fewer optim.lora.experts"
    )
