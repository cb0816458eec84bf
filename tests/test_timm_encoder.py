"""Encoders out of timm: the same tokens as timm's own loop, the seams for PEFT methods, loading, licences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from semseg_automl.build import build_method
from semseg_automl.errors import CheckpointError, ConfigError, UnsupportedCombination
from semseg_automl.models.checkpoints import read_checkpoint
from semseg_automl.models.encoder import Encoder, Prompter, SideNetwork, auxiliary_loss
from semseg_automl.models.facts import encoder_facts
from semseg_automl.models.timm_encoder import (
    TimmViT,
    build_timm_encoder,
    check_license,
    fetch_timm_weights,
)
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.conv_lora import ConvLoraLinear
from semseg_automl.third_party import timm

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SAM: dict[str, Any] = {**TINY, "img_size": 64, "window_size": 3, "global_attn_indexes": (1,)}
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {**TINY, "img_size": 64}),
    "distilled": ("deit_tiny_distilled_patch16_224", {**TINY, "img_size": 64}),
    "mae": ("vit_base_patch16_224.mae", {**TINY, "img_size": 64}),
    "pooled": ("vit_medium_patch16_gap_240", {**TINY, "img_size": 64}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**TINY, "img_size": 56}),
    "dinov3": ("vit_small_patch16_dinov3", {**TINY, "img_size": 64}),
    "eva": ("eva_giant_patch14_224", {**TINY, "img_size": 56}),
    "eva02": ("eva02_tiny_patch14_224", {**TINY, "img_size": 56}),
    "eva02_split": ("eva02_base_patch14_224", {**TINY, "img_size": 56}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {**TINY, "img_size": 64}),
    "sam": ("samvit_base_patch16", SAM),
    "sam_norm": ("samvit_base_patch16_224", SAM),
}
FUSED = [kind for kind in VITS if kind != "eva02_split"]


def vit(kind: str, **options: Any) -> TimmViT:
    """Build a small vision transformer in evaluation mode that counts as pretrained."""
    name, sizes = VITS[kind]
    encoder = build_timm_encoder(name, out_channels=16, **sizes, **options)
    assert isinstance(encoder, TimmViT)
    encoder.mark_pretrained()
    randomise(encoder)
    return encoder.eval()


def randomise(module: nn.Module) -> None:
    """Draw every parameter, so that none of those that start at zero or one hides a fault."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def pictures(encoder: Encoder, rows: int, columns: int) -> Tensor:
    """Draw two images of so many tokens."""
    return torch.randn(2, 3, rows * encoder.stride, columns * encoder.stride)


def timm_twin(encoder: TimmViT) -> Any:
    """Build timm's own model with the weights of `encoder`."""
    sizes: dict[str, Any] = {} if "samvit" in encoder.name else {"dynamic_img_size": True}
    twin = timm.create_model(encoder.name, num_classes=0, **sizes, **encoder.options).eval()
    renamed = {
        key.removeprefix("trunk.").replace(".block.", ".").replace(".qkv.qkv.", ".qkv."): value
        for key, value in encoder.state_dict().items()
    }
    result = twin.load_state_dict(renamed, strict=False)
    assert not [key for key in result.missing_keys if not key.startswith(("neck.", "fc_norm.", "head"))]
    return twin


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_timm_vit__blocks_run_by_our_loop__give_the_tokens_of_timm(kind: str, grid: tuple[int, int]) -> None:
    encoder = vit(kind, neck_taps=(0, 1, 2))
    images = pictures(encoder, *grid)
    with torch.no_grad():
        expected = timm_twin(encoder).forward_intermediates(images, indices=[0, 1, 2], intermediates_only=True)
        tapped = encoder.begin(images, 3)
    for ours, theirs in zip(tapped, expected, strict=True):
        torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["deit", "dinov2", "dinov3"])
