"""Memory of prediction: ``python -m benchmarks.predict_memory [--images 50 1000] [--sides 6000 10000]``.

Peak resident memory of processes of their own. ``predict(save_to=)`` over few and over many small images is to be the
same within 5 %. Of one large image in tiles, what counts is the peak above that of the same process before it, with the
network loaded; the goal is 1 GB at 10,000 x 10,000 pixels. Network: the built-in encoder with random weights on 256
pixels, tiles of 1024 pixels of the image.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from semseg_automl import SemanticSegmentor
from semseg_automl.data.images import write_png
from semseg_automl.data.synthetic import draw_dataset

SETTINGS = {"model.input_size": 256, "env.batch_size": 4, "env.precision": "32-true", "data.augmentation": "none"}
MIB = 2**20


def main() -> None:
    """Print one line per process: what it predicted, its peak, and the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[50, 1000])
    parser.add_argument("--sides", type=int, nargs="*", default=[6000, 10000])
    parser.add_argument("--kind", default="binary", choices=["binary", "multiclass"])
    parser.add_argument("--child", nargs=3, metavar=("BUNDLE", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*map(Path, options.child))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = draw_dataset(root / "data", kind=options.kind, train=4, val=1, test=1, size=(160, 160))
        for tiling in ("off", "on"):
            settings = SETTINGS | {"data.tiling": tiling} | ({"data.tile_scale": 0.25} if tiling == "on" else {})
            segmentor = SemanticSegmentor(path=root / tiling, hyperparameters=settings, verbosity=0)
            segmentor.fit(folder / "train.csv", folder / "val.csv", time_limit=1)
        for count in options.images:
            print(f"{count} images of 160 x 160 pixels: {_measure(root / 'off', _many(root, count))}", flush=True)
        for side in options.sides:
            print(f"{side} x {side} pixels in tiles: {_measure(root / 'on', _large(root, side))}", flush=True)


def _many(root: Path, count: int) -> Path:
    folder = root / f"many{count}"
    rng = np.random.default_rng(0)
    for i in range(count):
        write_png(folder / f"{i}.png", rng.integers(0, 256, (160, 160, 3), dtype=np.uint8))
    return folder


def _large(root: Path, side: int) -> Path:
    folder = root / f"large{side}"
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (side // 40, side // 40, 3), dtype=np.uint8)
    large = np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    write_png(folder / "large.png", large)
    return folder


def _measure(bundle: Path, folder: Path) -> str:
    out = folder.with_name(f"{folder.name}-masks")
    command = [sys.executable, "-m", "benchmarks.predict_memory", "--child", str(bundle), str(folder), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _child(bundle: Path, folder: Path, out: Path) -> None:
    """Predict a folder; print the memory before it, the peak and the seconds."""
    segmentor = SemanticSegmentor.load(bundle)
    # The first forward pass loads what is loaded once.
    segmentor.predict(np.zeros((160, 160, 3), dtype=np.uint8))
    before = _resident()
    start = time.perf_counter()
    with _Peak() as peak:
        saved = segmentor.predict(folder, save_to=out)
    seconds = time.perf_counter() - start
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{before / MIB:.0f} MiB before, peak {peak.bytes / MIB:.0f} MiB, {(peak.bytes - before) / MIB:.0f} MiB more; "
        f"peak of the process {process / MIB:.0f} MiB; {seconds:.0f} s, {len(saved)} masks"
    )


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


class _Peak:
    """Looks at the resident memory every ten milliseconds."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, _resident())


if __name__ == "__main__":
    main()
