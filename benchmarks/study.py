"""Fine-tuning methods compared on equal terms: ``python -m benchmarks.study run ...``, then ``... table``.

    python -m benchmarks.study run --data DATA --checkpoint deit_tiny.safetensors --sets kvasir_polyp nuclei
    python -m benchmarks.study table

Every run has the same optimizer steps, batch, input size, augmentation, loss and schedule (cosine to zero at the last
step), and no cached features, so that each method sees the same fresh views. The learning rate is chosen per set and
method by the validation score of seed 0; only the runs at the chosen rate are scored on the test images. Each run is a
row of ``--out``, written when it is done: a study that was cut off goes on where it stopped, and what failed is tried
again. The best network of each search waits in ``runs/`` beside the file until it is scored. One process per file.

Not here: the rows' files and the table (`benchmarks.study_table`).
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.study_table import (
    Budget,
    Cell,
    ImageRow,
    Row,
    append_rows,
    chosen_rate,
    images_file,
    read_rows,
    study_table,
)
from semseg_automl import SemanticSegmentor
from semseg_automl.data.images import read_mask
from semseg_automl.data.table import read_table
from semseg_automl.errors import ConfigError
from semseg_automl.metrics import binary_iou, confusion_matrix

REFERENCE = {
    "optim.peft": "conv_lora",
    "optim.lora.rank": 3,
    "optim.lora.alpha": 32.0,
    "optim.lora.experts": 8,
    "optim.lora.activation": "gelu",
    "optim.lora.interpolation": "bicubic",
    "optim.lora.gate": "balanced",
}
"""Conv-LoRA as its authors' code in AutoGluon has it; optimizer and decoder are the study's."""

METHODS: dict[str, dict[str, Any]] = {
    "decoder_only": {"optim.peft": "decoder_only"},
    "bitfit": {"optim.peft": "bitfit"},
    "adapter": {"optim.peft": "adapter"},
    "vpt": {"optim.peft": "vpt"},
    "ssf": {"optim.peft": "ssf"},
    "lora": {"optim.peft": "lora"},
    "conv_lora_reference": REFERENCE,
    "conv_lora": {"optim.peft": "conv_lora"},
    "lora_reference": {"optim.peft": "lora", "optim.lora.rank": 3, "optim.lora.alpha": 32.0},
    "lst": {"optim.peft": "lst"},
    "sam_adapter": {"optim.peft": "sam_adapter"},
    "full": {"optim.peft": "full"},
    "conv_lora_learned": {"optim.peft": "conv_lora", "optim.lora.gate": "learned"},
    "conv_lora_windows": {"optim.peft": "conv_lora", "model.window_size": 8},
    "conv_lora_whole": {"optim.peft": "conv_lora", "model.window_size": 8, "optim.lora.windowed": False},
    "conv_lora_dora": {"optim.peft": "conv_lora", "optim.lora.dora": True},
    "conv_lora_rs": {"optim.peft": "conv_lora", "optim.lora.scaling": "sqrt_rank"},
    "conv_lora_plus": {"optim.peft": "conv_lora", "optim.lora.b_lr_ratio": 4},
    "conv_lora_decoder": {"optim.peft": "conv_lora", "optim.lora.decoder_rank": 8},
    "conv_lora_one": {"optim.peft": "conv_lora", "optim.lora.experts": 1},
    "lora_no_detail": {"optim.peft": "lora", "model.detail": False},
    "conv_lora_no_detail": {"optim.peft": "conv_lora", "model.detail": False},
}
"""Name to hyperparameters over the preset "fast"; what is not named here is the plan's own choice."""