def test_timm_vit__neck__reads_tokens_after_the_final_norm(kind: str) -> None:
    encoder = vit(kind, neck_taps=(2,))
    images = pictures(encoder, 3, 5)
    with torch.no_grad():
        features = timm_twin(encoder).forward_features(images)[:, encoder.prefix_tokens :]
        torch.testing.assert_close(encoder(images), encoder.neck([features.unflatten(1, (3, 5))]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", VITS)
def test_timm_vit__cut_at_any_stage__equals_the_whole_also_after_another_size(kind: str) -> None:
    encoder = vit(kind)
    images, others = pictures(encoder, 3, 5), pictures(encoder, 4, 2)
    with torch.no_grad():
        whole = encoder(images)
        assert whole.shape == (2, 16, 3, 5)
        for stage in range(encoder.last_stage + 1):
            state = encoder.begin(images, stage)
            encoder(others)
            torch.testing.assert_close(encoder.finish(state, stage), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("method", ["lora", "conv_lora"])
def test_timm_vit__adapted__starts_as_it_was_and_trains_only_what_was_added(kind: str, method: str) -> None:
    encoder = vit(kind)
    images = pictures(encoder, 3, 5)
    frozen = encoder(images)
    pretrained = {name for name, _ in encoder.named_parameters()} - encoder.fresh_parameter_names
    build_method(method, {"rank": 2}).apply(encoder)
    assert torch.equal(encoder(images), frozen)
    for name, parameter in encoder.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    encoder.train()
    (encoder(images).square().sum() + auxiliary_loss(encoder)).backward()
    trainable = trainable_parameters(encoder)
    added = [name for name in trainable if not name.startswith("neck.")]
    assert len(added) == 3 * (2 if method == "lora" else 6)
    # With the balanced gate only the load of the noisy draw reaches the router, and experts may go unchosen.
    resting = ("w_gate", "w_noise", "expert_weight", "expert_bias")
    for name in added:
        gradient = trainable[name].grad
        assert name.endswith(resting) or (gradient is not None and gradient.any()), f"no gradient reaches {name}"
    expert = [trainable[name].grad for name in added if name.endswith("expert_weight")]
    assert all(gradient is not None and gradient.any() for gradient in expert)
    still = {name.replace("qkv.base.", "qkv.") for name, p in encoder.named_parameters() if p.grad is None}
    assert pretrained <= still


@pytest.mark.parametrize("kind", ["deit", "dinov2", "dinov3", "eva"])
def test_timm_vit__conv_lora__corrects_the_grid_as_the_layer_does_and_the_prefix_by_lora_alone(kind: str) -> None:
    encoder = vit(kind)
    build_method("conv_lora", {"rank": 2}).apply(encoder)
    seam = encoder.eval().seams()[0]["qkv"]
    layer = seam.module
    assert isinstance(layer, ConvLoraLinear)
    randomise(layer)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = seam.owner.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.clone())))
    with torch.no_grad():
        encoder(pictures(encoder, 3, 5))
        handle.remove()
        [(sequence, projected)] = seen
        prefix = encoder.prefix_tokens
        grid = layer(sequence[:, prefix:].unflatten(1, (3, 5))).flatten(1, 2)
        lora = layer.base(sequence) + layer.scaling * sequence @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(projected[:, prefix:], grid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projected[:, :prefix], lora[:, :prefix], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(grid, lora[:, prefix:], atol=1e-3)


def test_timm_vit__conv_lora_in_windows__sees_each_window_as_a_grid() -> None:
    encoder = vit("sam")
    build_method("conv_lora", {"rank": 2}).apply(encoder)
    images = pictures(encoder, 4, 5)  # in windows of 3: two by two, filled up
    encoder(images)
    layers = [seams["qkv"].module for seams in encoder.seams()]
    assert [len(layer.chosen_expert) for layer in layers] == [8, 2, 8]
    assert [seams["qkv"].in_windows for seams in encoder.seams()] == [True, False, True]
    with pytest.raises(UnsupportedCombination, match=r"windowed is false.*one window at a time"):
        build_method("conv_lora", {"rank": 2, "windowed": False}).apply(vit("sam"))


@pytest.mark.parametrize("kind", ["dinov3", "sam"])
def test_timm_vit__activation_checkpointing__gives_the_same_gradients(kind: str) -> None:
    encoder = vit(kind).train()
    gradients = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        encoder.zero_grad()
        encoder(pictures_of(0, encoder)).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def pictures_of(seed: int, encoder: Encoder) -> Tensor:
    """Draw the images of a seed."""
    torch.manual_seed(seed)
    return pictures(encoder, 3, 5)


@pytest.mark.parametrize("kind", ["dinov2", "pooled", "sam"])  # with prefix tokens, without, a grid in windows
def test_timm_vit__side__gets_the_grid_after_every_block_and_gives_those_the_neck_reads(kind: str) -> None:
    class Halves(SideNetwork):
        seen: list[list[Tensor]]

        def forward(self, grids: list[Tensor], taps: Sequence[int]) -> list[Tensor]:
            self.seen.append(grids)
            return [0.5 * grids[tap] for tap in taps]

    encoder, side = vit(kind, neck_taps=(0, 2)), Halves()
    images = pictures(encoder, 3, 5)
    with torch.no_grad():
        after = [encoder.begin(images, stage)[-1] for stage in (1, 2, 3)]
        side.seen = []
        encoder.side = side
        embeddings = encoder(images)
        [grids] = side.seen
        assert [tuple(grid.shape) for grid in grids] == [(2, 3, 5, 32)] * 3
        assert all(torch.equal(grid, wanted) for grid, wanted in zip(grids, after, strict=True))
        assert torch.equal(embeddings, encoder.read_out([0.5 * after[0], 0.5 * after[2]]))
        for stage in range(encoder.last_stage + 1):
            assert torch.equal(encoder.finish(encoder.begin(images, stage), stage), embeddings)


@pytest.mark.parametrize("kind", ["dinov2", "pooled", "sam", "rope_mixed"])
def test_timm_vit__prompter__adds_to_the_grid_alone_before_each_block(kind: str) -> None:
    class Ramp(Prompter):
        def prepare(self, images: Tensor, tokens: Tensor) -> Tensor:
            return tokens

        def forward(self, index: int, features: Tensor) -> Tensor:
            return (index + 1) * features

    encoder = vit(kind)
    images = pictures(encoder, 3, 5)
    encoder.prompter = Ramp()
    with torch.no_grad():
        tokens = encoder.embed(images)
        first, tapped = tokens[:, encoder.prefix_tokens :], []
        for i, (block, rotary) in enumerate(zip(encoder.blocks, encoder._rotary((3, 5)), strict=True)):
            prefix, grid = tokens[:, : encoder.prefix_tokens], tokens[:, encoder.prefix_tokens :]
            tokens = block(torch.cat([prefix, grid + (i + 1) * first], dim=1), (3, 5), rotary)
            tapped += [tokens[:, encoder.prefix_tokens :].unflatten(1, (3, 5))] * (i in encoder.neck_taps)
        expected = encoder.read_out(tapped)
        for stage in range(encoder.last_stage + 1):
            torch.testing.assert_close(encoder.finish(encoder.begin(images, stage), stage), expected)


def test_timm_vit__autocast_to_bfloat16__is_finite_and_close() -> None:
    encoder = vit("dinov3")
    build_method("conv_lora", {"rank": 2}).apply(encoder)
    images = pictures(encoder, 3, 5)
    with torch.no_grad():
        exact = encoder.eval()(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(images)
    assert (rounded.float() - exact).abs().mean() < 0.1


def test_timm_vit__training_mode__draws_nothing() -> None:
    encoder = vit("dinov3", rope_rescale_coords=2.0)
    images = pictures(encoder, 3, 5)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder.train()(images))


def test_timm_vit__separate_projections__name_the_methods_that_work() -> None:
    working = "decoder_only, bitfit, adapter, lst, sam_adapter, full"
    with pytest.raises(UnsupportedCombination, match=rf"eva02_base_patch14_224 lacks qkv\. Methods.*: {working}\."):
        build_method("lora", {}).apply(vit("eva02_split"))
    encoder = vit("eva02_split")
    build_method("decoder_only", {}).apply(encoder)
    assert set(trainable_parameters(encoder)) == encoder.fresh_parameter_names
    assert encoder.frozen_stage() == 3


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("deit", set()),
        ("dinov3", set()),
        ("eva02_split", {"qkv", "prompts", "fc1"}),  # separate projections, a gated MLP
        ("sam", {"prompts"}),  # attention takes the grid itself
    ],
)
def test_timm_vit__parts__are_those_of_its_blocks(kind: str, missing: set[str]) -> None:
    parts = {"norm1", "qkv", "proj", "norm2", "fc1", "fc2", "prompts", "patch_embed", "tokens"}
    assert vit(kind).parts() == parts - missing


