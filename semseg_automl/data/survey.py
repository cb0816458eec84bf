"""What is in every file of some tables, each opened once; what is known of unchanged files is kept on disk.

The notes are one JSON file for each folder of images, by name, time of change and size of each file. They are only a
short cut: where they cannot be read or written, everything is opened again.

Not here: what may be wrong with a data set (:mod:`semseg_automl.findings`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semseg_automl.data.channels import Channels
from semseg_automl.data.checks import RowCheck, has_areas, size_mismatch
from semseg_automl.data.duplicates import THUMBNAIL, bytes_digest, pixel_digest, small_picture
from semseg_automl.data.encodings import MaskEncoding
from semseg_automl.data.images import ImageSource, glance, read_stored_mask
from semseg_automl.data.objects import extents
from semseg_automl.data.parallel import each_row
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import DataError

FORMAT = 5
"""Of the notes; others are ignored."""

MAX_NOTES = 256 * 2**20
"""Bytes of a file of notes; larger ones are not read. An image takes about 2,000."""

MASK = "mask"
"""What is noted of a file as a mask; as an image, the channels count."""


@dataclass(frozen=True)
class ImageFacts:
    """What is in an image."""

    size: tuple[int, int]
    """Height and width in pixels."""
    digest: str
    """Of its pixels; of a JPEG, of what its pixels are decoded from."""
    picture: bytes
    """Grey, 32 x 32."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"size": list(self.size), "digest": self.digest, "picture": _text(self.picture)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageFacts:
        """Rebuild what :meth:`to_json` gave; a ValueError, TypeError or KeyError says that it is something else."""
        picture = _bytes(data["picture"])
        if len(picture) != THUMBNAIL**2:
            raise ValueError(f"a picture of {len(picture)} bytes")
        return cls(_size(data["size"]), str(data["digest"]), picture)


