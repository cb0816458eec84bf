"""Methods that add nothing and only choose what trains: decoder-only, BitFit and full fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from semseg_automl.models.encoder import Encoder
from semseg_automl.peft.base import PeftMethod, freeze_pretrained


class DecoderOnly(PeftMethod):
    """Train the mask decoder alone, the encoder frozen (row "decoder-only" of Conv-LoRA's table 1)."""

    name: ClassVar[str] = "decoder_only"
    frozen_prefix: ClassVar[bool] = True

    def _adapt(self, encoder: Encoder) -> None:
        freeze_pretrained(encoder)


class BitFit(PeftMethod):
    """Train the encoder's biases (Zaken, Goldberg, Ravfogel, "BitFit", ACL 2022, arXiv 2106.10199, section 3)."""

    name: ClassVar[str] = "bitfit"

    def _adapt(self, encoder: Encoder) -> None:
        freeze_pretrained(encoder)
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias"):  # EVA's q_bias and v_bias among them
                parameter.requires_grad_(True)


class Full(PeftMethod):
    """Train every parameter: the only sensible choice for an encoder without pretrained weights."""

    name: ClassVar[str] = "full"

    def _adapt(self, encoder: Encoder) -> None:
        encoder.requires_grad_(True)
