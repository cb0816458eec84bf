"""Whole images or tiles: when, at which scale, and what that means for training, validation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from semseg_automl import SemanticSegmentor
from semseg_automl.config import load_config
from semseg_automl.data.crops import CropRule, cut
from semseg_automl.data.dataset import MaskDataset, TileDataset, collate_tiles
from semseg_automl.data.images import write_png
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.data.transforms import resize, resize_mask
from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.framing import LARGE_SIDE, LARGEST_SHRINK
from semseg_automl.hardware import Hardware
from semseg_automl.models.facts import EncoderFacts, encoder_facts
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import IGNORE_INDEX, SegmentationTask
from semseg_automl.training import data_module

CPU = Hardware("cpu", "CPU with 2 cores", 8 * 2**30, 2, bf16=False)
TASK = SegmentationTask("binary", values=(0, 255), class_names=("background", "road"))
SCRATCH = encoder_facts("tiny_vit")
FROZEN = EncoderFacts(
    "tiny_vit",
    "tiny_vit",
    {"embed_dim": 64, "depth": 4, "num_heads": 1, "patch_size": 8, "grid": 4, "neck_taps": [1, 3]},
    8,
    64,
    4,
    "absent/vit.safetensors",
    "a file",
)
FAST: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "flip",
    "optim.lr": 1e-3,
}


def plan_of(
    size: tuple[int, int], settings: dict[str, Any] | None = None, encoder: EncoderFacts = SCRATCH, **options: Any
) -> Plan:
    stats = DataStats(rows=9, sizes=((size[0] // 2, size[1] // 2),) * 4 + (size,) * 5)
    return make_plan(load_config("fast", settings), TASK, stats, CPU, encoder, **options)


@pytest.mark.parametrize("size", [(480, 640), (720, 1280), (LARGE_SIDE, 3000)])
def test_make_plan__images_of_usual_size__are_seen_whole(size: tuple[int, int]) -> None:
    plan = plan_of(size)
    assert (plan.tile_scale, plan.tile, plan.balanced_crops) == (None, None, False)
    assert f"{size[0]} x {size[1]}" in plan.reasons["tile_scale"]
    assert "balanced_crops" not in plan.reasons


def test_make_plan__large_images__are_seen_in_square_tiles_at_the_largest_shrink() -> None:
    plan = plan_of((3000, 4000))
    assert plan.tile_scale == 1 / LARGEST_SHRINK
    assert plan.input_size[0] == plan.input_size[1] == 128
    assert plan.tile == (512, 512)
    assert plan.balanced_crops
    assert {"tile_scale", "balanced_crops"} <= plan.reasons.keys()
    assert "square" in plan.reasons["input_size"]


def test_make_plan__large_input__needs_no_tiles_for_what_it_hardly_shrinks() -> None:
    assert plan_of((3000, 4000), {"model.input_size": 768}).tile_scale is None
    plan = plan_of((3000, 4000), {"model.input_size": 736})
    assert plan.tile_scale == 0.25
    assert plan.tile == (2944, 2944)


def test_make_plan__asked_for__is_kept_and_marked() -> None:
    plan = plan_of((480, 640), {"data.tiling": "on", "data.tile_scale": 0.5, "data.balanced_crops": False})
    assert (plan.tile_scale, plan.balanced_crops) == (0.5, False)
    assert plan.reasons["tile_scale"] == plan.reasons["balanced_crops"] == "as asked"
    assert plan_of((480, 640), {"data.tile_scale": 1}).tile_scale == 1.0, "a scale asks for tiles"
    assert plan_of((3000, 4000), {"data.tiling": "off"}).tile_scale is None
    alone = plan_of((480, 640), {"data.tiling": "on"})
    assert alone.tile_scale is not None
    assert alone.tile_scale >= 0.25


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"data.tiling": "off", "data.tile_scale": 0.5}, r"data\.tile_scale is 0\.5.*data\.tiling='on'"),
        ({"data.balanced_crops": True}, r"data\.balanced_crops is True"),
        ({"data.tiling": "on", "env.feature_cache": "memory", "optim.peft": "decoder_only"}, "new ones every time"),
        ({"data.tile_scale": 0.001}, r"data\.tile_scale: .*from 0\.01 to 16"),
        ({"data.tile_scale": float("nan")}, r"from 0\.01 to 16"),
        ({"data.tiling": "yes"}, r"data\.tiling"),
    ],
)
def test_make_plan__settings_that_cannot_be__are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        plan_of((480, 640), settings, FROZEN)


def test_make_plan__tiles_and_frozen_blocks__repeat_no_views() -> None:
    frozen = {"optim.peft": "decoder_only"}
    assert plan_of((480, 640), frozen, FROZEN).cached_views == 4
    plan = plan_of((480, 640), frozen | {"data.tiling": "on"}, FROZEN)
    assert (plan.feature_cache, plan.cached_views) == ("off", 0)
    with pytest.raises(UnsupportedCombination):
        plan_of((3000, 4000), frozen | {"env.feature_cache": "disk"}, FROZEN)


def table_of(*shapes: tuple[int, int]) -> MaskTable:
    """Draw images whose mask is 255 where they are bright."""
    rng = np.random.default_rng(0)
    masks = [rng.choice(np.array([0, 255], np.uint8), shape) for shape in shapes]
    images = [np.repeat(np.maximum(mask // 2, 30)[:, :, None], 3, axis=2) for mask in masks]
    return MaskTable(tuple(images), tuple(masks), pd.RangeIndex(len(shapes)))


def test_dataset__crops__are_parts_of_image_and_mask_and_follow_from_the_seed() -> None:
    table = table_of((90, 80), (20, 100))
    data = MaskDataset(table, TASK, (16, 24), seed=4, crops=CropRule((32, 48), balanced=True))
    images = [np.asarray(source) for source in table.images]
    seen = set()
    for index in range(12):
        sample, again = data[index], data[index]
        assert np.array_equal(sample.image, again.image)
        assert (sample.image.shape, sample.mask.shape, sample.native_mask.shape) == ((16, 24, 3), (16, 24), (32, 48))
        assert sample.geometry.original_size == (32, 48)
        assert np.array_equal(sample.mask, resize_mask(sample.native_mask, (16, 24)))
        row = index % 2
        outside = sample.native_mask == IGNORE_INDEX
        assert outside.any() == (row == 1)
        seen.add(sample.image.tobytes())
        places = [
            corner
            for corner in np.ndindex(90 - 31, 80 - 47)
            if row == 0 and np.array_equal(resize(cut(images[0], corner, (32, 48)), (16, 24))[0], sample.image)
        ]
        assert len(places) == (1 if row == 0 else 0)
    assert len(seen) == 12
    other = MaskDataset(table, TASK, (16, 24), seed=5, crops=CropRule((32, 48), balanced=True))
    assert not np.array_equal(other[0].image, data[0].image)


def test_dataset__augmented_crops__keep_image_and_mask_together() -> None:
    mask = np.kron(np.random.default_rng(1).integers(0, 2, (6, 6)), np.full((30, 30), 255)).astype(np.uint8)
    image = np.repeat(np.maximum(mask // 2, 30)[:, :, None], 3, axis=2)
    table = MaskTable((image,), (mask,), pd.RangeIndex(1))
    for strength in ("flip", "medium"):
        data = MaskDataset(table, TASK, (32, 32), strength, crops=CropRule((60, 60)))
        found = [data[index] for index in range(6)]
        agreement = [((s.image[:, :, 0] > s.image[:, :, 0].mean()) == (s.mask == 1)).mean() for s in found]
        assert min(agreement) > 0.9


def test_tile_dataset__row__holds_every_tile_in_order() -> None:
    table = table_of((50, 90), (10, 12))
    data = TileDataset(MaskDataset(table, TASK, (16, 16)), (32, 32))
    sample = data[0]
    assert len(sample.images) == len(sample.grid) == 2 * 4
    image = np.asarray(table.images[0])
    for tile, corner in zip(sample.images, sample.grid.corners(), strict=True):
        assert np.array_equal(tile, resize(cut(image, corner, (32, 32)), (16, 16))[0])
    batch = collate_tiles([sample]).to("cpu")
    assert batch.grid == sample.grid
    assert (len(batch), len(batch.geometry), [*map(tuple, map(np.shape, batch.native_masks))]) == (8, 8, [(50, 90)])
    assert len(data[1].images) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw wide images of bright squares, which are the foreground."""
    folder = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "val": 3, "test": 3}.items():
        rows = []
        for i in range(count):
            mask = np.kron(rng.random((4, 10)) < 0.3, np.full((24, 24), 255)).astype(np.uint8)
            image = np.clip(rng.normal(90, 20, (*mask.shape, 3)) + mask[:, :, None] * 0.4, 0, 255).astype(np.uint8)
            write_png(folder / f"{split}{i}.png", image)
            write_png(folder / f"{split}{i}_mask.png", mask)
            rows.append({"image": f"{split}{i}.png", "label": f"{split}{i}_mask.png"})
        pd.DataFrame(rows).to_csv(folder / f"{split}.csv", index=False)
    return folder


