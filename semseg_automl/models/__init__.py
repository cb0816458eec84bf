"""Networks: pure torch, built from plain values; they know no table, no configuration and no PEFT method.

To add an encoder: a subclass of `Encoder` and a line in `ENCODERS`; those of timm go by ``timm/<name>`` instead.
"""

from __future__ import annotations

from collections.abc import Callable

from semseg_automl.models.encoder import Encoder
from semseg_automl.models.sam import SAM_ENCODERS
from semseg_automl.models.tiny_vit import TinyViT

ENCODERS: dict[str, Callable[..., Encoder]] = {
    "tiny_vit": TinyViT,
    **SAM_ENCODERS,
}

__all__ = ["ENCODERS", "Encoder"]
