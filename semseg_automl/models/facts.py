"""What a plan has to know of an encoder before it is built: shape, stride, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from semseg_automl.errors import ConfigError, nearest
from semseg_automl.models.checkpoints import read_checkpoint
from semseg_automl.models.encoder import choose_taps
from semseg_automl.models.sam import SAM_ENCODERS, SAM_SIZES
from semseg_automl.models.tiny_vit import plain_vit_shape

Family = Literal["tiny_vit", "sam", "timm"]
OFFICIAL = "official"
"""Stands in a plan for the weights that the encoder's authors published, fetched when the network is built."""

TIMM_PREFIX = "timm/"
SCRATCH_ENCODER: dict[str, int | bool | list[int]] = {
    "embed_dim": 192,
    "depth": 4,
    "num_heads": 3,
    "patch_size": 16,
    "conv_stem": True,
    "window_size": 0,
    "grid": 16,
    "neck_taps": [1, 3],
}


@dataclass(frozen=True)
class EncoderFacts:
    """An encoder as a plan sees it.

    Attributes:
        name: of `ENCODERS`, or ``timm/<name>``.
        family: which of our classes runs it.
        options: its architecture, enough to rebuild it without the checkpoint.
        stride: pixels per token and side.
        embed_dim: width of the tokens.
        depth: number of blocks; 0 for an encoder without.
        taps: token grids that its neck reads.
        fixed_size: ``(height, width)`` that its input must have, None for any.
        checkpoint: file of its weights, `OFFICIAL`, or None for random ones.
        why: where that follows from, in words.
    """

    name: str
    family: Family
    options: dict[str, int | bool | str | list[int]]
    stride: int
    embed_dim: int
    depth: int
    checkpoint: str | None
    why: str
    taps: int = 1
    fixed_size: tuple[int, int] | None = None

    @property
    def pretrained(self) -> bool:
        """Whether the weights are not random."""
        return self.checkpoint is not None


def encoder_facts(
    name: str,
    *,
    checkpoint: str | None = None,
    pretrained: bool = True,
    accept_license: str | None = None,
    window_size: int = 0,
) -> EncoderFacts:
    """Look an encoder up. Reads a given checkpoint's shapes for ``tiny_vit``; downloads nothing.

    Args:
        name: ``tiny_vit``, a name of `SAM_ENCODERS`, or ``timm/<name>``.
        checkpoint: file of pretrained weights, or None for the published ones where there are any.
        pretrained: False asks for random weights.
        accept_license: of published weights that are not free for every use.
        window_size: side in tokens of the attention windows of ``tiny_vit`` with a checkpoint; the last block of each
            quarter of the depth stays global. 0 for global attention everywhere.

    Raises:
        CheckpointError: the file cannot be read, or is of another architecture.
        ConfigError: the name is unknown, a licence has to be accepted first, or an argument does not fit the others.
    """
    if checkpoint is not None and not pretrained:
        raise ConfigError("model.checkpoint is set and model.pretrained is false. Leave one of them out.")
    if window_size and (name != "tiny_vit" or checkpoint is None):
        raise ConfigError(
            f"model.window_size is {window_size}, which only tiny_vit with a checkpoint takes. Leave it out."
        )
    if name.startswith(TIMM_PREFIX):
        return _timm_facts(name, checkpoint, pretrained, accept_license)
    if accept_license is not None:
        raise ConfigError(f"model.accept_license is set, but {name} needs none. Leave it out.")
    if name in SAM_ENCODERS:
        size = SAM_SIZES[name]
        source = checkpoint or (OFFICIAL if pretrained else None)
        why = {None: "random weights, as asked", OFFICIAL: "the published weights, fetched once"}
        reason = why.get(source, "weights as asked")
        return EncoderFacts(name, "sam", {}, 16, size["embed_dim"], size["depth"], source, reason)
    if name == "tiny_vit":
        return _tiny_vit_facts(checkpoint, window_size)
    known = ["tiny_vit", *SAM_ENCODERS]
    raise ConfigError(
        f"unknown model.encoder '{name}'{nearest(name, known)}. Known: {', '.join(known)}, timm/<name of a timm model>."
    )


def _tiny_vit_facts(checkpoint: str | None, window_size: int) -> EncoderFacts:
    if checkpoint is None:
        shape = dict(SCRATCH_ENCODER)
        why = "no checkpoint: a small encoder that trains from scratch in minutes"
    else:
        shape = {**plain_vit_shape(read_checkpoint(checkpoint), source=checkpoint), "window_size": window_size}
        shape["neck_taps"] = list(choose_taps(None, int(str(shape["depth"]))))
        why = "read off the checkpoint; attention is global, as it was pretrained"
        if window_size:
            shape["global_blocks"] = shape["neck_taps"]
            why = "read off the checkpoint; attention windows as asked"
    stride, width, depth = (int(str(shape[key])) for key in ("patch_size", "embed_dim", "depth"))
    taps = shape["neck_taps"]
    grids = len(taps) if isinstance(taps, list) else 1
    return EncoderFacts("tiny_vit", "tiny_vit", dict(shape), stride, width, depth, checkpoint, why, grids)


def _timm_facts(name: str, checkpoint: str | None, pretrained: bool, accept_license: str | None) -> EncoderFacts:
    from semseg_automl.models.timm_encoder import build_timm_encoder, check_license

    model = name.removeprefix(TIMM_PREFIX)
    with torch.device("meta"):
        encoder = build_timm_encoder(model)
    if checkpoint is None and pretrained:
        check_license(model, accept_license)
    source = checkpoint or (OFFICIAL if pretrained else None)
    return EncoderFacts(
        name,
        "timm",
        {},
        encoder.stride,
        encoder.embed_dim,
        len(encoder.blocks),
        source,
        {None: "random weights, as asked", OFFICIAL: "timm's published weights"}.get(source, "weights as asked"),
        taps=len(getattr(encoder, "neck_taps", ())) or 1,
        fixed_size=getattr(encoder, "fixed_size", None),
    )
