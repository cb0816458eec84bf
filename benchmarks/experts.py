"""What the experts of a fitted Conv-LoRA contribute: ``python -m benchmarks.experts run ...``, then ``... table``.

    python -m benchmarks.experts run --data DATA --checkpoint deit_tiny.safetensors --sets kvasir_polyp nuclei
    python -m benchmarks.experts table

Each run fits Conv-LoRA as `benchmarks.study` does and scores the test images three times: as fitted; with every sample
sent to the expert after the one the gate chose; and with kernels and biases of the experts set to zero, which leaves
plain LoRA. A row per run is appended to ``--out``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.study import METHODS, Study, fit
from benchmarks.study_table import Cell
from semseg_automl import SemanticSegmentor
from semseg_automl.peft.conv_lora import ConvLoraLinear

SAMPLED = 8  # test images on which the sizes of the two paths are compared


@dataclass(frozen=True)
class ExpertRow:
    """One fit.

    Attributes:
        set: folder of the data.
        method: name in `benchmarks.study.METHODS`.
        steps: optimizer steps.
        seed: of the fit.
        iou: test IoU as fitted.
        iou_without: with the experts set to zero.
        iou_other: with each sample sent to the expert after the one chosen.
        share: norm of what the experts add over the norm of what they add it to, mean over layers.
    """

    set: str
    method: str
    steps: int
    seed: int
    iou: float
    iou_without: float
    iou_other: float
    share: float


def layers_of(model: nn.Module) -> list[ConvLoraLinear]:
    """Return the adapted layers of a network, in order."""
    return [layer for layer in model.modules() if isinstance(layer, ConvLoraLinear)]


@torch.no_grad()
def expert_share(segmentor: SemanticSegmentor, images: Sequence[str]) -> float:
    """Return the mean over layers and images of ``|E(z)| / |z|``, z being LoRA's bottleneck."""
    ratios: list[float] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(layer, ConvLoraLinear):
            raise TypeError(f"{type(layer).__name__} is no Conv-LoRA layer")
        z = F.linear(inputs[0], layer.lora_A)
        ratios.append(float(layer._mix(z).norm() / z.norm()))

    hooks = [layer.register_forward_pre_hook(compare) for layer in layers_of(segmentor._predictor.model)]
    segmentor.predict(list(images))
    for hook in hooks:
        hook.remove()
    return sum(ratios) / len(ratios) if ratios else math.nan


@torch.no_grad()
def scores(segmentor: SemanticSegmentor, folder: Path) -> dict[str, float]:
    """Return the figures of an `ExpertRow` for a fitted segmentor; its experts are zero afterwards."""
    test = pd.read_csv(folder / "test.csv")
    layers = layers_of(segmentor._predictor.model)
    found = {"iou": segmentor.evaluate(folder / "test.csv", "iou")["iou"]}
    found["share"] = expert_share(segmentor, [str(folder / name) for name in test["image"][:SAMPLED]])
    for layer in layers:
        layer.w_gate.copy_(layer.w_gate.roll(1, dims=1))
    found["iou_other"] = segmentor.evaluate(folder / "test.csv", "iou")["iou"]
    for layer in layers:
        layer.expert_weight.zero_()
        layer.expert_bias.zero_()
    found["iou_without"] = segmentor.evaluate(folder / "test.csv", "iou")["iou"]
    return found


def run(study: Study, method: str) -> None:
    """Do the runs that are left, a row and a line for each."""
    for name in study.sets:
        for seed in study.seeds:
            done = pd.read_csv(study.out) if study.out.exists() else pd.DataFrame(columns=["set", "method"])
            same = done[(done["set"] == name) & (done["method"] == method)]
            if len(same) and ((same["steps"] == study.steps) & (same["seed"] == seed)).any():
                continue
            with tempfile.TemporaryDirectory() as folder:
                cell = Cell(name, method, study.rates[0], seed, "final")
                figures = scores(fit(study, cell, Path(folder) / "fit"), study.data / name)
            row = ExpertRow(name, method, study.steps, seed, **{key: round(v, 6) for key, v in figures.items()})
            pd.DataFrame([asdict(row)]).to_csv(study.out, mode="a", header=not study.out.exists(), index=False)
            print(row, flush=True)


def table(rows: pd.DataFrame) -> str:
    """Return a Markdown table: mean over seeds and standard error of the figures, and of what is lost.

    >>> frame = pd.DataFrame([asdict(ExpertRow("a", "conv_lora", 80, s, 0.6, 0.5, 0.55, 0.25)) for s in (0, 1)])
    >>> print(table(frame).splitlines()[-1])
    | a | conv_lora | 80 | 2 | 0.600 ± 0.000 | -0.100 ± 0.000 | -0.050 ± 0.000 | 0.25 |
    """
    lines = [
        "| data | method | steps | seeds | IoU | without experts | other expert | share |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def spread(values: NDArray[np.float64], sign: str = "") -> str:
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{values.mean():{sign}.3f} ± {error:.3f}"

    for _, group in rows.groupby(["set", "method", "steps"]):
        first: dict[Any, Any] = group.iloc[0].to_dict()
        iou = group["iou"].to_numpy(float)
        losses = [spread(group[column].to_numpy(float) - iou, "+") for column in ("iou_without", "iou_other")]
        key = [first["set"], first["method"], str(first["steps"]), str(len(group))]
        cells = [*key, spread(iou), *losses, f"{group['share'].mean():.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asked, shown = commands.add_parser("run"), commands.add_parser("table")
    for command in (asked, shown):
        command.add_argument("--out", type=Path, default=Path("benchmarks/experts.csv"), help="file of rows")
    asked.add_argument("--data", type=Path, required=True, help="folder of the sets' folders")
    asked.add_argument("--checkpoint", type=Path, required=True, help="pretrained plain ViT")
    asked.add_argument("--sets", nargs="+", required=True)
    variants = [name for name in METHODS if name.startswith("conv_lora")]
    asked.add_argument("--method", choices=variants, default="conv_lora")
    asked.add_argument("--steps", type=int, default=80)
    asked.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    if options["command"] == "table":
        print(table(pd.read_csv(options["out"])))
        return
    study = Study(
        options["data"],
        options["checkpoint"],
        options["out"],
        tuple(options["sets"]),
        (options["method"],),
        seeds=tuple(options["seeds"]),
        rates=(options["rate"],),
        steps=options["steps"],
    )
    run(study, options["method"])


if __name__ == "__main__":
    main()
