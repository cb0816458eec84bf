"""What pysodmetrics says of 200 random pairs, kept for the tests.

``python -m benchmarks.saliency_answers --reference PYTHON`` writes `tests/saliency_answers.json`: seeds and scores, no
images. PYTHON is the interpreter of an environment with pysodmetrics 1.6. The test draws the pairs again from their
seeds by `draw`, so a change of `draw` needs the answers written again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]

ANSWERS = Path(__file__).resolve().parent.parent / "tests" / "saliency_answers.json"
PAIRS = 200
MAX_SIZE = (96, 128)
MASKS = ("blobs", "blobs", "blobs", "noise", "thin", "one pixel", "all but one", "empty", "full")
PREDICTIONS = ("soft", "soft", "binary", "noise", "faint", "constant", "perfect", "opposite")

# Reads the names of the arrays in a file, answers with one JSON list; null stands for what is not finite.
REFERENCE = """
import json, math, sys, warnings
from importlib.metadata import version
import numpy as np
import py_sod_metrics as reference
warnings.simplefilter("ignore")
answers = []
with np.load(sys.argv[1]) as stored:
    for number in range(len(stored.files) // 2):
        pair = stored[f"prediction_{number}"], stored[f"mask_{number}"]
        s, e, mae = reference.Smeasure(), reference.Emeasure(), reference.MAE()
        wf, wf_03 = reference.WeightedFmeasure(beta=1), reference.WeightedFmeasure(beta=0.3)
        for measure in (s, e, mae, wf, wf_03):
            measure.step(*pair)
        em = e.get_results()["em"]
        found = {
            "s_measure": s.get_results()["sm"], "e_measure": em["curve"].mean(), "e_measure_max": em["curve"].max(),
            "e_measure_adaptive": em["adp"], "wf": wf.get_results()["wfm"], "wf_03": wf_03.get_results()["wfm"],
            "mae": mae.get_results()["mae"],
        }
        answers.append({name: float(value) if math.isfinite(value) else None for name, value in found.items()})
print(json.dumps({"version": version("pysodmetrics"), "answers": answers}))
"""


def draw(seed: int) -> Pair:
    """Draw an 8-bit prediction and a mask of 0 and 255, of any size up to `MAX_SIZE` and of the kinds listed above.

    In whole numbers only, so that every machine draws the same.
    """
    rng = np.random.default_rng(seed)
    size = (1, 1) if seed == 0 else tuple(int(rng.integers(1, most + 1)) for most in MAX_SIZE)
    mask = _mask(rng, str(rng.choice(MASKS)), size)
    kind = str(rng.choice(PREDICTIONS))
    if kind in ("perfect", "opposite"):
        levels = 255 * (mask if kind == "perfect" else ~mask).astype(np.int64)
    elif kind == "constant":
        levels = np.full(size, rng.integers(0, 256))
    elif kind == "noise":
        levels = rng.integers(0, 256, size)
    else:
        levels = _blurred(255 * mask.astype(np.int64), 5) + _blurred(rng.integers(-500, 501, size), 7)
        if kind == "binary":
            levels = 255 * (levels > 128).astype(np.int64)
        elif kind == "faint":
            levels = 20 + levels // 5
    return np.clip(levels, 0, 255).astype(np.uint8), mask.astype(np.uint8) * 255


def _blurred(numbers: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Whole-numbered mean over windows of `side` by `side` pixels."""
    window = np.ones((side, side), dtype=np.int64)
    return np.asarray(ndimage.convolve(numbers, window, mode="nearest") // window.size, dtype=np.int64)


def _mask(rng: np.random.Generator, kind: str, size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Draw the mask of a pair, bool."""
    if kind in ("blobs", "noise"):
        field = rng.integers(0, 1_000_000, size)
        field = _blurred(field, int(rng.integers(3, 20))) if kind == "blobs" else field
        return np.asarray(field > np.sort(field, axis=None)[int(field.size * rng.uniform(0.1, 0.95))])
    mask = np.full(size, kind in ("full", "all but one"))
    if kind in ("one pixel", "all but one"):
        mask.flat[rng.integers(mask.size)] ^= True
    elif kind == "thin":
        mask[rng.integers(size[0])] = mask[:, rng.integers(size[1])] = True
    return mask


def digest(seeds: range) -> str:
    """Digest of the pairs of `seeds`, which tells a changed drawing from a wrong score."""
    hashed = hashlib.sha256()
    for seed in seeds:
        for array in draw(seed):
            hashed.update(str(array.shape).encode() + array.tobytes())
    return hashed.hexdigest()


def ask(reference: str, seeds: range) -> dict[str, Any]:
    """Have the reference, run by the interpreter `reference`, score the pairs of `seeds`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.npz"
        arrays: dict[str, Any] = {}
        for number, seed in enumerate(seeds):
            arrays[f"prediction_{number}"], arrays[f"mask_{number}"] = draw(seed)
        np.savez(path, **arrays)
        done = subprocess.run([reference, "-c", REFERENCE, str(path)], stdout=subprocess.PIPE, text=True, check=True)
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def main() -> None:
    """Parse the command line, ask, write."""
    parser = argparse.ArgumentParser(description="write what pysodmetrics says of 200 random pairs")
    parser.add_argument("--reference", metavar="PYTHON", required=True, help="interpreter with pysodmetrics")
    parser.add_argument("--out", type=Path, default=ANSWERS)
    arguments = parser.parse_args()
    found = ask(arguments.reference, range(PAIRS))
    lines = ",\n".join(json.dumps(answer) for answer in found["answers"])
    head = f'"reference": "pysodmetrics {found["version"]}",\n"digest": "{digest(range(PAIRS))}"'
    arguments.out.write_text(f'{{\n{head},\n"answers": [\n{lines}\n]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
