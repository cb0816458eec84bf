"""Predictions into a folder: one file per row, each whole or not there, and a journal to go on from after a stop.

The journal, ``predictions.jsonl``, says in its first line which segmentor wrote the folder in which format, and in
each further one which source a file was made of. Nothing in it is ever used as a path.

Predicting is :mod:`semseg_automl.inference`'s, pictures are :mod:`semseg_automl.report`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.data.images import read_image, write_png
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import DataError, check_known
from semseg_automl.files import replaced
from semseg_automl.inference import FailedPrediction, OnError, Predictor
from semseg_automl.report import overlay
from semseg_automl.task import SegmentationTask

SaveFormat = Literal["same-as-labels", "index", "overlay", "probability"]

JOURNAL = "predictions.jsonl"
MAX_LINE_BYTES = 2**16
"""Of a line of the journal; longer ones are not ours."""
WHITE_16_BIT = 65535
OVERLAY_PIXELS = 2**21
"""Drawn at once."""


def save_predictions(
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    folder: Path,
    *,
    threshold: float,
    format: SaveFormat = "same-as-labels",
    on_error: OnError = "raise",
    resume: bool = False,
) -> list[Mapping[str, str | None]]:
    """Predict a table into a folder; memory does not grow with the number of rows.

    Args:
        predictor: gives labels and scores.
        table: images.
        task: what the class indices mean.
        folder: made if need be; files in it that have a row's name are replaced.
        threshold: foreground probability above which a pixel is foreground.
        format: ``same-as-labels``, PNG in the values, colours or palette of the training masks; ``index``, PNG of class
            indices; ``overlay``, RGB PNG of the image with its classes in colour; ``probability``, 16-bit PNG of the
            foreground probability times 65535 for binary tasks, float16 ``.npy`` ``(K, H, W)`` of all scores otherwise.
        on_error: ``raise`` stops at an image that cannot be read, ``report`` names it in its row and goes on.
        resume: keep the files that the same segmentor wrote in the same format, of sources whose path, size and time
            of change are the same; False starts anew. Images in memory are always predicted.

    Returns:
        Per row: ``image``, ``mask`` (the file, None where it failed) and ``error`` (None where it did not).

    Raises:
        ConfigError: the format or `on_error` is unknown.
        DataError: a row cannot be predicted, the folder cannot be written, or it was written by another segmentor or
            in another format and `resume` is True.
    """
    check_known("format", format, get_args(SaveFormat))
    check_known("on_error", on_error, get_args(OnError))
    suffix = ".npy" if format == "probability" and task.kind != "binary" else ".png"
    rows = [_Row(source, name) for source, name in zip(table.images, file_names(table, suffix), strict=True)]
    header = {"format": format, "segmentor": fingerprint(predictor, task, threshold)}
    saved: list[Mapping[str, str | None]] = [_entry(row, folder) for row in rows]
    with Journal(folder, header, {row.file for row in rows}, resume) as journal:
        left = [position for position, row in enumerate(rows) if not journal.has(row)]
        remaining = table.take(left)
        for position, prediction in zip(
            left, _predicted(predictor, remaining, task, format, threshold, on_error), strict=True
        ):
            row = rows[position]
            if isinstance(prediction, FailedPrediction):
                saved[position] = {**saved[position], "mask": None, "error": prediction.reason}
                continue
            if suffix == ".npy":
                _write_npy(folder / row.file, prediction)
            else:
                write_png(folder / row.file, prediction, **(task.written_as() if format == "same-as-labels" else {}))
            journal.add(row)
    return saved


def file_names(table: MaskTable, suffix: str) -> list[str]:
    """Name a file for each row after its image; a name that came before gets the row's position behind it.

    Names that differ in case alone count as the same, since some file systems cannot hold both. A row's name depends
    on the rows before it alone, so it stays when rows are added at the end.
    """
    taken: set[str] = set()
    names = []
    for position, source in enumerate(table.images):
        stem = Path(source).stem if isinstance(source, str | os.PathLike) else f"image_{position}"
        while stem.lower() in taken:
            stem = f"{stem}_{position}"
        taken.add(stem.lower())
        names.append(stem + suffix)
    return names


def fingerprint(predictor: Predictor, task: SegmentationTask, threshold: float) -> str:
    """Return 32 hexadecimal digits of all that a prediction depends on: weights, sizes, threshold, classes."""
    digest = hashlib.blake2b(digest_size=16)
    seen = [predictor.input_size, predictor.tile, predictor.mirrored, predictor.temperature]
    digest.update(json.dumps([*seen, threshold, task.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Row:
    """One row's file name, and its source as the journal notes it."""

    def __init__(self, source: object, file: str) -> None:
        self.file = file
        self.image = os.fspath(source) if isinstance(source, str | os.PathLike) else None
        self.source: dict[str, str | int] | None = None
        if self.image is not None:
            try:
                found = os.stat(self.image)
            except (OSError, ValueError):
                return  # reading it will say what is wrong
            path = os.path.abspath(self.image)
            self.source = {"image": str(path), "size": found.st_size, "mtime_ns": found.st_mtime_ns}


