"""The images of a folder, and files that other files name: looked for inside one folder, never outside of it.

Not here: opening images (:mod:`semseg_automl.data.images`).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from semseg_automl.data.images import SUFFIXES
from semseg_automl.data.npy import NPY_SUFFIX, holds_image
from semseg_automl.errors import DataError

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What the folders and keys of each part of a data set are called."""


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder by name, no subfolders; of ``.npy`` files those that can be images.

    Raises:
        DataError: The folder cannot be read.
    """
    return sorted(
        path
        for path in _entries(folder)
        if (path.suffix.lower() in SUFFIXES and not path.is_dir())
        or (path.suffix.lower() == NPY_SUFFIX and path.is_file() and holds_image(path))
    )


def files_of(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files of a folder with one of these suffixes, in lower case, by name; hidden ones are left out.

    Raises:
        DataError: The folder cannot be read.
    """
    entries = _entries(folder)
    return sorted(p for p in entries if p.suffix.lower() in suffixes and p.name[0] != "." and not p.is_dir())


def inside(folder: Path, name: str, *, start: Path | None = None) -> Path | None:
    """Return the path of a file named in another file; None where it would leave `folder`.

    Links are not followed: they are the user's own, while the name may be anybody's.

    Args:
        folder: The folder to stay in.
        name: As it is written, also with the separators of Windows.
        start: Where a relative name starts; by default `folder`.

    >>> inside(Path("images"), "a/../b.jpg").name, inside(Path("images"), "../b.jpg")
    ('b.jpg', None)
    """
    if not name.strip() or "\0" in name:
        return None
    root = os.path.abspath(folder)
    begin = root if start is None else os.path.abspath(start)
    path = os.path.normpath(os.path.join(begin, name))
    if "\\" in name and not os.path.exists(path):
        path = os.path.normpath(os.path.join(begin, name.replace("\\", "/")))
    return Path(path) if path != root and os.path.commonpath([root, path]) == root else None


def part_of(folder: Path, split: str) -> Path | None:
    """Return the subfolder of a part of the data set, such as ``images/val``; None where there is none."""
    for name in SPLITS.get(split, (split,)):
        path = inside(folder, name)
        if path is not None and path.is_dir():
            return path
    return None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read ({error.strerror}); check the path") from error
