"""Work on rows side by side: everything is done once over, whatever becomes of the processes that help."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import pytest

from semseg_automl.data import parallel
from semseg_automl.data.parallel import each_row

Result = TypeVar("Result")

ROWS = 80
PAUSE = 0.005
"""Seconds for a row: so many that a process is there, on a busy machine too, before this one has done them all."""

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
HERE = os.getpid()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes be forked though tests before have left threads behind, as trackers do."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


def place_of(row: int) -> tuple[int, int]:
    """Return the row, and which process looked at it."""
    time.sleep(PAUSE)
    return row, os.getpid()


def run(work: Callable[[int], Result], rows: int = ROWS, *, workers: int = 3, progress: bool = False) -> list[Result]:
    """Do the work where processes may be forked; none of them is left, whatever comes of it."""
    try:
        return each_row(work, rows, workers=workers, progress=progress, forked=True)
    finally:
        for process in multiprocessing.active_children():
            process.join(5)
        assert multiprocessing.active_children() == []


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 300])
def test_each_row__any_number_of_rows_and_workers__gives_them_in_order(rows: int, workers: int, forked: bool) -> None:
    found = each_row(lambda row: row * row, rows, workers=workers, progress=False, forked=forked)
    assert found == [row * row for row in range(rows)]


@pytest.mark.parametrize("rows", [1, 2, 50, 1000, 10**5, 10**7])
@pytest.mark.parametrize("workers", [1, 2, parallel.MOST_FORKS + 1])
def test_parts__any_number_of_rows__are_all_of_them_in_order_and_fit_into_a_pipe(rows: int, workers: int) -> None:
    parts = parallel._parts(rows, workers)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == rows
    sizes = [len(part) for part in parts]
    assert min(sizes) == 1
    assert sizes == sorted(sizes, reverse=True)
    assert 4 * len(parts) <= 4096


@needs_fork
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rows", "processes"), [(63, 1), (64, 2), (255, 2), (256, 3)])
def test_each_row__enough_rows__is_done_in_processes_beside_this_one(rows: int, processes: int) -> None:
    found = run(place_of, rows, workers=9)
    assert [row for row, _ in found] == list(range(rows))
    where = {process for _, process in found}
    assert len(where) == processes
    assert HERE in where


@needs_fork
@pytest.mark.usefixtures("alone")
def test_each_row__progress_bar__comes_after_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert len({process for _, process in run(place_of, progress=True)}) == 2


def test_each_row__another_thread_is_there__forks_nothing() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert {process for _, process in run(place_of)} == {HERE}
    finally:
        done.set()
        thread.join()


def test_each_row__where_no_process_may_be_forked__is_done_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(sys, "platform", "linux")
    assert parallel._may_fork()
    with monkeypatch.context() as daemon:
        daemon.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
        assert not parallel._may_fork()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not parallel._may_fork()
    assert {process for _, process in run(place_of)} == {HERE}


@needs_fork
@pytest.mark.usefixtures("alone")
def test_each_row__no_process_can_be_had__does_everything_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    assert run(place_of) == [(row, HERE) for row in range(ROWS)]


def killed(row: int) -> int:
    """End the process that helps, but not this one."""
    time.sleep(PAUSE)
    if os.getpid() != HERE:
        os.kill(os.getpid(), signal.SIGKILL)
    return row


def refused(row: int) -> int:
    """Fail in the process that helps."""
    time.sleep(PAUSE)
    if os.getpid() != HERE:
        raise ValueError(f"row {row}")
    return row


def unsendable(row: int) -> object:
    """Return what cannot be sent from one process to another."""
    time.sleep(PAUSE)
    return row if os.getpid() == HERE else (lambda: row)


@needs_fork
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("work", [killed, refused, unsendable])
def test_each_row__process_ends_early__does_here_what_it_has_not_delivered(work: Callable[[int], object]) -> None:
    assert run(work) == list(range(ROWS))


@needs_fork
@pytest.mark.usefixtures("alone")
def test_each_row__process_waits_for_ever__does_here_what_it_has_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(row: int) -> int:
        time.sleep(PAUSE if os.getpid() == HERE else 600)
        return row

    monkeypatch.setattr(parallel, "STALLED", 0.2)
    begin = time.monotonic()
    assert run(waits) == list(range(ROWS))
    assert time.monotonic() - begin < 300, "nobody waited for the process"


@needs_fork
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_each_row__error_here__ends_the_processes_and_reaches_the_caller(error: type[BaseException]) -> None:
    def fails(row: int) -> int:
        if os.getpid() != HERE:
            time.sleep(600)
        if row > 20:
            raise error(f"row {row}")
        return row

    with pytest.raises(error, match="row 2"):
        run(fails)


@needs_fork
@pytest.mark.usefixtures("alone")
def test_each_row__warnings_of_processes__are_given_here() -> None:
    def warns(row: int) -> int:
        time.sleep(PAUSE)
        warnings.warn(f"row {row} of {'here' if os.getpid() == HERE else 'there'}", UserWarning, stacklevel=1)
        return row

    with pytest.warns(UserWarning, match="row") as told:
        assert run(warns) == list(range(ROWS))
    messages = [str(warning.message) for warning in told]
    assert {int(message.split()[1]) for message in messages} == set(range(ROWS))
    assert {message.split()[-1] for message in messages} == {"here", "there"}
    assert {warning.filename for warning in told} == {__file__}
