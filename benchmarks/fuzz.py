"""Damaged files by the thousand: ``python -m benchmarks.fuzz --files 10000 [--seed 0] [--real FOLDER]``.

Small good images and masks, drawn or taken from a folder, are spoiled in the ways of :mod:`benchmarks.fuzz_files`. They
go in batches, half of the rows with a spoiled image, half with a spoiled mask, through `check_data` (with its page) and
through ``predict(on_error="report")`` of a tiny segmentor. What must hold:

- no exception but DataError where a file is read, none at all elsewhere; no batch takes longer than its limit;
- `check_data` reports the rows whose files cannot be read or differ in size, and no others; `predict` the rows whose
  image cannot be read, and gives the others a mask of the image's size; `image_size` agrees with what is read;
- a file that must be refused is refused, and one that is as good as before reads as before;
- no Python warning from outside of semseg_automl; the peak memory of the process grows within bounds.

Prints for each way files, readable and refused ones, and milliseconds per file; then what did not hold. Exit code 1 if
anything did not. ``--only BATCH`` repeats one batch, ``--keep FOLDER`` leaves its files. Lines that the C libraries
write to the standard error stream past Python are not counted.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import semseg_automl
from benchmarks.fuzz_files import KINDS, REFUSED, Seed, Spoiled, drawn_seeds, real_seeds, spoil
from semseg_automl import FailedPrediction, SemanticSegmentor, check_data
from semseg_automl.data.images import image_size, read_image, read_stored_mask
from semseg_automl.data.synthetic import draw_dataset
from semseg_automl.errors import DataError

SETTINGS = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "optim.max_epochs": 1,
}
PACKAGE = os.path.dirname(os.path.abspath(semseg_automl.__file__))
FILE_FLAWS = ("missing file", "unreadable file", "size mismatch")
MIB = 2**20

# Pillow's advice about TIFF of 89 megapixels and more, which are read nevertheless.
ALLOWED = Image.DecompressionBombWarning


@dataclass
class Tally:
    """What became of the files spoiled in one way."""

    files: int = 0
    readable: int = 0
    seconds: float = 0.0
    slowest: float = 0.0


@dataclass
class Outcome:
    """What a run found."""

    tallies: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    violations: list[str] = field(default_factory=list)
    slowest_batch: float = 0.0
    growth: float = 0.0
    """Of the peak memory after the first file, in MiB."""

    @property
    def files(self) -> int:
        """Return how many files were made."""
        return sum(tally.files for tally in self.tallies.values())


@dataclass(frozen=True)
class Read:
    """What a file holds: its pixels, or why they cannot be had."""

    pixels: np.ndarray[Any, Any] | None
    palette: tuple[int, ...] = ()
    why: str = ""

    @property
    def size(self) -> tuple[int, int] | None:
        """Return height and width, None where it cannot be read."""
        return None if self.pixels is None else (self.pixels.shape[0], self.pixels.shape[1])

    def equals(self, other: Read) -> bool:
        """Whether both are refused, or the same pixels."""
        if self.pixels is None or other.pixels is None:
            return self.pixels is other.pixels
        return self.palette == other.palette and np.array_equal(self.pixels, other.pixels)


@dataclass(frozen=True)
class Limits:
    """What a batch may take."""

    rows: int = 500
    seconds: float = 300.0
    memory: float = 2048.0
    """MiB by which the peak of the whole run may grow."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=Limits.rows, help="of a batch")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="that a batch may take")
    parser.add_argument("--memory", type=float, default=Limits.memory, help="MiB by which the peak may grow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path, help="folder of images that are spoiled, too")
    parser.add_argument("--only", type=int, help="number of the one batch to run")
    parser.add_argument("--keep", type=Path, help="folder to leave the files in")
    options = parser.parse_args(arguments)
    limits = Limits(options.rows, options.seconds, options.memory)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.environ["SEMSEG_AUTOML_CACHE"] = os.path.join(name, "cache")  # not the user's: files here are gone soon
        segmentor = fit_tiny(Path(name) / "fit")
        folder = options.keep or Path(name)
        outcome = run(options.files, segmentor, folder, limits, options.seed, options.real, options.only)
    print(table_of(outcome))
    for violation in outcome.violations:
        print(f"VIOLATION {violation!a}")
    return 1 if outcome.violations else 0


def fit_tiny(folder: Path) -> SemanticSegmentor:
    """Fit a segmentor of 32 x 32 pixels to a few drawn images."""
    data = draw_dataset(folder / "data", kind="binary", train=4, val=2, test=1, size=(32, 32))
    segmentor = SemanticSegmentor(path=folder / "bundle", hyperparameters=SETTINGS, verbosity=0)
    return segmentor.fit(data / "train.csv", data / "val.csv", max_epochs=1)


def run(
    files: int,
    segmentor: SemanticSegmentor,
    folder: Path,
    limits: Limits | None = None,
    seed: int = 0,
    real: Path | None = None,
    only: int | None = None,
) -> Outcome:
    """Spoil `files` files in batches and see what becomes of them; stops at a batch that hangs.

    Args:
        files: How many.
        segmentor: A fitted one.
        folder: Where the files are written; they are removed batch by batch unless `only` is given.
        limits: What a batch may take.
        seed: Of chance; a batch is the same whatever was before it.
        real: Folder of images that are spoiled, too.
        only: Number of the one batch to run.
    """
    limits = limits or Limits()
    seeds = drawn_seeds(np.random.default_rng(seed))
    seeds += real_seeds(real, np.random.default_rng(seed)) if real is not None else []
    outcome = Outcome()
    fuzz = _Fuzz(seeds, segmentor, outcome)
    before = _peak()
    for number, start in enumerate(range(0, files, limits.rows)):
        if only is not None and number != only:
            continue
        place = folder / f"batch{number}"
        place.mkdir(parents=True)
        rng = np.random.default_rng((seed, number))
        rows = min(limits.rows, files - start)
        began = time.perf_counter()
        finished = within(limits.seconds, partial(fuzz.batch, number, rows, rng, place))
        seconds = time.perf_counter() - began
        outcome.slowest_batch = max(outcome.slowest_batch, seconds)
        outcome.growth = (_peak() - before) / MIB
        print(f"batch {number}: {seconds:.1f} s, memory +{outcome.growth:.0f} MiB", file=sys.stderr, flush=True)
        if not finished:
            outcome.violations.append(f"batch {number} is not through after {limits.seconds:.0f} s")
            break
        if only is None:
            shutil.rmtree(place)
    if outcome.growth > limits.memory:
        outcome.violations.append(f"the peak memory grew by {outcome.growth:.0f} MiB, allowed {limits.memory:.0f}")
    return outcome


class TooLate(BaseException):
    """A batch has not ended in time; no Exception, so that nothing takes it for a fault of a file."""


def within(seconds: float, work: Callable[[], None]) -> bool:
    """Run `work`; False, with all stacks on the standard error stream, where it takes too long.

    A decoder that never gives Python back the word ends the program, with all stacks, after twice the time. Nothing
    runs in a thread of Python's, beside which `check_data` would fork no process.
    """

    def late(*_: object) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        raise TooLate

    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        work()
    except TooLate:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
    return True


def table_of(outcome: Outcome) -> str:
    """Return the counts as text."""
    lines = [f"{'way':<22} {'files':>6} {'readable':>9} {'refused':>8} {'ms/file':>8} {'slowest':>8}"]
    for kind, tally in outcome.tallies.items():
        if tally.files:
            each = 1000 * tally.seconds / tally.files
            lines.append(
                f"{kind:<22} {tally.files:>6} {tally.readable:>9} {tally.files - tally.readable:>8} {each:>8.2f} "
                f"{1000 * tally.slowest:>8.0f}"
            )
    readable = sum(tally.readable for tally in outcome.tallies.values())
    lines += [
        f"{outcome.files} files, {readable} readable, {outcome.files - readable} refused; slowest batch "
        f"{outcome.slowest_batch:.0f} s; peak memory +{outcome.growth:.0f} MiB; {len(outcome.violations)} violations"
    ]
    return "\n".join(lines)


class _Fuzz:
    """One batch after another."""

    def __init__(self, seeds: list[Seed], segmentor: SemanticSegmentor, outcome: Outcome) -> None:
        self.seeds, self.segmentor, self.outcome = seeds, segmentor, outcome
        self._originals: dict[tuple[Seed, bool], Read] = {}
        self._number = 0

    def batch(self, number: int, rows: int, rng: np.random.Generator, folder: Path) -> None:
        """Spoil one file for each row, read it alone, and send the table through the package."""
        self._number = number
        for seed in self.seeds:
            for mask in (False, True):
                if (seed, mask) not in self._originals:
                    self._originals[seed, mask] = self._original(seed, mask, folder)
        good = next(seed for seed in self.seeds if (seed.name, seed.suffix) == ("mask", ".png"))
        (folder / "good.png").write_bytes(good.data)
        size = image_size(folder / "good.png")
        spoiled = [spoil(rng, self.seeds, folder, f"{row}") for row in range(rows)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = [self._alone(each, mask=row % 2 == 1) for row, each in enumerate(spoiled)]
            good_path = str(folder / "good.png")
            images = [good_path if row % 2 else each.path for row, each in enumerate(spoiled)]
            labels = [each.path if row % 2 else good_path for row, each in enumerate(spoiled)]
            index = [f"r{number}" for number in rng.permutation(rows)]
            frame = pd.DataFrame({"image": images, "label": labels}, index=index)
            self._check(frame, spoiled, read, size)
            self._predict(frame, spoiled, read, size)
        for warning in caught:
            ours = os.path.abspath(warning.filename).startswith(PACKAGE)
            if not ours and not issubclass(warning.category, ALLOWED):
                self._violated(f"warning from {warning.filename}:{warning.lineno}: {warning.message}")

    def _alone(self, spoiled: Spoiled, *, mask: bool) -> Read:
        """Read a file by itself, and compare with what may become of it."""
        began = time.perf_counter()
        read = self._read(spoiled.path, spoiled.kind, mask=mask)
        seconds = time.perf_counter() - began
        tally = self.outcome.tallies[spoiled.kind]
        tally.files += 1
        tally.readable += read.pixels is not None
        tally.seconds += seconds
        tally.slowest = max(tally.slowest, seconds)
        original, verdict = self._originals[spoiled.seed, mask], spoiled.verdict
        as_before = read.equals(original) or (verdict == "same or refused" and read.pixels is None)
        if not {"any": True, "refused": read.pixels is None}.get(verdict, as_before):
            became = read.why or "read"
            self._violated(f"{spoiled.kind}, {spoiled.path}: {became}, but it should be {verdict}")
        return read

    def _read(self, path: str, kind: str, *, mask: bool) -> Read:
        try:
            if mask:
                stored = read_stored_mask(path)
                return Read(stored.pixels, stored.palette)
            pixels = read_image(path)
        except DataError as error:
            return Read(None, why=str(error))
        except Exception as error:  # whatever it is, it is what this program looks for
            self._violated(f"{kind}, {path}: {error!r}")
            return Read(None, why=repr(error))
        try:
            said: object = image_size(path)
        except Exception as error:  # as above
            said = repr(error)
        if said != pixels.shape[:2]:
            self._violated(f"{kind}, {path}: image_size says {said}, but it is read as {pixels.shape}")
        return Read(pixels)

    def _check(self, frame: pd.DataFrame, spoiled: list[Spoiled], read: list[Read], size: tuple[int, int]) -> None:
        page = Path(frame["label"].iloc[0]).with_name("check.html")
        try:
            report = check_data(frame, path=page)
            str(report).encode("utf-8")
        except Exception as error:  # as above
            self._violated(f"check_data: {error!r}")
            return
        found = report.problems[report.problems["kind"].isin(FILE_FLAWS)]
        told = {(str(row), str(kind) == "size mismatch") for row, kind in zip(found["row"], found["kind"], strict=True)}
        for row, each in enumerate(read):
            name = str(frame.index[row])
            unreadable = each.pixels is None
            expected = {(name, not unreadable)} if unreadable or each.size != size else set()
            if {one for one in told if one[0] == name} != expected:
                where = f"{spoiled[row].kind}, {spoiled[row].path}"
                self._violated(f"{where}: check_data tells {told & {(name, True), (name, False)}}, not {expected}")

    def _predict(self, frame: pd.DataFrame, spoiled: list[Spoiled], read: list[Read], size: tuple[int, int]) -> None:
        try:
            masks = self.segmentor.predict(frame, on_error="report")
        except Exception as error:  # as above
            self._violated(f"predict: {error!r}")
            return
        for row, (each, mask) in enumerate(zip(read, masks, strict=True)):
            expected = size if row % 2 else each.size
            got = None if isinstance(mask, FailedPrediction) else mask.shape
            if got != expected:
                self._violated(f"{spoiled[row].kind}, {spoiled[row].path}: predict gives {got}, not {expected}")

    def _original(self, seed: Seed, mask: bool, folder: Path) -> Read:
        path = folder / f"original{seed.suffix}"
        path.write_bytes(seed.data)
        read = self._read(str(path), "original", mask=mask)
        if seed.drawn and (read.pixels is None) != ((seed.name, seed.suffix, mask) in REFUSED):
            self._violated(f"the unspoiled {seed.name}{seed.suffix}, mask {mask}: {read.why or 'read'}")
        return read

    def _violated(self, text: str) -> None:
        self.outcome.violations.append(f"batch {self._number}: {text}")


def _peak() -> float:
    """Return the peak of the resident memory in bytes, of this process or of the largest that it forked."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    faulthandler.enable()  # a decoder that crashes says where
    sys.exit(main())