@dataclass
class Journal:
    """The record of a folder's files; opened, it holds the folder for writing.

    Args:
        folder: made if need be.
        header: what all files were made with.
        files: names of the files that matter; entries of others are passed over.
        resume: go on with a journal that has the same header; False replaces it.
    """

    folder: Path
    header: Mapping[str, str]
    files: Collection[str]
    resume: bool

    def __enter__(self) -> Self:
        """Open the journal.

        Raises:
            DataError: the folder cannot be written, or the journal has another header.
        """
        path = self.folder / JOURNAL
        self._done: dict[str, Mapping[str, Any]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self.resume and path.is_file() and path.stat().st_size > 0
            with ExitStack() as opened:
                self._stream: BinaryIO = opened.enter_context(open(path, "r+b" if known else "wb"))
                if known:
                    self._read()
                else:
                    self._write(self.header)
                self._opened = opened.pop_all()
        except FileExistsError as error:
            raise DataError(f"'{self.folder}' is a file, not a folder; give another folder to save in") from error
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Close it; every entry is in the file already."""
        self._opened.close()

    def has(self, row: _Row) -> bool:
        """Whether a row's file is there as it was written, and its source is unchanged."""
        entry = self._done.get(row.file)
        if entry is None or row.source is None or {**row.source, "file": row.file} != _without_bytes(entry):
            return False
        try:
            return bool((self.folder / row.file).stat().st_size == entry["bytes"])
        except OSError:
            return False

    def add(self, row: _Row) -> None:
        """Note that a row's file is written.

        Raises:
            DataError: the journal cannot be written.
        """
        try:
            size = (self.folder / row.file).stat().st_size
            self._write({"file": row.file, **(row.source or {}), "bytes": size})
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, entry: Mapping[str, str | int]) -> None:
        self._stream.write(json.dumps(entry).encode() + b"\n")
        self._stream.flush()

    def _read(self) -> None:
        """Read what was written, and leave the stream where the next line begins.

        A line that is no entry of ours, such as one cut off by a stop, counts for nothing: its row is predicted again.
        """
        lines = _lines(self._stream)
        first = next(lines, {})
        if first != self.header:
            why = self._difference(first)
            raise DataError(f"'{self.folder}': {why}. Use another folder, or resume=False to write all files anew")
        for entry in lines:
            file = entry.get("file")
            if isinstance(file, str) and file in self.files and "bytes" in entry:
                self._done[file] = entry
        self._stream.seek(-1, os.SEEK_END)
        if self._stream.read(1) != b"\n":
            self._stream.write(b"\n")

    def _difference(self, first: Mapping[str, Any]) -> str:
        if first.keys() != self.header.keys():
            return f"{JOURNAL} is damaged, so it is not known what the files are"
        if first["format"] != self.header["format"]:
            return f"its files have the format {first['format']!r}, not {self.header['format']!r}"
        return "its files were written by another segmentor, or with another threshold or temperature"

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"'{self.folder}': cannot be written ({error.strerror}); check its permissions and free space, or use "
            "another folder"
        )


def _without_bytes(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "bytes"}


def _lines(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield what each line of the journal holds; an empty mapping for one that holds none."""
    while line := stream.readline(MAX_LINE_BYTES):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        yield entry if isinstance(entry, dict) else {}


def _entry(row: _Row, folder: Path) -> dict[str, str | None]:
    return {"image": row.image, "mask": str(folder / row.file), "error": None}


def _predicted(
    predictor: Predictor,
    table: MaskTable,
    task: SegmentationTask,
    format: SaveFormat,
    threshold: float,
    on_error: OnError,
) -> Iterator[NDArray[Any] | FailedPrediction]:
    """Yield the pixels of each row's file."""
    if format == "probability":
        for row, scores in enumerate(predictor.scores(table, on_error=on_error)):
            yield scores if isinstance(scores, FailedPrediction) else _probabilities(scores, task, table.row_name(row))
        return
    for row, labels in enumerate(predictor.labels(table, threshold=threshold, on_error=on_error)):
        if isinstance(labels, FailedPrediction) or format == "index":
            yield labels
        elif format == "overlay":
            name = table.row_name(row)
            image = read_image(table.images[row], name=name, channels=table.channels)
            yield _overlay(image, labels, binary=task.kind == "binary")
        else:
            yield task.decode(labels)


def _overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], *, binary: bool) -> NDArray[np.uint8]:
    """Draw as `overlay` does, some rows at a time: it needs many times the memory of what it draws."""
    height, width = labels.shape
    rows = max(1, OVERLAY_PIXELS // width)
    out = np.empty_like(image)
    for top in range(0, height, rows):
        above, end = max(0, top - 1), min(height, top + rows)  # a border line looks one pixel up and one down
        drawn = overlay(image[above : end + 1], labels[above : end + 1], binary=binary)
        out[top:end] = drawn[top - above : end - above]
    return out


def _probabilities(scores: Tensor, task: SegmentationTask, name: str) -> NDArray[Any]:
    if not bool(scores.isfinite().all()):
        raise DataError(
            f"{name}: the network's scores are not finite and cannot be saved. Its weights are damaged or its "
            "computation overflowed: fit again, with env.precision 32-true if it was lower"
        )
    if task.kind == "binary":
        return (scores[0] * WHITE_16_BIT).round().numpy().astype(np.uint16)
    return scores.half().numpy()


def _write_npy(path: Path, array: NDArray[Any]) -> None:
    """Write an array, whole or not at all."""
    try:
        with replaced(path) as part, open(part, "wb") as stream:
            np.save(stream, array, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error