@dataclass(frozen=True)
class MaskFacts:
    """What is in a mask."""

    size: tuple[int, int]
    """Height and width in pixels."""
    digest: str
    """Of what it stores."""
    counts: dict[int, int]
    """Each value and its pixels, as in :class:`RowCheck`."""
    encoding: MaskEncoding
    """How it stores its values."""
    objects: NDArray[np.int32] | None = field(compare=False)
    """The :func:`extents` of its values, which equal digests have in common; None for masks of many values."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; JSON knows no numbers as keys."""
        encoding = self.encoding
        return {
            "size": list(self.size),
            "digest": self.digest,
            "counts": [list(pair) for pair in self.counts.items()],
            "colours": encoding.colours,
            "palette": list(encoding.palette),
            "areas": None if encoding.areas is None else [list(pair) for pair in encoding.areas.items()],
            "unlisted": encoding.unlisted,
            "form": encoding.form,
            "alpha": encoding.alpha,
            "objects": None if self.objects is None else _text(self.objects.astype("<i4").tobytes()),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MaskFacts:
        """Rebuild what :meth:`to_json` gave; a ValueError, TypeError or KeyError says that it is something else."""
        encoding = MaskEncoding(
            colours=bool(data["colours"]),
            palette=tuple(int(colour) for colour in data["palette"]),
            areas=None if data["areas"] is None else {int(value): int(pixels) for value, pixels in data["areas"]},
            unlisted=int(data["unlisted"]),
            form=str(data["form"]),
            alpha=int(data["alpha"]),
        )
        objects = data["objects"]
        return cls(
            size=_size(data["size"]),
            digest=str(data["digest"]),
            counts={int(value): int(pixels) for value, pixels in data["counts"]},
            encoding=encoding,
            objects=None if objects is None else np.frombuffer(_bytes(objects), "<i4").reshape(-1, 4).astype(np.int32),
        )


@dataclass(frozen=True)
class RowSurvey:
    """What is in the two files of a row, None where one cannot be read, and what is wrong with them."""

    image: ImageFacts | None
    mask: MaskFacts | None
    flaws: tuple[tuple[str, str], ...] = ()
    """Kind and message of each."""

    @cached_property
    def check(self) -> RowCheck | None:
        """What the row adds to the task; None for a row that cannot be used."""
        if self.flaws or self.image is None or self.mask is None:
            return None
        return RowCheck(self.image.size, self.mask.counts, self.mask.encoding)


@dataclass
class FileNotes:
    """What earlier surveys found in the files of some folders.

    Args:
        folder: Where the notes are.
    """

    folder: Path
    trouble: str = ""
    """Why notes could not be read or written; empty where all went well."""
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)
    _changed: dict[str, set[str]] = field(default_factory=dict)
    """The files of each folder that were seen and of which something is new."""
    _places: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Folder and name of each path."""

    def look_up(self, path: str, key: str) -> Any:
        """Return what is known under `key` of an unchanged file, else None."""
        folder, name = self._place(path)
        if folder not in self._known:
            self._known[folder] = self._read(folder)
        entry = self._known[folder].get(name)
        if not isinstance(entry, dict) or key not in entry:
            return None
        return entry[key] if entry.get("stamp") == _stamp(path) else None

    def keep(self, path: str, key: str, stamp: list[int], facts: dict[str, Any]) -> None:
        """Remember what was found in a file."""
        folder, name = self._place(path)
        entries = self._known.setdefault(folder, {})
        entry = entries.get(name)
        kept = entry if isinstance(entry, dict) and entry.get("stamp") == stamp else {"stamp": stamp}
        entries[name] = {**kept, key: facts}
        self._changed.setdefault(folder, set()).add(name)

    def close(self) -> None:
        """Write what is new, each file of notes whole or not at all; files that are gone are forgotten."""
        for folder, seen in sorted(self._changed.items()):
            files = {
                name: entry
                for name, entry in self._known[folder].items()
                if name in seen or os.path.lexists(os.path.join(folder, name))
            }
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"format": FORMAT, "folder": folder, "files": files})
                _write(self._path(folder), text.encode("ascii"))
            except OSError as error:
                self._complain(f"the notes on checked files cannot be written to {self.folder} ({error.strerror})")
        self._changed.clear()

    def damaged(self) -> None:
        """Say that an entry was not what was written."""
        self._complain(f"the notes on checked files in {self.folder} were damaged")

    def _place(self, path: str) -> tuple[str, str]:
        if path not in self._places:
            self._places[path] = os.path.split(os.path.abspath(path))
        return self._places[path]

    def _path(self, folder: str) -> Path:
        return self.folder / f"{hashlib.blake2b(os.fsencode(folder), digest_size=16).hexdigest()}.json"

    def _read(self, folder: str) -> dict[str, Any]:
        path = self._path(folder)
        try:
            if path.stat().st_size > MAX_NOTES:
                raise ValueError("too large")
            data = json.loads(path.read_text(encoding="ascii"))
            if not isinstance(data, dict) or not isinstance(data.get("files"), dict):
                raise ValueError("no notes")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is damaged"
            self._complain(f"{path}: the notes on checked files cannot be read ({why})")
            return {}
        files: dict[str, Any] = data["files"]
        return files if data.get("format") == FORMAT and data.get("folder") == folder else {}

    def _complain(self, trouble: str) -> None:
        self.trouble = self.trouble or f"{trouble}; every file was opened"


def survey_tables(
    tables: Sequence[MaskTable], notes: FileNotes | None = None, *, workers: int | None = None, progress: bool = False
) -> list[list[RowSurvey]]:
    """Look into every image and mask of some tables; rows that cannot be used are told, too, not raised.

    Args:
        tables: Images and masks; a file that several rows name is opened once.
        notes: What is known from before, and where to remember; None opens every file.
        workers: Threads or processes; by default one for each processor this program may use.
        progress: Whether to show a progress bar on the terminal.
    """
    known: dict[_File, ImageFacts | MaskFacts | _Flaw] = {}
    first: dict[_File, tuple[int, int]] = {}
    spots = [(place, row) for place, table in enumerate(tables) for row in range(len(table))]
    files = {spot: _files(tables[spot[0]], *spot) for spot in spots}
    for spot, own in files.items():
        for file in own:
            if file not in known and file not in first:
                facts = _recalled(file, notes)
                if facts is None:
                    first[file] = spot
                else:
                    known[file] = facts
    new = list(first.items())

    def look(position: int) -> tuple[list[int] | None, ImageFacts | MaskFacts | _Flaw]:
        file, (place, row) = new[position]
        stamp = _stamp(file.source) if isinstance(file.source, str) else None  # before what may be changed is read
        return stamp, _look(tables[place], row, file)

    looked = each_row(look, len(new), workers=workers, progress=progress, forked=True)
    for (file, _), (stamp, found) in zip(new, looked, strict=True):
        known[file] = found
        if notes is not None and stamp is not None and isinstance(file.source, str) and not isinstance(found, _Flaw):
            notes.keep(file.source, file.key, stamp, found.to_json())
    surveys: list[list[RowSurvey]] = [[] for _ in tables]
    for (place, row), own in files.items():
        facts_or_flaws = [
            _look(tables[place], row, file)  # the message is to name this row
            if isinstance(known[file], _Flaw) and first[file] != (place, row)
            else known[file]
            for file in own
        ]
        surveys[place].append(_row_survey(tables[place], row, facts_or_flaws))
    return surveys


class _File(NamedTuple):
    """An image or a mask of a table."""

    key: str
    """As what it is read."""
    source: str | tuple[int, int]
    """Its path, or the table and the row of one that is no file."""


class _Flaw(NamedTuple):
    """Why a file cannot be read."""

    kind: str
    message: str


def _files(table: MaskTable, place: int, row: int) -> list[_File]:
    keys = ["image" if table.channels is None else f"channels {table.channels} of the image", MASK]
    sources = [table.images[row], *(() if table.masks is None else (table.masks[row],))]
    return [
        _File(key, os.fspath(source) if isinstance(source, (str, os.PathLike)) else (place, row))
        for key, source in zip(keys, sources, strict=False)
    ]


def _recalled(file: _File, notes: FileNotes | None) -> ImageFacts | MaskFacts | None:
    """Return what notes say of a file that has not changed."""
    if notes is None or not isinstance(file.source, str):
        return None
    known = notes.look_up(file.source, file.key)
    if known is not None:
        try:
            return MaskFacts.from_json(known) if file.key == MASK else ImageFacts.from_json(known)
        except (KeyError, TypeError, ValueError, OverflowError):
            notes.damaged()
    return None


def _look(table: MaskTable, row: int, file: _File) -> ImageFacts | MaskFacts | _Flaw:
    """Open a file of a row."""
    name = table.row_name(row)
    source = table.masks[row] if file.key == MASK and table.masks is not None else table.images[row]
    try:
        return _look_at_mask(source, name) if file.key == MASK else _look_at_image(source, name, table.channels)
    except DataError as error:
        return _Flaw(_kind(source), str(error))


def _row_survey(table: MaskTable, row: int, found: Sequence[ImageFacts | MaskFacts | _Flaw]) -> RowSurvey:
    flaws = [(flaw.kind, flaw.message) for flaw in found if isinstance(flaw, _Flaw)]
    image = next((facts for facts in found if isinstance(facts, ImageFacts)), None)
    mask = next((facts for facts in found if isinstance(facts, MaskFacts)), None)
    if image is not None and mask is not None:
        wrong = size_mismatch(table, row, image.size, mask.size)
        if wrong is not None:
            flaws.append(("size mismatch", wrong))
    return RowSurvey(image, mask, tuple(flaws))


def _look_at_image(source: ImageSource, name: str, channels: Channels | None) -> ImageFacts:
    seen = glance(source, 2 * THUMBNAIL, name=name, channels=channels)
    digest = bytes_digest(seen.coded) if seen.coded else pixel_digest(seen.pixels)
    return ImageFacts(seen.size, digest, small_picture(seen.pixels).tobytes())


def _look_at_mask(source: ImageSource, name: str) -> MaskFacts:
    stored = read_stored_mask(source, name=name)
    values = stored.values()
    counts, encoding = stored.survey(values)
    size = (stored.pixels.shape[0], stored.pixels.shape[1])
    return MaskFacts(size, values.digest(), counts, encoding, extents(values) if has_areas(counts, encoding) else None)


def _write(path: Path, data: bytes) -> None:
    """Replace a file, whole or not at all; notes that a loss of power damages are told and made anew, so none waits."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _kind(source: ImageSource) -> str:
    gone = isinstance(source, (str, os.PathLike)) and not os.path.exists(source)
    return "missing file" if gone else "unreadable file"


def _stamp(source: str) -> list[int] | None:
    """Return the time of change in nanoseconds and the bytes of a file; None where there is none."""
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return [found.st_mtime_ns, found.st_size]


def _text(data: bytes) -> str:
    """Return bytes as JSON can have them."""
    return base64.b64encode(data).decode("ascii")


def _bytes(text: Any) -> bytes:
    return base64.b64decode(text, validate=True)


def _size(pair: Any) -> tuple[int, int]:
    height, width = pair
    if int(height) < 1 or int(width) < 1:
        raise ValueError(f"an image of {height} x {width}")
    return int(height), int(width)
