"""The built-in encoder: shapes, windows, positions, parity with torch's own layers, and reading of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import CheckpointError, ConfigError
from semseg_automl.models.checkpoints import read_checkpoint
from semseg_automl.models.encoder import Prompter, SideNetwork, block_seams
from semseg_automl.models.layers import (
    PLAIN_ATTENTION_TOKENS,
    LayerNorm2d,
    attend,
    interpolate_position,
    window_partition,
    window_unpartition,
)
from semseg_automl.models.tiny_vit import Block, TinyViT, plain_vit_shape

SHAPES: dict[str, dict[str, Any]] = {
    "global": {},
    "windowed": {"window_size": 3, "global_blocks": (1,)},
    "conv_stem": {"conv_stem": True},
}


def tiny(**options: Any) -> TinyViT:
    """Build an encoder of a few thousand parameters, stride 8."""
    settings: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "out_channels": 16}
    return TinyViT(**{**settings, "grid": 4, "neck_taps": (0, 2), **options}).eval()


def timm_state(
    dim: int = 64, depth: int = 2, patch: int = 8, grid: int = 4, prefix_tokens: int = 1
) -> dict[str, Tensor]:
    """Draw the tensors of a plain ViT classifier under timm's names, in half precision as files often are."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, grid * grid + prefix_tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (10, dim),
        "head.bias": (10,),
    }
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (dim,), f"blocks.{i}.{norm}.bias": (dim,)}
        for layer, shape in layers.items():
            shapes |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    return {name: (0.1 * torch.randn(shape)).half() for name, shape in shapes.items()}


