"""What every parameter-efficient fine-tuning method owes the rest: one class, one `PeftMethod._adapt`.

The methods themselves live beside this file; freezing and the check of what an encoder offers are here, because they
are the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from semseg_automl.errors import UnsupportedCombination
from semseg_automl.models.encoder import Encoder
from semseg_automl.models.mask_decoder import MaskDecoder


class PeftMethod(ABC):
    """One way to adapt a frozen encoder.

    A method is built from plain keyword values and checks them at once; `apply` then edits the encoder in place through
    its seams: it may replace layers, or set ``encoder.side`` or ``encoder.prompter``, and nothing else. It leaves the
    parameters it adds trainable, and every parameter it does not train with ``requires_grad = False``.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """The seams it works on, in the names of `Encoder.parts`."""
    changes_at_init: ClassVar[str] = ""
    """Why the adapted encoder differs from the frozen one before the first step; empty where they are bit-equal."""
    not_mergeable: ClassVar[str] = ""
    """Why what was learned cannot be folded into the base weights; empty where it can."""
    frozen_prefix: ClassVar[bool] = False
    """Whether all blocks stay frozen and see nothing trained, so that their features need computing only once."""
    reads_all_blocks: ClassVar[bool] = False
    """Whether the tokens after every block are read later on, not only those that the neck taps."""

    def apply(self, encoder: Encoder) -> None:
        """Adapt `encoder` in place.

        Raises:
            UnsupportedCombination: the encoder has not the parts this method works on; the methods that work are named.
            ConfigError: an option does not fit the encoder's width or depth.
        """
        missing = self.needs - encoder.parts()
        if missing:
            raise UnsupportedCombination(
                f"optim.peft is '{self.name}', which works on {', '.join(sorted(self.needs))} of every block; "
                f"{getattr(encoder, 'name', type(encoder).__name__)} lacks {', '.join(sorted(missing))}. Methods that "
                f"work with it: {', '.join(_fitting(encoder))}."
            )
        self._adapt(encoder)

    @abstractmethod
    def _adapt(self, encoder: Encoder) -> None:
        """Adapt `encoder`, which has all that `needs` names."""

    def apply_to_decoder(self, decoder: MaskDecoder, *, pretrained: bool) -> None:  # noqa: B027
        """Adapt the mask decoder in place; most methods leave it as it is, all of it training.

        Args:
            decoder: the decoder.
            pretrained: whether its weights come from a checkpoint.
        """

    def merge(self, encoder: Encoder) -> None:
        """Fold what was learned into the base weights of an adapted `encoder`, which then has its own layers again.

        Raises:
            UnsupportedCombination: what was learned cannot be folded; the message says why.
        """
        if self.not_mergeable:
            raise UnsupportedCombination(
                f"optim.peft is '{self.name}', which cannot be merged: {self.not_mergeable}. Methods that can: "
                f"{', '.join(_mergeable())}. Use the segmentor as it is."
            )
        self._fold(encoder)

    def _fold(self, encoder: Encoder) -> None:  # noqa: B027
        """Fold; methods that train the base weights themselves have nothing to fold."""

    def learning_rate_ratio(self, parameter_name: str) -> float:
        """Return the parameter's learning rate as a multiple of the plan's."""
        return 1.0


def _fitting(encoder: Encoder) -> list[str]:
    """Name the methods that work with an encoder."""
    from semseg_automl.peft import METHODS  # the dict is made of the classes that derive from this file's

    return [name for name, method in METHODS.items() if method.needs <= encoder.parts()]


def _mergeable() -> list[str]:
    """Name the methods that can be merged."""
    from semseg_automl.peft import METHODS

    return [name for name, method in METHODS.items() if not method.not_mergeable]


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
