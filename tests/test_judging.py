"""How far a segmentor can be believed, through the public class: calibration, review, label issues, strata, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.data.images import read_mask, write_png
from semseg_automl.data.transforms import resize_mask
from semseg_automl.errors import BundleError, ConfigError, DataError, UnsupportedCombination
from semseg_automl.fitted import NotFittedError
from semseg_automl.metrics import build_metrics

FAST: dict[str, Any] = {
    "model.input_size": 64,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "flip",
}


def drawn_and_fitted(folder: Path, kind: Any, **settings: Any) -> tuple[Path, Path]:
    """Draw a data set, fit one short epoch to it, and return its folder and that of the bundle."""
    data = draw_dataset(folder / "data", kind=kind, train=8, val=4, test=5, size=(72, 96))
    segmentor = SemanticSegmentor(path=folder / "bundle", hyperparameters=FAST, verbosity=0, **settings)
    segmentor.fit(data / "train.csv", data / "val.csv", max_epochs=1)
    return data, folder / "bundle"


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Fit to a binary set."""
    return drawn_and_fitted(tmp_path_factory.mktemp("binary"), "binary")


@pytest.fixture(scope="module")
def multiclass(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Fit to a 4-class set whose masks may leave pixels out."""
    return drawn_and_fitted(tmp_path_factory.mktemp("multi"), "multiclass", ignore_label=255)


def frame_of(folder: Path, split: str = "test") -> pd.DataFrame:
    """Read a table with paths made absolute, under an index of its own."""
    frame = pd.read_csv(folder / f"{split}.csv").map(lambda cell: str(folder / cell))
    frame.index = pd.Index([f"case {row}" for row in range(len(frame))], name="case")
    return frame


@pytest.fixture(params=["binary", "multiclass"])
def either(request: pytest.FixtureRequest) -> tuple[SemanticSegmentor, pd.DataFrame]:
    """A fresh segmentor of either kind, and its test table."""
    data, bundle = request.getfixturevalue(request.param)
    return SemanticSegmentor.load(bundle), frame_of(data)


def test_calibrate_temperature__either_task__keeps_masks_and_improves_the_likelihood(
    either: tuple[SemanticSegmentor, pd.DataFrame], tmp_path: Path
) -> None:
    segmentor, frame = either
    assert segmentor.temperature_ == 1.0
    segmentor.threshold_ = 0.37
    masks, raw = segmentor.predict(frame), segmentor.predict_proba(frame)
    before = segmentor.calibration(frame)
    temperature = segmentor.calibrate_temperature(frame)
    assert temperature == segmentor.temperature_ != 1.0
    assert all(np.array_equal(a, b) for a, b in zip(masks, segmentor.predict(frame), strict=True))
    assert segmentor.calibration(frame).nll < before.nll
    softened = segmentor.predict_proba(frame)[0]
    if segmentor.task_.kind == "binary":
        odds = np.log(raw[0] / (1 - raw[0])) / temperature
        np.testing.assert_allclose(softened, 1 / (1 + np.exp(-odds)), atol=1e-5)
        assert np.array_equal((softened > segmentor.threshold_) * 255, masks[0])
        assert segmentor.threshold_ == pytest.approx(1 / (1 + (0.63 / 0.37) ** (1 / temperature)))
    else:
        powers = raw[0] ** (1 / temperature)
        np.testing.assert_allclose(softened, powers / powers.sum(axis=0), atol=1e-5)
    assert segmentor.calibrate_temperature(frame) == temperature  # not the temperature of what is calibrated already
    loaded = SemanticSegmentor.load(segmentor.save(tmp_path / "saved"))
    assert (loaded.temperature_, loaded.threshold_) == (temperature, segmentor.threshold_)
    np.testing.assert_array_equal(loaded.predict_proba(frame)[0], softened)
    assert SemanticSegmentor.load(segmentor.path_).temperature_ == 1.0


def test_load__damaged_temperature__raises(binary: tuple[Path, Path], tmp_path: Path) -> None:
    folder = SemanticSegmentor.load(binary[1]).save(tmp_path / "saved")
    content = yaml.safe_load((folder / "bundle.yaml").read_text(encoding="utf-8"))
    for wrong in (0, "hot", [2.0]):
        text = yaml.safe_dump({**content, "temperature": wrong})
        (folder / "bundle.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(BundleError, match="temperature"):
            SemanticSegmentor.load(folder)


def test_calibrate_decision_threshold__iou__is_better_and_saved(binary: tuple[Path, Path], tmp_path: Path) -> None:
    segmentor, frame = SemanticSegmentor.load(binary[1]), frame_of(binary[0])
    for metric, sign in (("iou", 1), ("ber", -1)):
        segmentor.threshold_ = 0.5
        before = segmentor.evaluate(frame, metric)[metric]
        chosen = segmentor.calibrate_decision_threshold(frame, metric)
        assert chosen == segmentor.threshold_
        after = segmentor.evaluate(frame, metric)[metric]
        assert sign * after >= sign * before
        for shift in (-0.05, 0.05):
            segmentor.threshold_ = min(max(chosen + shift, 0.001), 0.999)
            assert sign * after >= sign * segmentor.evaluate(frame, metric)[metric]
        segmentor.threshold_ = chosen
    loaded = SemanticSegmentor.load(segmentor.save(tmp_path / "saved"))
    assert loaded.threshold_ == segmentor.threshold_
    assert np.array_equal(loaded.predict(frame)[0], segmentor.predict(frame)[0])


def test_calibrate_decision_threshold__unusable__raises(
    binary: tuple[Path, Path], multiclass: tuple[Path, Path]
) -> None:
    with pytest.raises(ConfigError, match="Known: iou, dice"):
        SemanticSegmentor.load(binary[1]).calibrate_decision_threshold(frame_of(binary[0]), "mae")
    with pytest.raises(UnsupportedCombination, match="binary"):
        SemanticSegmentor.load(multiclass[1]).calibrate_decision_threshold(frame_of(multiclass[0]))


def test_confidence_and_quality__either_task__follow_from_probabilities(
    either: tuple[SemanticSegmentor, pd.DataFrame],
) -> None:
    segmentor, frame = either
    probability = segmentor.predict_proba(frame)[0]
    wanted = np.maximum(probability, 1 - probability) if probability.ndim == 2 else probability.max(axis=0)
    np.testing.assert_allclose(segmentor.confidence(frame)[0], wanted, atol=1e-6)
    assert segmentor.confidence(frame["image"].iloc[0]).shape == wanted.shape
    quality = segmentor.quality(frame)
    assert quality.index.equals(frame.index)
    assert quality.between(0, 1).all()
    assert segmentor.quality(frame["image"].iloc[0]) == pytest.approx(quality.iloc[0], abs=1e-3)


def test_review__unlabelled_images__lists_the_least_expected_iou(
    either: tuple[SemanticSegmentor, pd.DataFrame],
) -> None:
    segmentor, frame = either
    found = segmentor.review(frame[["image"]], n=3)
    quality = segmentor.quality(frame)
    assert found["expected_iou"].tolist() == sorted(quality)[:3]
    assert found["image"].tolist() == frame.loc[found.index, "image"].tolist()
    with pytest.raises(ConfigError, match="n is 0"):
        segmentor.review(frame, n=0)


def test_find_label_issues__caller_index__ranks_all_masks(either: tuple[SemanticSegmentor, pd.DataFrame]) -> None:
    segmentor, frame = either
    found = segmentor.find_label_issues(frame)
    assert sorted(found.index) == sorted(frame.index)
    assert found["score"].is_monotonic_decreasing
    assert found["score"].between(0, 1).all()
    masks: Any = [np.array(mask) for mask in segmentor.predict(frame)]
    agreeing = frame.assign(label=masks)
    assert (segmentor.find_label_issues(agreeing)["pixels"] == 0).all()


@pytest.mark.parametrize("method", ["calibrate_temperature", "calibration", "find_label_issues"])
def test_judging__unusable_tables__raise(method: str, binary: tuple[Path, Path], tmp_path: Path) -> None:
    segmentor, frame = SemanticSegmentor.load(binary[1]), frame_of(binary[0])
    judge = getattr(segmentor, method)
    with pytest.raises(DataError, match="no rows"):
        judge(frame.iloc[:0])
    with pytest.raises(DataError, match="no column 'label'"):
        judge(frame[["image"]])
    write_png(tmp_path / "odd.png", np.full((72, 96), 77, np.uint8))
    with pytest.raises(DataError, match=r"no class has(.|\n)*case 1(.|\n)*77"):
        judge(frame.assign(label=[frame["label"].iloc[0], str(tmp_path / "odd.png"), *frame["label"].iloc[2:]]))
    with pytest.raises(NotFittedError):
        getattr(SemanticSegmentor(), method)(frame)


def test_review__scores_not_finite__names_the_row(binary: tuple[Path, Path]) -> None:
    broken = SemanticSegmentor.load(binary[1])
    with torch.no_grad():
        for weight in broken._bundle.model.parameters():
            weight.fill_(torch.nan)
    for method in ("review", "quality", "confidence", "calibration", "find_label_issues"):
        with pytest.raises(DataError, match=r"case 0 .*not finite"):
            getattr(broken, method)(frame_of(binary[0]))


def test_evaluate__by_column__agrees_with_the_rows_alone(binary: tuple[Path, Path]) -> None:
    segmentor, frame = SemanticSegmentor.load(binary[1]), frame_of(binary[0])
    frame["site"] = ["b", "a", "b", None, "a"]
    found = segmentor.evaluate(frame, ["iou", "ber"], by="site")
    assert found.index.get_level_values("site").unique().tolist() == ["a", "b", "missing"]
    images = segmentor.evaluate(frame, "iou", return_per_image=True)["iou"]
    assert found.loc[("a", "iou"), "value"] == pytest.approx(images.iloc[[1, 4]].mean())
    assert found.loc[("missing", "iou"), "value"] == pytest.approx(images.iloc[3])
    whole = segmentor.evaluate(frame.assign(site=1), by="site")
    assert whole["value"].droplevel("site").to_dict() == pytest.approx(segmentor.evaluate(frame))
    intervals = segmentor.evaluate(frame, intervals=True)
    np.testing.assert_allclose(whole["low"].droplevel("site"), intervals["low"])


@pytest.mark.parametrize("by", ["class", "object_size", "boundary_distance"])
def test_evaluate__by_built_in__works_from_a_csv_file(
    by: str, either: tuple[SemanticSegmentor, pd.DataFrame], tmp_path: Path
) -> None:
    segmentor, frame = either
    frame.to_csv(tmp_path / "test.csv", index=False)
    found = segmentor.evaluate(tmp_path / "test.csv", by=by)
    pd.testing.assert_frame_equal(found, segmentor.evaluate(frame, by=by))
    assert found.index.names == [by, "figure"]
    values = found["value"].unstack()
    if by == "class":
        assert sorted(values.index) == sorted(segmentor.task_.class_names)
        if segmentor.task_.kind == "binary":
            wanted = segmentor.evaluate(frame, "iou_pooled")["iou_pooled"]
            assert values.loc[segmentor.task_.class_names[1], "iou"] == pytest.approx(wanted)
        else:
            assert values["iou"].mean() == pytest.approx(segmentor.evaluate(frame, "miou")["miou"])
    elif by == "boundary_distance":
        wrong = (values["error_rate"].fillna(0) * values["pixels"]).sum() / values["pixels"].sum()
        assert wrong == pytest.approx(1 - segmentor.evaluate(frame, "accuracy")["accuracy"])
    else:
        assert found["images"].groupby(by).first().sum() == len(frame)


def test_evaluate__by_with_unusable_arguments__raises(binary: tuple[Path, Path]) -> None:
    segmentor, frame = SemanticSegmentor.load(binary[1]), frame_of(binary[0])
    with pytest.raises(ConfigError, match="did you mean 'object_size'"):
        segmentor.evaluate(frame, by="object_sise")
    with pytest.raises(ConfigError, match="figures of its own"):
        segmentor.evaluate(frame, "iou", by="class")
    forms: list[dict[str, Any]] = [{"intervals": True}, {"return_per_image": True}]
    for form in forms:
        with pytest.raises(ConfigError, match="by gives a table of its own"):
            segmentor.evaluate(frame, by="object_size", **form)


def test_evaluate__metric_size_model__scores_the_input_square(binary: tuple[Path, Path]) -> None:
    segmentor, frame = SemanticSegmentor.load(binary[1]), frame_of(binary[0])
    metrics = build_metrics(["iou", "mae"], kind="binary", num_classes=2)
    scores = segmentor._predictor.scores(segmentor._read(frame), size="model")
    for each, path in zip(scores, frame["label"], strict=True):
        assert isinstance(each, torch.Tensor)
        assert each.shape == (1, 64, 64)
        target = torch.from_numpy(resize_mask(segmentor.task_.encode(read_mask(path)), (64, 64))).long()
        for metric in metrics.values():
            metric.update(each, (each[0] > 0.5).long(), target)
    found = segmentor.evaluate(frame, ["iou", "mae"], metric_size="model")
    assert found == pytest.approx({name: metric.compute().item() for name, metric in metrics.items()})
    assert found != segmentor.evaluate(frame, ["iou", "mae"])
    intervals = segmentor.evaluate(frame, ["iou", "mae"], metric_size="model", intervals=True)
    assert intervals["value"].to_dict() == pytest.approx(found)
    with pytest.raises(ConfigError, match="metric_size 'square'"):
        segmentor.evaluate(frame, metric_size="square")  # type: ignore[arg-type]


def test_evaluate__ignored_pixels__count_in_no_stratum(multiclass: tuple[Path, Path], tmp_path: Path) -> None:
    segmentor, frame = SemanticSegmentor.load(multiclass[1]), frame_of(multiclass[0])
    assert segmentor.task_.ignore_values == (255,)
    masks = []
    for number, path in enumerate(frame["label"]):
        mask = np.array(read_mask(path), dtype=np.uint8)
        mask[:, 48:] = 255
        write_png(tmp_path / f"{number}.png", mask)
        masks.append(str(tmp_path / f"{number}.png"))
    holed = frame.assign(label=masks)
    pixels = len(frame) * 72 * 48
    assert segmentor.calibration(holed).pixels == pixels
    for by, figure in (("class", "support"), ("boundary_distance", "pixels")):
        counted = segmentor.evaluate(holed, by=by)["value"].xs(figure, level="figure")
        assert counted.sum() == pixels
