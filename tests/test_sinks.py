"""Predictions into a folder: formats, names, going on after a stop, streams, and disks that fail."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from semseg_automl import FailedPrediction, SemanticSegmentor, draw_dataset, sinks
from semseg_automl.data.images import read_image, read_mask, write_png
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.inference import Predictor
from semseg_automl.report import overlay
from semseg_automl.sinks import JOURNAL, file_names

FAST: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
}


def fitted_to(folder: Path, path: Path) -> SemanticSegmentor:
    segmentor = SemanticSegmentor(path=path, hyperparameters=FAST, verbosity=0)
    return segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=1)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small binary data set."""
    return draw_dataset(tmp_path_factory.mktemp("binary"), kind="binary", train=6, val=2, test=5, size=(40, 48))


@pytest.fixture(scope="module")
def fitted(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    """Fit to the binary set."""
    return fitted_to(binary, tmp_path_factory.mktemp("bundle") / "a")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[SemanticSegmentor, Path]:
    """Fit to a 4-class set."""
    folder = tmp_path_factory.mktemp("multi")
    draw_dataset(folder, kind="multiclass", train=6, val=2, test=3, size=(40, 48))
    return fitted_to(folder, tmp_path_factory.mktemp("bundle") / "c"), folder


@pytest.fixture
def images(binary: Path, tmp_path: Path) -> list[str]:
    """Five images of the test's own, which it may change."""
    folder = tmp_path / "own"
    folder.mkdir()
    names = sorted(Path(path).name for path in pd.read_csv(binary / "test.csv")["image"])
    for name in names:
        (folder / name).write_bytes((binary / "images" / name).read_bytes())
    return [str(folder / name) for name in names]


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that the network is run on."""
    seen: list[str] = []
    labels = Predictor.labels

    def watched(self: Predictor, table: Any, **options: Any) -> Iterator[Any]:
        seen.extend(Path(source).name if isinstance(source, str) else "memory" for source in table.images)
        return labels(self, table, **options)

    monkeypatch.setattr(Predictor, "labels", watched)
    return seen


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def threshold_inside(segmentor: SemanticSegmentor, images: list[str]) -> None:
    """Put the threshold where both classes are predicted."""
    segmentor.threshold_ = float(np.median(np.stack(segmentor.predict_proba(images))))


def test_predict__formats_of_a_binary_task__agree_with_each_other(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path
) -> None:
    segmentor = SemanticSegmentor.load(fitted.path_)
    threshold_inside(segmentor, images)
    out = {
        format: segmentor.predict(images, save_to=tmp_path / format, format=format)
        for format in ("same-as-labels", "index", "overlay", "probability")
    }
    masks, probabilities = segmentor.predict(images), segmentor.predict_proba(images)
    for row, path in enumerate(images):
        files = {format: saved["mask"][row] for format, saved in out.items()}
        assert {Path(file).name for file in files.values()} == {f"{Path(path).stem}.png"}
        assert np.array_equal(read_mask(files["same-as-labels"]), masks[row])
        index = read_mask(files["index"])
        assert set(np.unique(index)) == {0, 1}
        assert np.array_equal(255 * index, masks[row])
        assert np.array_equal(
            read_image(files["overlay"]), overlay(read_image(path), index.astype(np.uint8), binary=True)
        )
        with Image.open(files["probability"]) as stored:
            assert stored.mode == "I;16"
            np.testing.assert_allclose(np.asarray(stored) / 65535, probabilities[row], rtol=0, atol=0.51 / 65535)


def test_predict__formats_of_several_classes__are_indices_and_half_precision_scores(
    classes: tuple[SemanticSegmentor, Path], tmp_path: Path
) -> None:
    segmentor, folder = classes
    frame = pd.read_csv(folder / "test.csv").map(lambda cell: str(folder / cell))
    saved = segmentor.predict(frame, save_to=tmp_path / "p", format="probability")
    index = segmentor.predict(frame, save_to=tmp_path / "i", format="index")
    for row, scores in enumerate(segmentor.predict_proba(frame)):
        stored = np.load(saved["mask"][row])
        assert (str(stored.dtype), stored.shape) == ("float16", (4, 40, 48))
        np.testing.assert_allclose(stored, scores, rtol=1e-3, atol=1e-6)
        assert np.array_equal(read_mask(index["mask"][row]), scores.argmax(axis=0))


def test_overlay__large_image__is_drawn_in_strips_without_seams(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmentor = SemanticSegmentor.load(fitted.path_)
    threshold_inside(segmentor, images)
    whole = segmentor.predict(images, save_to=tmp_path / "a", format="overlay")
    monkeypatch.setattr(sinks, "OVERLAY_PIXELS", 48 * 3)
    segmentor.predict(images, save_to=tmp_path / "b", format="overlay")
    assert len(whole) == 5
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_predict__words_that_do_not_fit__are_refused_before_anything_is_written(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="did you mean 'overlay'"):
        fitted.predict(images, save_to=tmp_path / "out", format="overlai")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="raise, report"):
        fitted.predict(images, save_to=tmp_path / "out", on_error="no")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    asked: list[dict[str, Any]] = [{"resume": True}, {"format": "index"}]
    for options in asked:
        with pytest.raises(ConfigError, match="save_to"):
            fitted.predict(images, **options)


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program be stopped before file number `count`, counted from 0, is written."""
    written: list[Any] = []

    def write(path: Any, array: Any, **options: Any) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(path)
        write_png(path, array, **options)

    monkeypatch.setattr(sinks, "write_png", write)


def test_predict__resumed_after_a_stop__writes_what_is_left_and_the_same_files(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, predicted: list[str]
) -> None:
    expected = fitted.predict(images, save_to=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            fitted.predict(images, save_to=tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 3
    predicted.clear()
    again = SemanticSegmentor.load(fitted.path_).predict(images, save_to=tmp_path / "out", resume=True)
    assert predicted == [Path(path).name for path in images[3:]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert again["image"].tolist() == expected["image"].tolist()
    assert [Path(path).name for path in again["mask"]] == [Path(path).name for path in expected["mask"]]
    predicted.clear()
    fitted.predict(images, save_to=tmp_path / "out", resume=True)
    assert predicted == []
    fitted.predict(images, save_to=tmp_path / "out")
    assert len(predicted) == 5, "without resume everything is written anew"


def test_predict__resumed__does_changed_lost_and_cut_files_again(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, predicted: list[str]
) -> None:
    out = tmp_path / "out"
    fitted.predict(images, save_to=out)
    first, second, third, fourth, fifth = (Path(path) for path in images)
    write_png(first.with_suffix(".tmp"), 255 - read_image(first))
    os.replace(first.with_suffix(".tmp"), first)
    (out / f"{second.stem}.png").unlink()
    (out / f"{third.stem}.png").write_bytes(b"")
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(b"".join(lines)[:-7])  # the last entry is cut off
    predicted.clear()
    fitted.predict(images, save_to=out, resume=True)
    assert predicted == [first.name, second.name, third.name, fifth.name]
    predicted.clear()
    fitted.predict([*images, read_image(fourth)], save_to=out, resume=True)
    assert predicted == ["memory"], "an image in memory is always predicted"
    fitted.predict(images, save_to=tmp_path / "fresh")
    assert contents(tmp_path / "fresh").items() <= contents(out).items()


def test_predict__resumed_with_something_else__says_what_differs(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fitted.predict(images, save_to=out)
    with pytest.raises(DataError, match=r"format 'same-as-labels', not 'index'.*resume=False"):
        fitted.predict(images, save_to=out, format="index", resume=True)
    other = SemanticSegmentor.load(fitted.path_)
    with torch.no_grad():
        next(other._bundle.model.parameters()).view(-1)[0] += 1
    with pytest.raises(DataError, match="another segmentor"):
        other.predict(images, save_to=out, resume=True)
    moved = SemanticSegmentor.load(fitted.path_)
    moved.threshold_ = 0.4
    with pytest.raises(DataError, match="another threshold"):
        moved.predict(images, save_to=out, resume=True)
    before = (out / JOURNAL).read_bytes()
    assert b"same-as-labels" in before, "a refusal leaves the journal as it was"
    other.predict(images, save_to=out)
    other.predict(images, save_to=out, resume=True)


@pytest.mark.parametrize("damage", [b"\x00\xff", b"[" * 70_000, b"7\n", b'{"format": ["x"]}\n'])
def test_predict__damaged_journal__is_refused_and_never_followed(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, damage: bytes
) -> None:
    out = tmp_path / "out"
    fitted.predict(images, save_to=out)
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(damage + b"".join(lines[1:]))
    with pytest.raises(DataError, match=f"{JOURNAL} is damaged"):
        fitted.predict(images, save_to=out, resume=True)
    outside = {"file": "../own/x.png", "bytes": 1, "image": images[0]}
    odd = [b"[" * 70_000, json.dumps(outside).encode(), b'{"file": [1], "bytes": 2}', b"null", b"\xff\xfe"]
    (out / JOURNAL).write_bytes(b"\n".join([lines[0].strip(), *odd]))
    saved = fitted.predict(images, save_to=out, resume=True)
    assert {Path(path).parent for path in saved["mask"]} == {out}
    entries = (out / JOURNAL).read_bytes().splitlines()
    assert json.loads(entries[-1])["file"] == f"{Path(images[-1]).stem}.png"


def test_file_names__equal_stems__never_collide_and_stay_when_rows_are_added(tmp_path: Path) -> None:
    from semseg_automl.data.table import read_images

    sources: list[Any] = ["a/x.png", "b/X.jpg", np.zeros((4, 4), np.uint8), "c/x.png", "x_1.png", "image_2.png"]
    names = file_names(read_images(sources), ".png")
    assert names == ["x.png", "X_1.png", "image_2.png", "x_3.png", "x_1_4.png", "image_2_5.png"]
    assert file_names(read_images(sources[:4]), ".npy") == [name.replace(".png", ".npy") for name in names[:4]]


def test_predict__bad_image__is_named_in_its_row_and_done_when_repaired(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, predicted: list[str]
) -> None:
    good = Path(images[1]).read_bytes()
    Path(images[1]).write_bytes(good[:50])
    saved = fitted.predict(images, save_to=tmp_path / "out", on_error="report")
    assert saved["mask"].isna().tolist() == [False, True, False, False, False]
    assert Path(images[1]).name in saved["error"][1]
    assert len(contents(tmp_path / "out")) == 4
    Path(images[1]).write_bytes(good)
    predicted.clear()
    saved = fitted.predict(images, save_to=tmp_path / "out", resume=True)
    assert predicted == [Path(images[1]).name]
    assert saved["error"].isna().all()


@pytest.mark.parametrize("format", ["same-as-labels", "probability"])
def test_predict__full_disk__says_so_and_leaves_no_half_file(
    classes: tuple[SemanticSegmentor, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    segmentor, folder = classes
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_bytes(self: Path, data: bytes) -> int:
        with open(self, "wb") as stream:
            stream.write(data[:9])
        raise full

    def save(stream: Any, array: NDArray[Any], **_: Any) -> None:
        stream.write(b"half")
        raise full

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    monkeypatch.setattr(np, "save", save)
    with pytest.raises(DataError, match="No space left on device"):
        segmentor.predict(folder / "test.csv", save_to=tmp_path / "out", format=format)  # type: ignore[arg-type]
    assert listed(tmp_path / "out") == [JOURNAL]


def test_predict__journal_that_cannot_be_written__says_so(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: sinks.Journal, entry: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sinks.Journal, "_write", write)
    with pytest.raises(DataError, match=r"out'.*No space left on device"):
        fitted.predict(images, save_to=tmp_path / "out")


def test_predict__folder_that_is_no_folder__says_so(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, predicted: list[str]
) -> None:
    (tmp_path / "file").write_bytes(b"here")
    with pytest.raises(DataError, match="is a file, not a folder"):
        fitted.predict(images, save_to=tmp_path / "file")
    with pytest.raises(DataError, match="Not a directory"):
        fitted.predict(images, save_to=tmp_path / "file" / "deeper")
    (tmp_path / "odd" / JOURNAL).mkdir(parents=True)
    with pytest.raises(DataError, match="Is a directory"):
        fitted.predict(images, save_to=tmp_path / "odd")
    assert predicted == [], "found out before the network ran"
    assert (tmp_path / "file").read_bytes() == b"here"


def test_predict__folder_without_permission__says_so(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(sinks, "open", refuse, raising=False)  # a test may run as root, whom nothing is forbidden
    with pytest.raises(DataError, match="Permission denied"):
        fitted.predict(images, save_to=tmp_path / "out")
    assert listed(tmp_path / "out") == []


def test_predict__scores_not_finite__are_not_saved(
    fitted: SemanticSegmentor, images: list[str], tmp_path: Path
) -> None:
    broken = SemanticSegmentor.load(fitted.path_)
    with torch.no_grad():
        for parameter in broken._bundle.model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(DataError, match=r"row 0 .*not finite"):
        broken.predict(images, save_to=tmp_path / "out", format="probability")


def test_predict_iter__any_source__gives_the_masks_of_predict_one_by_one(
    fitted: SemanticSegmentor, images: list[str], binary: Path
) -> None:
    expected = fitted.predict(images)
    taken: list[int] = []

    def endless() -> Iterator[NDArray[np.uint8]]:
        while True:
            taken.append(len(taken))
            yield read_image(images[(len(taken) - 1) % 5])

    stream = fitted.predict_iter(endless())
    for row in range(11):
        assert np.array_equal(next(stream), expected[row % 5])
    assert len(taken) <= 11 + fitted.plan_.micro_batch_size
    sources: list[Any] = [iter(images), images, images[0]]
    for data in sources:
        found = list(fitted.predict_iter(data))
        assert len(found) == (1 if data is images[0] else 5)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=False))
    assert len(list(fitted.predict_iter(binary / "test.csv"))) == 5
    assert list(fitted.predict_iter(iter([]))) == []


def test_predict_iter__bad_items__are_named_by_their_place_in_the_stream(
    fitted: SemanticSegmentor, images: list[str]
) -> None:
    count = fitted.plan_.micro_batch_size + 1
    stream = [*[images[0]] * count, "absent.png", images[0]]
    found = list(fitted.predict_iter(iter(stream), on_error="report"))
    assert [isinstance(each, FailedPrediction) for each in found] == [False] * count + [True, False]
    failed = found[count]
    assert isinstance(failed, FailedPrediction)
    assert f"row {count} (absent.png)" in failed.row
    with pytest.raises(DataError, match=f"row {count} .*absent"):
        list(fitted.predict_iter(iter(stream)))
    with pytest.raises(DataError, match=r"row 1 \(int\)"):
        list(fitted.predict_iter(iter([images[0], 7])))  # type: ignore[arg-type]
