"""The door to the packages that import torchvision: each state of torchvision in a process of its own.

Stand-ins for torchvision are small packages written into a folder that is first on the path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semseg_automl import third_party

ROOT = Path(__file__).resolve().parents[1]

# What the real package does when it is imported: it registers a shape function for an operator.
REGISTER = """
import torch
from torch import library

@library.register_fake("torchvision::nms")
def shape_of_nms(dets, scores, iou_threshold):
    return scores.new_empty(0, dtype=torch.long)
"""


def run_python(code: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = [str(p) for p in (first_on_path, ROOT) if p is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def write_torchvision(folder: Path, source: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(source, encoding="utf-8")
    return folder


def test_door__all_four_packages__import_with_the_installed_torchvision() -> None:
    result = run_python(
        "from semseg_automl.third_party import lightning, segment_anything, timm, torchmetrics\n"
        "print(lightning.Trainer.__name__, segment_anything.sam_model_registry['vit_b'].__name__,\n"
        "      len(timm.list_models('vit_tiny*')) > 0, torchmetrics.Metric.__name__)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["Trainer", "build_sam_vit_b", "True", "Metric"]


def test_door__torchvision_that_imports__has_nothing_declared_and_no_torch_loaded(tmp_path: Path) -> None:
    result = run_python(
        "import sys\n"
        "from semseg_automl import third_party\n"
        "third_party.make_torchvision_importable()\n"
        "print(sys.modules['torchvision'].MARK, 'torch' in sys.modules)\n"
        "import torch\n"
        "print(hasattr(torch.ops.torchvision, 'nms'))",
        write_torchvision(tmp_path, "MARK = 'mine'"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["mine", "False", "False"]


def test_door__torchvision_without_its_operators__imports_at_the_second_try(tmp_path: Path) -> None:
    result = run_python(
        "from semseg_automl import third_party\n"
        "third_party.make_torchvision_importable()\n"
        "third_party.make_torchvision_importable()\n"
        "import torch, torchvision\n"
        "boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]])\n"
        "print(torch.ops.torchvision.nms(boxes, torch.tensor([0.1, 0.9, 0.5]), 0.5).tolist())",
        write_torchvision(tmp_path, REGISTER),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[1, 2]"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "raise RuntimeError('operator torchvision::roi_align is odd')",
            "RuntimeError: operator torchvision::roi",
        ),
        ("raise ImportError('libjpeg.so.8 is missing')", "ImportError: libjpeg.so.8 is missing"),
        ("import no_such_module_of_torchvision", "No module named 'no_such_module_of_torchvision'"),
    ],
)
def test_door__torchvision_broken_in_another_way__raises_its_own_error(
    tmp_path: Path, source: str, error: str
) -> None:
    result = run_python(
        "import sys\n"
        "from semseg_automl import third_party\n"
        "try:\n"
        "    third_party.make_torchvision_importable()\n"
        "finally:\n"
        "    print('torch' in sys.modules)",
        write_torchvision(tmp_path, source),
    )
    assert result.returncode == 1
    assert error in result.stderr.splitlines()[-1]
    assert result.stdout.strip() == "False"  # nothing was declared: that would have loaded torch


def test_door__torchvision_not_installed__is_left_to_the_package_that_needs_it() -> None:
    result = run_python(
        "import sys\n"
        "sys.modules['torchvision'] = None\n"
        "from semseg_automl import third_party\n"
        "third_party.make_torchvision_importable()\n"
        "print('torch' in sys.modules)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


def test_door__other_name__is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'torchaudio'"):
        third_party.torchaudio  # noqa: B018


def test_nms__overlapping_boxes__keeps_the_best_of_each_group_best_first() -> None:
    boxes = torch.tensor(
        [[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 5]], dtype=torch.float32
    )
    scores = torch.tensor([0.6, 0.7, 0.9, 0.5])
    # IoU with box 1: box 0 has 90 / 100, box 3 has 50 / 90.
    assert third_party._nms(boxes, scores, 0.6).tolist() == [2, 1, 3]
    assert third_party._nms(boxes, scores, 0.5).tolist() == [2, 1]
    assert third_party._nms(boxes, scores, 0.95).tolist() == [2, 1, 0, 3]


def test_nms__no_boxes__keeps_none() -> None:
    kept = third_party._nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert (kept.shape, kept.dtype) == ((0,), torch.int64)
