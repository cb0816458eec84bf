"""How far counted tensors are from the memory that a process really takes: one training step per subprocess.

``python -m benchmarks.probe [--checkpoint FILE]``: for each encoder, side and number of images, what
`semseg_automl.rehearsal` counts, on real tensors and without computing, against the growth of the peak of resident
memory (``VmHWM``) in the same step, without a meter. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

CASES = [
    ("tiny_vit", 128, 8),
    ("checkpoint", 256, 1),
    ("checkpoint", 256, 4),
    ("checkpoint", 256, 8),
    ("sam_vit_b", 512, 1),
    ("sam_vit_b", 512, 2),
]


def measure(encoder: str, side: int, images: int, checkpoint: str | None) -> dict[str, Any]:
    """Take a step of `images` images and return its bytes: real growth, counted on real tensors, counted on none."""
    import torch

    from semseg_automl.build import build_model
    from semseg_automl.config import load_config
    from semseg_automl.hardware import detect_hardware
    from semseg_automl.meters import forget_peak, peak_bytes, resident_bytes
    from semseg_automl.models.facts import encoder_facts
    from semseg_automl.peft import trainable_parameters
    from semseg_automl.plan import DataStats, make_plan
    from semseg_automl.rehearsal import Surroundings, Trial, counted_bytes
    from semseg_automl.task import infer_task

    torch.set_num_threads(1)
    task, hardware = infer_task([{0: 1, 255: 1}]), detect_hardware()
    facts = encoder_facts(encoder if encoder != "checkpoint" else "tiny_vit", checkpoint=checkpoint)
    config = load_config("medium_quality" if "sam" in encoder else "fast", {"model.input_size": side})
    plan = make_plan(config, task, DataStats(100, ((side, side),) * 100), hardware, facts)
    model = build_model(plan, pretrained=False)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    trial = Trial(model, plan, task, Surroundings(torch.device("cpu"), hardware, (side, side), 0, 0.0))
    if not forget_peak(torch.device("cpu")):
        raise SystemExit("this system does not tell a process the peak of its memory")
    before = resident_bytes() or 0
    trial.train(images)
    real = (peak_bytes(torch.device("cpu")) or 0) - before
    counted = trial.peak(images)[0]
    return {"real": real, "counted": counted, "without": counted_bytes(model, plan, task, images)}


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", help="a plain ViT; without it these cases are left out")
    parser.add_argument("--case", help="for its own subprocesses")
    arguments = parser.parse_args()
    if arguments.case:
        encoder, side, images = arguments.case.split(",")
        checkpoint = arguments.checkpoint if encoder == "checkpoint" else None
        print(json.dumps(measure(encoder, int(side), int(images), checkpoint)))
        return
    print("encoder      side  images   real MiB  counted  without computing  real/counted")
    for encoder, side, images in CASES:
        if encoder == "checkpoint" and not arguments.checkpoint:
            continue
        command = [sys.executable, "-m", "benchmarks.probe", "--case", f"{encoder},{side},{images}"]
        command += ["--checkpoint", arguments.checkpoint] if arguments.checkpoint else []
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        got = json.loads(out.splitlines()[-1])
        real, counted, without = (got[key] / 2**20 for key in ("real", "counted", "without"))
        print(f"{encoder:12} {side:4} {images:7} {real:10.0f} {counted:8.0f} {without:18.0f} {real / counted:13.2f}")


if __name__ == "__main__":
    main()
