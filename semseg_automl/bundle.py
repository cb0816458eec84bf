"""The saved segmentor: a folder of YAML and safetensors files. No pickle, no network, nothing outside the folder.

``frozen.safetensors`` holds what the checkpoint gave, ``trained.safetensors`` what was learned (a few megabytes that
change with every better epoch), ``plan.yaml`` and ``task.yaml`` how to rebuild and read it, ``bundle.yaml`` the rest;
the last is written last, so a folder with it is whole.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from semseg_automl.build import build_model
from semseg_automl.errors import BundleError, ConfigError, SemsegError, check_known
from semseg_automl.files import replaced
from semseg_automl.models.layers import running_statistics
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.interchange import to_autogluon, write_hf_adapter
from semseg_automl.plan import Plan
from semseg_automl.task import SegmentationTask
from semseg_automl.version import __version__

FORMAT = 1
AdapterFormat = Literal["autogluon", "peft"]
FILES = ("frozen.safetensors", "trained.safetensors", "plan.yaml", "task.yaml", "bundle.yaml")
"""In the order of writing."""
MAX_YAML_BYTES = 16 * 2**20

# What building a network from senseless sizes raises: negative, zero, or too large to count even without memory.
_UNBUILDABLE = (TypeError, KeyError, ValueError, ArithmeticError, RuntimeError)


@dataclass
class Bundle:
    """Everything a saved segmentor holds.

    Attributes:
        model: the network with its best weights.
        plan: how it was made.
        task: what the masks hold.
        record: plain values: the estimator's settings, decision threshold, history.
    """

    model: SegmentationModel
    plan: Plan
    task: SegmentationTask
    record: dict[str, Any] = field(default_factory=dict)


def save_bundle(path: str | Path, bundle: Bundle, *, frozen_too: bool = True) -> None:
    """Write a bundle; each file appears whole or not at all.

    Args:
        path: folder, made if need be. Files of an older bundle in it are replaced.
        bundle: what to save.
        frozen_too: False leaves ``frozen.safetensors`` as it is, when only trained weights changed since the last call.

    Raises:
        BundleError: the folder cannot be written.
    """
    folder = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.model.state_dict().items()}
    trained = _changing(bundle.model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if frozen_too:
            (folder / "bundle.yaml").unlink(missing_ok=True)
            _write_tensors(folder / "frozen.safetensors", {n: t for n, t in state.items() if n not in trained})
            _write_yaml(folder / "plan.yaml", bundle.plan.model_dump(mode="json"))
            _write_yaml(folder / "task.yaml", bundle.task.to_dict())
        _write_tensors(folder / "trained.safetensors", {n: t for n, t in state.items() if n in trained})
        versions = {"semseg_automl": __version__, "torch": str(torch.__version__)}
        _write_yaml(folder / "bundle.yaml", {"format": FORMAT, **bundle.record, "versions": versions})
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"cannot write '{folder}' ({error}). Check space and permissions, or use another path."
        ) from error


def copy_bundle(source: Path, target: Path) -> None:
    """Put the bundle of one folder into another, as links where the file system has them; the last file makes it whole.

    Raises:
        BundleError: a file cannot be read or written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / FILES[-1]).unlink(missing_ok=True)
        for name in FILES:
            with replaced(target / name) as temporary:
                temporary.unlink(missing_ok=True)
                try:
                    os.link(source / name, temporary)
                except OSError:
                    shutil.copyfile(source / name, temporary)
    except OSError as error:
        raise BundleError(f"cannot copy '{source}' to '{target}' ({error}). Check space and permissions.") from error


