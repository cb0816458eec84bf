"""Does choosing by itself pay, and is the clock kept? ``python -m benchmarks.automl run ...``, then ``... table``.

    python -m benchmarks.automl run --data DATA --weights FOLDER --limits 120 360
    python -m benchmarks.automl table

Each cell is a data set with a time limit; in each, every system is fitted to train.csv within the limit, validated on
val.csv, and scored on test.csv at the images' own resolution:

- ``auto``: ``SemanticSegmentor().fit(train, val, time_limit=...)``, nothing else said; the weights in ``--weights`` are
  at hand;
- ``auto_scratch``: the same with no weights at hand;
- ``recipe``: one recipe for all sets: Conv-LoRA as its authors have it (rank 3, 8 experts) on the ViT in ``--weights``,
  256 x 256 pixels;
- ``unet``: a ResNet-18 U-Net without pretrained weights (segmentation_models_pytorch), trained as our scratch recipe
  has it, under the same clock.

Each run is a process of its own and a row of ``--out`` when it is done; a study that was cut off goes on where it
stopped. Run nothing else meanwhile. ``seconds`` are from calling ``fit`` to its return, saving and report included.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semseg_automl import SemanticSegmentor
from semseg_automl.data.table import read_table
from semseg_automl.evaluation import tally_table

SETS = ("kvasir_polyp", "aerial_road", "nuclei", "camvid")
SYSTEMS = ("auto", "auto_scratch", "recipe", "unet")
PRETRAINED = ("auto", "recipe")
FIELDS = ("set", "limit", "system", "seed", "seconds", "steps", "metric", "score", "low", "high", "validation", "plan")
ALLOWED = (0.02, 5.0)
"""Share of the limit, and seconds: whichever is more may be missing or too much."""
RECIPE = {
    "model.input_size": 256,
    "data.tiling": "off",
    "optim.peft": "conv_lora",
    "optim.lora.rank": 3,
    "optim.lora.alpha": 32.0,
    "data.augmentation": "medium",
    "optim.lr": 1e-3,
    "env.batch_size": 8,
}


def figure_of(table: Any, name: str) -> dict[str, float]:
    """Return a figure with its interval from the table that ``evaluate(intervals=True)`` gives."""
    row = table.loc[name]
    return {"score": float(row["value"]), "low": float(row["low"]), "high": float(row["high"])}


def fit_ours(system: str, folder: Path, limit: float, seed: int, weights: Path, out: Path) -> dict[str, Any]:
    """Fit one of our systems and score it."""
    settings: dict[str, Any] = {}
    preset = "auto"
    if system == "recipe":
        (checkpoint,) = sorted(weights.glob("*.safetensors"))
        preset, settings = "fast", RECIPE | {"model.checkpoint": str(checkpoint)}
    segmentor = SemanticSegmentor(path=out, presets=preset, hyperparameters=settings, verbosity=1)
    start = time.monotonic()
    segmentor.fit(folder / "train.csv", folder / "val.csv", time_limit=limit, seed=seed)
    seconds = time.monotonic() - start
    plan, summary = segmentor.plan_, segmentor.fit_summary()
    name = plan.validation_metric
    told = f"{plan.peft} {plan.encoder} {plan.input_size[0]}x{plan.input_size[1]} {plan.loss}"
    return {
        "seconds": round(seconds, 1),
        "steps": summary["history"][-1]["step"] if summary["history"] else 0,
        "validation": summary["best_score"],
        "metric": name,
        "plan": told,
        **figure_of(segmentor.evaluate(folder / "test.csv", name, intervals=True), name),
    }


def fit_unet_cell(folder: Path, limit: float, seed: int) -> dict[str, Any]:
    """Fit the U-Net and score it."""
    from benchmarks.real_data import fit_unet

    start = time.monotonic()
    predictor, task, result = fit_unet(folder, limit, seed)
    seconds = time.monotonic() - start
    name = "iou" if task.kind == "binary" else "miou"
    test = read_table(folder / "test.csv")
    interval = tally_table(predictor, test, task, metrics=[name], threshold=0.5).intervals()[name]
    return {
        "seconds": round(seconds, 1),
        "steps": result.history[-1]["step"] if result.history else 0,
        "validation": result.best_score,
        "metric": name,
        "plan": f"unet resnet18 {predictor.input_size[0]}x{predictor.input_size[1]}",
        "score": interval.value,
        "low": interval.low,
        "high": interval.high,
    }


def work(options: argparse.Namespace) -> None:
    """Carry out one run in this process, and print its row."""
    system, folder = options.worker, options.data / options.sets[0]
    limit, seed = options.limits[0], options.seeds[0]
    with tempfile.TemporaryDirectory() as scratch:
        if system == "unet":
            found = fit_unet_cell(folder, limit, seed)
        else:
            weights = options.weights if system in PRETRAINED else Path(scratch) / "none"
            os.environ["SEMSEG_AUTOML_CACHE"] = str(weights)
            found = fit_ours(system, folder, limit, seed, options.weights, Path(scratch) / "run")
    print(json.dumps(found))


def run(options: argparse.Namespace) -> None:
    """Carry out the runs that the file does not hold yet."""
    done = {(row["set"], float(row["limit"]), row["system"], int(row["seed"])) for row in read_rows(options.out)}
    wanted = [(limit, seed, name) for limit in options.limits for seed in options.seeds for name in options.sets]
    for limit, seed, name in wanted:
        for system in options.systems:
            if (name, limit, system, seed) in done:
                continue
            command = [sys.executable, "-m", "benchmarks.automl", "run", "--worker", system, "--data", options.data]
            command += ["--weights", options.weights, "--sets", name, "--limits", limit, "--seeds", seed]
            finished = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if finished.returncode:
                print(f"{name} {limit} {system}: {finished.stderr[-2000:]}", file=sys.stderr)
                continue
            found = json.loads(finished.stdout.splitlines()[-1])
            append_row(options.out, {"set": name, "limit": limit, "system": system, "seed": seed, **found})
            told = f"{found['metric']} {found['score']:.3f} in {found['seconds']} s"
            print(f"{name} {limit:.0f} s {system}: {told}", flush=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row, after a header in a new file."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        writer.writerow(rounded)


def verdict(rows: Sequence[dict[str, str]], system: str, against: Sequence[str]) -> str:
    """Say in how many cells a system is the best of these, or has the best one's score within its interval."""
    cells: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        cells.setdefault((row["set"], row["limit"], row["seed"]), {})[row["system"]] = row
    judged = [cell for cell in cells.values() if system in cell and any(other in cell for other in against)]
    level = sum(
        float(cell[system]["high"]) >= max(float(cell[other]["score"]) for other in against if other in cell)
        for cell in judged
    )
    best = sum(
        float(cell[system]["score"]) >= max(float(cell[other]["score"]) for other in against if other in cell)
        for cell in judged
    )
    others = ", ".join(against)
    return f"{system} against {others}: best in {best}, best or within its interval in {level} of {len(judged)}"


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the cells as a Markdown table, with the verdicts and how the clock was kept below."""
    lines = ["| data | limit | system | score (95 % interval) | steps | seconds | plan |", "|---" * 7 + "|"]
    for row in sorted(rows, key=lambda r: (r["set"], float(r["limit"]), int(r["seed"]), SYSTEMS.index(r["system"]))):
        score, low, high = (float(row[key]) for key in ("score", "low", "high"))
        lines.append(
            f"| {row['set']} | {float(row['limit']):.0f} s | {row['system']} | {row['metric']} {score:.3f} "
            f"({low:.3f} to {high:.3f}) | {row['steps']} | {row['seconds']} | {row['plan']} |"
        )
    ours = [row for row in rows if row["system"] != "unet"]
    over = [float(row["seconds"]) - float(row["limit"]) for row in ours]
    off = [abs(late) > max(ALLOWED[0] * float(row["limit"]), ALLOWED[1]) for late, row in zip(over, ours, strict=True)]
    lines += [
        "",
        verdict(rows, "auto", ["recipe", "unet"]),
        verdict(rows, "auto_scratch", ["unet"]),
        f"clock: {len(ours)} fits, seconds beyond the limit from {min(over, default=math.nan):.1f} to "
        f"{max(over, default=math.nan):.1f}; {sum(off)} off by more than 2 % and 5 s",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, help="folder with the safetensors file of a plain ViT")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/automl.csv"))
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--limits", nargs="+", type=float, default=[120.0, 360.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.what == "table":
        print(table(read_rows(options.out)))
        return
    if options.data is None or options.weights is None:
        parser.error("run needs --data and --weights")
    work(options) if options.worker else run(options)


if __name__ == "__main__":
    main()
