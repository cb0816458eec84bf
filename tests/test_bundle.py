"""The saved segmentor: a round trip that changes nothing, and damaged, foreign or hostile folders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from semseg_automl import bundle as bundle_module
from semseg_automl.build import build_model
from semseg_automl.bundle import Bundle, load_bundle, save_bundle
from semseg_automl.config import load_config
from semseg_automl.errors import BundleError
from semseg_automl.hardware import Hardware
from semseg_automl.models.facts import EncoderFacts
from semseg_automl.models.segmentation_model import semantic_scores
from semseg_automl.peft import METHODS
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import SegmentationTask
from semseg_automl.version import __version__

FILES = {"bundle.yaml", "plan.yaml", "task.yaml", "frozen.safetensors", "trained.safetensors"}
TASK = SegmentationTask("multiclass", (0, 3, 7), ("sky", "road", "car"), ignore_values=(255,), reasons=("as seen",))
RECORD: dict[str, Any] = {
    "settings": {"label": "label"},
    "threshold": 0.4,
    "best_score": float("nan"),
    "history": [{"epoch": 0.0, "miou": 0.5}],
}


def tiny_plan(method: str = "conv_lora", head: str = "class_tokens") -> Plan:
    """Plan a network of a few thousand parameters, its encoder from a file that does not exist."""
    options: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8, "grid": 4}
    encoder = EncoderFacts("tiny_vit", "tiny_vit", options, 8, 64, 2, "gone/vit.safetensors", "a file")
    settings = {
        "model.decoder_dim": 32,
        "model.input_size": 32,
        "model.multiclass_head": head,
        "optim.peft": method,
        "optim.lora.rank": 2,
    }
    stats = DataStats(rows=10, sizes=((40, 50),) * 10)
    hardware = Hardware("cpu", "CPU", 2**33, 2, bf16=False)
    return make_plan(load_config("fast", settings), TASK, stats, hardware, encoder)


def tiny_bundle(method: str = "conv_lora", head: str = "class_tokens") -> Bundle:
    """Build such a network, every parameter moved off its start, as training would."""
    plan = tiny_plan(method, head)
    model = build_model(plan, pretrained=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Bundle(model, plan, TASK, dict(RECORD))


def predict(bundle: Bundle) -> Tensor:
    """Score two fixed images."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return semantic_scores(bundle.model(images), (32, 32))


def edit_yaml(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a YAML file in place."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a small bundle and return its folder."""
    save_bundle(tmp_path / "saved", tiny_bundle())
    return tmp_path / "saved"


_opened: list[str] | None = None
_hooked = False


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "socket.connect", "subprocess.Popen"):
        _opened.append(str(arguments[0]) if event == "open" else event)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Collect the files Python opens, and connections and processes it starts; Python's own modules left out."""
    global _opened, _hooked
    if not _hooked:
        sys.addaudithook(_note_opened)  # cannot be removed again: one for all tests, idle outside of this context
        _hooked = True
    noted: list[str] = []
    _opened = []
    try:
        yield noted
    finally:
        modules = (".py", ".pyc", ".so")
        noted.extend(path for path in _opened if not path.endswith(modules))
        _opened = None


@pytest.mark.parametrize("head", ["class_tokens", "queries"])
@pytest.mark.parametrize("method", METHODS)
def test_bundle__saved_and_loaded__predicts_bit_for_bit_the_same(method: str, head: str, tmp_path: Path) -> None:
    if method == "full":
        before = tiny_bundle("decoder_only", head)
        before.plan = before.plan.model_copy(update={"peft": "full", "checkpoint": None})
        before.model.requires_grad_(True)
    else:
        before = tiny_bundle(method, head)
    save_bundle(tmp_path, before)
    after = load_bundle(tmp_path)
    assert not after.model.training
    assert torch.equal(predict(after), predict(before))
    assert after.plan == before.plan
    assert after.task == before.task
    trains = {name for name, p in before.model.named_parameters() if p.requires_grad}
    assert {name for name, p in after.model.named_parameters() if p.requires_grad} == trains
    assert set(load_file(tmp_path / "trained.safetensors")) == trains


