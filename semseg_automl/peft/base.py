"""What every parameter-efficient fine-tuning method owes the rest: one class, one ``apply``.

The methods themselves live beside this file; freezing and the choice of which parts of the model train are here,
because they are the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from semseg_automl.models.encoder import Encoder


class PeftMethod(ABC):
    """One way to adapt a frozen encoder.

    A method is built from plain keyword values and checks them at once; `apply` then edits the encoder in place:
    it may replace submodules of a block, set ``encoder.side`` or wrap ``block.attn``, and nothing else. It leaves
    the parameters it adds trainable, and every parameter it does not train with ``requires_grad = False``.
    """

    name: ClassVar[str]
    identity_at_init: ClassVar[bool] = True
    """Whether the adapted encoder computes bit for bit what the frozen one did before the first step."""

    @abstractmethod
    def apply(self, encoder: Encoder) -> None:
        """Adapt `encoder` in place.

        Raises:
            UnsupportedCombination: the encoder has not the parts this method works on.
        """


def freeze_pretrained(encoder: Encoder) -> None:
    """Freeze the encoder's pretrained parts; its fresh ones (a neck that no checkpoint filled) keep training."""
    fresh = set(encoder.fresh_parameter_names)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in fresh)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name every parameter of `module` that trains."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Count ``(trainable, all)`` parameters of `module`; works on the meta device."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters())
