"""Parameter-efficient fine-tuning methods of Conv-LoRA's table 1; to add one: a class and a line in `METHODS`."""

from __future__ import annotations

from semseg_automl.peft.adapters import Adapter, SamAdapter
from semseg_automl.peft.base import PeftMethod, count_parameters, trainable_parameters
from semseg_automl.peft.conv_lora import ConvLora
from semseg_automl.peft.freeze import BitFit, DecoderOnly, Full
from semseg_automl.peft.lora import Lora
from semseg_automl.peft.lst import Lst
from semseg_automl.peft.ssf import Ssf
from semseg_automl.peft.vpt import Vpt

METHODS: dict[str, type[PeftMethod]] = {
    "decoder_only": DecoderOnly,
    "bitfit": BitFit,
    "adapter": Adapter,
    "vpt": Vpt,
    "lst": Lst,
    "sam_adapter": SamAdapter,
    "ssf": Ssf,
    "lora": Lora,
    "conv_lora": ConvLora,
    "full": Full,
}

__all__ = ["METHODS", "PeftMethod", "count_parameters", "trainable_parameters"]
