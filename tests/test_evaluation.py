"""Judging a fitted segmentor: per image, with intervals, against another, and on tables that cannot be judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from semseg_automl import SemanticSegmentor, compare, draw_dataset
from semseg_automl.data.images import read_mask, write_png
from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination
from semseg_automl.metrics import METRICS, MeanIoU, SMeasure
from semseg_automl.uncertainty import Interval

FAST: dict[str, Any] = {
    "model.input_size": 64,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "flip",
}
BINARY = [name for name in METRICS if "binary" in METRICS[name](2).tasks]


def fitted_to(folder: Path, path: Path, **options: Any) -> SemanticSegmentor:
    """A segmentor after one short epoch."""
    segmentor = SemanticSegmentor(path=path, hyperparameters=FAST, verbosity=0)
    return segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=1, **options)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small binary data set."""
    return draw_dataset(tmp_path_factory.mktemp("binary"), kind="binary", train=8, val=4, test=5, size=(72, 96))


@pytest.fixture(scope="module")
def multiclass(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small 4-class data set."""
    return draw_dataset(tmp_path_factory.mktemp("multi"), kind="multiclass", train=8, val=4, test=4, size=(72, 96))


@pytest.fixture(scope="module")
def fitted(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    """Fit to the binary set."""
    return fitted_to(binary, tmp_path_factory.mktemp("bundle") / "a")


@pytest.fixture(scope="module")
def other(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    """Fit to the binary set from another seed."""
    return fitted_to(binary, tmp_path_factory.mktemp("bundle") / "b", seed=1)


@pytest.fixture(scope="module")
def fitted_multiclass(multiclass: Path, tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    """Fit to the 4-class set."""
    return fitted_to(multiclass, tmp_path_factory.mktemp("bundle") / "c")


def frame_of(folder: Path, split: str = "test") -> pd.DataFrame:
    """Read a table with paths made absolute, under an index of its own."""
    frame = pd.read_csv(folder / f"{split}.csv").map(lambda cell: str(folder / cell))
    frame.index = pd.Index([f"case {row}" for row in range(len(frame))], name="case")
    return frame


def rewritten(frame: pd.DataFrame, folder: Path, values: dict[int, int]) -> pd.DataFrame:
    """The table with masks in which `values` are replaced."""
    masks = []
    for number, path in enumerate(frame["label"]):
        mask = np.array(read_mask(path), dtype=np.uint8)
        for old, new in values.items():
            mask[mask == old] = new
        write_png(folder / f"{number}.png", mask)
        masks.append(str(folder / f"{number}.png"))
    return frame.assign(label=masks)


def test_evaluate__per_image__has_the_callers_index_and_averages_to_the_figures(
    fitted: SemanticSegmentor, binary: Path
) -> None:
    frame = frame_of(binary)
    figures = fitted.evaluate(frame, BINARY)
    images = fitted.evaluate(frame, BINARY, return_per_image=True)
    assert list(images.columns) == BINARY == list(figures)
    assert images.index.equals(frame.index)
    pooled = ["iou_pooled", "dice_pooled", "ber", "accuracy", "e_measure_max"]
    for name in set(BINARY) - set(pooled):
        assert images[name].mean() == pytest.approx(figures[name], rel=1e-12), name
    for row, case in enumerate(frame.index):
        alone = fitted.evaluate(frame.iloc[[row]], BINARY)
        # The network rounds differently in a batch of one.
        assert images.loc[case].to_dict() == pytest.approx(alone, abs=1e-4)


def test_evaluate__multiclass_per_image__has_a_column_per_class_and_nan_for_absent_ones(
    fitted_multiclass: SemanticSegmentor, multiclass: Path, tmp_path: Path
) -> None:
    values = [int(value) for value in fitted_multiclass.classes_]
    frame = rewritten(frame_of(multiclass), tmp_path, {values[3]: values[0]})
    metrics = ["miou", "miou_with_absent", "iou_per_class", "boundary_miou"]
    images = fitted_multiclass.evaluate(frame, metrics, return_per_image=True)
    figures = fitted_multiclass.evaluate(frame, metrics)
    assert list(images.columns) == list(figures)
    last = images[f"iou_per_class[{fitted_multiclass.task_.class_names[3]}]"]
    predicted = [bool((mask == values[3]).any()) for mask in fitted_multiclass.predict(frame)]
    assert last.isna().tolist() == [not found for found in predicted]
    assert (last.dropna() == 0).all()


def test_evaluate__intervals__are_around_the_figures(fitted: SemanticSegmentor, binary: Path) -> None:
    frame = frame_of(binary)
    found = fitted.evaluate(frame, BINARY, intervals=True)
    assert list(found.columns) == list(Interval._fields)
    assert found["value"].to_dict() == pytest.approx(fitted.evaluate(frame, BINARY), rel=1e-12)
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()
    assert (found["low"] < found["high"]).any()
    pd.testing.assert_frame_equal(found, fitted.evaluate(frame, BINARY, intervals=True))


def test_evaluate__metric_objects__are_used_with_their_settings_and_left_alone(
    fitted: SemanticSegmentor, binary: Path
) -> None:
    raw = SMeasure(stretch=False)
    raw.update(torch.ones(1, 2, 2), torch.ones(2, 2).long(), torch.ones(2, 2).long())
    before = raw.compute()
    figures = fitted.evaluate(frame_of(binary), ["s_measure", raw])
    assert list(figures) == ["s_measure", "SMeasure"]
    assert figures["s_measure"] != figures["SMeasure"]
    assert fitted.evaluate(frame_of(binary), raw) == {"SMeasure": figures["SMeasure"]}
    assert torch.equal(raw.compute(), before)


def test_evaluate__unusable_metrics_or_forms__raise(fitted: SemanticSegmentor, binary: Path) -> None:
    frame = frame_of(binary)
    with pytest.raises(ConfigError, match="both True"):
        fitted.evaluate(frame, return_per_image=True, intervals=True)
    with pytest.raises(ConfigError, match="more than once: SMeasure, SMeasure"):
        fitted.evaluate(frame, [SMeasure(), SMeasure(stretch=False)])
    with pytest.raises(UnsupportedCombination, match="'MeanIoU' is not defined for a binary task"):
        fitted.evaluate(frame, MeanIoU(3))
    with pytest.raises(ConfigError, match="one at least"):
        fitted.evaluate(frame, [])


def test_evaluate__metric_of_another_number_of_classes__raises(
    fitted_multiclass: SemanticSegmentor, multiclass: Path
) -> None:
    with pytest.raises(UnsupportedCombination, match="'MeanIoU' is not defined for a multiclass task of 4 classes"):
        fitted_multiclass.evaluate(frame_of(multiclass), MeanIoU(5))


def test_evaluate__empty_table__raises(fitted: SemanticSegmentor, binary: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        fitted.evaluate(frame_of(binary).iloc[:0])


def test_evaluate__scores_not_finite__names_the_row(fitted: SemanticSegmentor, binary: Path) -> None:
    broken = SemanticSegmentor.load(fitted.path_)
    with torch.no_grad():
        for weight in broken._bundle.model.parameters():
            weight.fill_(torch.nan)
    frame = frame_of(binary)
    for intervals in (False, True):
        with pytest.raises(DataError, match="scores are not finite") as info:
            broken.evaluate(frame, "iou", intervals=intervals)
        assert "case 0" in str(info.value)


def test_evaluate__masks_of_another_class_set__name_the_values(
    fitted_multiclass: SemanticSegmentor, multiclass: Path, tmp_path: Path
) -> None:
    frame = rewritten(frame_of(multiclass), tmp_path, {int(fitted_multiclass.classes_[1]): 77})
    for per_image in (False, True):
        with pytest.raises(DataError, match=r"hold values that no class has(.|\n)*77"):
            fitted_multiclass.evaluate(frame, return_per_image=per_image)


def test_compare__two_seeds__rows_agree_with_evaluate(
    fitted: SemanticSegmentor, other: SemanticSegmentor, binary: Path
) -> None:
    frame = frame_of(binary)
    found = compare(fitted, other, frame, ["iou", "iou_pooled", "mae"])
    assert found.index.tolist() == ["iou", "iou_pooled", "mae"]
    assert found["a"].to_dict() == pytest.approx(fitted.evaluate(frame, ["iou", "iou_pooled", "mae"]))
    assert found["b"].to_dict() == pytest.approx(other.evaluate(frame, ["iou", "iou_pooled", "mae"]))
    np.testing.assert_allclose(found["difference"], found["a"] - found["b"])
    assert (found["low"] <= found["difference"]).all()
    assert (found["difference"] <= found["high"]).all()
    assert found["p"].between(0, 1).all()
    pd.testing.assert_frame_equal(found, compare(fitted, other, frame, ["iou", "iou_pooled", "mae"]))


def test_compare__same_segmentor_twice__has_no_difference(fitted: SemanticSegmentor, binary: Path) -> None:
    found = compare(fitted, fitted, binary / "test.csv")
    assert (found[["difference", "low", "high"]] == 0).all(axis=None)
    assert (found["p"] == 1).all()


def test_compare__segmentors_of_different_classes__raises(
    fitted: SemanticSegmentor, fitted_multiclass: SemanticSegmentor, binary: Path
) -> None:
    with pytest.raises(UnsupportedCombination, match=r"a was fitted to binary masks .* b to multiclass masks"):
        compare(fitted, fitted_multiclass, binary / "test.csv")
