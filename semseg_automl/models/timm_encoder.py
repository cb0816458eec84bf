"""Encoders out of timm, by name: plain vision transformers, and hierarchical networks as feature pyramids.

timm builds the networks and reads their weights; the loop over the blocks, the neck and the seams for PEFT methods are
ours. timm is imported inside the functions that need it, because importing it takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semseg_automl.errors import CheckpointError, ConfigError, UnsupportedCombination, nearest
from semseg_automl.models.encoder import Encoder, EncoderState, Seam, TokenEncoder, choose_taps
from semseg_automl.models.grid_blocks import GridBlock
from semseg_automl.models.pyramid import FeaturePyramid, freeze_statistics
from semseg_automl.models.tiny_vit import MultiBlockNeck

FREE_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")
"""Licences, as timm spells them, that allow every use; weights under any other one have to be accepted by name."""

VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_sam", "deit", "eva")
ANY_SIZE: dict[str, dict[str, Any]] = {
    **{module: {"dynamic_img_size": True} for module in VIT_MODULES if module != "vision_transformer_sam"},
    **{module: {"strict_img_size": False} for module in ("swin_transformer", "swin_transformer_v2")},
}
"""Per module of timm, the option under which its models take images of any size."""

FINEST = 4
"""Smallest reduction of the feature maps read; finer ones cost much memory and show edges, not objects."""

NOT_OPTIONS = {
    *("in_chans", "num_classes", "features_only", "patch_drop_rate", "cache_dir"),
    *("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"),
}
"""What timm's constructors take, but would lead past our own loading or break the token grid."""

HEADS = ("head", "head_dist", "head_drop", "fc_norm", "attn_pool", "neck", "blocks")
"""Parts of a vision transformer that do not stay in the trunk: what follows the last block, and the blocks."""

CONVERSION_ERRORS = (*(RuntimeError, ValueError, LookupError, TypeError), *(AttributeError, AssertionError))
"""What timm's converters fail with on tensors that they do not expect; they check little by themselves."""


def build_timm_encoder(name: str, **options: Any) -> Encoder:
    """Build an encoder with random weights from the name of a timm model.

    Args:
        name: as in ``timm.list_models()``, with or without the tag of its weights.
        options: of `TimmViT` or `TimmPyramid`, and those that timm's own constructor takes.

    Raises:
        ConfigError: the name or an option is unknown.
        UnsupportedCombination: the model gives no features that an encoder could use.
    """
    from semseg_automl.third_party import timm

    _pretrained_config(name)
    is_vit = timm.models.is_model_in_modules(name, VIT_MODULES)
    return TimmViT(name, **options) if is_vit else TimmPyramid(name, **options)


def check_license(name: str, accept_license: str | None) -> None:
    """Raise `ConfigError` unless a timm model's published weights are free, or `accept_license` names their licence.

    Licences are spelled as by timm; weights for which it states none are under "unknown".
    """
    found = _pretrained_config(name).license or "unknown"
    if found not in FREE_LICENSES and accept_license != found:
        given = f"; model.accept_license is '{accept_license}'" if accept_license is not None else ""
        raise ConfigError(
            f"the published weights of '{name}' have the licence '{found}', which may forbid your use{given}. Read it, "
            f"then pass model.accept_license='{found}'; or choose weights under {', '.join(FREE_LICENSES)}."
        )


def fetch_timm_weights(name: str) -> dict[str, Tensor]:
    """Fetch the published weights of a timm model from its cache or the network.

    Returns:
        Tensors by timm's names, without the classifier.

    Raises:
        CheckpointError: they cannot be fetched or read.
        ConfigError: the name is unknown, or nobody published weights under it.
    """
    from huggingface_hub import errors as hub_errors

    from semseg_automl.third_party import timm

    if not _pretrained_config(name).has_weights:
        tags = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        known = f"Those with weights: {', '.join(tags)}." if tags else "Use model.pretrained=false."
        raise ConfigError(f"timm has no published weights for '{name}'. {known}")
    # The hub's client lets errors of its transport through, whose library changed between its versions.
    transport: type[Exception] = getattr(hub_errors, "HTTPError", OSError)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, transport) as error:
        raise CheckpointError(
            f"cannot fetch the published weights of '{name}' ({error}). Without a network, pass "
            "model.checkpoint=<file of its weights> or model.pretrained=false."
        ) from error
    return dict(model.state_dict())


def _pretrained_config(name: str) -> Any:
    """Return timm's record of a model's weights; raise `ConfigError` naming the nearest model for an unknown name."""
    from semseg_automl.third_party import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ConfigError(
            f"timm has no model '{base}'{nearest(base, timm.list_models())}. timm.list_models() has all of them."
        )
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if tag and name not in tagged:
        known = ", ".join(tagged) or f"{base} alone"
        raise ConfigError(f"timm's '{base}' has no weights '{tag}'{nearest(name, tagged)}. Known: {known}.")
    return timm.models.get_pretrained_cfg(name, allow_unregistered=False)


