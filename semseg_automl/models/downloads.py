"""The official SAM checkpoints: where they lie, and how one is downloaded once, resumed, and checked.

In the cache folder ``NAME`` is a whole file, ``NAME.part`` one that is still coming, ``NAME.verified`` the note that
spares later starts the hashing, ``NAME.lock`` what keeps two processes apart. Nothing here looks into the files.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from semseg_automl.errors import CheckpointError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**16  # bytes; what a cut connection can lose
_MAX_BYTES = 4 * 2**30  # where neither we nor the server know the size; the largest SAM has 2.6e9 bytes
_LOCK_POLL = 0.2  # seconds

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A file of weights on the web.

    Attributes:
        name: file name, on the server and in the cache.
        url: where it lies.
        sha256: of the whole file, 64 lowercase hex digits.
        size: bytes; None if unknown.
    """

    name: str
    url: str
    sha256: str
    size: int | None


def _official(name: str, sha256: str, size: int | None) -> OfficialCheckpoint:
    return OfficialCheckpoint(name, f"https://dl.fbaipublicfiles.com/segment_anything/{name}", sha256, size)


OFFICIAL: dict[str, OfficialCheckpoint] = {
    "sam_vit_b": _official(
        "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", 375_042_383
    ),
    "sam_vit_l": _official(  # public sources differ by 129 bytes in its size; the hash decides
        "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", None
    ),
    "sam_vit_h": _official(
        "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", 2_564_550_879
    ),
}
"""Released weights (Kirillov et al., 2023; Apache-2.0) by encoder name; each file name ends in the start of its md5."""


