"""What the preset "auto" stands for, by device, memory and the weights at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.choosing import LARGE_FIRST, choose_preset
from semseg_automl.config import list_presets, load_config
from semseg_automl.errors import ConfigError
from semseg_automl.hardware import Hardware
from semseg_automl.models.downloads import OFFICIAL

CPU = Hardware("cpu", "CPU with 2 cores", 16 * 2**30, 2, bf16=False)


def gpu(gib: int) -> Hardware:
    """Describe an accelerator."""
    return Hardware("cuda", "GPU", gib * 2**30, 8, bf16=True, ram=64 * 2**30)


def put(folder: Path, *encoders: str) -> None:
    """Put files in the place of SAM's weights; only their names are looked at."""
    for encoder in encoders:
        (folder / OFFICIAL[encoder].name).write_bytes(b"")


def write_vit(path: Path) -> None:
    """Write what a plain ViT in timm's naming is known by."""
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
    save_file({name: torch.zeros(1) for name in names}, path)


@pytest.mark.parametrize(
    ("gib", "at_hand", "preset"),
    [
        (80, ("sam_vit_b", "sam_vit_l", "sam_vit_h"), "best_quality"),
        (80, ("sam_vit_b", "sam_vit_l"), "high_quality"),
        (16, ("sam_vit_b", "sam_vit_l", "sam_vit_h"), "high_quality"),
        (8, ("sam_vit_b", "sam_vit_l", "sam_vit_h"), "medium_quality"),
        (4, ("sam_vit_b",), "fast"),
        (80, (), "fast"),
    ],
)
def test_choose_preset__accelerator__takes_the_largest_that_fits_and_is_at_hand(
    tmp_path: Path, gib: int, at_hand: tuple[str, ...], preset: str
) -> None:
    put(tmp_path, *at_hand)
    choice = choose_preset(gpu(gib), {}, folder=tmp_path)
    assert choice.preset == preset
    assert "GiB" in choice.reason


def test_choose_preset__accelerator_without_weights__names_the_preset_that_fetches_them(tmp_path: Path) -> None:
    assert "presets='high_quality' fetches" in choose_preset(gpu(16), {}, folder=tmp_path).reason


def test_choose_preset__processor__never_takes_sam(tmp_path: Path) -> None:
    put(tmp_path, "sam_vit_b")
    choice = choose_preset(CPU, {}, folder=tmp_path)
    assert (choice.preset, choice.settings) == ("fast", {})


def test_choose_preset__plain_vits_at_hand__takes_the_smallest(tmp_path: Path) -> None:
    write_vit(tmp_path / "b.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "0.safetensors").write_bytes(b"torn")
    choice = choose_preset(CPU, {}, folder=tmp_path)
    assert choice.settings == {"model.checkpoint": str(tmp_path / "b.safetensors")}
    assert "b.safetensors" in choice.reason


@pytest.mark.parametrize("asked", [{"model.checkpoint": "x"}, {"model": {"encoder": "sam_vit_l"}}])
def test_choose_preset__user_names_the_network__leaves_it_so(tmp_path: Path, asked: dict[str, object]) -> None:
    write_vit(tmp_path / "b.safetensors")
    choice = choose_preset(gpu(80), asked, folder=tmp_path)
    assert (choice.preset, choice.settings) == ("fast", {})
    assert "given" in choice.reason


def test_choose_preset__unknown_setting__is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        choose_preset(CPU, {"model.encodr": "x"}, folder=tmp_path)


def test_large_first__every_preset__exists_with_that_encoder() -> None:
    for preset, encoder, _ in LARGE_FIRST:
        assert preset in list_presets()
        assert load_config(preset).model.encoder == encoder


def test_fit__default_preset__says_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path / "cache"))
    data = draw_dataset(tmp_path / "data", kind="binary", train=4, val=2, test=1, size=(32, 32))
    segmentor = SemanticSegmentor(verbosity=0).fit(data / "train.csv", data / "val.csv", dry_run=True)
    assert segmentor.plan_.preset == "fast"
    assert segmentor.plan_.reasons["preset"].startswith("auto: ")
    asked = SemanticSegmentor(presets="fast", verbosity=0).fit(data / "train.csv", data / "val.csv", dry_run=True)
    assert asked.plan_.reasons["preset"] == "as asked"