SEARCH_SEED = 0
VALIDATIONS = 3  # at most: the average of the last steps is nearly always the best, and each costs time
TEST_SCORES = ("iou", "dice", "s_measure", "e_measure", "ber", "mae")


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Attributes:
        data: folder of the sets' folders.
        checkpoint: pretrained encoder.
        out: file of rows.
        sets: folders in `data`.
        methods: names of `METHODS`.
        seeds: of the final runs.
        rates: learning rates tried for every method.
        extra_rates: method and rate, tried for that method besides.
        steps: optimizer steps of a run.
        batch: images per step.
        size: side of the input in pixels.
    """

    data: Path
    checkpoint: Path
    out: Path
    sets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    extra_rates: tuple[tuple[str, float], ...] = ()
    steps: int = 150
    batch: int = 4
    size: int = 256

    @property
    def budget(self) -> Budget:
        """What all runs have in common."""
        return self.steps, self.batch, self.size

    def grid(self, method: str) -> list[float]:
        """Return the learning rates tried for a method, the common ones first."""
        return list(dict.fromkeys([*self.rates, *(rate for name, rate in self.extra_rates if name == method)]))

    def kept(self, cell: Cell) -> Path:
        """Return where the best network of a search waits for its test, in a folder of its set, method and budget."""
        group = f"{cell.set}-{cell.method}-{'-'.join(str(part) for part in self.budget)}"
        return self.out.parent / "runs" / f"{self.out.stem}_kept" / group / f"{cell.lr!r}"


def cells_left(study: Study, rows: Sequence[Row], given_up: AbstractSet[Cell] = frozenset()) -> list[Cell]:
    """Return the runs that are left, in their order; the first can be done now.

    Set after set: all searches, a rate at a time, then all methods with the first seed, with the second, ... So a study
    that is cut off has complete comparisons. The rate of a final run is provisional until the searches before it are
    done, NaN before there is any score.

    Args:
        study: what is to be run.
        rows: what has been run.
        given_up: what failed in this process; a method whose searches have all failed has no final run.
    """
    done = {row.cell for row in rows if row.budget == study.budget}
    left: list[Cell] = []
    for name in study.sets:
        grids = {method: study.grid(method) for method in study.methods}
        searches = [
            Cell(name, method, grid[i], SEARCH_SEED, "search")
            for i in range(max(len(grid) for grid in grids.values()))
            for method, grid in grids.items()
            if i < len(grid)
        ]
        pending = [cell for cell in searches if cell not in done and cell not in given_up]
        left += pending
        for seed in study.seeds:
            for method in study.methods:
                rate = chosen_rate(rows, name, method, study.budget)
                cell = Cell(name, method, math.nan if rate is None else rate, seed, "final")
                hopeless = rate is None and not any(search.method == method for search in pending)
                if not hopeless and cell not in done and cell not in given_up:
                    left.append(cell)
    return left


def settings_of(study: Study, method: str, lr: float) -> dict[str, Any]:
    """Return the hyperparameters of a run: the method's own, and what all runs have in common."""
    return {
        **METHODS[method],
        "model.checkpoint": str(study.checkpoint),
        "model.input_size": study.size,
        "env.batch_size": study.batch,
        "env.micro_batch_size": study.batch,  # validations are counted in micro-batches
        "env.feature_cache": "off",
        "optim.lr": lr,
        "optim.max_epochs": study.steps,  # no epoch is shorter than a step, so the steps end training
    }