def cache_folder() -> Path:
    """Return ``$SEMSEG_AUTOML_CACHE``, else ``$XDG_CACHE_HOME/semseg_automl``, else ``~/.cache/semseg_automl``."""
    own = os.environ.get("SEMSEG_AUTOML_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "semseg_automl"


def fetch_checkpoint(checkpoint: OfficialCheckpoint, *, folder: Path | None = None, progress: bool = True) -> Path:
    """Return the file in the cache, downloading it if it is not there.

    A file gets its final name only after its sha256 was checked, one that the user put there is checked once. An
    interrupted download goes on where it stopped.

    Args:
        checkpoint: what to fetch, one of `OFFICIAL`.
        folder: the cache; `cache_folder()` by default.
        progress: draw a progress bar if stderr is a terminal.

    Raises:
        CheckpointError: there is no connection, the server answers with an error or another file, the transfer stops
            half-way, the folder cannot be written, the disk is full, or the hash is wrong. The message says what to do.
    """
    path = (cache_folder() if folder is None else Path(folder)) / checkpoint.name
    try:
        if path.exists():
            _verify(path, checkpoint)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_beside(path, "lock")):
            if path.exists():
                _verify(path, checkpoint)
            else:
                _download(checkpoint, path, progress=progress)
    except OSError as error:
        raise CheckpointError(
            f"'{path}' cannot be read or written ({error}). Set SEMSEG_AUTOML_CACHE to a folder that can be written. "
            f"{_by_hand(checkpoint, path)}"
        ) from error
    return path


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _by_hand(checkpoint: OfficialCheckpoint, path: Path) -> str:
    """Say what a user can do without a download."""
    return (
        f"Or fetch {checkpoint.url} (sha256 {checkpoint.sha256}) elsewhere and put it at '{path}', or give "
        "model.checkpoint=<file>, or model.pretrained=False for random weights."
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file. The operating system frees it with the process, so that none is ever stale.

    The file stays: deleting it would let a process that waits and one that comes anew lock two different files.
    """
    with path.open("ab") as handle:
        if not _try_lock(handle.fileno()):
            _log.warning("another process is downloading; waiting until it frees '%s'", path)
            while not _try_lock(handle.fileno()):
                time.sleep(_LOCK_POLL)
        yield


def _try_lock(descriptor: int) -> bool:
    """Lock an open file for this process alone, if no other one has it; closing the file frees it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _note(path: Path, checkpoint: OfficialCheckpoint) -> bytes:
    """Return what ``NAME.verified`` holds while the file is the one that was checked."""
    stat = path.stat()
    return f"{checkpoint.sha256} {stat.st_size} {stat.st_mtime_ns}\n".encode()


def _remember(path: Path, checkpoint: OfficialCheckpoint) -> None:
    """Write down that the file was checked."""
    try:
        _beside(path, "verified").write_bytes(_note(path, checkpoint))
    except OSError as error:
        warnings.warn(f"'{path}' will be hashed at every start: no note can be left ({error})", stacklevel=4)


def _verify(path: Path, checkpoint: OfficialCheckpoint) -> None:
    """Check the hash of a file under its final name, unless that was done before."""
    mark = _beside(path, "verified")
    if mark.is_file() and mark.read_bytes() == _note(path, checkpoint):
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != checkpoint.sha256:
        raise CheckpointError(
            f"'{path}' has sha256 {found}, expected {checkpoint.sha256}: it is damaged or another file. Delete it and "
            f"run again to download it, or give model.checkpoint the path of the file you mean."
        )
    _remember(path, checkpoint)


def _download(checkpoint: OfficialCheckpoint, path: Path, *, progress: bool) -> None:
    """Bring the file to its final name, going on from what an earlier call left."""
    part = _beside(path, "part")
    digest, kept = hashlib.sha256(), 0
    if part.is_file():
        with part.open("rb") as file:
            digest, kept = hashlib.file_digest(file, "sha256"), part.stat().st_size
    if digest.hexdigest() != checkpoint.sha256:
        response, start, total = _request(checkpoint, path, kept)
        if not start:
            digest = hashlib.sha256()
        with response:
            try:
                _transfer(response, part, digest, checkpoint, start=start, total=total, progress=progress)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                part.unlink(missing_ok=True)
                needed = "unknown" if total is None else f"{total:,}"
                raise CheckpointError(
                    f"the disk is full: '{path}' does not fit (bytes needed: {needed}). Free some space or set "
                    f"SEMSEG_AUTOML_CACHE to a folder on another disk. {_by_hand(checkpoint, path)}"
                ) from error
    found = digest.hexdigest()
    if found != checkpoint.sha256:
        part.unlink()
        raise CheckpointError(
            f"what {checkpoint.url} sent has sha256 {found}, expected {checkpoint.sha256}; it was deleted. Run again "
            f"to download it anew. {_by_hand(checkpoint, path)}"
        )
    os.replace(part, path)
    _remember(path, checkpoint)


def _request(checkpoint: OfficialCheckpoint, path: Path, start: int) -> tuple[HTTPResponse, int, int | None]:
    """Ask for the file from byte `start` on.

    Returns:
        The open answer, the byte it begins at (0 from a server that cannot resume), and the size of the whole file in
        bytes, None if unknown.
    """
    headers = {"User-Agent": "semseg-automl"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response: HTTPResponse = urlopen(Request(checkpoint.url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and start:  # nothing there to go on with, and the hash said that the part is not whole
            return _request(checkpoint, path, 0)
        raise CheckpointError(
            f"{checkpoint.url} answers {error.code} {error.reason}. Try again later. {_by_hand(checkpoint, path)}"
        ) from error
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"{checkpoint.name} is not in the cache and {checkpoint.url} cannot be reached ({error}). Connect and run "
            f"again. {_by_hand(checkpoint, path)}"
        ) from error
    total, usual = response.length, 200
    if start and response.status == 206:
        sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if sent is None or int(sent[1]) != start:
            response.close()
            return _request(checkpoint, path, 0)
        total, usual = None if sent[2] == "*" else int(sent[2]), 206
    else:
        start = 0
    too_large = total is not None and total > _MAX_BYTES
    if response.status != usual or too_large or (checkpoint.size and total not in (None, checkpoint.size)):
        response.close()
        raise CheckpointError(
            f"{checkpoint.url} answers {response.status} with {total} bytes, expected {usual} and "
            f"{checkpoint.size or f'at most {_MAX_BYTES}'}: another file, or a page put in front of it. "
            f"{_by_hand(checkpoint, path)}"
        )
    return response, start, total


def _chunks(response: HTTPResponse, checkpoint: OfficialCheckpoint) -> Iterator[bytes]:
    """Yield the body until it ends or the connection does."""
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, HTTPException) as error:
            raise CheckpointError(
                f"the connection to {checkpoint.url} broke ({error or type(error).__name__}). What came is kept: run "
                "again to go on where it stopped."
            ) from error
        if not chunk:
            return
        yield chunk


def _transfer(
    response: HTTPResponse,
    part: Path,
    digest: hashlib._Hash,
    checkpoint: OfficialCheckpoint,
    *,
    start: int,
    total: int | None,
    progress: bool,
) -> None:
    """Write the body behind the first `start` bytes of `part`, and into `digest`."""
    total = checkpoint.size if total is None else total
    limit = _MAX_BYTES if total is None else total
    done = start
    with _progress_bar(shown=progress) as bar, part.open("ab" if start else "wb") as out:
        task = bar.add_task(checkpoint.name, total=total, completed=start)
        for chunk in _chunks(response, checkpoint):
            done += len(chunk)
            if done > limit:
                out.close()
                part.unlink()
                raise CheckpointError(
                    f"{checkpoint.url} sends more than the {limit:,} bytes expected; what came was deleted. "
                    "Run again, or give model.checkpoint=<file>."
                )
            out.write(chunk)
            digest.update(chunk)
            bar.update(task, completed=done)
        out.flush()
        os.fsync(out.fileno())  # a crash of the machine must not leave the final name on a file that is not there
    if total is not None and done < total:
        raise CheckpointError(
            f"{checkpoint.url} stopped after {done:,} of {total:,} bytes. What came is kept: run again to go on where "
            "it stopped."
        )


def _progress_bar(*, shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not (shown and sys.stderr.isatty())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=hidden)
