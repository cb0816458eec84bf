"""LST: the ladder's formula, and that nothing of the frozen encoder takes part in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from semseg_automl.build import build_method
from semseg_automl.models.encoder import TokenEncoder
from semseg_automl.models.sam import SamViT
from semseg_automl.models.timm_encoder import TimmViT
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.lst import LadderSideNetwork, Lst, SideBlock

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "out_channels": 16}
KINDS: dict[str, Callable[[], TokenEncoder]] = {
    "sam": partial(SamViT, **SMALL, window_size=3, global_blocks=(1,), grid=4),
    "tiny": partial(TinyViT, **SMALL, window_size=3, neck_taps=(0, 2), grid=4),
    "dinov3": partial(TimmViT, "vit_small_patch16_dinov3", **SMALL, neck_taps=(0, 2), img_size=64),
}


def jitter(module: nn.Module) -> None:
    """Move every parameter off its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def adapted(kind: str, method: str = "lst") -> TokenEncoder:
    """Build an encoder, frozen with its neck, and a method applied to it."""
    encoder = KINDS[kind]()
    encoder.fresh_parameter_names = frozenset()
    build_method(method, {}).apply(encoder)
    jitter(encoder)
    return encoder.train()


def saved_by(compute: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that autograd keeps for the backward pass."""
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return shapes


@pytest.mark.parametrize("kind", KINDS)
def test_lst__forward_pass__keeps_nothing_of_the_encoder_s_blocks(kind: str) -> None:
    encoder = adapted(kind)
    depth = len(encoder.blocks)
    images = torch.randn(2, 3, 48, 64)
    grids = [grid.detach() for grid in encoder.begin(images, depth)]

    def beside() -> None:
        assert encoder.side is not None
        encoder.read_out(encoder.side(grids, encoder.neck_taps))

    assert saved_by(lambda: encoder.begin(images, depth)) == []
    whole = saved_by(lambda: encoder(images))
    assert whole == saved_by(beside)
    assert len(whole) > 10 * depth
    assert saved_by(lambda: adapted(kind, "lora").begin(images, depth)), "methods within the blocks keep some"


@pytest.mark.parametrize("kind", KINDS)
def test_lst__backward_pass__touches_no_block(kind: str) -> None:
    encoder = adapted(kind)
    in_the_graph: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in encoder.named_modules():
        if not list(module.children()):
            part = name.partition(".")[0]
            module.register_forward_hook(lambda _, __, out, part=part: in_the_graph[out.requires_grad].add(part))
    encoder(torch.randn(1, 3, 48, 64)).square().sum().backward()
    # timm's final norm, in the trunk, is part of the way to the neck.
    assert in_the_graph[True] - {"trunk"} == {"side", "neck"}
    assert "blocks" in in_the_graph[False]
    assert {name for name, p in encoder.named_parameters() if p.grad is not None} == set(trainable_parameters(encoder))


@pytest.mark.parametrize("kind", KINDS)
def test_lst__tokens_after_all_blocks__can_be_kept(kind: str) -> None:
    encoder = adapted(kind)
    depth = len(encoder.blocks)
    assert encoder.frozen_stage() == depth
    assert Lst.frozen_prefix
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        state = encoder.begin(images, depth)
    assert [tuple(part.shape) for part in state][-depth:] == [(2, 3, 4, 32)] * depth
    embeddings = encoder.finish(state, depth)
    assert torch.equal(embeddings, encoder(images))
    assert embeddings.requires_grad


def test_ladder__random_parameters__equals_the_formula_of_the_paper() -> None:
    side = LadderSideNetwork(12, 16, 3).double()
    jitter(side)
    grids = [torch.randn(2, 3, 5, 12, dtype=torch.float64) for _ in range(3)]
    expected, s = [], torch.zeros(2, 15, 16, dtype=torch.float64)
    for i, grid in enumerate(grids):
        mu = 1 / (1 + torch.exp(-side.gates[i] / 0.1))
        down = side.ladders[i](grid.flatten(1, 2))
        s = side.blocks[i](mu * s + (1 - mu) * down)
        expected.append(grid + (s @ side.up.weight.T + side.up.bias).unflatten(1, (3, 5)))
    for taps in ((0, 1, 2), (1, 2), (2,)):
        for got, wanted in zip(side(grids, taps), [expected[tap] for tap in taps], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_side_block__same_weights__equals_torchs_encoder_layer() -> None:
    block = SideBlock(16).double().eval()
    jitter(block)
    oracle = nn.TransformerEncoderLayer(
        16, 8, 32, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {
        "qkv.weight": "self_attn.in_proj_weight",
        "qkv.bias": "self_attn.in_proj_bias",
        "proj": "self_attn.out_proj",
        "lin": "linear",
    }
    state = block.state_dict()
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs) if name.startswith(ours) else name: t for name, t in state.items()}
    oracle.double().load_state_dict(state)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x), oracle(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "width"), [(1280, 112), (1024, 96), (768, 64), (192, 16), (32, 16)])
def test_lst__width_left_open__is_the_share_that_the_paper_s_table_has(dim: int, width: int) -> None:
    with torch.device("meta"):
        encoder = TinyViT(embed_dim=dim, depth=1, num_heads=1)
        build_method("lst", {}).apply(encoder)
    assert isinstance(encoder.side, LadderSideNetwork)
    assert encoder.side.up.in_features == width
