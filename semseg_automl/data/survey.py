"""What is in every file of a table, each opened once, in threads; what is known of unchanged files is kept on disk.

The notes are one JSON file for each folder of images, by name, time of change and size of each file. They are only a
short cut: where they cannot be read or written, everything is opened again.

Not here: what may be wrong with a data set (:mod:`semseg_automl.findings`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from semseg_automl.data.channels import Channels
from semseg_automl.data.checks import MOST_VALUES, RowCheck, each_row, size_mismatch
from semseg_automl.data.colours import pack
from semseg_automl.data.duplicates import THUMBNAIL, bytes_digest, pixel_digest, small_picture
from semseg_automl.data.encodings import MaskEncoding, StoredMask
from semseg_automl.data.images import ImageSource, glance, read_stored_mask
from semseg_automl.data.objects import Extent, extents
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import DataError
from semseg_automl.files import replaced

FORMAT = 2
"""Of the notes; others are ignored."""

MAX_NOTES = 256 * 2**20
"""Bytes of a file of notes; larger ones are not read. An image takes about 2,000."""

Facts = TypeVar("Facts", "ImageFacts", "MaskFacts")


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
        picture = base64.b64encode(self.picture).decode("ascii")
        return {"size": list(self.size), "digest": self.digest, "picture": picture}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageFacts:
        """Rebuild what :meth:`to_json` gave; a ValueError, TypeError or KeyError says that it is something else."""
        picture = base64.b64decode(data["picture"], validate=True)
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
    objects: dict[int, tuple[Extent, ...]] | None
    """The connected areas of each value; None for masks of many values."""

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
            "objects": None if self.objects is None else [[v, [list(e) for e in x]] for v, x in self.objects.items()],
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
            objects=None if objects is None else {
                int(value): tuple(Extent(int(h), int(w), int(n)) for h, w, n in found) for value, found in objects
            },
        )


@dataclass(frozen=True)
class RowSurvey:
    """What is in the two files of a row, None where one cannot be read, and what is wrong with them."""

    image: ImageFacts | None
    mask: MaskFacts | None
    flaws: tuple[tuple[str, str], ...] = ()
    """Kind and message of each."""

    @property
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
    _changed: set[str] = field(default_factory=set)

    def open(self, table: MaskTable) -> None:
        """Read the notes on the folders of a table."""
        sources = [*table.images, *(table.masks or ())]
        for folder in {os.path.dirname(os.path.abspath(s)) for s in sources if isinstance(s, (str, os.PathLike))}:
            if folder not in self._known:
                self._known[folder] = self._read(folder)

    def look_up(self, path: str, key: str, stamp: list[int]) -> Any:
        """Return what is known under `key` of an unchanged file, else None."""
        folder, name = os.path.split(os.path.abspath(path))
        entry = self._known.get(folder, {}).get(name)
        return entry.get(key) if isinstance(entry, dict) and entry.get("stamp") == stamp else None

    def keep(self, path: str, key: str, stamp: list[int], facts: dict[str, Any]) -> None:
        """Remember what was found in a file."""
        folder, name = os.path.split(os.path.abspath(path))
        entries = self._known.setdefault(folder, {})
        entry = entries.get(name)
        kept = entry if isinstance(entry, dict) and entry.get("stamp") == stamp else {"stamp": stamp}
        entries[name] = {**kept, key: facts}
        self._changed.add(folder)

    def close(self) -> None:
        """Write what is new, each file of notes whole or not at all; files that are gone are forgotten."""
        for folder in sorted(self._changed):
            files = {name: e for name, e in self._known[folder].items() if os.path.lexists(os.path.join(folder, name))}
            target = self._path(folder)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replaced(target) as part:
                    part.write_text(json.dumps({"format": FORMAT, "folder": folder, "files": files}), encoding="ascii")
            except OSError as error:
                self._complain(f"the notes on checked files cannot be written to {self.folder} ({error.strerror})")
        self._changed.clear()

    def damaged(self) -> None:
        """Say that an entry was not what was written."""
        self._complain(f"the notes on checked files in {self.folder} were damaged")

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


def survey_table(
    table: MaskTable, notes: FileNotes | None = None, *, workers: int | None = None, progress: bool = False
) -> list[RowSurvey]:
    """Look into every image and mask of a table; rows that cannot be used are told, too, not raised.

    Args:
        table: Images and masks.
        notes: What is known from before, and where to remember; None opens every file.
        workers: Threads; by default one for each processor this program may use.
        progress: Whether to show a progress bar on the terminal.
    """
    if notes is not None:
        notes.open(table)
    return each_row(lambda row: _survey_row(table, row, notes), len(table), workers=workers, progress=progress)


def _survey_row(table: MaskTable, row: int, notes: FileNotes | None) -> RowSurvey:
    name = table.row_name(row)
    flaws: list[tuple[str, str]] = []
    image = mask = None
    source = table.images[row]
    try:
        channels = table.channels
        key = "image" if channels is None else f"channels {channels} of the image"
        image = _facts(source, key, lambda: _look_at_image(source, name, channels), ImageFacts, notes)
    except DataError as error:
        flaws.append((_kind(source), str(error)))
    if table.masks is not None:
        label = table.masks[row]
        try:
            mask = _facts(label, "mask", lambda: _look_at_mask(label, name), MaskFacts, notes)
        except DataError as error:
            flaws.append((_kind(label), str(error)))
    if image is not None and mask is not None:
        wrong = size_mismatch(table, row, image.size, mask.size)
        if wrong is not None:
            flaws.append(("size mismatch", wrong))
    return RowSurvey(image, mask, tuple(flaws))


def _facts(
    source: ImageSource, key: str, look: Callable[[], Facts], kind: type[Facts], notes: FileNotes | None
) -> Facts:
    """Return what is in a file, from the notes where it has not changed."""
    stamp = None if notes is None or not isinstance(source, (str, os.PathLike)) else _stamp(source)
    if notes is None or stamp is None or not isinstance(source, (str, os.PathLike)):
        return look()
    known = notes.look_up(os.fspath(source), key, stamp)
    if known is not None:
        try:
            return kind.from_json(known)
        except (KeyError, TypeError, ValueError, OverflowError):
            notes.damaged()
    found = look()
    notes.keep(os.fspath(source), key, stamp, found.to_json())
    return found


def _look_at_image(source: ImageSource, name: str, channels: Channels | None) -> ImageFacts:
    seen = glance(source, 2 * THUMBNAIL, name=name, channels=channels)
    digest = bytes_digest(seen.coded) if seen.coded else pixel_digest(seen.pixels)
    return ImageFacts(seen.size, digest, small_picture(seen.pixels).tobytes())


def _look_at_mask(source: ImageSource, name: str) -> MaskFacts:
    stored = read_stored_mask(source, name=name)
    counts, encoding = stored.survey()
    few = len(counts) <= MOST_VALUES and not encoding.unlisted
    size = (stored.pixels.shape[0], stored.pixels.shape[1])
    return MaskFacts(
        size, pixel_digest(stored.pixels), counts, encoding, extents(_stored_values(stored)) if few else None
    )


def _stored_values(stored: StoredMask) -> np.ndarray[Any, Any]:
    """Return the values as they are counted: numbers, or packed colours."""
    return pack(stored.pixels.astype(np.uint8, copy=False)) if stored.pixels.ndim == 3 else stored.pixels


def _kind(source: ImageSource) -> str:
    gone = isinstance(source, (str, os.PathLike)) and not os.path.exists(source)
    return "missing file" if gone else "unreadable file"


def _stamp(source: str | os.PathLike[str]) -> list[int] | None:
    """Return the time of change in nanoseconds and the bytes of a file; None where there is none."""
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return [found.st_mtime_ns, found.st_size]


def _size(pair: Any) -> tuple[int, int]:
    height, width = pair
    if int(height) < 1 or int(width) < 1:
        raise ValueError(f"an image of {height} x {width}")
    return int(height), int(width)