def matching_encoder(**options: Any) -> TinyViT:
    """Build the encoder whose architecture `timm_state` has."""
    return tiny(**{"embed_dim": 64, "depth": 2, "num_heads": 1, "neck_taps": (1,), "grid": 2, **options})


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (64, 8)])
def test_tiny_vit__any_multiple_of_the_stride__gives_one_embedding_per_patch(size: tuple[int, int], kind: str) -> None:
    encoder = tiny(**SHAPES[kind])
    assert encoder.stride == 8
    assert encoder(torch.randn(2, 3, *size)).shape == (2, 16, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("kind", SHAPES)
def test_tiny_vit__batch_of_one__equals_its_row_of_a_larger_batch(kind: str) -> None:
    encoder = tiny(**SHAPES[kind])
    images = torch.randn(3, 3, 40, 32)
    with torch.no_grad():
        together = encoder(images)
        apart = torch.cat([encoder(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_tiny_vit__random_weights__are_all_fresh() -> None:
    encoder = tiny()
    assert encoder.fresh_parameter_names == {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize("neck_taps", [(0, 2), (2,)])
def test_tiny_vit__side_network__gets_the_tokens_after_all_blocks_and_gives_those_the_neck_reads(
    neck_taps: tuple[int, ...],
) -> None:
    class Halves(SideNetwork):
        """Keep what it is given, and hand half of the tapped grids on."""

        seen: list[tuple[list[Tensor], tuple[int, ...]]]

        def forward(self, grids: list[Tensor], taps: Sequence[int]) -> list[Tensor]:
            self.seen.append((grids, tuple(taps)))
            return [0.5 * grids[tap] for tap in taps]

    encoder, side = tiny(neck_taps=neck_taps), Halves()
    images = torch.randn(1, 3, 32, 16)
    after = [encoder.begin(images, stage)[-1] for stage in (1, 2, 3)]
    side.seen = []
    encoder.side = side
    embeddings = encoder(images)
    [(grids, taps)] = side.seen
    assert taps == neck_taps
    assert all(torch.equal(grid, wanted) for grid, wanted in zip(grids, after, strict=True))
    assert torch.equal(embeddings, encoder.neck([0.5 * after[tap] for tap in neck_taps]))
    side.seen.clear()
    for stage in range(encoder.last_stage + 1):
        assert torch.equal(encoder.finish(encoder.begin(images, stage), stage), embeddings)


@pytest.mark.parametrize("neck_taps", [(0, 2), (2,)])
def test_tiny_vit__prompter__adds_to_the_tokens_before_each_block(neck_taps: tuple[int, ...]) -> None:
    class Ramp(Prompter):
        """Make features of brightness and tokens, and add them times the block's number."""

        def prepare(self, images: Tensor, tokens: Tensor) -> Tensor:
            return images.mean() + tokens

        def forward(self, index: int, features: Tensor) -> Tensor:
            return (index + 1) * features

    encoder = tiny(neck_taps=neck_taps)
    images = torch.randn(2, 3, 32, 16)
    encoder.prompter = Ramp()
    tokens = encoder.embed(images)
    features = images.mean() + tokens
    tapped = []
    for i, block in enumerate(encoder.blocks):
        tokens = block(tokens + (i + 1) * features)
        tapped += [tokens] * (i in neck_taps)
    expected = encoder.neck(tapped)
    for stage in range(encoder.last_stage + 1):
        torch.testing.assert_close(encoder.finish(encoder.begin(images, stage), stage), expected)


def test_block_seams__layer_replaced__is_the_one_the_block_runs() -> None:
    block = Block(32, 2)
    seams = block_seams(block)
    layers = [block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.lin1, block.mlp.lin2, block.attn]
    assert list(seams) == ["norm1", "qkv", "proj", "norm2", "fc1", "fc2", "prompts"]
    assert [seam.module for seam in seams.values()] == layers
    x = torch.randn(1, 4, 4, 32)
    for seam in seams.values():
        layer = seam.module
        seam.replace(nn.Sequential(layer))
        outputs: list[Tensor] = []
        seam.module.register_forward_hook(lambda _, __, output, kept=outputs: kept.append(output))
        block(x)
        assert len(outputs) == 1
        seam.replace(layer)


def test_parts__one_block_without_a_layer__are_those_that_every_block_has() -> None:
    encoder = tiny()
    parts = {"norm1", "qkv", "proj", "norm2", "fc1", "fc2", "prompts", "patch_embed", "tokens"}
    assert encoder.parts() == parts
    encoder.blocks[1].mlp = nn.Identity()
    assert encoder.parts() == parts - {"fc1", "fc2"}
    assert tiny(conv_stem=True).parts() == parts - {"patch_embed"}


@pytest.mark.parametrize(
    ("height", "width", "padded"), [(8, 4, (8, 4)), (5, 7, (8, 8)), (3, 9, (4, 12)), (1, 1, (4, 4))]
)
def test_window_partition__unpartitioned__gives_the_grid_back(height: int, width: int, padded: tuple[int, int]) -> None:
    x = torch.randn(2, height, width, 3)
    windows, padded_size = window_partition(x, 4)
    assert padded_size == padded
    assert windows.shape == (2 * padded[0] * padded[1] // 16, 4, 4, 3)
    assert int((windows == 0).all(-1).sum()) == 2 * (padded[0] * padded[1] - height * width), "padding is zero"
    assert torch.equal(window_unpartition(windows, 4, padded_size, (height, width)), x)


def test_window_partition__two_windows_across__keeps_neighbours_together() -> None:
    x = torch.arange(8).view(1, 2, 4, 1)
    windows, _ = window_partition(x, 2)
    assert windows.flatten(1).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_block__window_as_large_as_the_grid__equals_global_attention() -> None:
    windowed, whole = Block(32, 2, window_size=4), Block(32, 2)
    whole.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 4, 4, 32)
    torch.testing.assert_close(windowed(x), whole(x), rtol=1e-5, atol=1e-5)


def test_block__two_windows__attend_apart() -> None:
    windowed, whole = Block(32, 2, window_size=4), Block(32, 2)
    whole.load_state_dict(windowed.state_dict())
    x = torch.randn(1, 4, 8, 32)
    halves = torch.cat([whole(x[:, :, :4]), whole(x[:, :, 4:])], dim=2)
    torch.testing.assert_close(windowed(x), halves, rtol=1e-5, atol=1e-5)


def test_block__same_weights__equals_torchs_encoder_layer() -> None:
    block = Block(32, 4).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    oracle = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    names = {
        "attn.qkv.weight": "self_attn.in_proj_weight",
        "attn.qkv.bias": "self_attn.in_proj_bias",
        "attn.proj": "self_attn.out_proj",
        "mlp.lin1": "linear1",
        "mlp.lin2": "linear2",
    }
    state = block.state_dict()
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    oracle.load_state_dict(state)
    x = torch.randn(2, 3, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(block(x).flatten(1, 2), oracle(x.flatten(1, 2)), rtol=1e-5, atol=1e-5)


def test_interpolate_position__own_grid__is_exact() -> None:
    embedding = torch.randn(1, 4, 4, 8)
    assert torch.equal(interpolate_position(embedding, (4, 4)), embedding)


def test_interpolate_position__other_grid__keeps_constants_and_axes() -> None:
    constant = torch.full((1, 4, 4, 2), 0.7)
    torch.testing.assert_close(interpolate_position(constant, (7, 3)), torch.full((1, 7, 3, 2), 0.7))
    rows = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 4, 1)
    resized = interpolate_position(rows, (8, 6))[0, :, :, 0]
    torch.testing.assert_close(resized, resized[:, :1].expand(8, 6))
    assert (resized[1:, 0] > resized[:-1, 0]).all()


def test_conv_stem__pixel_of_another_patch__moves_the_token_a_plain_embedding_leaves() -> None:
    images = torch.zeros(1, 3, 16, 16)
    touched = images.clone()
    touched[..., 8] = 1.0  # the first column of the right-hand patches
    stem, plain = tiny(conv_stem=True).patch_embed, tiny().patch_embed
    assert stem(images).shape == plain(images).shape == (1, 2, 2, 32)
    assert torch.equal(plain(images)[:, :, 0], plain(touched)[:, :, 0])
    assert not torch.equal(stem(images)[:, :, 0], stem(touched)[:, :, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "heads must divide"),
        ({"neck_taps": (3,)}, "0 to 2"),
        ({"neck_taps": (-4,)}, "0 to 2"),
        ({"neck_taps": ()}, "0 to 2"),
        ({"neck_taps": (2, -1)}, "each once"),
        ({"conv_stem": True, "patch_size": 12}, "power of two"),
    ],
)
def test_tiny_vit__option_out_of_range__is_refused_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_load_pretrained__timm_names__fills_all_but_the_neck_and_drops_the_class_token(prefix_tokens: int) -> None:
    state, encoder = timm_state(prefix_tokens=prefix_tokens), matching_encoder()
    neck = {name: p.clone() for name, p in encoder.named_parameters() if name.startswith("neck.")}
    encoder.load_pretrained(state, source="vit")
    parameters = dict(encoder.named_parameters())
    assert encoder.fresh_parameter_names == set(neck)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in neck.items())
    expected = state["pos_embed"][:, prefix_tokens:].float().view(1, 4, 4, 64)
    assert torch.equal(parameters["pos_embed"], expected)
    for name, tensor in state.items():
        if name.startswith(("blocks.", "patch_embed.")):
            own = name.replace("fc1", "lin1").replace("fc2", "lin2")
            assert parameters[own].dtype == torch.float32
            assert torch.equal(parameters[own], tensor.float()), name
    assert encoder(torch.randn(1, 3, 48, 32)).shape == (1, 16, 6, 4)


def test_load_pretrained__deit_tiny__fits_the_shape_read_off_it(shared: Callable[[str], Path]) -> None:
    state = read_checkpoint(shared("weights/deit_tiny_patch16_224.fp16.safetensors"))
    shape = plain_vit_shape(state, source="deit_tiny")
    assert shape == {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16, "grid": 14}
    options: dict[str, Any] = dict(shape)
    encoder = TinyViT(**options, out_channels=16, neck_taps=(5, 11)).eval()
    encoder.load_pretrained(state, source="deit_tiny")
    assert torch.equal(encoder.pos_embed[0, 0, 1], state["pos_embed"][0, 2].float()), "the class token's is first"
    assert all(name.startswith("neck.") for name in encoder.fresh_parameter_names)
    with torch.no_grad():
        assert torch.isfinite(encoder(torch.randn(1, 3, 32, 48))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc1.bias": None}, r"lacks 1 tensors.*'blocks\.1\.mlp\.lin1\.bias'"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(96, 64)}, r"'blocks\.0\.attn\.qkv\.weight'.*\(96, 64\).*\(192, 64\)"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 4, 4)}, r"patch_embed.*\(64, 3, 4, 4\).*\(64, 3, 8, 8\)"),
        ({"pos_embed": None}, "not a plain ViT"),
        ({"pos_embed": torch.zeros(1, 20, 64)}, "20 positions"),
    ],
)
def test_load_pretrained__tensors_do_not_fit__names_both_sides(change: dict[str, Tensor | None], message: str) -> None:
    state: dict[str, Any] = timm_state() | change
    with pytest.raises(CheckpointError, match=message) as caught:
        matching_encoder().load_pretrained({n: t for n, t in state.items() if t is not None}, source="my_vit")
    assert "my_vit" in str(caught.value)


def test_load_pretrained__conv_stem__has_no_place_for_a_patch_embedding() -> None:
    with pytest.raises(CheckpointError, match=r"patch_embed\.stages"):
        matching_encoder(conv_stem=True).load_pretrained(timm_state(), source="vit")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"layer1.weight": torch.zeros(3, 3)}, "not a plain ViT.*layer1"),
        ({}, "not a plain ViT"),
        (timm_state(dim=48), "width 48"),
    ],
)
def test_plain_vit_shape__other_network__is_refused_by_name(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plain_vit_shape(state, source="resnet")


def test_plain_vit_shape__made_up_vit__is_read_off_its_tensors() -> None:
    shape = plain_vit_shape(timm_state(dim=128, depth=3, patch=4, grid=5), source="vit")
    assert shape == {"embed_dim": 128, "depth": 3, "num_heads": 2, "patch_size": 4, "grid": 5}


@pytest.mark.parametrize("tokens", [17, PLAIN_ATTENTION_TOKENS + 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend__either_way_of_computing__equals_the_formula(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (5, tokens, tokens))
    weights = (q.double() @ k.double().transpose(-2, -1) / 4).softmax(dim=-1)
    out = attend(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=tolerance)


def test_layer_norm_2d__random_weights__equals_torch_with_channels_last() -> None:
    ours, theirs = LayerNorm2d(6), nn.LayerNorm(6, eps=1e-6)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = 5 + 3 * torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
