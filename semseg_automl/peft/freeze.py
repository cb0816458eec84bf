"""Methods that add nothing and only choose what trains: decoder-only and full fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from semseg_automl.models.encoder import Encoder
from semseg_automl.peft.base import PeftMethod, freeze_pretrained


class DecoderOnly(PeftMethod):
    """Train the mask decoder alone, the encoder frozen (row "decoder-only" of Conv-LoRA's table 1)."""

    name: ClassVar[str] = "decoder_only"

    def apply(self, encoder: Encoder) -> None:
        """Freeze the encoder's pretrained parts."""
        freeze_pretrained(encoder)


class Full(PeftMethod):
    """Train every parameter: the only sensible choice for an encoder without pretrained weights."""

    name: ClassVar[str] = "full"

    def apply(self, encoder: Encoder) -> None:
        """Leave every parameter trainable."""
        encoder.requires_grad_(True)
