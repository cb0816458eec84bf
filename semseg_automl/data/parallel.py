"""Something done for every row of a table: in threads, or beside processes that are forked from this one.

Threads hand Python's lock to and fro, so that of small files, whose decoding leaves it free for moments only, two do
hardly more than one. Processes need no lock, but are forked only where that is safe: on Linux, and where no other
thread of Python's could hold something that the copy would wait for.

Not here: what is done (:mod:`semseg_automl.data.checks`, :mod:`semseg_automl.data.survey`), training's loader
(:mod:`semseg_automl.data.dataset`).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from semseg_automl.hardware import usable_cores

MOST_AT_ONCE = 16
"""Rows that are taken at once, of tables that are not very long: to hand over what is to be done takes some 50
microseconds."""

MOST_FULL_PARTS = 512
"""Parts of a table that are not small because they are the last ones. There are less than 1,024 in all: their numbers,
of four bytes, are what an empty pipe takes in any case."""

ROWS_A_FORK = 64
"""Rows for which one process is forked, four times as many for two, and so on: they are forked one after the other, in
some 10 milliseconds each, in which 20 small files are read."""

MOST_FORKS = 15
"""Processes that are forked at most; one process gathers what they find."""

STALLED = 60.0
"""Seconds without a word from any process after which this one does by itself what they have not delivered."""

Result = TypeVar("Result")


def each_row(
    work: Callable[[int], Result], rows: int, *, workers: int | None, progress: bool, forked: bool = False
) -> list[Result]:
    """Return ``work(0)``, ``work(1)``, ...

    Args:
        work: What is done for a row; decoding leaves Python's lock free.
        rows: How many there are.
        workers: Threads or processes; by default one for each processor this program may use.
        progress: Whether to show a progress bar on the terminal.
        forked: Whether processes may do it: `work` then gives what can be sent between them, and changes nothing here.
    """
    workers = workers or usable_cores()
    helpers = min(workers - 1, math.isqrt(rows // ROWS_A_FORK), MOST_FORKS) if forked and _may_fork() else 0
    parts = _parts(rows, helpers + 1 if helpers else workers)
    if not helpers:
        with ThreadPoolExecutor(workers) as pool, _progress_bar(rows, progress) as advance:
            return _gathered(enumerate(pool.map(lambda part: [work(row) for row in part], parts)), len(parts), advance)
    # The bar has a thread of its own, so it comes after the processes.
    with _Helpers(work, parts, helpers) as team, _progress_bar(rows, progress) as advance:
        return _gathered(team.results(), len(parts), advance)


def _parts(rows: int, workers: int) -> list[range]:
    """Return what is taken at once: less and less towards the end, so that all get ready together.

    (Polychronopoulos and Kuck, "Guided Self-Scheduling", 1987, with half of their share.)

    >>> [len(part) for part in _parts(50, 2)]
    [12, 9, 7, 5, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1]
    """
    most = max(MOST_AT_ONCE, math.ceil(rows / MOST_FULL_PARTS))
    parts: list[range] = []
    start = 0
    while start < rows:
        size = max(1, min(most, (rows - start) // (2 * workers)))
        parts.append(range(start, start + size))
        start += size
    return parts


def _gathered(results: Iterator[tuple[int, list[Result]]], parts: int, advance: Callable[[int], None]) -> list[Result]:
    found: list[list[Result]] = [[]] * parts
    for number, result in results:
        found[number] = result
        advance(len(result))
    return [each for part in found for each in part]


class _Helpers(Generic[Result]):
    """Processes forked from this one, which take parts as this one does and send what they find.

    Whatever they do not deliver, because they were killed, wait for ever or met an error, this process does.
    """

    def __init__(self, work: Callable[[int], Result], parts: Sequence[range], number: int) -> None:
        self._work = work
        self._parts = parts
        self._number = number
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._receivers: list[Connection[Any, Any]] = []

    def __enter__(self) -> _Helpers[Result]:
        self._tickets, numbers = os.pipe()
        os.write(numbers, b"".join(number.to_bytes(4, "big") for number in range(len(self._parts))))
        os.close(numbers)  # so that behind the last number there is the end
        try:
            with suppress(OSError):  # no memory or no processes left: with those that there are, or none
                self._fork()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(through=error is None and not self._receivers)

    def _fork(self) -> None:
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            # Python 3.12 warns of threads of any kind; those of libraries, which wait for work, hold nothing.
            warnings.simplefilter("ignore", DeprecationWarning)
            for _ in range(self._number):
                receiver, sender = context.Pipe(duplex=False)
                self._receivers.append(receiver)
                about = self._work, self._parts, self._tickets, tuple(self._receivers), sender
                process = context.Process(target=_help, args=about, daemon=True)
                try:
                    process.start()
                finally:
                    sender.close()
                self._processes.append(process)

    def _end(self, *, through: bool = False) -> None:
        os.close(self._tickets)
        for receiver in self._receivers:
            receiver.close()
        # Those that are through are ending by themselves, which takes a while that nobody has to wait for;
        # multiprocessing buries them.
        for process in () if through else self._processes:
            process.kill()
            process.join()

    def results(self) -> Iterator[tuple[int, list[Result]]]:
        """Give the number of each part and what was found in it, in any order."""
        missing = set(range(len(self._parts)))
        for number in _drawn(self._tickets):
            missing.discard(number)
            yield number, self._done(number)
            for sent, found in self._received(wait(self._receivers, 0)):
                missing.discard(sent)
                yield sent, found
        while self._receivers and (ready := wait(self._receivers, STALLED)):
            for sent, found in self._received(ready):
                missing.discard(sent)
                yield sent, found
        # Where processes ended early, or say nothing any more.
        for number in sorted(missing):
            yield number, self._done(number)

    def _done(self, number: int) -> list[Result]:
        return [self._work(row) for row in self._parts[number]]

    def _received(self, ready: Sequence[object]) -> Iterator[tuple[int, list[Result]]]:
        """Take what has come, warnings too; the end of a pipe is that of its process."""
        for receiver in [each for each in self._receivers if each in ready]:
            try:
                number, found, told = receiver.recv()
            except (EOFError, OSError):
                self._receivers.remove(receiver)
                receiver.close()
                continue
            for warning, category, file, line in told:
                warnings.warn_explicit(warning, category, file, line)
            yield number, found


def _help(
    work: Callable[[int], object],
    parts: Sequence[range],
    tickets: int,
    receivers: Sequence[Connection[Any, Any]],
    sender: Connection[Any, Any],
) -> None:
    """Do parts in a process of their own until there are none left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who was interrupted ends its processes
    for receiver in receivers:
        receiver.close()  # or nobody would notice that the one who reads is gone
    with warnings.catch_warnings(record=True) as told, suppress(Exception):  # who waits meets the same error
        for number in _drawn(tickets):
            found = [work(row) for row in parts[number]]
            sender.send((number, found, [(w.message, w.category, w.filename, w.lineno) for w in told]))
            told.clear()
    sender.close()  # the process itself takes a while to end


def _drawn(tickets: int) -> Iterator[int]:
    """Draw numbers from a pipe, each of which one process gets, until there are none left."""
    while ticket := os.read(tickets, 4):
        yield int.from_bytes(ticket, "big")


def _may_fork() -> bool:
    """Return whether a process can be forked that waits for nothing: a lock that a thread held would stay locked."""
    alone = threading.active_count() == 1 and not multiprocessing.current_process().daemon
    return sys.platform == "linux" and alone


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda rows: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("checking images", total=total)
        yield lambda rows: bar.advance(task, rows)