def test_timm_vit__positions_for_one_size_only__is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match="use_rope"):
        TimmViT("samvit_base_patch16", **{**SAM, "use_rel_pos": False, "use_rope": True})


def test_timm_vit__taps_that_are_no_blocks__are_refused() -> None:
    with pytest.raises(ConfigError, match="0 to 2"):
        vit("deit", neck_taps=(0, 1))


@pytest.mark.parametrize("kind", VITS)
def test_timm_vit__file_of_the_whole_model__fills_everything_but_the_neck(kind: str) -> None:
    name, sizes = VITS[kind]
    model = timm.create_model(name, **sizes).eval()
    randomise(model)
    encoder = build_timm_encoder(name, out_channels=16, **sizes).eval()
    encoder.load_pretrained({key: value.half() for key, value in model.state_dict().items()}, source="file")
    assert encoder.fresh_parameter_names == {n for n, _ in encoder.named_parameters() if n.startswith("neck.")}
    theirs = model.state_dict()
    for key, value in encoder.state_dict().items():
        if key.startswith("neck."):
            continue
        key = key.removeprefix("trunk.").replace(".block.", ".").replace(".qkv.qkv.", ".qkv.")
        torch.testing.assert_close(value, theirs[key].half().to(value.dtype), msg=key)


def test_timm_vit__file_with_another_position_grid__is_resized_as_timm_does() -> None:
    name, sizes = VITS["deit"]
    model: Any = timm.create_model(name, **{**sizes, "img_size": 96})
    encoder = build_timm_encoder(name, **sizes)
    encoder.load_pretrained(model.state_dict(), source="file")
    model.set_input_size((64, 64))
    torch.testing.assert_close(encoder.state_dict()["trunk.pos_embed"], model.pos_embed.data)