def test_bundle__record__comes_back_with_the_versions(saved: Path) -> None:
    record = load_bundle(saved).record
    assert record.pop("versions")["semseg_automl"] == __version__
    assert str(record.pop("best_score")) == "nan"
    assert record == {key: value for key, value in RECORD.items() if key != "best_score"}


def test_bundle__files__are_text_and_safetensors_alone(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    for path in saved.glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    for path in saved.glob("*.safetensors"):
        assert load_file(path)
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.read_bytes()[8:9] == b"{"
        assert header < path.stat().st_size
    with_defaults = saved / "reference"
    with_defaults.touch()
    assert (saved / "bundle.yaml").stat().st_mode == with_defaults.stat().st_mode, "whoever reads files reads these"


def test_save_bundle__loaded_one_of_an_older_version__names_the_version_that_wrote_it(saved: Path) -> None:
    edit_yaml(saved / "bundle.yaml", lambda content: content["versions"].update(semseg_automl="0.0.1"))
    old = load_bundle(saved)
    assert old.record["versions"]["semseg_automl"] == "0.0.1"
    save_bundle(saved, old)
    assert load_bundle(saved).record["versions"]["semseg_automl"] == __version__


def test_save_bundle__trained_weights_only__leaves_the_frozen_file_alone(saved: Path) -> None:
    frozen = (saved / "frozen.safetensors").read_bytes()
    (saved / "frozen.safetensors").touch()
    stamp = (saved / "frozen.safetensors").stat().st_mtime_ns
    bundle = load_bundle(saved)
    with torch.no_grad():
        bundle.model.mask_decoder.mask_tokens.weight.add_(1.0)
    bundle.record["threshold"] = 0.7
    save_bundle(saved, bundle, frozen_too=False)
    assert (saved / "frozen.safetensors").stat().st_mtime_ns == stamp
    assert (saved / "frozen.safetensors").read_bytes() == frozen
    after = load_bundle(saved)
    assert torch.equal(predict(after), predict(bundle))
    assert after.record["threshold"] == 0.7


def test_load_bundle__checkpoint_gone__opens_no_file_outside_the_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_bundle(saved).plan.checkpoint == "gone/vit.safetensors"
    moved = saved.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with opened_files() as opened:
        load_bundle(Path("moved"))
    assert {"moved/bundle.yaml", "moved/plan.yaml", "moved/task.yaml"} <= set(opened), "the hook sees what is opened"
    assert [path for path in opened if Path(path).absolute().parent != moved] == []


@pytest.mark.parametrize("name", sorted(FILES - {"bundle.yaml"}))
def test_load_bundle__missing_file__is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(BundleError, match=f"{saved.name}.*{name}"):
        load_bundle(saved)


@pytest.mark.parametrize("there", [True, False])
def test_load_bundle__no_bundle_yaml__says_what_folder_to_give(there: bool, tmp_path: Path) -> None:
    folder = tmp_path if there else tmp_path / "absent"
    with pytest.raises(BundleError, match=r"no bundle\.yaml\).*fit or save"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["frozen.safetensors", "trained.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, -7])
def test_load_bundle__truncated_weights__are_refused(kept: int, name: str, saved: Path) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:kept])
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(saved)


@pytest.mark.parametrize("name", ["bundle.yaml", "plan.yaml", "task.yaml"])
@pytest.mark.parametrize(
    "content", [b"", b"- 1\n- 2\n", b"a: [1, 2", b"\xff\xfe\x00", b"!!python/object/apply:os.system [exit 1]\n"]
)
def test_load_bundle__no_mapping_in_a_yaml_file__is_refused(content: bytes, name: str, saved: Path) -> None:
    (saved / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}' is damaged"):
        load_bundle(saved)


def test_load_bundle__endless_yaml__is_not_parsed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_YAML_BYTES", 100)
    with pytest.raises(BundleError, match="larger than 100 bytes"):
        load_bundle(saved)


@pytest.mark.parametrize("found", [0, 99, "1", None])
def test_load_bundle__foreign_format__names_both(found: object, saved: Path) -> None:
    edit_yaml(saved / "bundle.yaml", lambda content: content.update(format=found))
    with pytest.raises(BundleError, match=rf"{__version__}.*this version reads format {bundle_module.FORMAT}"):
        load_bundle(saved)


TAMPERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "huge": lambda plan: plan["encoder_options"].update(embed_dim=64 * 10**6, num_heads=10**6),
    "beyond_counting": lambda plan: plan["encoder_options"].update(embed_dim=64 * 10**12, num_heads=10**12),
    "no_heads": lambda plan: plan["encoder_options"].update(num_heads=0),
    "negative": lambda plan: plan["encoder_options"].update(grid=-4),
    "huge_decoder": lambda plan: plan["decoder_options"].update(num_mask_tokens=10**9),
    "deeper": lambda plan: plan["encoder_options"].update(depth=3),
    "unknown_option": lambda plan: plan["encoder_options"].update(colour=1),
    "unknown_encoder": lambda plan: plan.update(encoder="resnet"),
    "unknown_method": lambda plan: plan.update(peft="magic"),
    "wrong_type": lambda plan: plan.update(lr="fast"),
    "surplus_key": lambda plan: plan.update(colour="red"),
    "missing_key": lambda plan: plan.pop("loss"),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_load_bundle__tampered_plan__is_refused_before_memory_is_taken(
    change: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_yaml(saved / "plan.yaml", TAMPERED[change])
    devices: list[str] = []

    def noting_build(plan: Plan, *, pretrained: bool) -> Any:
        devices.append(torch.empty(0).device.type)
        return build_model(plan, pretrained=pretrained)

    monkeypatch.setattr(bundle_module, "build_model", noting_build)
    with pytest.raises(BundleError, match=f"{saved.name}.*damaged"):
        load_bundle(saved)
    assert set(devices) <= {"meta"}


def _rename_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["renamed"] = tensors.pop("mask_decoder.mask_tokens.weight")


def _reshape_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["mask_decoder.mask_tokens.weight"] = torch.zeros(4, 32)


def _add_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["surplus"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [(_add_a_tensor, "surplus"), (_rename_a_tensor, "mask_tokens"), (_reshape_a_tensor, "mask_tokens")],
)
def test_load_bundle__tensors_the_plan_does_not_have__are_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], named: str, saved: Path
) -> None:
    tensors = load_file(saved / "trained.safetensors")
    change(tensors)
    save_file(tensors, saved / "trained.safetensors")
    with pytest.raises(BundleError, match=f"do not fit plan.yaml.*{named}"):
        load_bundle(saved)


def test_load_bundle__task_that_contradicts_itself__is_refused(saved: Path) -> None:
    edit_yaml(saved / "task.yaml", lambda task: task.update(values=[3, 0, 7]))
    with pytest.raises(BundleError, match=r"damaged.*increasing"):
        load_bundle(saved)


def test_save_bundle__disk_full__leaves_the_old_bundle_and_no_litter(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    old = predict(load_bundle(saved))

    def half_a_file(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "save_file", half_a_file)
    with pytest.raises(BundleError, match=f"cannot write '{saved}'.*No space left.*another path"):
        save_bundle(saved, tiny_bundle(), frozen_too=False)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert torch.equal(predict(load_bundle(saved)), old)


def test_save_bundle__disk_full_with_all_files__leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "_write_yaml", refuse)
    with pytest.raises(BundleError, match="No space left"):
        save_bundle(tmp_path, tiny_bundle())
    with pytest.raises(BundleError, match=r"no bundle\.yaml"):
        load_bundle(tmp_path)


def test_save_bundle__file_in_place_of_the_folder__is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(BundleError, match="cannot write"):
        save_bundle(tmp_path / "taken", tiny_bundle())
    assert (tmp_path / "taken").read_text() == "mine"
