"""What a fitted segmentor offers of its fine-tuning method: merging, export, starting from an adapter, expert usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.errors import BundleError, CheckpointError, ConfigError, UnsupportedCombination
from semseg_automl.models.tiny_vit import TinyViT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small binary data set."""
    return draw_dataset(tmp_path_factory.mktemp("binary"), kind="binary", train=8, val=4, test=3, size=(64, 64))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small plain ViT in timm's names, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = TinyViT(embed_dim=64, depth=2, num_heads=1, grid=4)
    state = {
        name.replace(".mlp.lin", ".mlp.fc"): tensor
        for name, tensor in vit.state_dict().items()
        if not name.startswith("neck.")
    }
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def fit(folder: Path, checkpoint: Path, path: Path, peft: str, **settings: Any) -> SemanticSegmentor:
    """Fit four steps."""
    small = {"model.input_size": 64, "model.decoder_dim": 32, "model.detail": False, "env.batch_size": 4}
    given = {"model.checkpoint": str(checkpoint), "optim.peft": peft, "env.precision": "32-true", "optim.lr": 0.01}
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    segmentor = SemanticSegmentor(path=path, hyperparameters=small | given | dotted, verbosity=0)
    return segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=1, limit_train_batches=4)


@pytest.mark.parametrize(("peft", "settings"), [("lora", {"optim__lora__dora": True}), ("ssf", {}), ("bitfit", {})])
def test_merge__linear_correction__keeps_the_masks_and_comes_back_from_disk(
    folder: Path, checkpoint: Path, tmp_path: Path, peft: str, settings: dict[str, Any]
) -> None:
    segmentor = fit(folder, checkpoint, tmp_path / "fit", peft, **settings)
    unmerged = SemanticSegmentor.load(tmp_path / "fit")
    before = segmentor.predict_proba(folder / "test.csv")
    for one, other in zip(unmerged.predict_proba(folder / "test.csv"), before, strict=True):
        np.testing.assert_array_equal(one, other)
    added = {"lora": ".lora_A", "ssf": ".scale", "bitfit": "nothing"}[peft]
    segmentor.merge().merge().save(tmp_path / "merged")
    merged = SemanticSegmentor.load(tmp_path / "merged")
    assert merged.plan_.merged
    assert not any(added in name for name, _ in merged._bundle.model.named_parameters())
    for one, two, other in zip(
        segmentor.predict_proba(folder / "test.csv"), merged.predict_proba(folder / "test.csv"), before, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_array_equal(one, two)
    assert not SemanticSegmentor.load(tmp_path / "fit").plan_.merged


def test_merge__conv_lora__says_why_not_and_counts_its_experts(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    segmentor = fit(folder, checkpoint, tmp_path / "fit", "conv_lora", optim__lora__experts=3)
    with pytest.raises(UnsupportedCombination, match=r"convolve over the grid.*lora"):
        segmentor.merge()
    usage = segmentor.fit_summary()["expert_usage"]
    assert [len(counts) for counts in usage.values()] == [3, 3]
    assert all(sum(counts) == 4 for counts in usage.values())  # one choice per validation image and layer
    assert (tmp_path / "fit" / "expert_usage.png").is_file()
    assert SemanticSegmentor.load(tmp_path / "fit").fit_summary()["expert_usage"] == usage
    with pytest.raises(UnsupportedCombination, match="AutoGluon"):
        segmentor.export_adapter(tmp_path / "peft", format="peft")


def test_export_adapter__peft__is_where_another_fit_starts(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    segmentor = fit(folder, checkpoint, tmp_path / "fit", "lora", optim__lora__rank=2)
    segmentor.export_adapter(tmp_path / "adapter", format="peft")
    lora_b = "encoder.blocks.0.attn.qkv.lora_B"
    learned = segmentor._bundle.model.state_dict()[lora_b]
    assert learned.any()
    again = fit(
        folder,
        checkpoint,
        tmp_path / "again",
        "lora",
        optim__lora__rank=2,
        model__adapter=str(tmp_path / "adapter"),
        optim__lr=1e-9,
    )
    torch.testing.assert_close(again._bundle.model.state_dict()[lora_b], learned, rtol=0, atol=1e-6)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert SemanticSegmentor.load(tmp_path / "again").plan_.adapter == str(tmp_path / "adapter")  # but is not read
    with pytest.raises(CheckpointError, match="adapter"):
        fit(folder, checkpoint, tmp_path / "x", "lora", model__adapter=str(tmp_path / "adapter"))


def test_export_adapter__what_cannot_be_written__is_refused(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    segmentor = fit(folder, checkpoint, tmp_path / "fit", "lora")
    with pytest.raises(ConfigError, match="autogluon, peft"):
        segmentor.export_adapter(tmp_path / "a.safetensors", format="onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        segmentor.export_adapter(tmp_path / "a.ckpt")
    with pytest.raises(UnsupportedCombination, match="SAM"):
        segmentor.export_adapter(tmp_path / "a.safetensors")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((BundleError, CheckpointError), match="file"):
        segmentor.export_adapter(tmp_path / "file" / "adapter", format="peft")