def test_timm_vit__file_of_another_model__is_refused_by_name_and_shape() -> None:
    name, sizes = VITS["deit"]
    encoder = build_timm_encoder(name, **sizes)
    state: dict[str, Tensor] = dict(timm.create_model(name, **sizes).state_dict())
    key = "norm.weight"
    with pytest.raises(CheckpointError, match=rf"'{key}' has shape \(5,\).*expects \(\d+,\)"):
        encoder.load_pretrained({**state, key: torch.zeros(5)}, source="file")
    with pytest.raises(CheckpointError, match=r"too many: 1 tensors.*'surplus'"):
        encoder.load_pretrained({**state, "surplus": torch.zeros(1)}, source="file")
    del state[key]
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors.*'{key}'"):
        encoder.load_pretrained(state, source="file")


def test_timm_vit__file_that_timm_cannot_convert__is_refused() -> None:
    encoder = build_timm_encoder("deit_tiny_patch16_224", **VITS["deit"][1])
    with pytest.raises(CheckpointError, match="cannot read it as 'deit_tiny_patch16_224'"):
        encoder.load_pretrained({"patch_embed.proj.weight": torch.zeros(5, 3)}, source="file")


def test_timm_vit__real_weights__give_the_features_of_timm(shared: Callable[[str], Path]) -> None:
    state = read_checkpoint(shared("weights/deit_tiny_patch16_224.fp16.safetensors"))
    encoder = build_timm_encoder("deit_tiny_patch16_224", neck_taps=[11]).eval()
    encoder.load_pretrained(state, source="file")
    model: Any = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict({key: value.float() for key, value in state.items()})
    images = pictures(encoder, 14, 14)[:1]
    with torch.no_grad():
        [ours] = encoder.begin(images, 12)
        [theirs] = model.forward_intermediates(images, indices=[11], intermediates_only=True)
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_build_timm_encoder__unknown_name_tag_or_option__is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'deit_tiny_patch16_224'"):
        build_timm_encoder("deit_tinny_patch16_224")
    with pytest.raises(ConfigError, match=r"did you mean 'vit_base_patch16_224\.mae'"):
        build_timm_encoder("vit_base_patch16_224.mea")
    with pytest.raises(ConfigError, match="embed_dimm"):
        build_timm_encoder("deit_tiny_patch16_224", embed_dimm=32)
    with pytest.raises(ConfigError, match="checkpoint_path"):
        build_timm_encoder("deit_tiny_patch16_224", checkpoint_path="weights.pth")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "convnext_atto"])