def test_fit__tiled__learns_and_is_judged_alike_while_fitting_and_after(folder: Path, tmp_path: Path) -> None:
    settings = FAST | {"data.tiling": "on", "data.tile_scale": 0.5}
    segmentor = SemanticSegmentor(path=tmp_path / "b", hyperparameters=settings, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=3)
    assert segmentor.plan_.tile == (64, 64)
    best = segmentor.fit_summary()["best_score"]
    figures = segmentor.evaluate(folder / "val.csv", "iou")
    assert figures["iou"] == pytest.approx(best, abs=1e-4), "validation sees what evaluate sees"
    assert best > 0.5
    loaded = SemanticSegmentor.load(tmp_path / "b")
    frame = pd.read_csv(folder / "test.csv").map(lambda cell: str(folder / cell))
    probability = loaded.predict_proba(frame)
    for mask, expected, scores in zip(loaded.predict(frame), segmentor.predict(frame), probability, strict=True):
        assert np.array_equal(mask, expected)
        assert np.array_equal(mask, 255 * (scores > loaded.threshold_))


def test_data_module__tiled_plan__crops_the_training_rows_only(folder: Path) -> None:
    settings = FAST | {"data.tiling": "on", "data.tile_scale": 0.25}
    segmentor = SemanticSegmentor(hyperparameters=settings, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True)
    train_table, validation_table = (read_table(folder / f"{split}.csv") for split in ("train", "val"))
    data = data_module(segmentor.plan_, segmentor.task_, train_table, validation_table)
    assert data.train.crops == CropRule((128, 128), balanced=True)
    assert data.validation.crops is None
    (batch, *rest) = list(data.val_dataloader())
    assert len(rest) == 2
    assert batch.grid is not None
    assert (batch.grid.size, batch.image.shape) == ((96, 240), torch.Size([3, 3, 32, 32]))
    train = next(iter(data.train_dataloader()))
    assert train.grid is None
    assert train.image.shape[1:] == (3, 32, 32)