def fit(study: Study, cell: Cell, folder: Path) -> SemanticSegmentor:
    """Fit one run in exactly the study's steps, validating at most three times, the last time after the last step.

    Raises:
        RuntimeError: another number of steps was done.
    """
    segmentor = SemanticSegmentor(path=folder, verbosity=0)
    data = study.data / cell.set
    segmentor.fit(
        data / "train.csv",
        data / "val.csv",
        hyperparameters=settings_of(study, cell.method, cell.lr),
        seed=cell.seed,
        max_steps=study.steps,
        val_check_interval=next(study.steps // n for n in range(VALIDATIONS, 0, -1) if study.steps % n == 0),
        check_val_every_n_epoch=None,  # the interval then runs on over the epochs' ends
    )
    done = segmentor.history_["step"].iloc[-1]
    if done != study.steps:
        raise RuntimeError(f"{cell} did {done} steps, {study.steps} were asked for: the comparison would not be fair.")
    return segmentor


def image_scores(segmentor: SemanticSegmentor, folder: Path) -> dict[str, float]:
    """Return the IoU of each test image by its path in the folder; an image without a labelled pixel is left out."""
    table = read_table(folder / "test.csv")
    task = segmentor.task_
    scores = {}
    for image, mask, predicted in zip(
        table.images, table.masks or (), segmentor.predict(folder / "test.csv"), strict=True
    ):
        truth = torch.from_numpy(task.encode(read_mask(mask, name=str(mask), colours=task.colours)))
        iou = float(binary_iou(confusion_matrix(torch.from_numpy(task.encode(predicted)), truth, task.num_classes)))
        if not math.isnan(iou):
            scores[Path(os.path.relpath(str(image), folder)).as_posix()] = round(iou, 6)
    return scores


def run_cell(study: Study, cell: Cell, rows: Sequence[Row]) -> tuple[Row, list[ImageRow]]:
    """Do one run; a final run of the search's seed takes the network that the search has kept, where it is there.

    Args:
        study: what is to be run.
        cell: the run.
        rows: what has been run.

    Returns:
        Its row and, for a final run, the scores of the test images.
    """
    blank = Row(cell.set, cell.method, cell.lr, cell.seed, cell.phase, *study.budget)
    kept = study.kept(cell)
    if cell.phase == "final" and cell.seed == SEARCH_SEED and kept.exists():
        segmentor = SemanticSegmentor.load(kept)
        search = next(r for r in rows if (r.cell, r.budget) == (replace(cell, phase="search"), study.budget))
        row = replace(blank, seconds=search.seconds, trainable=search.trainable, validation=search.validation)
    else:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            segmentor = fit(study, cell, Path(folder) / "fit")
            seconds = round(time.monotonic() - start, 1)
        summary = segmentor.fit_summary()
        score, trainable = round(summary["best_score"], 6), summary["trainable_parameters"]
        row = replace(blank, seconds=seconds, trainable=trainable, validation=score)
    if cell.phase == "search":
        if SEARCH_SEED in study.seeds and chosen_rate([*rows, row], cell.set, cell.method, study.budget) == cell.lr:
            discard(study, cell)  # a worse one
            segmentor.save(kept)
        return row, []
    figures = segmentor.evaluate(study.data / cell.set / "test.csv")
    test: dict[str, Any] = {name: round(figures[name], 6) for name in TEST_SCORES}
    images = [
        ImageRow(cell.set, cell.method, cell.lr, cell.seed, *study.budget, image, iou)
        for image, iou in image_scores(segmentor, study.data / cell.set).items()
    ]
    return replace(row, **test), images


def discard(study: Study, cell: Cell) -> None:
    """Delete the network kept for a set and method, if there is one."""
    folder = study.kept(cell).parent
    if folder.exists():
        shutil.rmtree(folder)


def run_study(study: Study) -> None:
    """Do all runs that are left, a row and a line of progress for each.

    Raises:
        ConfigError: a set is not there or is not binary.
        DataError: a set, or the file of rows, cannot be read.
        CheckpointError: the checkpoint cannot be read.
    """
    check_sets(study)
    given_up: set[Cell] = set()
    durations: list[float] = []
    finished = 0
    commit = current_commit()
    while True:
        rows = read_rows(study.out, Row)
        left = cells_left(study, rows, given_up)
        if not left:
            return
        cell = left[0]
        start = time.monotonic()
        images: list[ImageRow] = []
        try:
            row, images = run_cell(study, cell, rows)
            durations.append(time.monotonic() - start)
        except Exception as error:  # whatever it is, it is one method's: it is noted, and the others go on
            traceback.print_exc()
            given_up.add(cell)
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            row = Row(cell.set, cell.method, cell.lr, cell.seed, "failed", *study.budget, message=message)
        if images:
            append_rows(images_file(study.out), images)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_rows(study.out, [replace(row, torch=str(torch.__version__), commit=commit, time=now)])
        if cell.phase == "final" and cell.seed == SEARCH_SEED:
            discard(study, cell)  # scored, or of no use: a failed run is fitted anew next time
        finished += 1
        print(progress_line(cell, row, finished, len(left) - 1, durations), flush=True)


def progress_line(cell: Cell, row: Row, finished: int, left: int, durations: Sequence[float]) -> str:
    """Say what was run and about how long the rest takes, by the mean of the `durations` so far, in seconds."""
    result = row.message if row.phase == "failed" else f"validation {row.validation:.4f}, fitted in {row.seconds:.0f} s"
    if row.phase == "final":
        result += f", test IoU {row.iou:.4f}"
    minutes = round(left * sum(durations) / len(durations) / 60) if durations else 0
    rest = f"about {minutes // 60} h {minutes % 60:02d} min left" if durations else "no estimate yet"
    done = f"[{finished}/{finished + left}] {cell.set} {cell.method} lr {cell.lr:g} seed {cell.seed}"
    return f"{done} {row.phase}: {result}; {rest}"


def check_sets(study: Study) -> None:
    """Raise before the first run what would stop every run of a set.

    Raises:
        ConfigError: a set is not there or is not binary.
        DataError: rows of a set cannot be used.
        CheckpointError: the checkpoint cannot be read.
    """
    for name in study.sets:
        folder = study.data / name
        missing = [f"{split}.csv" for split in ("train", "val", "test") if not (folder / f"{split}.csv").is_file()]
        if missing:
            raise ConfigError(f"'{folder}' has no {', '.join(missing)}. Give --data the folder of the sets' folders.")
        common = settings_of(study, "decoder_only", study.rates[0])
        planner = SemanticSegmentor(hyperparameters=common, verbosity=0)
        planner.fit(folder / "train.csv", folder / "val.csv", dry_run=True)
        if planner.task_.kind != "binary":
            raise ConfigError(f"the masks of '{name}' are {planner.task_.kind}; the study compares binary sets.")


def current_commit() -> str:
    """Return the short name of the checked-out commit, empty outside git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def extra_rate(text: str) -> tuple[str, float]:
    """Read ``method=rate``.

    Raises:
        ArgumentTypeError: it is not that.

    >>> extra_rate("full=1e-4")
    ('full', 0.0001)
    """
    method, _, rate = text.partition("=")
    try:
        return method, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not method=rate, such as full=1e-4") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run, table = commands.add_parser("run", help="do the runs that are left"), commands.add_parser("table")
    for command in (run, table):
        command.add_argument("--out", type=Path, default=Path("benchmarks/study.csv"), help="file of rows")
    run.add_argument("--data", type=Path, required=True, help="folder of the sets' folders")
    run.add_argument("--checkpoint", type=Path, required=True, help="pretrained plain ViT")
    run.add_argument("--sets", nargs="+", required=True, help="folders with train.csv, val.csv and test.csv")
    run.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    run.add_argument("--steps", type=int, default=Study.steps, help="optimizer steps")
    run.add_argument("--batch", type=int, default=Study.batch, help="images per step")
    run.add_argument("--size", type=int, default=Study.size, help="side of the input in pixels")
    run.add_argument("--seeds", type=int, nargs="+", default=list(Study.seeds))
    run.add_argument("--rates", type=float, nargs="+", default=list(Study.rates), help="learning rates to try")
    run.add_argument("--extra-rates", type=extra_rate, nargs="+", default=[], help="method=rate, for that method only")
    options = vars(parser.parse_args(arguments))
    if options.pop("command") == "table":
        print(study_table(read_rows(options["out"], Row), read_rows(images_file(options["out"]), ImageRow)))
        return
    unknown = {method for method, _ in options["extra_rates"]} - set(options["methods"])
    if unknown:
        parser.error(f"--extra-rates names {', '.join(sorted(unknown))}, which --methods does not")
    if options["steps"] < 1:
        parser.error(f"--steps is {options['steps']}; 1 or more are needed")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    run_study(Study(**values))


if __name__ == "__main__":
    main()
