"""Reading weights: the formats that are read, and files that are damaged or would run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from semseg_automl.errors import CheckpointError
from semseg_automl.models.checkpoints import read_checkpoint


def weights() -> dict[str, Tensor]:
    """Draw a state dict of two types."""
    return {"layer.weight": torch.randn(4, 3), "layer.bias": torch.randn(4).half()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, types and values."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


class Intruder:
    """An object that, once unpickled, leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_read_checkpoint__safetensors__gives_the_tensors(tmp_path: Path) -> None:
    state = weights()
    save_file(state, tmp_path / "vit.safetensors")
    assert_equal(read_checkpoint(tmp_path / "vit.safetensors"), state)
    assert_equal(read_checkpoint(str(tmp_path / "vit.safetensors")), state)


@pytest.mark.parametrize("nested_in", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_checkpoint__torch_file__gives_the_tensors(zipped: bool, nested_in: str | None, tmp_path: Path) -> None:
    state = weights()
    content: dict[str, Any] = state if nested_in is None else {nested_in: state, "epoch": 3, "best": {"iou": 0.5}}
    torch.save(content, tmp_path / "vit.pth", _use_new_zipfile_serialization=zipped)
    assert_equal(read_checkpoint(tmp_path / "vit.pth"), state)


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth", "."])
def test_read_checkpoint__no_such_file__says_which_setting_to_correct(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights at '.*model\.checkpoint"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "legacy.pth"])
def test_read_checkpoint__file_cut_off_anywhere__is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vit.{suffix}"
    if suffix == "safetensors":
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=suffix == "pth")
    content = path.read_bytes()
    for kept in range(0, len(content), 5):
        path.write_bytes(content[:kept])
        with pytest.raises(CheckpointError, match=f"{path.name}.*cannot be read"):
            read_checkpoint(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_read_checkpoint__something_else_in_the_file__is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"page.{suffix}"
    path.write_text("<!DOCTYPE html><html>404: not found</html>" * 20)
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoint(path)


@pytest.mark.parametrize("written_by", ["torch", "torch_legacy", "pickle"])
def test_read_checkpoint__pickled_object__is_refused_and_not_run(written_by: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "vit.pth"
    content = {"layer.weight": torch.zeros(2), "extra": Intruder(trace)}
    if written_by == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=written_by == "torch")
    with pytest.raises(CheckpointError, match=r"vit\.pth"):
        read_checkpoint(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Intruder(trace)))
    assert trace.exists(), "the object does run code where it is let"


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2), "epoch": 3}, [torch.zeros(2)], torch.zeros(2)])
def test_read_checkpoint__not_only_named_tensors__is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "run.pth")
    with pytest.raises(CheckpointError, match="does not hold named tensors"):
        read_checkpoint(tmp_path / "run.pth")
