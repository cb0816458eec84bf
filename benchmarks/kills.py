"""Kill a fit at random moments, go on, and compare the weights: ``python -m benchmarks.kills --points 200``.

A small fit on drawn images runs in a process of its own, which is ended by SIGKILL after a random time. It is gone on
with until it is complete, killed again or not, and its weights are compared bit by bit with those of a fit that nobody
disturbed. Moments are counted from when a fit has noted what it runs; the kills of one fit are spread over its time. A
line per fit; exit code 1 where anything differs. Processes are forked, so that none has to import torch anew.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from semseg_automl import SemanticSegmentor, draw_dataset, plan

SETTINGS = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.micro_batch_size": 2,
    "env.precision": "32-true",
    "env.state_seconds": 0.2,
    "optim.max_epochs": 4,
}


def fit(data: Path, path: Path) -> None:
    """Fit, or go on with what is there."""
    plan.MIN_STEPS_PER_EPOCH = 4
    segmentor = SemanticSegmentor(path=path, hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(data / "train.csv", data / "val.csv", resume=True)


def draw(data: Path) -> None:
    """Draw a small data set."""
    draw_dataset(data, kind="binary", train=16, val=2, test=1, size=(40, 40))


def start(data: Path, path: Path) -> ForkProcess:
    """Start a fit in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=fit, args=(data, path))
    process.start()
    return process


def begins(process: ForkProcess, path: Path) -> None:
    """Wait until the fit has noted what it runs, or is over."""
    while process.is_alive() and not (path / "resume" / "run.json").exists():
        time.sleep(0.01)


def killed(data: Path, path: Path, seconds: float) -> bool:
    """Run a fit, end it by SIGKILL `seconds` after it began; return whether it was still running."""
    process = start(data, path)
    begins(process, path)
    time.sleep(seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def same(one: Path, other: Path) -> bool:
    """Compare the trained weights of two fits bit by bit."""
    ours, theirs = (load_file(path / "trained.safetensors") for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, go on, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--chain", type=int, default=4, help="kills of one fit before it may end")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a forked process has none of the others
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        drawing = multiprocessing.get_context("fork").Process(target=draw, args=(data,))  # starts OpenCV's threads
        drawing.start()
        drawing.join()
        whole = Path(folder) / "whole"
        process = start(data, whole)
        begins(process, whole)
        began = time.monotonic()
        process.join()
        if process.exitcode:
            raise SystemExit("the undisturbed fit failed")
        span = time.monotonic() - began
        kills = in_time = fits = different = 0
        while kills < options.points:
            path = Path(folder) / "broken"
            for _ in range(min(options.chain, options.points - kills)):
                in_time += killed(data, path, rng.uniform(0, 1.2 * span / options.chain))
                kills += 1
            last = start(data, path)
            last.join()
            fits += 1
            different += bool(last.exitcode) or not same(path, whole)
            shutil.rmtree(path)
            print(f"{kills} kills, {in_time} while it ran, {fits} fits, {different} different", flush=True)
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
