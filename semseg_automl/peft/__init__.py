"""Parameter-efficient fine-tuning methods of Conv-LoRA's table 1; to add one: a class and a line in `METHODS`."""

from __future__ import annotations

from semseg_automl.peft.base import PeftMethod, count_parameters, trainable_parameters
from semseg_automl.peft.conv_lora import ConvLora
from semseg_automl.peft.freeze import DecoderOnly, Full
from semseg_automl.peft.lora import Lora

METHODS: dict[str, type[PeftMethod]] = {
    "decoder_only": DecoderOnly,
    "lora": Lora,
    "conv_lora": ConvLora,
    "full": Full,
}

__all__ = ["METHODS", "PeftMethod", "count_parameters", "trainable_parameters"]