def test_build_timm_encoder__on_the_meta_device__needs_no_memory(name: str) -> None:
    with torch.device("meta"):
        encoder = build_timm_encoder(name)
    assert all(p.is_meta for p in encoder.parameters())
    assert encoder.stride == 16


def test_timm_encoder__normalisation__is_that_of_the_model() -> None:
    encoder = vit("deit")
    torch.testing.assert_close(encoder.pixel_mean.flatten(), torch.tensor([123.675, 116.28, 103.53]))
    inception = build_timm_encoder("vit_tiny_patch16_224", **{**TINY, "img_size": 64})
    torch.testing.assert_close(inception.pixel_std.flatten(), torch.full((3,), 127.5))


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("vit_base_patch16_224.mae", "cc-by-nc-4.0"),
        ("vit_small_patch16_dinov3", "dinov3-license"),
        ("convnext_base.eupe_lvd1689m", "fair-noncommercial-research-license"),
        ("dla60_res2net", "unknown"),
    ],
)
def test_check_license__weights_not_free_for_every_use__must_be_accepted_by_name(name: str, licence: str) -> None:
    with pytest.raises(ConfigError, match=f"model.accept_license='{licence}'"):
        check_license(name, None)
    with pytest.raises(ConfigError, match=f"'{licence}'.*is 'mit'"):
        check_license(name, "mit")
    check_license(name, licence)
    with pytest.raises(ConfigError, match=licence):
        encoder_facts(f"timm/{name}")
    assert not encoder_facts(f"timm/{name}", pretrained=False).pretrained


def test_check_license__free_weights__need_no_word() -> None:
    for name in ("deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"):
        check_license(name, None)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("not in the cache"), URLError("no route"), RuntimeError("invalid hash value")]
)
def test_fetch_timm_weights__without_a_network__says_what_to_set(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(CheckpointError, match=r"model.checkpoint=<file.*model.pretrained=false"):
        fetch_timm_weights("deit_tiny_patch16_224")


def test_fetch_timm_weights__error_of_the_transport__is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def broken(*args: Any, **options: Any) -> None:
        raise errors.HTTPError("connection reset")  # type: ignore[attr-defined]

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", broken)
    with pytest.raises(CheckpointError, match="connection reset"):
        fetch_timm_weights("deit_tiny_patch16_224")


def test_fetch_timm_weights__published_ones__fill_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("resnet18").state_dict()
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *args, **options: dict(published))
    encoder = build_timm_encoder("resnet18")
    encoder.load_pretrained(fetch_timm_weights("resnet18"), source="published")
    assert torch.equal(encoder.state_dict()["body.conv1.weight"], published["conv1.weight"])
    assert all(name.startswith("neck.") for name in encoder.fresh_parameter_names)


def test_fetch_timm_weights__model_without_any__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(has_weights=False)
    monkeypatch.setattr(timm.models, "get_pretrained_cfg", lambda *args, **options: nothing)
    with pytest.raises(ConfigError, match=r"no published weights.*resnet18\.a1_in1k"):
        fetch_timm_weights("resnet18")
