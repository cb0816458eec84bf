"""Prediction image by image: tiled and whole agree, labels are what the scores decide, and memory stays bounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl import inference
from semseg_automl.data.images import write_png
from semseg_automl.data.table import MaskTable
from semseg_automl.data.transforms import Geometry
from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination
from semseg_automl.inference import FailedPrediction, Predictor
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels
from semseg_automl.models.tiny_vit import TinyViT

Image = NDArray[np.uint8]


def network(tokens: int) -> SegmentationModel:
    """A small network with random weights, its scores spread so that they are not all alike."""
    torch.manual_seed(3)
    encoder = TinyViT(embed_dim=32, depth=1, num_heads=1, patch_size=8, grid=4, out_channels=32)
    model = SegmentationModel(encoder, MaskDecoder(32, mlp_dim=32, num_mask_tokens=tokens)).eval()
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter.mul_(1.5)
    return model


BINARY, CLASSES = network(1), network(3)


def predictor(model: SegmentationModel = BINARY, tile: tuple[int, int] | None = None, batch_size: int = 1) -> Predictor:
    return Predictor(model, (32, 32), batch_size, torch.device("cpu"), tile=tile)


def draw(*shape: int, seed: int = 0) -> Image:
    """Draw noise that changes slowly enough for the network to see it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-shape[0] // 6), -(-shape[1] // 6), 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 6, axis=0), 6, axis=1)[: shape[0], : shape[1]].copy()


def table_of(*images: Image | str) -> MaskTable:
    return MaskTable(images, None, pd.RangeIndex(len(images)))


def scores_of(predictor: Predictor, image: Image) -> Tensor:
    (scores,) = predictor.scores(table_of(image))
    assert isinstance(scores, Tensor)
    return scores


@pytest.mark.parametrize("model", [BINARY, CLASSES])
@pytest.mark.parametrize("tile", [(32, 32), (48, 40)])
def test_scores__image_of_one_tile__are_those_of_the_whole_image_bit_for_bit(
    model: SegmentationModel, tile: tuple[int, int]
) -> None:
    image = draw(*tile)
    whole, tiled = scores_of(predictor(model), image), scores_of(predictor(model, tile), image)
    assert whole.std() > 0.01
    assert torch.equal(whole, tiled)


@pytest.mark.parametrize("model", [BINARY, CLASSES])
@pytest.mark.parametrize("tile", [None, (40, 40)])
def test_scores__mirrored__turn_with_the_image(model: SegmentationModel, tile: tuple[int, int] | None) -> None:
    image = draw(40, 80)
    turned = np.ascontiguousarray(image[:, ::-1])
    once, both = predictor(model, tile), replace(predictor(model, tile), mirrored=True)
    torch.testing.assert_close(scores_of(both, turned), scores_of(both, image).flip(-1))
    assert not torch.allclose(scores_of(once, turned), scores_of(once, image).flip(-1), atol=1e-3)
    if tile is None:
        mean = (scores_of(once, image) + scores_of(once, turned).flip(-1)) / 2
        torch.testing.assert_close(scores_of(both, image), mean)


def test_scores__image_smaller_than_a_tile__are_those_of_the_mirrored_image_bit_for_bit() -> None:
    image = draw(21, 40)
    padded = np.pad(image, ((5, 6), (4, 4), (0, 0)), mode="reflect")
    whole = scores_of(predictor(), padded)[:, 5:26, 4:44]
    tiled = scores_of(predictor(tile=(32, 48)), image)
    assert torch.equal(whole, tiled)


@pytest.mark.parametrize("model", [BINARY, CLASSES])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_labels__whole_or_tiled__are_what_the_scores_decide(model: SegmentationModel, temperature: float) -> None:
    images = [draw(40, 90), draw(24, 24, seed=1), draw(70, 33, seed=2)]
    for tile in (None, (40, 40)):
        made = replace(predictor(model, tile, batch_size=2), temperature=temperature)
        threshold = float(np.median(np.concatenate([np.ravel(s) for s in map_of(made, images)])))
        labels = list(made.labels(table_of(*images), threshold=threshold))
        for image, scores, found in zip(images, map_of(made, images), labels, strict=True):
            assert isinstance(found, np.ndarray)
            assert found.dtype == np.uint8
            assert found.shape == image.shape[:2]
            assert np.array_equal(found, hard_labels(scores, threshold).numpy())
            assert len(np.unique(found)) > 1


def map_of(made: Predictor, images: list[Image]) -> list[Tensor]:
    """The scores of several images."""
    return [scores for scores in made.scores(table_of(*images)) if isinstance(scores, Tensor)]


def test_scores__several_tiles__agree_with_the_whole_image_where_it_is_uniform() -> None:
    image = np.full((90, 100, 3), 90, np.uint8)
    tiled = scores_of(predictor(tile=(32, 32)), image)
    tile = scores_of(predictor(), image[:32, :32])
    assert tile.min() - 1e-6 <= tiled.min() <= tiled.max() <= tile.max() + 1e-6
    assert tiled.shape == (1, 90, 100)


def test_scores__batches_of_tiles__do_not_change_them() -> None:
    image = draw(90, 100)
    one, four = (scores_of(predictor(CLASSES, (32, 32), batch_size=size), image) for size in (1, 4))
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [BINARY, CLASSES])
def test_labels__large_whole_image_in_strips__are_those_of_one_piece(
    model: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = draw(63, 97)
    whole = scores_of(predictor(model), image)
    monkeypatch.setattr(inference, "STRIP_ELEMENTS", 97 * whole.shape[0] * 10 + 5)
    monkeypatch.setattr(Geometry, "undo", lambda *_: pytest.fail("the whole map was made"))
    strips = scores_of(predictor(model), image)
    assert not torch.equal(whole, torch.zeros_like(whole))
    torch.testing.assert_close(strips, whole, rtol=0, atol=1e-6)
    (labels,) = predictor(model).labels(table_of(image), threshold=0.5)
    assert isinstance(labels, np.ndarray)
    assert np.array_equal(labels, hard_labels(strips).numpy())


@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_labels__bad_image__raises_or_stands_in_its_place(tile: tuple[int, int] | None, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    write_png(tmp_path / "good.png", draw(20, 30))
    table = table_of(draw(40, 40), str(bad), str(tmp_path / "good.png"))
    made = predictor(tile=tile, batch_size=2)
    with pytest.raises(DataError, match=r"bad\.png"):
        list(made.labels(table, threshold=0.5))
    first, failed, last = made.labels(table, threshold=0.5, on_error="report")
    assert isinstance(failed, FailedPrediction)
    assert "row 1" in failed.row
    assert [getattr(each, "shape", None) for each in (first, last)] == [(40, 40), (20, 30)]
    with pytest.raises(ConfigError, match="allowed: raise, report"):
        made.labels(table, threshold=0.5, on_error="skip")  # type: ignore[arg-type]


def test_scores__size_of_the_input__is_refused_for_tiles() -> None:
    (scores,) = predictor().scores(table_of(draw(40, 50)), size="model")
    assert isinstance(scores, Tensor)
    assert scores.shape == (1, 32, 32)
    with pytest.raises(UnsupportedCombination, match=r"data\.tiling='off'"):
        predictor(tile=(40, 40)).scores(table_of(draw(40, 50)), size="model")
    with pytest.raises(ConfigError, match="allowed: original, model"):
        predictor().scores(table_of(draw(40, 50)), size="own")  # type: ignore[arg-type]
