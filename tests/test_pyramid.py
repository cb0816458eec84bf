"""Feature pyramids, by way of timm's hierarchical networks: maps, padding, stages, statistics, loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from semseg_automl.build import build_method
from semseg_automl.errors import CheckpointError, ConfigError, UnsupportedCombination
from semseg_automl.models.timm_encoder import TimmPyramid, build_timm_encoder
from semseg_automl.third_party import timm

PYRAMIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}),
}


def pyramid(kind: str) -> TimmPyramid:
    """Build a small feature pyramid in evaluation mode that counts as pretrained."""
    name, sizes = PYRAMIDS[kind]
    encoder = build_timm_encoder(name, out_channels=16, **sizes)
    assert isinstance(encoder, TimmPyramid)
    encoder.mark_pretrained()
    return encoder.eval()


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_timm_pyramid__file_of_the_whole_model__fills_everything_but_the_neck(kind: str) -> None:
    name, sizes = PYRAMIDS[kind]
    theirs = timm.create_model(name, **sizes).state_dict()
    encoder = build_timm_encoder(name, out_channels=16, **sizes)
    encoder.load_pretrained({key: v.half() if v.is_floating_point() else v for key, v in theirs.items()}, source="file")
    assert encoder.fresh_parameter_names == {n for n, _ in encoder.named_parameters() if n.startswith("neck.")}
    for key, value in encoder.state_dict().items():
        if key.startswith("body."):
            torch.testing.assert_close(value, theirs[key.removeprefix("body.")].half().to(value.dtype), msg=key)


def test_timm_pyramid__file_of_another_network__is_refused() -> None:
    name, sizes = PYRAMIDS["resnet"]
    state = timm.create_model(name, **{**sizes, "channels": (8, 12, 16, 24)}).state_dict()
    with pytest.raises(CheckpointError, match=r"'layer4\.0.*has shape .*timm's 'resnet18' expects"):
        build_timm_encoder(name, **sizes).load_pretrained(dict(state), source="file")
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors"):
        build_timm_encoder(name, **sizes).load_pretrained({}, source="file")


@pytest.mark.parametrize("kind", PYRAMIDS)
@pytest.mark.parametrize("size", [(96, 128), (80, 112)])
def test_timm_pyramid__any_multiple_of_the_stride__gives_embeddings_also_when_cut(
    kind: str, size: tuple[int, int]
) -> None:
    encoder = pyramid(kind)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        whole = encoder(images)
        assert whole.shape == (2, 16, size[0] // 16, size[1] // 16)
        for stage in range(encoder.last_stage + 1):
            assert torch.equal(encoder.finish(encoder.begin(images, stage), stage), whole)


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_timm_pyramid__maps__are_those_of_timm(kind: str) -> None:
    encoder = pyramid(kind)
    name, sizes = PYRAMIDS[kind]
    extra: dict[str, Any] = {"strict_img_size": False} if kind == "swin" else {}
    twin: Any = timm.create_model(name, num_classes=0, **sizes, **extra).eval()
    twin.load_state_dict({k.removeprefix("body."): v for k, v in encoder.state_dict().items()}, strict=False)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = twin.forward_intermediates(images, intermediates_only=True)[-4:]
        maps = encoder.feature_maps(images)
    assert [images.shape[-1] // m.shape[-1] for m in maps] == [4, 8, 16, 32]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_timm_pyramid__full_fine_tuning__leaves_no_parameter_without_gradient(kind: str) -> None:
    encoder = pyramid(kind).train()
    encoder(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None]


def test_timm_pyramid__frozen__keeps_its_statistics_and_can_be_cut_before_the_neck() -> None:
    encoder = pyramid("resnet")
    build_method("decoder_only", {}).apply(encoder)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert encoder.frozen_stage() == 1
    build_method("full", {}).apply(encoder)
    encoder.train()(torch.randn(2, 3, 64, 64))
    assert not torch.equal(encoder.state_dict()["body.bn1.running_mean"], before["body.bn1.running_mean"])
    assert encoder.frozen_stage() == 0


def test_timm_pyramid__training_mode__drops_no_paths_unless_asked() -> None:
    encoder = pyramid("swin")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder.train()(images))
    name, sizes = PYRAMIDS["swin"]
    noisy = build_timm_encoder(name, drop_path_rate=0.9, **sizes).train()
    assert not torch.equal(noisy(images), noisy(images))


@pytest.mark.parametrize("method", ["lora", "conv_lora"])
def test_timm_pyramid__method_for_attention__names_the_methods_that_work(method: str) -> None:
    with pytest.raises(UnsupportedCombination, match="decoder_only, bitfit, full"):
        build_method(method, {}).apply(pyramid("resnet"))


def test_timm_pyramid__network_for_one_size__says_which() -> None:
    with torch.device("meta"):
        encoder = build_timm_encoder("maxvit_tiny_tf_224", img_size=96)
        assert encoder(torch.zeros(1, 3, 96, 96)).shape == (1, 256, 6, 6)
        with pytest.raises(ConfigError, match=r"64 x 96 pixels.*\(96, 96\) alone"):
            encoder(torch.zeros(1, 3, 64, 96))


def test_timm_pyramid__network_that_cuts_borders_off__is_refused() -> None:
    with torch.device("meta"), pytest.raises(UnsupportedCombination, match="cuts borders off"):
        build_timm_encoder("inception_v3")(torch.zeros(1, 3, 128, 128))


def test_timm_pyramid__network_without_fine_maps__is_refused() -> None:
    with torch.device("meta"), pytest.raises(UnsupportedCombination, match=r"reductions \(32,"):
        build_timm_encoder("mixer_s32_224")