def _any_size(name: str) -> dict[str, Any]:
    """Return the option by which a timm model takes images of any size; empty where none is needed or known."""
    from semseg_automl.third_party import timm

    return next((option for module, option in ANY_SIZE.items() if timm.models.is_model_in_modules(name, module)), {})


def _create(name: str, options: dict[str, Any]) -> Any:
    """Build a timm model without classifier and with random weights, for images of any size where it allows them.

    Dropout and stochastic depth are off unless the options speak of them: some models have them on by default, and
    what a frozen encoder computes must not change from step to step.
    """
    from semseg_automl.third_party import timm

    refused = sorted(NOT_OPTIONS & options.keys())
    if refused:
        raise ConfigError(
            f"'{refused[0]}' is no option of an encoder; only those of the architecture are. Leave it out."
        )
    try:
        model = timm.create_model(name, num_classes=0, **{**_any_size(name), **options})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"timm cannot build '{name}' with the options {options or 'given'} ({error}). Leave out those it does not "
            "take."
        ) from error
    layers: Any = timm.layers
    if not any("drop" in option for option in options):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, layers.DropPath):
                module.drop_prob = 0.0
    return model


def _pixel_scale(model: Any, key: str) -> tuple[float, float, float]:
    """Return the ``mean`` or ``std`` that a timm model wants its input normalised with, in units of 0..255."""
    red, green, blue = (255 * float(value) for value in model.pretrained_cfg[key])
    return red, green, blue


def _load(
    encoder: nn.Module, ours: dict[str, str], name: str, options: dict[str, Any], state: dict[str, Tensor], source: str
) -> None:
    """Fill an encoder of the timm model `name` from a checkpoint in timm's names, or original ones that timm converts.

    `ours` has our name for each tensor wanted, by timm's name.

    Raises:
        CheckpointError: the tensors belong to another architecture.
    """
    with torch.device("meta"):
        whole = _create(name, options)  # timm's converters read shapes off it, also of parts that the trunk has not
    # Under this name in every module of timm whose models ever had other names or another position grid.
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if convert is not None:
        try:
            tensors = convert(tensors, whole)
        except CONVERSION_ERRORS as error:
            raise CheckpointError(f"{source}: timm cannot read it as '{name}' ({error}). Give its weights.") from error
    classifiers = whole.pretrained_cfg.get("classifier") or ()
    heads = (*([classifiers] if isinstance(classifiers, str) else classifiers), "head", "head_dist", "fc_norm")
    spare = tuple(f"{head}." for head in heads)
    known = whole.state_dict().keys() | ours.keys()
    # Counters of batch normalisation, which it does not use unless its momentum is None, came later than some files.
    missing = sorted(key for key in ours.keys() - tensors.keys() if not key.endswith("num_batches_tracked"))
    surplus = sorted(key for key in tensors.keys() - known if not key.startswith(spare))
    for keys, fault in ((missing, "lacks"), (surplus, "has too many:")):
        if keys:
            raise CheckpointError(
                f"{source} {fault} {len(keys)} tensors, going by timm's '{name}', for example '{keys[0]}'. Give "
                "weights of that model, or name the model they are of in model.encoder."
            )
    own = encoder.state_dict()
    for theirs, mine in ours.items():
        if theirs in tensors and tensors[theirs].shape != own[mine].shape:
            raise CheckpointError(
                f"{source}: '{theirs}' has shape {tuple(tensors[theirs].shape)}, timm's '{name}' expects "
                f"{tuple(own[mine].shape)}. Give weights of that model."
            )
    encoder.load_state_dict({mine: tensors[key] for key, mine in ours.items() if key in tensors}, strict=False)


