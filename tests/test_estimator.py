"""The main job through the public class, on small drawn data: what a user does first, and what goes wrong first."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import clone

from semseg_automl import FailedPrediction, SemanticSegmentor, draw_dataset
from semseg_automl.data.images import read_image, read_mask
from semseg_automl.errors import BundleError, ConfigError, DataError, TrainingError
from semseg_automl.fitted import NotFittedError
from semseg_automl.third_party import lightning

FAST: dict[str, Any] = {
    "model.input_size": 64,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "flip",
}


def fast_segmentor(path: Path, **arguments: Any) -> SemanticSegmentor:
    """Build a segmentor that fits in seconds."""
    return SemanticSegmentor(path=path, hyperparameters=FAST, verbosity=0, **arguments)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small binary data set."""
    return draw_dataset(tmp_path_factory.mktemp("binary"), kind="binary", train=12, val=4, test=5, size=(72, 96))


@pytest.fixture(scope="module")
def multiclass(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small 4-class data set."""
    return draw_dataset(tmp_path_factory.mktemp("multi"), kind="multiclass", train=12, val=4, test=4, size=(72, 96))


@pytest.fixture(scope="module")
def fitted(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    """Fit two epochs to the binary set."""
    path = tmp_path_factory.mktemp("bundle") / "b"
    return fast_segmentor(path).fit(binary / "train.csv", binary / "val.csv", max_epochs=2)


def frame_of(folder: Path, split: str) -> pd.DataFrame:
    """Read a table with paths made absolute."""
    frame = pd.read_csv(folder / f"{split}.csv")
    return frame.map(lambda cell: str(folder / cell))


def test_fit__binary_masks__gives_scores_masks_and_summary(fitted: SemanticSegmentor, binary: Path) -> None:
    assert fitted.task_.kind == "binary"
    assert fitted.classes_.tolist() == [0, 255]
    figures = fitted.evaluate(binary / "test.csv")
    assert set(figures) == {"iou", "dice", "iou_pooled", "s_measure", "e_measure", "ber", "mae"}
    assert all(np.isfinite(value) for value in figures.values())
    masks = fitted.predict(binary / "test.csv")
    for mask, path in zip(masks, frame_of(binary, "test")["image"], strict=True):
        assert mask.shape == read_image(path).shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
    summary = fitted.fit_summary()
    assert summary["kind"] == "binary"
    assert summary["trainable_parameters"] <= summary["total_parameters"]
    assert len(fitted.history_) == 2
    assert summary["best_score"] == pytest.approx(fitted.history_["iou"].max())


def test_fit__multiclass_masks__works_with_the_same_call(multiclass: Path, tmp_path: Path) -> None:
    segmentor = fast_segmentor(tmp_path / "b").fit(multiclass / "train.csv", multiclass / "val.csv", max_epochs=1)
    assert segmentor.task_.kind == "multiclass"
    assert segmentor.classes_.tolist() == [0, 1, 2, 3]
    figures = segmentor.evaluate(multiclass / "test.csv")
    assert {"miou", "accuracy"} <= set(figures)
    assert sum(name.startswith("iou_per_class[") for name in figures) == 4
    scores = segmentor.predict_proba(frame_of(multiclass, "test")["image"][0])
    assert scores.shape == (4, 72, 96)
    np.testing.assert_allclose(scores.sum(axis=0), 1.0, atol=1e-5)


def test_fit__queries_head__trains_and_predicts(multiclass: Path, tmp_path: Path) -> None:
    segmentor = fast_segmentor(tmp_path / "b").fit(
        multiclass / "train.csv",
        multiclass / "val.csv",
        max_epochs=1,
        hyperparameters={"optim.loss": "set_criterion", "model.num_queries": 6},
    )
    assert segmentor.plan_.decoder_options["num_mask_tokens"] == 6
    assert set(np.unique(segmentor.predict(frame_of(multiclass, "test")["image"][0]))) <= {0, 1, 2, 3}


def test_fit__without_tuning_data__holds_rows_out(binary: Path, tmp_path: Path) -> None:
    segmentor = fast_segmentor(tmp_path / "b").fit(binary / "train.csv", max_epochs=1, holdout_frac=0.25)
    assert np.isfinite(segmentor.fit_summary()["best_score"])


def test_fit__any_index_and_extra_columns__keeps_the_callers_index(
    fitted: SemanticSegmentor, binary: Path, tmp_path: Path
) -> None:
    frame = frame_of(binary, "test").assign(patient="p")
    frame.index = pd.Index(["x", "y", "x", "z", "w"], name="case")
    saved = fitted.predict(frame, save_to=tmp_path / "out")
    assert saved.index.equals(frame.index)
    for path, mask in zip(frame["image"], saved["mask"], strict=True):
        assert Path(mask).stem == Path(path).stem
        assert read_mask(mask).shape == read_image(path).shape[:2]


def test_fit__relative_paths__start_from_base_dir(fitted: SemanticSegmentor, binary: Path) -> None:
    frame = pd.read_csv(binary / "test.csv")
    segmentor = SemanticSegmentor.load(fitted.path_)
    segmentor.set_params(base_dir=str(binary))
    assert segmentor.evaluate(frame, "iou") == fitted.evaluate(binary / "test.csv", "iou")


def test_fit__dry_run__decides_and_trains_nothing(binary: Path, tmp_path: Path) -> None:
    segmentor = fast_segmentor(tmp_path / "b").fit(binary / "train.csv", dry_run=True)
    assert segmentor.plan_.input_size == (64, 64)
    assert "lr" in str(segmentor.plan_)
    assert not (tmp_path / "b").exists()
    with pytest.raises(NotFittedError):
        segmentor.predict(binary / "test.csv")


def test_fit__plan_of_an_earlier_fit__learns_the_same(
    fitted: SemanticSegmentor, binary: Path, tmp_path: Path
) -> None:
    again = SemanticSegmentor(path=tmp_path / "b", verbosity=0)
    again.fit(binary / "train.csv", binary / "val.csv", plan=fitted.path_ / "plan.yaml")
    assert again.plan_ == fitted.plan_
    ours, theirs = (each.predict_proba(binary / "test.csv") for each in (again, fitted))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"lr": "much"}, "lr: "),
        ({"colour": 1}, "colour: "),
        ({"micro_batch_size": 3}, "must divide batch_size, 4"),
        ({"validation_metric": "iuo"}, "iuo"),
        ({"decoder_options": {"num_mask_tokens": 4}}, "for masks of 4 scores, these masks have 1"),
        ({"merged": True}, "nothing left to train"),
    ],
)
def test_fit__plan_edited_badly__says_what_is_wrong(
    fitted: SemanticSegmentor, binary: Path, tmp_path: Path, edit: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(fitted.plan_.model_dump(mode="json") | edit))
    with pytest.raises(ConfigError, match=problem):
        SemanticSegmentor(verbosity=0).fit(binary / "train.csv", binary / "val.csv", plan=path, dry_run=True)


def test_fit__plan_and_what_it_decides__is_refused(fitted: SemanticSegmentor, binary: Path, tmp_path: Path) -> None:
    plain = SemanticSegmentor(verbosity=0)
    for given in ({"presets": "fast"}, {"seed": 3}, {"time_limit": 5}, {"max_epochs": 2}):
        with pytest.raises(ConfigError, match="plan= holds"):
            plain.fit(binary / "train.csv", plan=fitted.plan_, dry_run=True, **given)
    with pytest.raises(ConfigError, match="cannot be read as a plan"):
        plain.fit(binary / "train.csv", plan=tmp_path / "absent.yaml", dry_run=True)


def test_predict__series_of_paths__gives_a_mask_for_each(fitted: SemanticSegmentor, binary: Path) -> None:
    images = frame_of(binary, "test")["image"]
    assert len(fitted.predict(images)) == len(images)


def test_fit__same_seed__gives_bit_identical_weights(binary: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        segmentor = fast_segmentor(tmp_path / name).fit(binary / "train.csv", binary / "val.csv", max_epochs=1, seed=3)
        weights.append(segmentor._bundle.model.state_dict())
        torch.rand(1)  # whatever else happens in between
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fit__handful_of_images__is_overfitted(binary: Path, tmp_path: Path) -> None:
    frame = frame_of(binary, "train").head(4)
    hyperparameters = {"data.augmentation": "none", "optim.lr": 2e-3, "optim.ema": 0.0, "model.detail": True}
    segmentor = fast_segmentor(tmp_path / "b").fit(
        frame, frame, max_epochs=12, hyperparameters={**hyperparameters, "optim.patience": 20}
    )
    assert segmentor.evaluate(frame, "iou")["iou"] > 0.9


def test_fit__time_limit__stops_and_keeps_a_usable_bundle(binary: Path, tmp_path: Path) -> None:
    segmentor = fast_segmentor(tmp_path / "b").fit(binary / "train.csv", binary / "val.csv", time_limit=6)
    assert segmentor.fit_summary()["stopped_by"] == "time_limit"
    assert SemanticSegmentor.load(tmp_path / "b").evaluate(binary / "test.csv", "iou")["iou"] >= 0


class Interrupt(lightning.Callback):
    """Presses Ctrl-C in a given training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Press it."""
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 30])
def test_fit__interrupted__leaves_a_fitted_segmentor_and_a_usable_bundle(
    step: int, binary: Path, tmp_path: Path
) -> None:
    segmentor = fast_segmentor(tmp_path / "b")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="best state so far"):
        segmentor.fit(binary / "train.csv", binary / "val.csv", max_epochs=5, callbacks=Interrupt(step))
    assert signal.getsignal(signal.SIGINT) is handler
    mine = segmentor.predict(binary / "test.csv")
    loaded = SemanticSegmentor.load(tmp_path / "b").predict(binary / "test.csv")
    assert all(np.array_equal(a, b) for a, b in zip(mine, loaded, strict=True))
    assert segmentor.fit_summary()["stopped_by"] == "interrupt"


def test_fit__loss_not_finite__is_an_error_that_names_the_learning_rate(binary: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"optim\.lr"):
        fast_segmentor(tmp_path / "b").fit(
            binary / "train.csv", binary / "val.csv", max_epochs=3, hyperparameters={"optim.lr": 1e30}
        )


def test_fit__lightning_arguments__are_passed_through(binary: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            seen.append(trainer.current_epoch)

    logger = lightning.pytorch.loggers.CSVLogger(str(tmp_path / "logs"))
    fast_segmentor(tmp_path / "b").fit(
        binary / "train.csv", binary / "val.csv", max_epochs=2, callbacks=[Watch()], logger=logger, accelerator="cpu"
    )
    assert seen == [0, 1]
    assert "train_loss" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_epoch": 3}, "did you mean 'max_epochs'"),
        ({"hyperparameters": {"optim.lrr": 1}}, "did you mean 'optim.lr'"),
        ({"presets": "fsat"}, "did you mean 'fast'"),
        ({"hyperparameters": {"optim.peft": "conv_lora"}}, "model.checkpoint"),
        ({"hyperparameters": {"model.input_size": 70}}, "divisible by 16"),
    ],
)
def test_fit__setting_that_cannot_be__is_refused_before_training(
    arguments: dict[str, Any], message: str, binary: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        fast_segmentor(tmp_path / "b").fit(binary / "train.csv", **arguments)
    assert not (tmp_path / "b").exists()


def test_fit__unknown_metric__is_refused_before_training(binary: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="iuo"):
        fast_segmentor(tmp_path / "b", eval_metric="iuo").fit(binary / "train.csv")
    with pytest.raises(ConfigError):
        fast_segmentor(tmp_path / "b", validation_metric="miou").fit(binary / "train.csv")


def damaged(folder: Path, tmp_path: Path, kind: str) -> tuple[Path, str]:
    """Copy a data set, damage its third training row in one way, and return it with the row's file name."""
    copy = tmp_path / kind
    shutil.copytree(folder, copy)
    frame = pd.read_csv(copy / "train.csv")
    image, mask = copy / frame["image"][2], copy / frame["label"][2]
    if kind == "missing":
        image.unlink()
    elif kind == "truncated":
        image.write_bytes(image.read_bytes()[:200])
    elif kind == "size":
        Image.fromarray(read_mask(mask)[:-3].astype(np.uint8)).save(mask)
    return copy, image.name if kind != "size" else image.stem


@pytest.mark.parametrize("kind", ["missing", "truncated", "size"])
def test_fit__bad_file__is_named_with_its_row_before_training(kind: str, binary: Path, tmp_path: Path) -> None:
    copy, name = damaged(binary, tmp_path, kind)
    with pytest.raises(DataError, match=f"row 2 .*{name}"):
        fast_segmentor(tmp_path / "b").fit(copy / "train.csv")
    assert not (tmp_path / "b").exists()


def test_fit__unusable_tables__are_refused(binary: Path, tmp_path: Path) -> None:
    frame = frame_of(binary, "train")
    with pytest.raises(DataError, match="no rows"):
        fast_segmentor(tmp_path / "b").fit(frame.head(0))
    with pytest.raises(DataError, match="no column 'label'"):
        fast_segmentor(tmp_path / "b").fit(frame.drop(columns="label"))
    empty = tmp_path / "empty.png"
    Image.fromarray(np.zeros((72, 96), np.uint8)).save(empty)
    with pytest.raises(DataError, match="one class"):
        fast_segmentor(tmp_path / "b").fit(frame.assign(label=str(empty)))


def test_evaluate__unknown_label_value__names_row_and_value(
    fitted: SemanticSegmentor, binary: Path, tmp_path: Path
) -> None:
    frame = frame_of(binary, "test")
    mask = read_mask(frame["label"][1]).astype(np.uint8)
    mask[:3] = 7
    Image.fromarray(mask).save(tmp_path / "odd.png")
    frame.loc[1, "label"] = str(tmp_path / "odd.png")
    with pytest.raises(DataError, match=r"row 1 .*7 \(288 pixels\)"):
        fitted.evaluate(frame)


def test_predict__every_form_of_images__gives_the_same_masks(fitted: SemanticSegmentor, binary: Path) -> None:
    paths = list(frame_of(binary, "test")["image"])
    expected = fitted.predict(frame_of(binary, "test"))
    arrays = [read_image(path) for path in paths]
    forms: list[Any] = [paths, arrays, [Image.fromarray(a) for a in arrays], binary / "test.csv"]
    for form in forms:
        for a, b in zip(fitted.predict(form), expected, strict=True):
            assert np.array_equal(a, b)
    for single in (paths[0], Path(paths[0]), arrays[0], Image.fromarray(arrays[0])):
        assert np.array_equal(fitted.predict(single), expected[0])
    folder = fitted.predict(binary / "images")
    assert len(folder) == 21


def test_predict_proba__binary__decides_as_predict_does(fitted: SemanticSegmentor, binary: Path) -> None:
    image = frame_of(binary, "test")["image"][0]
    probability = fitted.predict_proba(image)
    assert probability.dtype == np.float32
    assert np.array_equal((probability > fitted.threshold_) * 255, fitted.predict(image))


def test_predict__bad_file_among_many__is_reported_in_its_place(
    fitted: SemanticSegmentor, binary: Path, tmp_path: Path
) -> None:
    paths = list(frame_of(binary, "test")["image"])
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    expected: list[NDArray[Any]] = fitted.predict(paths)
    mixed = [paths[0], str(bad), *paths[1:]]
    with pytest.raises(DataError, match=r"bad\.jpg"):
        fitted.predict(mixed)
    reported = fitted.predict(mixed, on_error="report")
    assert isinstance(reported[1], FailedPrediction)
    assert "bad.jpg" in reported[1].row
    for got, wanted in zip([reported[0], *reported[2:]], expected, strict=True):
        assert np.array_equal(got, wanted)
    saved = fitted.predict(mixed, save_to=tmp_path / "out", on_error="report")
    assert saved["mask"].isna().tolist() == [False, True, False, False, False, False]
    with pytest.raises(ConfigError, match="raise, report"):
        fitted.predict(paths, on_error="ignore")  # type: ignore[arg-type]


def test_predict__same_file_names_in_two_folders__do_not_collide(
    fitted: SemanticSegmentor, binary: Path, tmp_path: Path
) -> None:
    path = Path(frame_of(binary, "test")["image"][0])
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / path.name
    Image.fromarray(255 - read_image(path)).save(twin)
    saved = fitted.predict([path, twin], save_to=tmp_path / "out")
    assert saved["mask"].nunique() == 2
    for source, mask in zip([path, twin], saved["mask"], strict=True):
        assert np.array_equal(read_mask(mask), fitted.predict(source))


def test_save_and_load__predictions__are_equal(fitted: SemanticSegmentor, binary: Path, tmp_path: Path) -> None:
    copy = SemanticSegmentor.load(fitted.save(tmp_path / "copy"))
    assert copy.fit_summary()["history"] == fitted.fit_summary()["history"]
    for a, b in zip(copy.predict(binary / "test.csv"), fitted.predict(binary / "test.csv"), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(BundleError, match="no saved segmentor"):
        SemanticSegmentor.load(tmp_path)


def test_estimator__scikit_learn_habits__hold(tmp_path: Path) -> None:
    segmentor = fast_segmentor(tmp_path / "b", label="mask")
    copy = clone(segmentor)
    assert copy.get_params() == segmentor.get_params()
    with pytest.raises(NotFittedError, match="fit"):
        segmentor.predict("a.jpg")
    with pytest.raises(ConfigError, match="semantic_segmentation"):
        SemanticSegmentor("detection").fit("x.csv")
