"""Images of many channels: which are read is the user's choice, and the same one everywhere."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from semseg_automl import SemanticSegmentor, check_data
from semseg_automl.cli import app
from semseg_automl.data.channels import as_channels
from semseg_automl.data.checks import check_rows
from semseg_automl.data.images import image_size, read_image, read_mask, write_png
from semseg_automl.data.kept import DecodedFiles
from semseg_automl.data.survey import FileNotes, survey_tables
from semseg_automl.data.table import MaskTable, read_images
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.resume import row_name

TINY = {
    "model.input_size": 64, "model.decoder_dim": 32, "model.detail": False, "env.batch_size": 2,
    "env.precision": "32-true",
}  # fmt: skip


def cube(channels: int, dtype: Any = np.uint8, size: tuple[int, int] = (21, 34)) -> NDArray[Any]:
    top = int(np.iinfo(dtype).max) + 1
    return np.random.default_rng(channels).integers(0, top, (*size, channels)).astype(dtype)


def tiff(
    path: Path,
    pixels: NDArray[Any],
    *,
    planes: bool = False,
    packed: bool = False,
    differences: bool = False,
    tile: tuple[int, int] | None = None,
    order: str = "<",
    photometric: int = 1,
    changed: dict[int, list[int]] | None = None,
) -> Path:
    """Write a TIFF after the specification alone, without the decoders' libraries."""
    height, width, channels = pixels.shape
    bits = 8 * pixels.itemsize
    down, across = tile or (8, width)
    parts = []
    for plane in [pixels[:, :, [c]] for c in range(channels)] if planes else [pixels]:
        for top in range(0, height, down):
            for left in range(0, width, across):
                part = plane[top : top + down, left : left + across]
                if tile:
                    part = np.pad(part, ((0, down - part.shape[0]), (0, across - part.shape[1]), (0, 0)))
                if differences:
                    before = np.zeros_like(part[:, :1])
                    part = np.diff(part, axis=1, prepend=before)
                data = part.astype(part.dtype.newbyteorder("<" if order == "<" else ">")).tobytes()
                parts.append(zlib.compress(data) if packed else data)
    starts = np.cumsum([8] + [len(part) for part in parts])[:-1].tolist()
    tags: dict[int, list[int]] = {
        256: [width], 257: [height], 258: [bits] * channels, 259: [8 if packed else 1], 262: [photometric],
        277: [channels], 284: [2 if planes else 1], 317: [2 if differences else 1], 338: [0] * (channels - 1),
        **({322: [across], 323: [down], 324: starts} if tile else {273: starts, 278: [down]}),
        325 if tile else 279: [len(part) for part in parts],
        **(changed or {}),
    }  # fmt: skip
    body = b"".join(parts)
    body += bytes(len(body) % 2)
    place = 8 + len(body)
    behind = place + 2 + 12 * len(tags) + 4
    entries = extra = b""
    for tag, values in sorted(tags.items()):
        short = tag in (258, 259, 262, 274, 277, 284, 317, 338, 339)
        coded = struct.pack(f"{order}{len(values)}{'H' if short else 'I'}", *values)
        if len(coded) > 4:
            coded, extra = struct.pack(f"{order}I", behind + len(extra)), extra + coded
        entries += struct.pack(f"{order}HHI", tag, 3 if short else 4, len(values)) + coded.ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", place)
    path.write_bytes(start + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra)
    return path


