"""From a plan to a network: encoder, fine-tuning method and mask decoder put together.

Here plain values leave the plan; the networks themselves know nothing of it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from semseg_automl.errors import ConfigError
from semseg_automl.models import ENCODERS
from semseg_automl.models.checkpoints import read_checkpoint
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft import METHODS
from semseg_automl.plan import Plan


def build_model(plan: Plan, *, pretrained: bool = True) -> SegmentationModel:
    """Build the network a plan describes, its fine-tuning method applied.

    Args:
        plan: the decisions.
        pretrained: read ``plan.checkpoint``, if there is one; False leaves random weights for a bundle to fill, and
            opens no file.

    Raises:
        CheckpointError: the checkpoint cannot be read or belongs to another architecture.
        ConfigError: an option is unknown or out of range.
    """
    dim: Any = plan.decoder_options["dim"]
    options: dict[str, Any] = dict(plan.encoder_options)
    encoder = ENCODERS[plan.encoder](out_channels=dim, **options)
    if plan.checkpoint is not None:
        if pretrained:
            encoder.load_pretrained(read_checkpoint(plan.checkpoint), source=plan.checkpoint)
        else:
            encoder.mark_pretrained()
    build_method(plan.peft, plan.peft_options).apply(encoder)
    decoder_options: dict[str, Any] = dict(plan.decoder_options)
    return SegmentationModel(encoder, MaskDecoder(**decoder_options))


def build_method(name: str, options: dict[str, Any]) -> Any:
    """Build a fine-tuning method by name, its options checked.

    Raises:
        ConfigError: the name or an option is unknown, or a value is out of range.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown fine-tuning method '{name}'. Known: {', '.join(METHODS)}.")
    known = inspect.signature(METHODS[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"{name} has no option '{unknown[0]}'. Its options: {', '.join(known) or 'none'}.")
    return METHODS[name](**options)


def seeded_model(plan: Plan) -> SegmentationModel:
    """Build the network with random parts drawn from the plan's seed, torch's own random state left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        return build_model(plan)
