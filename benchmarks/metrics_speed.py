"""What the saliency measures cost per image: ``python -m benchmarks.metrics_speed [--reference PYTHON]``.

PYTHON is the interpreter of an environment with pysodmetrics 1.6, which asks for an older NumPy than ours and so has
its own. Both sides take turns on the same drawn 8-bit pairs, from arrays in memory to figures; the order of the two
turns changes from pair to pair, and figures that differ by more than 1e-10 end the run. Each measure is timed alone;
"all" is one call of `saliency_scores` here, and the sum of the four in the reference, which has no such call. Wall
clock is what a user waits for; processor time, which includes every thread's, is the steadier of the two where other
programs run. That the values are right on small and odd pairs is the business of `benchmarks.saliency_answers`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from semseg_automl.saliency_scores import saliency_scores

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Record = dict[str, tuple[float, float, float]]
"""By measure: figure, wall ms, processor ms."""

MEASURES = {"S": "s_measure", "E": "e_measure", "wF": "wf", "MAE": "mae"}
TOGETHER = "all"
TOLERANCE = 1e-10
MAX_LEVELS = 255

# Reads the name of a pair's file per line, answers with a line of JSON.
REFERENCE = """
import json, sys, time
import numpy as np
import py_sod_metrics as reference
makers = {"S": reference.Smeasure, "E": reference.Emeasure, "wF": reference.WeightedFmeasure, "MAE": reference.MAE}
figures = {
    "S": lambda found: found["sm"],
    "E": lambda found: found["em"]["curve"].mean(),
    "wF": lambda found: found["wfm"],
    "MAE": lambda found: found["mae"],
}
for line in sys.stdin:
    with np.load(line.strip()) as stored:
        prediction, mask = stored["prediction"], stored["mask"]
    record = {}
    for name, make in makers.items():
        measure = make()
        wall, processor = time.perf_counter(), time.process_time()
        measure.step(prediction, mask)
        figure = float(figures[name](measure.get_results()))
        record[name] = figure, 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)
    print(json.dumps(record), flush=True)
"""


def draw_pair(seed: int, side: int) -> Pair:
    """Draw a soft 8-bit prediction and an 8-bit mask of blobs on about a third of ``(side, side)`` pixels."""
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), side / 16)
    mask = (field > np.quantile(field, rng.uniform(0.5, 0.85))).astype(np.uint8) * MAX_LEVELS
    soft = cv2.GaussianBlur(mask.astype(np.float64), (0, 0), side / 170)
    doubt = cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), side / 64)
    prediction = np.clip(soft + 40 * doubt / doubt.std(), 0, MAX_LEVELS).astype(np.uint8)
    return prediction, mask


def ours(pair: Pair) -> Record:
    """Score a pair with this package: each measure alone, from the arrays on, then all in one call."""
    record = {}
    for title, names in [*((title, [name]) for title, name in MEASURES.items()), (TOGETHER, list(MEASURES.values()))]:
        wall, processor = time.perf_counter(), time.process_time()
        scores = saliency_scores(torch.from_numpy(pair[0]), torch.from_numpy(pair[1] > MAX_LEVELS // 2), names)
        figures = [score.item() for score in scores.values()]
        record[title] = figures[0], 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)
        for single, figure in zip(MEASURES, figures, strict=True) if title == TOGETHER else ():
            if figure != record[single][0]:
                raise RuntimeError(f"{single} is {record[single][0]!r} alone and {figure!r} together with the others")
    return record


def theirs(process: subprocess.Popen[str], path: Path) -> Record:
    """Have the reference score the pair in a file.

    Raises:
        RuntimeError: the process ended; its own message stands above.
    """
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the reference was started without pipes")
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the reference ended; is pysodmetrics installed for the interpreter given by --reference?")
    record = {name: (figures[0], figures[1], figures[2]) for name, figures in json.loads(line).items()}
    wall, processor = (sum(figures[clock] for figures in record.values()) for clock in (1, 2))
    return record | {TOGETHER: (record["S"][0], wall, processor)}


def check(seed: int, mine: Record, other: Record) -> None:
    """Raise `RuntimeError` where figures of the pair `seed` differ."""
    for name, (figure, *_) in mine.items():
        if not abs(figure - other[name][0]) <= TOLERANCE:
            raise RuntimeError(f"pair {seed}: {name} is {figure!r} here and {other[name][0]!r} in the reference")


def run(pairs: int, side: int, reference: str | None) -> dict[str, list[Record]]:
    """Score `pairs` drawn pairs on both sides, in turns, after one that is not counted."""
    records: dict[str, list[Record]] = {side: [] for side in ("ours", "reference") if side == "ours" or reference}
    command = [reference or sys.executable, "-c", REFERENCE if reference else ""]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        path = Path(folder) / "pair.npz"
        for seed in range(pairs + 1):
            pair = draw_pair(seed, side)
            np.savez(path, prediction=pair[0], mask=pair[1])
            turns = sorted(records, reverse=bool(seed % 2))
            now = {turn: ours(pair) if turn == "ours" else theirs(process, path) for turn in turns}
            if reference:
                check(seed, now["ours"], now["reference"])
            for turn in turns if seed else []:
                records[turn].append(now[turn])
    return records


def table(records: dict[str, list[Record]]) -> str:
    """Medians over pairs: one line per measure and one for all of them."""
    titles = [f"{side} {clock} ms" for side in records for clock in ("wall", "cpu")]
    lines = [f"{'measure':>8}" + "".join(f"{title:>20}" for title in titles)]
    for name in [*MEASURES, TOGETHER]:
        medians = {
            (side, clock): statistics.median(record[name][clock] for record in every)
            for side, every in records.items()
            for clock in (1, 2)
        }
        line = f"{name:>8}" + "".join(f"{value:20.1f}" for value in medians.values())
        if "reference" in records:
            ratios = [medians["reference", clock] / medians["ours", clock] for clock in (1, 2)]
            line += f"   {ratios[0]:.1f} x wall, {ratios[1]:.1f} x processor"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="milliseconds per pair of the saliency measures")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--side", type=int, default=1024, help="height and width of a pair in pixels")
    parser.add_argument("--reference", metavar="PYTHON", help="interpreter with pysodmetrics")
    arguments = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads of torch, {cv2.getNumThreads()} of OpenCV"
    print(f"{arguments.pairs} pairs of {arguments.side} x {arguments.side}; {threads}")
    print(table(run(arguments.pairs, arguments.side, arguments.reference)))


if __name__ == "__main__":
    main()
