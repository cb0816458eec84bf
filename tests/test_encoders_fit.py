"""SAM and timm encoders through the whole main job: found, fitted, saved and loaded, on a SAM of toy size."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from semseg_automl import plan as plan_module
from semseg_automl.build import build_model
from semseg_automl.data.synthetic import draw_dataset
from semseg_automl.errors import CheckpointError, UnsupportedCombination
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.models import ENCODERS
from semseg_automl.models.downloads import OFFICIAL, OfficialCheckpoint
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SAM_SIZES, SamViT

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "global_blocks": (1,)}
# What segment_anything keeps in its prompt encoder, and the decoder here in itself.
PROMPT_NAMES = {
    "positional_encoding_gaussian_matrix": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "no_mask_embed": "prompt_encoder.no_mask_embed.weight",
}
QUICK: dict[str, Any] = {"model.input_size": 64, "optim.max_epochs": 1, "env.batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("drawn"), kind="binary", train=6, val=2, test=2, size=(72, 96))


@pytest.fixture(autouse=True)
def small_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SAM of three narrow blocks under the name of ViT-B."""
    monkeypatch.setitem(SAM_SIZES, "sam_vit_b", {**SAM_SIZES["sam_vit_b"], "embed_dim": 32, "depth": 3})
    monkeypatch.setitem(ENCODERS, "sam_vit_b", partial(SamViT, grid=4, **SMALL))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = {f"image_encoder.{name}": t for name, t in SamViT(grid=4, **SMALL).state_dict().items()}
    for name, tensor in MaskDecoder(256, mlp_dim=2048).state_dict().items():
        state[PROMPT_NAMES.get(name, f"mask_decoder.{name}")] = tensor
    path = tmp_path / "sam.pth"
    torch.save(state, path)
    return path


def fitted(folder: Path, path: Path, **settings: Any) -> SemanticSegmentor:
    hyperparameters = {**QUICK, "model.encoder": "sam_vit_b", **settings}
    segmentor = SemanticSegmentor(path=path, hyperparameters=hyperparameters, verbosity=0)
    return segmentor.fit(folder / "train.csv", folder / "val.csv")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim.peft": "decoder_only"},
        {"optim.lora.last_blocks": 1, "env.feature_cache": "disk"},
        {"env.checkpointing": True},
    ],
    ids=str,
)
def test_fit__sam_from_a_file__predicts_the_same_after_loading_without_it(
    settings: dict[str, Any], folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    segmentor = fitted(folder, tmp_path / "run", **{"model.checkpoint": str(checkpoint)}, **settings)
    frozen = segmentor._bundle.model.state_dict()["encoder.blocks.0.mlp.lin1.weight"]
    assert torch.equal(frozen, torch.load(checkpoint, weights_only=True)["image_encoder.blocks.0.mlp.lin1.weight"])
    assert not (tmp_path / "run" / "features").exists()
    expected = segmentor.predict(folder / "test.csv")
    checkpoint.unlink()
    loaded = SemanticSegmentor.load(tmp_path / "run")
    for mask, again in zip(expected, loaded.predict(folder / "test.csv"), strict=True):
        assert np.array_equal(mask, again)


def test_fit__published_sam_in_the_cache__is_checked_and_used(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    published = OfficialCheckpoint("sam.pth", "https://example.invalid/sam.pth", digest, checkpoint.stat().st_size)
    monkeypatch.setitem(OFFICIAL, "sam_vit_b", published)
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path))
    segmentor = fitted(folder, tmp_path / "run")
    assert segmentor.plan_.checkpoint == "official"
    checkpoint.write_bytes(b"another file")
    with pytest.raises(CheckpointError, match=r"sam\.pth"):
        build_model(segmentor.plan_)


def test_fit__sam_with_random_weights__trains_all_of_it(folder: Path, tmp_path: Path) -> None:
    segmentor = fitted(folder, tmp_path / "run", **{"model.pretrained": False})
    summary = segmentor.fit_summary()
    assert summary["peft"] == "full"
    assert summary["trainable_parameters"] == summary["total_parameters"]


def test_fit__timm_encoder_with_random_weights__needs_no_network(folder: Path, tmp_path: Path) -> None:
    settings = {"model.encoder": "timm/resnet10t", "model.pretrained": False}
    segmentor = fitted(folder, tmp_path / "run", **settings)
    loaded = SemanticSegmentor.load(tmp_path / "run")
    image = 255 * np.random.default_rng(0).random((50, 70, 3))
    assert np.array_equal(segmentor.predict(image.astype(np.uint8)), loaded.predict(image.astype(np.uint8)))


def test_fit__timm_encoder_from_a_file__is_adapted_by_conv_lora(folder: Path, tmp_path: Path) -> None:
    from semseg_automl.third_party import timm

    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    settings = {"model.encoder": "timm/vit_tiny_patch16_224", "model.checkpoint": str(tmp_path / "vit.pth")}
    assert fitted(folder, tmp_path / "run", **settings).plan_.peft == "conv_lora"


def test_fit__method_that_a_timm_network_cannot_take__names_those_it_can(folder: Path, tmp_path: Path) -> None:
    from semseg_automl.third_party import timm

    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "net.pth")
    settings = {"model.encoder": "timm/resnet10t", "model.checkpoint": str(tmp_path / "net.pth"), "optim.peft": "lora"}
    with pytest.raises(UnsupportedCombination, match="decoder_only, bitfit, full"):
        fitted(folder, tmp_path / "run", **settings)


def test_fit__batch_normalisation_trained_for_several_epochs__comes_back_with_its_statistics(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MIN_STEPS_PER_EPOCH", 2)
    settings = {"model.encoder": "timm/resnet10t", "model.pretrained": False, "optim.max_epochs": 3, "optim.lr": 0.01}
    segmentor = fitted(folder, tmp_path / "run", **settings, **{"optim.ema": 0.0})
    loaded = SemanticSegmentor.load(tmp_path / "run")
    image = (255 * np.random.default_rng(0).random((50, 70, 3))).astype(np.uint8)
    np.testing.assert_array_equal(segmentor.predict_proba(image), loaded.predict_proba(image))
    written = load_file(tmp_path / "run" / "trained.safetensors")
    counted = [tensor for name, tensor in written.items() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counted} == {3 * (segmentor.fit_summary()["best_epoch"] + 1)}
