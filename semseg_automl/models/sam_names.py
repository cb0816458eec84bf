"""The two namings in which SAM's weights are found, brought to segment_anything's; no tensor is touched here.

segment_anything (Kirillov et al., 2023) is the original. Hugging Face ``transformers`` keeps the same tensors, with the
same shapes, under names of its own.
"""

from __future__ import annotations

import itertools
import re

import torch
from torch import Tensor

from semseg_automl.errors import CheckpointError

_ORIGINAL_PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")

_POSITION = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"

# transformers' name -> segment_anything's, both without what follows ("weight", "attn.qkv.bias", ...). "#" is a number,
# taken over in order.
_RENAMED = {
    "vision_encoder.pos_embed": "image_encoder.pos_embed",
    "vision_encoder.patch_embed.projection": "image_encoder.patch_embed.proj",
    "vision_encoder.layers.#.layer_norm#": "image_encoder.blocks.#.norm#",
    "vision_encoder.layers.#.attn": "image_encoder.blocks.#.attn",
    "vision_encoder.layers.#.mlp": "image_encoder.blocks.#.mlp",
    "vision_encoder.neck.conv1": "image_encoder.neck.0",
    "vision_encoder.neck.layer_norm1": "image_encoder.neck.1",
    "vision_encoder.neck.conv2": "image_encoder.neck.2",
    "vision_encoder.neck.layer_norm2": "image_encoder.neck.3",
    # One tensor, used in two places there; a file holds it under either name, or both.
    "shared_image_embedding.positional_embedding": _POSITION,
    "prompt_encoder.shared_embedding.positional_embedding": _POSITION,
    "prompt_encoder.point_embed.#": "prompt_encoder.point_embeddings.#",
    "prompt_encoder.not_a_point_embed": "prompt_encoder.not_a_point_embed",
    "prompt_encoder.no_mask_embed": "prompt_encoder.no_mask_embed",
    "prompt_encoder.mask_embed.conv1": "prompt_encoder.mask_downscaling.0",
    "prompt_encoder.mask_embed.layer_norm1": "prompt_encoder.mask_downscaling.1",
    "prompt_encoder.mask_embed.conv2": "prompt_encoder.mask_downscaling.3",
    "prompt_encoder.mask_embed.layer_norm2": "prompt_encoder.mask_downscaling.4",
    "prompt_encoder.mask_embed.conv3": "prompt_encoder.mask_downscaling.6",
    "mask_decoder.iou_token": "mask_decoder.iou_token",
    "mask_decoder.mask_tokens": "mask_decoder.mask_tokens",
    "mask_decoder.transformer.layers.#.layer_norm#": "mask_decoder.transformer.layers.#.norm#",
    "mask_decoder.transformer.layers.#.self_attn": "mask_decoder.transformer.layers.#.self_attn",
    "mask_decoder.transformer.layers.#.cross_attn_token_to_image": (
        "mask_decoder.transformer.layers.#.cross_attn_token_to_image"
    ),
    "mask_decoder.transformer.layers.#.cross_attn_image_to_token": (
        "mask_decoder.transformer.layers.#.cross_attn_image_to_token"
    ),
    "mask_decoder.transformer.layers.#.mlp": "mask_decoder.transformer.layers.#.mlp",
    "mask_decoder.transformer.final_attn_token_to_image": "mask_decoder.transformer.final_attn_token_to_image",
    "mask_decoder.transformer.layer_norm_final_attn": "mask_decoder.transformer.norm_final_attn",
    "mask_decoder.upscale_conv1": "mask_decoder.output_upscaling.0",
    "mask_decoder.upscale_layer_norm": "mask_decoder.output_upscaling.1",
    "mask_decoder.upscale_conv2": "mask_decoder.output_upscaling.3",
    # SAM's three-layer perceptrons.
    "mask_decoder.output_hypernetworks_mlps.#.proj_in": "mask_decoder.output_hypernetworks_mlps.#.layers.0",
    "mask_decoder.output_hypernetworks_mlps.#.layers.0": "mask_decoder.output_hypernetworks_mlps.#.layers.1",
    "mask_decoder.output_hypernetworks_mlps.#.proj_out": "mask_decoder.output_hypernetworks_mlps.#.layers.2",
    "mask_decoder.iou_prediction_head.proj_in": "mask_decoder.iou_prediction_head.layers.0",
    "mask_decoder.iou_prediction_head.layers.0": "mask_decoder.iou_prediction_head.layers.1",
    "mask_decoder.iou_prediction_head.proj_out": "mask_decoder.iou_prediction_head.layers.2",
}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)") + r"(?P<rest>\..+)?")


def _template(name: str) -> str:
    count = itertools.count(1)
    return re.sub("#", lambda _: rf"\g<{next(count)}>", name) + r"\g<rest>"


_RULES = [(_pattern(theirs), _template(original)) for theirs, original in _RENAMED.items()]


def to_sam_names(state: dict[str, Tensor], *, source: str = "the checkpoint") -> dict[str, Tensor]:
    """Name a SAM's tensors as segment_anything does.

    Args:
        state: tensors by name, in segment_anything's naming (returned as they are) or in that of ``transformers``.
        source: what to call the file in errors.

    Returns:
        The same tensors, not copied.

    Raises:
        CheckpointError: some names belong to neither naming, or the two names of the position encoding's tensor hold
            different values.
    """
    if any(name.startswith("vision_encoder.") for name in state):
        return _from_transformers(state, source)
    strange = [name for name in state if not name.startswith(_ORIGINAL_PARTS)]
    if strange or not any(name.startswith("image_encoder.") for name in state):
        raise _unknown_names(strange or list(state), source)
    return dict(state)


def _from_transformers(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    strange = []
    for theirs, tensor in state.items():
        name = _original_name(theirs)
        if name is None:
            strange.append(theirs)
        elif name in renamed and not torch.equal(renamed[name], tensor):
            raise CheckpointError(
                f"{source}: '{theirs}' and its twin, which becomes '{name}' too, hold different values; SAM has "
                "one tensor there. Give a checkpoint as SamModel.save_pretrained writes it."
            )
        else:
            renamed[name] = tensor
    if strange:
        raise _unknown_names(strange, source)
    return renamed


def _original_name(name: str) -> str | None:
    """Return segment_anything's name for one of ``transformers``, or None if there is none."""
    matches = ((pattern.fullmatch(name), template) for pattern, template in _RULES)
    return next((match.expand(template) for match, template in matches if match is not None), None)


def _unknown_names(names: list[str], source: str) -> CheckpointError:
    found = ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return CheckpointError(
        f"{source} does not hold the weights of a SAM, by these names: {found or 'none at all'}. Allowed are those of "
        "segment_anything (image_encoder.blocks.0.attn.qkv.weight, ...) and of transformers "
        "(vision_encoder.layers.0.attn.qkv.weight, ...). Give such a checkpoint, or choose the encoder that these "
        "weights belong to."
    )
