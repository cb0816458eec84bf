"""From a plan to a network: encoder, fine-tuning method and mask decoder put together.

Here plain values leave the plan; the networks themselves know nothing of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from semseg_automl.errors import ConfigError
from semseg_automl.models import ENCODERS, Encoder
from semseg_automl.models.checkpoints import read_checkpoint
from semseg_automl.models.downloads import OFFICIAL as SAM_FILES
from semseg_automl.models.downloads import fetch_checkpoint
from semseg_automl.models.facts import OFFICIAL, TIMM_PREFIX
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SAM_ENCODERS, SamViT, unfilled
from semseg_automl.models.sam_names import to_sam_names
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft import METHODS, PeftMethod
from semseg_automl.peft.interchange import load_adapter
from semseg_automl.plan import Plan


def build_model(plan: Plan, *, pretrained: bool = True) -> SegmentationModel:
    """Build the network a plan describes, its fine-tuning method applied.

    Args:
        plan: the decisions.
        pretrained: read ``plan.checkpoint`` and ``plan.adapter``, where there are any; False opens no file and leaves
            random weights, or for SAM with a checkpoint any weights, for a bundle to fill.

    Raises:
        CheckpointError: the checkpoint cannot be read or belongs to another architecture.
        ConfigError: an option is unknown or out of range.
    """
    decoder_options: dict[str, Any] = dict(plan.decoder_options)
    encoder = _build_encoder(plan)
    decoder = MaskDecoder(**decoder_options)
    if plan.checkpoint is not None:
        if pretrained:
            _load(plan, encoder, decoder)
        else:
            encoder.mark_pretrained()
    method = build_method(plan.peft, plan.peft_options)
    method.apply(encoder)
    method.apply_to_decoder(decoder, pretrained=plan.checkpoint is not None and isinstance(encoder, SamViT))
    model = SegmentationModel(encoder, decoder)
    if plan.adapter is not None and pretrained:
        load_adapter(model, plan.adapter)
    if plan.merged:
        method.merge(encoder)
    return model


def _build_encoder(plan: Plan) -> Encoder:
    """Build the encoder of a plan with random weights, or with none yet where a file will fill them."""
    options: dict[str, Any] = {**plan.encoder_options, "out_channels": plan.decoder_options["dim"]}
    if plan.encoder.startswith(TIMM_PREFIX):
        from semseg_automl.models.timm_encoder import build_timm_encoder  # seconds of importing: only where used

        return build_timm_encoder(plan.encoder.removeprefix(TIMM_PREFIX), **options)
    if plan.encoder not in ENCODERS:
        raise ConfigError(f"unknown encoder '{plan.encoder}'. Known: {', '.join(ENCODERS)}, {TIMM_PREFIX}<name>.")
    build = functools.partial(ENCODERS[plan.encoder], **options)
    # A checkpoint, or the bundle that is loaded, fills all of SAM; plain ViTs have a neck of their own.
    return unfilled(build) if plan.encoder in SAM_ENCODERS and plan.checkpoint is not None else build()


def _load(plan: Plan, encoder: Encoder, decoder: MaskDecoder) -> None:
    """Fill encoder, and decoder where the checkpoint has one, from the plan's checkpoint."""
    if plan.checkpoint == OFFICIAL and plan.encoder.startswith(TIMM_PREFIX):
        from semseg_automl.models.timm_encoder import fetch_timm_weights

        state, source = fetch_timm_weights(plan.encoder.removeprefix(TIMM_PREFIX)), plan.encoder
    else:
        path = fetch_checkpoint(SAM_FILES[plan.encoder]) if plan.checkpoint == OFFICIAL else plan.checkpoint
        state, source = read_checkpoint(str(path)), str(path)
    if isinstance(encoder, SamViT):
        state = to_sam_names(state, source=source)
        decoder.load_sam(state, source=source)
    encoder.load_pretrained(state, source=source)


def build_method(name: str, options: Mapping[str, Any]) -> PeftMethod:
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