class TimmViT(TokenEncoder):
    """A vision transformer of timm: DeiT, MAE, DINOv2, DINOv3, EVA, SAM's, and what else is built like them.

    The stride is the model's patch size, 14 for DINOv2. The grid's tokens of the tapped blocks go through the model's
    final norm, as DINOv2's segmentation heads read them, then into the neck. Position embeddings are resized to the
    grid of the input as timm does it, rotary positions are made for it.

    Between stages, the state's tokens are the prefix ``(B, P, C)`` if there is one, and the grid ``(B, H, W, C)``.

    Attributes:
        prefix_tokens: P, the number of class, distillation and register tokens.

    Args:
        name: of the timm model.
        out_channels: channels of the embeddings.
        neck_taps: blocks whose tokens the neck reads, the last one among them; None for one per quarter of the depth.
        options: of timm's constructor, such as ``img_size``, the image size of the stored position embedding.

    Raises:
        ConfigError: the taps are not blocks with the last one among them, or an option is unknown.
        UnsupportedCombination: the model is built otherwise than a plain vision transformer.
    """

    def __init__(
        self, name: str, *, out_channels: int = 256, neck_taps: Sequence[int] | None = None, **options: Any
    ) -> None:
        from semseg_automl.third_party import timm

        vit = _create(name, options)
        super().__init__(pixel_mean=_pixel_scale(vit, "mean"), pixel_std=_pixel_scale(vit, "std"))
        families = timm.models.vision_transformer, timm.models.eva, timm.models.vision_transformer_sam
        plain, eva, sam = families[0].VisionTransformer, families[1].Eva, families[2].VisionTransformerSAM
        patch = vit.patch_embed.feat_ratio(as_scalar=False) if isinstance(vit, (plain, eva, sam)) else (0, 1)
        if patch[0] != patch[1] or getattr(vit, "rope_global", None) is not None:
            raise UnsupportedCombination(
                f"timm's '{name}' with the options {options} is not a vision transformer with square patches and "
                "positions for images of any size. Use its default options, or another model."
            )
        depth = len(vit.blocks)
        self.name = name
        self.options = options
        self.stride = patch[0]
        self.embed_dim = vit.embed_dim
        self.out_channels = out_channels
        self.neck_taps = choose_taps(neck_taps, depth)
        self.prefix_tokens: int = getattr(vit, "num_prefix_tokens", 0)
        # Noted here, because a method may put a layer of its own there.
        self._one_patch_layer = isinstance(getattr(vit.patch_embed, "proj", None), nn.Conv2d | nn.Linear)
        self.blocks = nn.ModuleList(
            GridBlock(block, window=getattr(block, "window_size", 0), on_grid=isinstance(vit, sam))
            for block in vit.blocks
        )
        for block in vit.blocks:
            if getattr(getattr(block, "attn", None), "q_bias", None) is not None:
                block.attn.qkv_bias_separate = True  # else EVA's attention reads qkv.weight and never calls qkv
        for part in HEADS:
            if isinstance(getattr(vit, part, None), nn.Module):
                delattr(vit, part)
        self.trunk = vit
        self.neck = MultiBlockNeck(self.embed_dim, out_channels, len(self.neck_taps))
        self.fresh_parameter_names = frozenset(key for key, _ in self.named_parameters())

    def train(self, mode: bool = True) -> TimmViT:
        """Switch training mode, except for frozen batch normalisation, and that rotary positions stay exact.

        Some models distort them at random in pretraining, which the two halves of a cut encoding would do apart.
        """
        super().train(mode)
        freeze_statistics(self)
        if getattr(self.trunk, "rope", None) is not None:
            self.trunk.rope.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Turn normalised images ``(B, 3, H, W)`` into ``(B, P + H / stride * W / stride, embed_dim)``."""
        from semseg_automl.third_party import timm

        layers: Any = timm.layers
        trunk = self.trunk
        x = trunk.patch_embed(images)
        if isinstance(trunk, timm.models.vision_transformer_sam.VisionTransformerSAM):
            if trunk.pos_embed is not None:
                x = x + layers.resample_abs_pos_embed_nhwc(trunk.pos_embed, list(x.shape[1:3]))
            x = trunk.pos_drop(x).flatten(1, 2)
        else:
            x = trunk._pos_embed(x)
            x = x[0] if isinstance(x, tuple) else x  # EVA returns the rotary positions as well
        tokens: Tensor = trunk.norm_pre(x)
        return tokens

    def read_out(self, tapped: list[Tensor]) -> Tensor:
        """Turn the tapped token grids into embeddings ``(B, out_channels, H / stride, W / stride)``."""
        # SAM's trunk has no norm after its blocks but in its neck, and others have theirs behind a pooling.
        norm = getattr(self.trunk, "norm", nn.Identity())
        embeddings: Tensor = self.neck([norm(tokens) for tokens in tapped])
        return embeddings

    def close(self, tokens: Tensor, images: Tensor) -> EncoderState:
        """Cut tokens ``(B, P + H * W, C)`` of images into prefix, if there is one, and grid ``(B, H, W, C)``."""
        return self._split(tokens, (images.shape[-2] // self.stride, images.shape[-1] // self.stride))

    def _split(self, tokens: Tensor, grid: tuple[int, int]) -> EncoderState:
        """Cut tokens ``(B, P + H * W, C)`` into prefix, if there is one, and grid ``(B, H, W, C)``."""
        spatial = tokens[:, self.prefix_tokens :].unflatten(1, grid)
        return (tokens[:, : self.prefix_tokens], spatial) if self.prefix_tokens else (spatial,)

    def _run_blocks(self, kept: list[Tensor], indices: range, features: Tensor | None = None) -> EncoderState:
        """Run some blocks from prefix and grid at the end of `kept`, which is edited; return both after them."""
        spatial = kept.pop()
        grid = int(spatial.shape[1]), int(spatial.shape[2])
        prefix = [kept.pop()] if self.prefix_tokens else []
        tokens = torch.cat([*prefix, spatial.flatten(1, 2)], dim=1)
        rotary = self._rotary(grid)
        for i in indices:
            if self.prompter is not None:
                *prefix, spatial = self._split(tokens, grid)
                tokens = torch.cat([*prefix, self._prompted(i, spatial, features).flatten(1, 2)], dim=1)
            tokens = self._run_block(i, tokens, grid, rotary[i])
            if self._keeps(i):
                kept.append(self._split(tokens, grid)[-1])
        return self._split(tokens, grid)

    def _rotary(self, grid: tuple[int, int]) -> list[Tensor | None]:
        """Return each block's rotary positions for a grid ``(H, W)``; None for a model without."""
        depth = len(self.blocks)
        if getattr(self.trunk, "rope", None) is None:
            return [None] * depth
        positions = self.trunk.rope.get_embed(shape=list(grid))
        return list(positions) if getattr(self.trunk, "rope_mixed", False) else [positions] * depth

    def seams(self) -> list[dict[str, Seam]]:
        """Return the seams of each block, see `block_seams`."""
        return [block.seams() if isinstance(block, GridBlock) else {} for block in self.blocks]

    def patch_seam(self) -> Seam | None:
        """Return the layer that embeds patches; None where that is no single layer."""
        return Seam(self.trunk.patch_embed, "proj") if self._one_patch_layer else None

    def load_pretrained(self, state: dict[str, Tensor], *, source: str) -> None:
        """Fill everything but the neck from timm's tensors; position embeddings of another grid are resized.

        Args:
            state: tensors by timm's names, of any floating type, or by those original ones that timm converts.
            source: what to call the file in errors.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        own = [key for key in self.state_dict() if not key.startswith("neck.")]
        theirs = {
            key.removeprefix("trunk.").replace(".block.", ".", 1).replace("attn.qkv.qkv.", "attn.qkv."): key
            for key in own
        }
        _load(self, theirs, self.name, self.options, state, source)
        self.mark_pretrained()

    def mark_pretrained(self) -> None:
        """Count everything but the neck as pretrained."""
        self.fresh_parameter_names = frozenset(n for n, _ in self.named_parameters() if n.startswith("neck."))


class TimmPyramid(FeaturePyramid):
    """A network of timm that gives feature maps: ResNet, ConvNeXt, Swin, ...

    One map per reduction from 4 on is read, the last; of a network of a single reduction, one map per quarter. What
    the maps do not need of the network is left out.

    Args:
        name: of the timm model.
        out_channels: channels of the embeddings.
        options: of timm's constructor, such as ``img_size``, for a network that takes images of one size only.

    Raises:
        ConfigError: an option is unknown.
        UnsupportedCombination: the model gives no feature maps that fit an encoder.
    """

    def __init__(self, name: str, *, out_channels: int = 256, **options: Any) -> None:
        body = _create(name, options)
        if not hasattr(body, "forward_intermediates") or not hasattr(body, "prune_intermediate_layers"):
            raise UnsupportedCombination(f"timm's '{name}' gives no feature maps. Use another model, such as resnet18.")
        found = [int(info["reduction"]) for info in body.feature_info]
        last = {reduction: index for index, reduction in enumerate(found) if reduction >= FINEST}
        indices = sorted(last.values()) if len(last) > 1 else list(choose_taps(None, len(found)))
        self.name = name
        self.options = options
        self.indices: list[int] = list(body.prune_intermediate_layers(indices, prune_norm=True))
        fixed = body.pretrained_cfg.get("fixed_input_size") and not _any_size(name)
        side = options.get("img_size", body.pretrained_cfg["input_size"][-2:])
        super().__init__(
            body,
            channels=[int(body.feature_info[i]["num_chs"]) for i in indices],
            reductions=[found[i] for i in indices],
            fixed_size=((side, side) if isinstance(side, int) else tuple(side)) if fixed else None,
            out_channels=out_channels,
            pixel_mean=_pixel_scale(body, "mean"),
            pixel_std=_pixel_scale(body, "std"),
        )

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the body's maps ``(B, C_i, H / r_i, W / r_i)``."""
        maps: list[Tensor] = self.body.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        return maps

    def load_pretrained(self, state: dict[str, Tensor], *, source: str) -> None:
        """Fill everything but the neck from timm's tensors; see `TimmViT.load_pretrained`."""
        ours = {key.removeprefix("body."): key for key in self.state_dict() if key.startswith("body.")}
        _load(self, ours, self.name, self.options, state, source)
        self.mark_pretrained()