def write_adapter(path: str | Path, model: SegmentationModel, *, format: AdapterFormat) -> None:
    """Write what a fine-tuning method learned for other software.

    Args:
        path: a safetensors file for ``autogluon``, a folder for ``peft``.
        model: the network with its trained weights.
        format: ``autogluon`` (adapters and mask decoder in AutoGluon MultiModal's names) or ``peft`` (LoRA in the files
            of Hugging Face PEFT).

    Raises:
        ConfigError: the format is unknown, or the path does not fit it.
        UnsupportedCombination: the format cannot hold this method; one that can is named.
        BundleError: the file cannot be written.
        CheckpointError: the folder cannot be written.
    """
    check_known("adapter format", format, get_args(AdapterFormat))
    if format == "autogluon" and Path(path).suffix != ".safetensors":
        raise ConfigError(f"'{path}' is to hold tensors; give a file name that ends in .safetensors.")
    try:
        if format == "peft":
            write_hf_adapter(path, model)
        else:
            tensors = {name: tensor.contiguous() for name, tensor in to_autogluon(model).items()}
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _write_tensors(Path(path), tensors)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot write '{path}' ({error}). Check space and permissions.") from error


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle; only files inside the folder are opened.

    Raises:
        BundleError: the folder is no bundle, a file is damaged, or it was written in another format.
    """
    folder = Path(path)
    if not (folder / "bundle.yaml").is_file():
        raise BundleError(
            f"'{folder}' holds no saved segmentor (no bundle.yaml). Give the folder that fit or save wrote."
        )
    record = _read_yaml(folder / "bundle.yaml")
    if record.pop("format", None) != FORMAT:
        raise BundleError(
            f"'{folder}' was written by {record.get('versions')} in another format; this version reads format {FORMAT}."
        )
    try:
        plan = Plan.model_validate(_read_yaml(folder / "plan.yaml"))
        task = SegmentationTask.from_dict(_read_yaml(folder / "task.yaml"))
        state = load_file(folder / "frozen.safetensors") | load_file(folder / "trained.safetensors")
        with torch.device("meta"):
            expected = build_model(plan, pretrained=False).state_dict()
        _check_shapes(folder, expected, state)  # before any memory is taken for sizes that a file asks for
        with torch.random.fork_rng():  # loading leaves the caller's random state alone
            model = build_model(plan, pretrained=False)
    except BundleError:
        raise
    except (OSError, SafetensorError, ValidationError, SemsegError, *_UNBUILDABLE) as error:
        raise BundleError(f"'{folder}' is damaged: {error}. Save or fit again.") from error
    model.load_state_dict(state)
    return Bundle(model.eval(), plan, task, record)


def _changing(model: SegmentationModel) -> set[str]:
    """Return the names of what training changes."""
    return trainable_parameters(model).keys() | running_statistics(model).keys()


def read_plan(path: str | Path) -> Plan:
    """Read a plan.yaml, perhaps one that was edited by hand.

    Raises:
        ConfigError: it cannot be read, or an entry is missing, unknown or of another type.
    """
    try:
        return Plan.model_validate(_read_yaml(Path(path)))
    except (OSError, BundleError) as error:
        raise ConfigError(f"'{path}' cannot be read as a plan ({error}). Give a plan.yaml that fit wrote.") from error
    except ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"'{path}' is no plan: {'; '.join(problems)}. Correct these entries.") from error


def _check_shapes(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    wrong = [n for n in expected if n not in found or found[n].shape != expected[n].shape]
    wrong += [n for n in found if n not in expected]
    if wrong:
        raise BundleError(
            f"'{folder}' is damaged: {len(wrong)} tensors do not fit plan.yaml, for example '{wrong[0]}'. "
            "Save or fit again."
        )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with replaced(path) as temporary:
        save_file(tensors, temporary)


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    with replaced(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_YAML_BYTES:
        raise BundleError(f"'{path}' is larger than {MAX_YAML_BYTES} bytes; this is not a file of ours.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"'{path}' is damaged: {error}. Save or fit again.") from error
    if not isinstance(content, dict):
        raise BundleError(f"'{path}' is damaged: it holds no mapping. Save or fit again.")
    return content
