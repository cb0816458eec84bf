"""Downloading checkpoints: from a server of our own that stops, ignores ranges, or sends too much; no network."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from semseg_automl.errors import CheckpointError
from semseg_automl.models import downloads
from semseg_automl.models.downloads import OFFICIAL, OfficialCheckpoint, cache_folder, fetch_checkpoint

CONTENT = random.Random(0).randbytes(300_000)
NAME = "tiny_0a1b2c.pth"


class Server(ThreadingHTTPServer):
    """Serves CONTENT in the way that `mode` says, and remembers the Range of each request (None without)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ranges"
        self.ranges: list[str | None] = []
        self.arrived, self.go_on, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.go_on.set()

    def handle_error(self, *args: Any) -> None:
        """A client that hangs up is part of these tests."""

    def offer(self, **changes: Any) -> OfficialCheckpoint:
        """Describe what lies here."""
        facts = {"name": NAME, "sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
        return OfficialCheckpoint(**{"url": f"http://127.0.0.1:{self.server_port}/{NAME}", **facts, **changes})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        """Keep the output of the tests clean."""

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        asked, mode = self.headers.get("Range"), self.server.mode
        self.server.ranges.append(asked)
        self.server.arrived.set()
        self.server.go_on.wait(10)
        if mode.isdigit():
            self.answer(int(mode), b"sorry", {"Content-Length": "5"})
            return
        start = 0 if asked is None or mode == "no_ranges" else int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.answer(416, b"", {"Content-Length": "0", "Content-Range": f"bytes */{len(CONTENT)}"})
            return
        if mode == "wrong_range":
            start = 0
        body, headers = CONTENT[start:], {"Content-Length": str(len(CONTENT) - start)}
        if asked is not None and mode != "no_ranges":
            headers["Content-Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        if mode == "other_file":
            body = bytes(len(body))
        elif mode in ("cut", "stalled"):
            body = body[: len(body) // 2]
        elif mode == "endless":
            body, headers = body + b"more", {}
        elif mode == "no_length":
            headers.pop("Content-Length")
        self.answer(206 if "Content-Range" in headers else 200, body, headers)
        if mode == "stalled":
            self.server.ended.wait(10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server that is reached past any proxy."""
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.go_on.set()
        running.ended.set()
        running.shutdown()
        thread.join()


def left_in(folder: Path) -> set[str]:
    """Return what lies in a folder, by what follows the checkpoint's name."""
    return {path.name.removeprefix(NAME) for path in folder.iterdir()}


def write_part(folder: Path, content: bytes) -> Path:
    part = folder / f"{NAME}.part"
    part.write_bytes(content)
    return part


@pytest.mark.parametrize("name", OFFICIAL)
def test_official__each_encoder__has_a_safe_address_and_a_hash(name: str) -> None:
    checkpoint = OFFICIAL[name]
    assert re.fullmatch(rf"{name}_[0-9a-f]{{6}}\.pth", checkpoint.name), "the start of the md5 ends the name"
    assert checkpoint.url == f"https://dl.fbaipublicfiles.com/segment_anything/{checkpoint.name}"
    assert re.fullmatch(r"[0-9a-f]{64}", checkpoint.sha256)
    assert checkpoint.size is None or 3e8 < checkpoint.size < downloads._MAX_BYTES


def test_official__all__are_three_different_files() -> None:
    assert list(OFFICIAL) == ["sam_vit_b", "sam_vit_l", "sam_vit_h"]
    assert len({checkpoint.sha256 for checkpoint in OFFICIAL.values()}) == 3


def test_cache_folder__variables__are_asked_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", "~/weights")
    assert cache_folder() == Path("/home/someone/weights")
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", "")
    assert cache_folder() == Path("/xdg/semseg_automl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/semseg_automl")


@pytest.mark.parametrize(("mode", "size"), [("ranges", len(CONTENT)), ("ranges", None), ("no_length", None)])
def test_fetch__nothing_in_the_cache__downloads_once(
    mode: str, size: int | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.mode = mode
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path / "new" / "cache"))
    path = fetch_checkpoint(server.offer(size=size))
    assert path == tmp_path / "new" / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert left_in(path.parent) == {"", ".lock", ".verified"}
    assert fetch_checkpoint(server.offer(size=size)) == path
    assert server.ranges == [None]


def test_fetch__own_file_in_the_cache__is_not_hashed_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch_checkpoint(server.offer(), folder=tmp_path)
    monkeypatch.delattr(hashlib, "file_digest")
    assert fetch_checkpoint(server.offer(), folder=tmp_path) == path
    os.utime(path, (1, 1))
    with pytest.raises(AttributeError, match="file_digest"):
        fetch_checkpoint(server.offer(), folder=tmp_path)


def test_fetch__connection_cut__goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.mode, half = "cut", len(CONTENT) // 2
    with pytest.raises(CheckpointError, match=rf"stopped after {half:,} of {len(CONTENT):,} bytes.*run again to go on"):
        fetch_checkpoint(server.offer(), folder=tmp_path)
    assert left_in(tmp_path) == {".lock", ".part"}
    server.mode = "ranges"
    assert fetch_checkpoint(server.offer(), folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={half}-"]
    assert left_in(tmp_path) == {"", ".lock", ".verified"}


def test_fetch__server_that_falls_silent__keeps_what_came(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.2)
    server.mode = "stalled"
    with pytest.raises(CheckpointError, match=r"connection to .* broke \(timed out\).*run again to go on"):
        fetch_checkpoint(server.offer(), folder=tmp_path)
    kept = (tmp_path / f"{NAME}.part").read_bytes()
    assert len(kept) > len(CONTENT) // 2 - downloads._CHUNK
    assert CONTENT.startswith(kept)


def test_fetch__server_that_never_answers__is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.2)
    server.go_on.clear()
    with pytest.raises(CheckpointError, match=r"cannot be reached \(timed out\)"):
        fetch_checkpoint(server.offer(), folder=tmp_path)


@pytest.mark.parametrize("mode", ["no_ranges", "wrong_range"])
def test_fetch__server_that_cannot_resume__starts_over(mode: str, server: Server, tmp_path: Path) -> None:
    server.mode = mode
    write_part(tmp_path, CONTENT[:1000])
    assert fetch_checkpoint(server.offer(), folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges == (["bytes=1000-"] if mode == "no_ranges" else ["bytes=1000-", None])


def test_fetch__part_that_is_whole__needs_no_request(server: Server, tmp_path: Path) -> None:
    write_part(tmp_path, CONTENT)
    assert fetch_checkpoint(server.offer(), folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


def test_fetch__part_longer_than_the_file__starts_over(server: Server, tmp_path: Path) -> None:
    write_part(tmp_path, CONTENT + b"more")
    assert fetch_checkpoint(server.offer(), folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]


@pytest.mark.parametrize("kept", [b"", bytes(1000)])
def test_fetch__wrong_hash__leaves_nothing_in_the_cache(kept: bytes, server: Server, tmp_path: Path) -> None:
    if kept:
        write_part(tmp_path, kept)
    else:
        server.mode = "other_file"
    expected = server.offer().sha256
    with pytest.raises(CheckpointError, match=rf"sha256 [0-9a-f]{{64}}, expected {expected}; it was deleted"):
        fetch_checkpoint(server.offer(), folder=tmp_path)
    assert left_in(tmp_path) == {".lock"}


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_fetch__more_bytes_than_announced__are_not_written(
    size: int | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size is None:
        monkeypatch.setattr(downloads, "_MAX_BYTES", 100_000)
    server.mode = "endless"
    with pytest.raises(CheckpointError, match=rf"sends more than the {size or 100_000:,} bytes expected"):
        fetch_checkpoint(server.offer(size=size), folder=tmp_path)
    assert left_in(tmp_path) == {".lock"}


@pytest.mark.parametrize(("size", "limit"), [(len(CONTENT) - 1, 10**9), (len(CONTENT) + 1, 10**9), (None, 1000)])
def test_fetch__file_of_another_size__is_refused_before_it_comes(
    size: int | None, limit: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_MAX_BYTES", limit)
    part = write_part(tmp_path, CONTENT[:100])
    expected = rf"with {len(CONTENT)} bytes, expected 206 and .*{size or limit}: another"
    with pytest.raises(CheckpointError, match=expected):
        fetch_checkpoint(server.offer(size=size), folder=tmp_path)
    assert part.read_bytes() == CONTENT[:100]


@pytest.mark.parametrize("status", ["403", "404", "503"])
def test_fetch__error_of_the_server__is_named_with_the_ways_out(status: str, server: Server, tmp_path: Path) -> None:
    server.mode = status
    with pytest.raises(CheckpointError, match=rf"answers {status} \w.*put it at '.*{NAME}'.*model\.checkpoint=<file>"):
        fetch_checkpoint(server.offer(), folder=tmp_path)
    assert left_in(tmp_path) == {".lock"}


def test_fetch__answer_without_a_file__is_refused(server: Server, tmp_path: Path) -> None:
    server.mode = "202"
    with pytest.raises(CheckpointError, match="answers 202 with 5 bytes, expected 200"):
        fetch_checkpoint(server.offer(size=None), folder=tmp_path)


def test_fetch__no_connection__names_file_folder_and_alternatives(server: Server, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        checkpoint = server.offer(url=f"http://127.0.0.1:{taken.getsockname()[1]}/{NAME}")
        with pytest.raises(CheckpointError, match="cannot be reached") as caught:
            fetch_checkpoint(checkpoint, folder=tmp_path)
    place = str(tmp_path / NAME)
    for needed in (checkpoint.url, checkpoint.sha256, place, "model.checkpoint=<file>", "model.pretrained=False"):
        assert needed in str(caught.value)


def test_fetch__folder_that_cannot_be_written__names_the_variable(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # permissions would not stop root
    with pytest.raises(CheckpointError, match=r"cannot be read or written.*SEMSEG_AUTOML_CACHE.*model\.checkpoint="):
        fetch_checkpoint(server.offer(), folder=tmp_path / "file" / "cache")
    assert server.ranges == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_fetch__full_disk__leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=rf"disk is full.*{len(CONTENT):,}.*SEMSEG_AUTOML_CACHE"):
        fetch_checkpoint(server.offer(), folder=tmp_path)
    assert left_in(tmp_path) == {".lock"}
    assert Path("/dev/full").exists()


def test_fetch__file_put_there_by_hand__is_taken_without_a_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    for _ in range(2):
        assert fetch_checkpoint(server.offer(), folder=tmp_path) == tmp_path / NAME
    assert left_in(tmp_path) == {"", ".verified"}
    assert server.ranges == []


def test_fetch__wrong_file_put_there_by_hand__names_both_hashes(server: Server, tmp_path: Path) -> None:
    fetch_checkpoint(server.offer(), folder=tmp_path)
    (tmp_path / NAME).write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(CheckpointError, match=rf"sha256 {found}, expected {server.offer().sha256}.*Delete it"):
        fetch_checkpoint(server.offer(), folder=tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"something else", "what a user put there is not ours to delete"


def test_fetch__note_that_cannot_be_left__warns_of_hashing_each_time(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    (tmp_path / f"{NAME}.verified").mkdir()
    with pytest.warns(UserWarning, match="hashed at every start") as caught:
        assert fetch_checkpoint(server.offer(), folder=tmp_path) == tmp_path / NAME
    assert caught[0].filename == __file__


def test_fetch__two_at_once__download_once(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"{NAME}.lock").write_text("of a process that died")
    server.go_on.clear()
    waiting = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: waiting.set()  # type: ignore[method-assign]
    logging.getLogger(downloads.__name__).addHandler(handler)
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(fetch_checkpoint, server.offer(), folder=tmp_path)
            assert server.arrived.wait(10)
            second = pool.submit(fetch_checkpoint, server.offer(), folder=tmp_path)
            assert waiting.wait(10), "the second one says that it waits"
            server.go_on.set()
            assert first.result(10) == second.result(10) == tmp_path / NAME
    finally:
        logging.getLogger(downloads.__name__).removeHandler(handler)
    assert server.ranges == [None]
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert f"{NAME}.lock" in caplog.text


@pytest.mark.parametrize(("progress", "terminal"), [(True, True), (True, False), (False, True)])
def test_fetch__progress_bar__is_drawn_on_terminals_only(
    progress: bool,
    terminal: bool,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    fetch_checkpoint(server.offer(), folder=tmp_path, progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert (NAME in shown.err) == (progress and terminal)