def in_eight_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    return np.rint(pixels / 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize(("packed", "differences"), [(False, False), (True, False), (True, True)])
def test_read_image__tiff_of_many_channels__gives_the_chosen_ones(
    tmp_path: Path, dtype: Any, order: str, tile: tuple[int, int] | None, planes: bool, packed: bool, differences: bool
) -> None:
    for count in (4, 7):
        pixels = cube(count, dtype)
        layout: dict[str, Any] = {"planes": planes, "packed": packed, "differences": differences}
        path = tiff(tmp_path / "a.tif", pixels, tile=tile, order=order, **layout)
        for channels in ((3, 0, 2), (count - 1, count - 1, 0)):
            expected = in_eight_bits(pixels[:, :, list(channels)])
            assert np.array_equal(read_image(path, channels=channels), expected)
        grey = np.repeat(in_eight_bits(pixels[:, :, 1:2]), 3, axis=2)
        assert np.array_equal(read_image(path, channels=(1,)), grey)
        assert image_size(path) == (21, 34)


def test_read_image__turned_tiff_of_many_channels__is_upright(tmp_path: Path) -> None:
    pixels = cube(5)
    path = tiff(tmp_path / "a.tif", pixels, changed={274: [6]})
    assert image_size(path) == (34, 21)
    assert np.array_equal(read_image(path, channels=(0, 1, 2)), np.rot90(pixels[:, :, :3], -1))


@pytest.mark.parametrize("count", [2, 5, 64])
def test_read_image__many_channels_and_no_choice__names_the_argument(tmp_path: Path, count: int) -> None:
    np.save(tmp_path / "a.npy", cube(count))
    sources: list[Any] = [tmp_path / "a.npy", cube(count)]
    sources += [tiff(tmp_path / "a.tif", cube(count))] if count > 2 else []
    for source in sources:
        with pytest.raises(DataError, match=rf"of {count} channels; choose three, or one, .* up to {count - 1} here"):
            read_image(source)
        chosen = read_image(source, channels=(count - 1, 0, 1))
        assert np.array_equal(chosen, cube(count)[:, :, [count - 1, 0, 1]])


def test_read_image__channel_that_is_not_there__says_how_many_there_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", cube(6))
    write_png(tmp_path / "grey.png", cube(1)[:, :, 0])
    sources: list[Any] = [tmp_path / "a.npy", cube(6), tiff(tmp_path / "a.tif", cube(6))]
    for source in sources:
        with pytest.raises(DataError, match=r"channels=\[1, 2, 6\], but the image has 6 channels, numbers 0 to 5"):
            read_image(source, channels=(1, 2, 6))
    with pytest.raises(DataError, match=r"grey\.png: channels=\[0, 1, 2\], but the image has 1 channel, number 0"):
        read_image(tmp_path / "grey.png", channels=(0, 1, 2))


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_read_image__channels_of_usual_files__are_those_stored(tmp_path: Path, suffix: str) -> None:
    pixels = cube(4)
    path = tmp_path / f"a.{suffix}"
    options: dict[str, Any] = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(path, **options)
    for source in (path, pixels, Image.fromarray(pixels)):
        assert np.array_equal(read_image(source, channels=(3, 1, 0)), pixels[:, :, [3, 1, 0]])
        assert np.array_equal(read_image(source, channels=(2,)), np.repeat(pixels[:, :, 2:3], 3, axis=2))
    if suffix != "webp":  # which knows no grey
        Image.fromarray(pixels[:, :, 0]).save(path)
        assert np.array_equal(read_image(path, channels=(0,))[:, :, 0], pixels[:, :, 0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({258: [32] * 6}, r"6 channels of \[32\] bits and sample format \[1\]; only whole numbers"),
        ({339: [2] * 6}, r"sample format \[2\]; only whole numbers"),
        ({259: [7]}, "with compression 7 and predictor 1; write it"),
        ({256: [60_000], 257: [60_000]}, "60000 x 60000 pixels"),
        ({256: [17_000], 257: [17_000], 278: [17_000]}, "6 channels and 1,734,000,000 numbers; at most 64 channels"),
        ({278: [1]}, "the TIFF has 3 of 21 strips"),
        ({273: [8, 10**6, 10**6]}, r"a\.tif: truncated or damaged"),
        ({277: [65], 258: [8] * 65}, "65 channels and .* numbers; at most 64"),
    ],
)
def test_read_image__tiff_that_is_not_read__says_why(
    tmp_path: Path, changed: dict[int, list[int]], message: str
) -> None:
    path = tiff(tmp_path / "a.tif", cube(6), changed=changed)
    with pytest.raises(DataError, match=message):
        read_image(path, channels=(0, 1, 2))


def test_read_mask__tiff_of_many_channels__is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m\.tif: a TIFF of 6 channels as a mask"):
        read_mask(tiff(tmp_path / "m.tif", cube(6)))


@pytest.mark.parametrize("asked", [(0, 1), (0, 1, 2, 3), (), (0, 1, -1), (0, 1, 64), (0, 1, 2.0), (True,), "012", 3])
def test_as_channels__no_channels__is_an_error_that_says_what_is(asked: Any) -> None:
    with pytest.raises(ConfigError, match=r"^channels is .*give three whole numbers from 0 to 63, such as \(2, 1, 0\)"):
        as_channels(asked)


def test_check_rows__kept_images_of_chosen_channels__are_not_chosen_from_again(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", cube(6))
    table = read_images([tmp_path / "a.npy"], channels=(5, 1, 0))
    kept = DecodedFiles(2**20)
    check_rows(table, keep=kept)
    again = kept.as_table(table)
    assert np.array_equal(read_image(again.images[0], channels=again.channels), cube(6)[:, :, [5, 1, 0]])
    assert again.take([0]).channels == (5, 1, 0)


def test_survey__other_channels_of_a_known_file__are_looked_at(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", cube(6))
    digests = []
    for channels in ((0, 1, 2), (3, 4, 5), (0, 1, 2)):
        notes = FileNotes(tmp_path / "notes")
        table = MaskTable((str(tmp_path / "a.npy"),), None, pd.RangeIndex(1), channels=channels)
        ((found,),) = survey_tables([table], notes, workers=1)
        notes.close()
        assert found.image is not None
        digests.append(found.image.digest)
    assert digests[0] == digests[2] != digests[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight images of six channels, whose mask only channel 4 shows, and a table of them."""
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path / "cache"))
    rows = []
    for row in range(8):
        rng = np.random.default_rng(row)
        pixels = rng.integers(0, 255, (40, 48, 6)).astype(np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        top, left = rng.integers(2, 20, 2)
        mask[top : top + 16, left : left + 20] = 255
        pixels[:, :, 4] = mask
        image = tmp_path / f"{row}.{'npy' if row % 2 else 'tif'}"
        np.save(image, pixels) if row % 2 else tiff(image, pixels)
        write_png(tmp_path / f"m{row}.png", mask)
        rows.append({"image": image.name, "label": f"m{row}.png"})
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    return tmp_path


def test_segmentor__channels__are_the_same_in_every_step(folder: Path) -> None:
    segmentor = SemanticSegmentor(path=folder / "b", hyperparameters=TINY, channels=[4, 0, 4], verbosity=0)
    segmentor.fit(folder / "train.csv", max_epochs=1, limit_train_batches=2)
    loaded = SemanticSegmentor.load(folder / "b")
    assert loaded.channels == [4, 0, 4]
    figures = loaded.evaluate(folder / "train.csv", "iou")
    assert figures == segmentor.evaluate(folder / "train.csv", "iou")
    paths = [folder / "0.tif", folder / "1.npy"]
    probabilities = loaded.predict_proba(paths)
    plain = SemanticSegmentor.load(folder / "b").set_params(channels=None)
    for path, probability, mask in zip(paths, probabilities, loaded.predict_iter(iter(paths)), strict=True):
        rgb = read_image(path, channels=(4, 0, 4))
        assert np.allclose(plain.predict_proba(rgb), probability, atol=1e-5)  # chosen from once, and no more
        assert np.array_equal(plain.predict(rgb), mask)
        with pytest.raises(DataError, match=r"of 6 channels; choose three, or one, with channels="):
            plain.predict(path)
    saved = loaded.predict(folder / "train.csv", save_to=folder / "out", format="overlay", on_error="report")
    assert saved["error"].isna().all()
    result = CliRunner().invoke(app, ["predict", str(folder / "b"), str(folder / "0.tif"), "--out", str(folder / "o")])
    assert result.exit_code == 0, result.output
    assert loaded.report(folder / "train.csv", folder / "report.html", pictures=1).is_file()
    again = SemanticSegmentor(path=folder / "b", hyperparameters=TINY, channels=(4, 0, 1), verbosity=0)
    with pytest.raises(ConfigError, match=r"is of the channels \[4, 0, 4\], not \(4, 0, 1\)"):
        again.fit(folder / "train.csv", max_epochs=1, limit_train_batches=2, resume=True)
    again.set_params(channels=(4, 0, 4)).fit(folder / "train.csv", max_epochs=1, limit_train_batches=2, resume=True)
    assert again.evaluate(folder / "train.csv", "iou") == figures


def test_row_name__other_channels__is_another_row_to_go_on_with() -> None:
    names = {row_name(read_images(["a.tif"], channels=channels), 0) for channels in (None, (0, 1, 2), (2, 1, 0))}
    assert len(names) == 3


def test_segmentor__channels_missing_or_wrong__fails_before_training(folder: Path) -> None:
    with pytest.raises(DataError, match=r"8 rows of 8 cannot be used(.|\n)*of 6 channels; choose three, or one, with"):
        SemanticSegmentor(path=folder / "b", verbosity=0).fit(folder / "train.csv")
    with pytest.raises(DataError, match=r"channels=\[0, 1, 6\], but the image has 6 channels, numbers 0 to 5"):
        SemanticSegmentor(path=folder / "b", channels=(0, 1, 6), verbosity=0).fit(folder / "train.csv")


def test_check_data__channels__are_read_and_shown(folder: Path) -> None:
    wrong = check_data(folder / "train.csv")
    assert (wrong.problems["kind"] == "unreadable file").sum() == 8
    page = folder / "check.html"
    report = check_data(folder / "train.csv", channels=(4, 0, 4), path=page, input_size=(64, 64))
    assert report.ok, str(report)
    assert report.rows == {"train": (8, 8)}


@pytest.mark.parametrize(
    ("channels", "code", "told"),
    [
        ("4,0,4", 0, "train: 8 rows"),
        ("0,1,9", 1, "6 channels, numbers 0 to 5"),
        (None, 1, "choose three, or one, with channels="),
    ],
)
def test_cli__check_with_channels__tells_what_it_found(
    folder: Path, channels: str | None, code: int, told: str
) -> None:
    options = [] if channels is None else ["--channels", channels]
    result = CliRunner().invoke(app, ["check", str(folder / "train.csv"), *options])
    assert result.exit_code == code, result.output
    assert told in result.output


def test_cli__fit_with_channels__reads_those(folder: Path) -> None:
    arguments = ["fit", str(folder / "train.csv"), "--out", str(folder / "b"), "--dry-run", "--channels"]
    assert CliRunner().invoke(app, [*arguments, "4,0,4"]).exit_code == 0
    result = CliRunner().invoke(app, [*arguments, "0,1,6"])
    assert "channels=[0, 1, 6], but the image has 6 channels" in str(result.exception)


@pytest.mark.parametrize("text", ["red", "1;2;3", "", "-1,2,3"])
def test_cli__channels_that_are_no_numbers__are_refused(folder: Path, text: str) -> None:
    result = CliRunner().invoke(app, ["check", str(folder / "train.csv"), "--channels", text])
    assert isinstance(result.exception, ConfigError)
    assert "write whole numbers with commas between them, such as 2,1,0" in str(result.exception)
