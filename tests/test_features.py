"""The cache of frozen features: the same training with and without it, and what happens when there is no room."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semseg_automl import draw_dataset, features
from semseg_automl.callbacks import TrainingResult
from semseg_automl.capacity import CACHE_SHARE
from semseg_automl.data.checks import check_rows
from semseg_automl.data.table import MaskTable, read_table
from semseg_automl.errors import ConfigError
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.features import FeatureCache
from semseg_automl.hardware import detect_hardware
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.conv_lora import ConvLora
from semseg_automl.peft.freeze import DecoderOnly, Full
from semseg_automl.peft.lst import Lst
from semseg_automl.plan import Plan
from semseg_automl.task import SegmentationTask
from semseg_automl.third_party import lightning
from semseg_automl.training import data_module, train

STAGES = {"fresh_neck": 3, "frozen_neck": 4, "last_block": 2, "lst": 3, "full": 0}
ROWS, VALIDATION_ROWS, EPOCHS, VIEWS = 8, 3, 4, 2


def build(kind: str) -> SegmentationModel:
    """Build three blocks and a decoder of which only the parts after ``STAGES[kind]`` train."""
    torch.manual_seed(0)
    encoder = TinyViT(embed_dim=32, depth=3, num_heads=2, patch_size=8, out_channels=32, grid=4, neck_taps=(0, 2))
    encoder.mark_pretrained()
    if kind == "frozen_neck":
        encoder.fresh_parameter_names = frozenset()
    methods = {"full": Full(), "last_block": ConvLora(rank=2, experts=2, last_blocks=1), "lst": Lst()}
    methods.get(kind, DecoderOnly()).apply(encoder)
    return SegmentationModel(encoder, MaskDecoder(32, depth=1, num_heads=2, mlp_dim=32))


@dataclass
class Setting:
    """A plan, its task and its tables."""

    plan: Plan
    task: SegmentationTask
    tables: tuple[MaskTable, MaskTable]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Draw a small data set and plan four epochs of two views that come round again."""
    folder = draw_dataset(
        tmp_path_factory.mktemp("data"), kind="binary", train=ROWS, val=VALIDATION_ROWS, test=1, size=(32, 32)
    )
    hyperparameters = {"model.input_size": 32, "env.batch_size": 4, "env.precision": "32-true"}
    segmentor = SemanticSegmentor(hyperparameters=hyperparameters, verbosity=0)
    segmentor.fit(folder / "train.csv", folder / "val.csv", dry_run=True, max_epochs=EPOCHS)
    changes = {"views": 1, "cached_views": VIEWS, "num_workers": 0, "augmentation": "medium"}
    tables = read_table(folder / "train.csv"), read_table(folder / "val.csv")
    assert [len(check_rows(table)) for table in tables] == [ROWS, VALIDATION_ROWS]
    return Setting(segmentor.plan_.model_copy(update=changes), segmentor.task_, tables)


@dataclass
class Run:
    """What a training left: final weights, result, notices, and how many images went through the first block."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    result: TrainingResult = field(default_factory=TrainingResult)
    notices: list[str] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        """Training losses and validation scores of all epochs."""
        return [entry[name] for entry in self.result.history for name in ("train_loss", "iou")]


def run(
    setting: Setting,
    kind: str,
    cache: str,
    folder: Path | None = None,
    callback: lightning.Callback | None = None,
    **updates: Any,
) -> Run:
    """Train with changes to the plan."""
    plan = setting.plan.model_copy(update={"feature_cache": cache, **updates})
    model = build(kind)
    got = Run()
    model.encoder.blocks[0].register_forward_hook(lambda _, inputs, __: got.encoded.append(len(inputs[0])))
    train(
        model,
        plan,
        setting.task,
        data_module(plan, setting.task, *setting.tables),
        result=got.result,
        on_best=lambda _: None,
        on_epoch=lambda _: None,
        on_notice=got.notices.append,
        cache_folder=folder,
        trainer_options={"callbacks": [] if callback is None else [callback]},
        progress_bar=False,
    )
    got.weights = {name: p.detach() for name, p in trainable_parameters(model).items()}
    return got


def assert_same(got: Run, expected: Run) -> None:
    """Compare weights and scores bit for bit."""
    assert got.weights.keys() == expected.weights.keys()
    assert all(torch.equal(got.weights[name], expected.weights[name]) for name in got.weights)
    assert got.scores == expected.scores


def assert_close(got: Run, expected: Run) -> None:
    """Compare what batches of another size leave: sums are rounded otherwise, and Adam enlarges that."""
    assert got.scores == pytest.approx(expected.scores, rel=1e-2)
    for name in got.weights:
        torch.testing.assert_close(got.weights[name], expected.weights[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["fresh_neck", "frozen_neck", "last_block", "lst"])
def test_train__cached_features__give_the_same_weights_from_each_view_encoded_once(setting: Setting, kind: str) -> None:
    assert build(kind).encoder.frozen_stage() == STAGES[kind]
    cached, plain = run(setting, kind, "memory"), run(setting, kind, "off")
    assert_same(cached, plain)
    assert sum(plain.encoded) == EPOCHS * (ROWS + VALIDATION_ROWS)
    assert sum(cached.encoded) == VIEWS * ROWS + VALIDATION_ROWS
    assert cached.notices == []


def test_train__encoder_that_trains__is_not_cached(setting: Setting, tmp_path: Path) -> None:
    cached, plain = run(setting, "full", "disk", tmp_path / "features"), run(setting, "full", "off")
    assert build("full").encoder.frozen_stage() == STAGES["full"]
    assert_same(cached, plain)
    assert cached.encoded == plain.encoded
    assert not (tmp_path / "features").exists()


def test_train__new_views_every_epoch__caches_only_the_validation(setting: Setting) -> None:
    got = run(setting, "fresh_neck", "memory", cached_views=0)
    assert sum(got.encoded) == EPOCHS * ROWS + VALIDATION_ROWS
    assert got.notices == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_train__cache_on_disk__equals_the_one_in_memory(setting: Setting, precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    left = folder / "rank0" / "train" / "0.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("what a killed run left")
    on_disk = run(setting, "last_block", "disk", folder, precision=precision)
    assert_same(on_disk, run(setting, "last_block", "memory", precision=precision))
    assert sum(on_disk.encoded) == VIEWS * ROWS + VALIDATION_ROWS
    assert not folder.exists()


class Stop(lightning.Callback):
    """Raises in the fourth step, when files are there."""

    def __init__(self, error: BaseException, folder: Path) -> None:
        self.error = error
        self.folder = folder
        self.files: set[str] = set()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Raise."""
        if trainer.global_step == 4:
            self.files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*.*")}
            raise self.error


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_train__ended_by_an_error_or_interrupt__deletes_the_files(
    setting: Setting, error: BaseException, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    stop = Stop(error, folder)
    if isinstance(error, KeyboardInterrupt):
        assert run(setting, "fresh_neck", "disk", folder, stop).result.stopped_by == "interrupt"
    else:
        with pytest.raises(ValueError, match="broken"):
            run(setting, "fresh_neck", "disk", folder, stop)
    assert stop.files == {f"rank0/train/{item}.safetensors" for item in range(VIEWS * ROWS)} | {
        f"rank0/validation/{item}.safetensors" for item in range(VALIDATION_ROWS)
    }
    assert list(tmp_path.iterdir()) == []


def test_train__disk_full__goes_on_without_further_files_and_says_so(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features"
    written: list[Path] = []
    write_bytes = Path.write_bytes

    def write_until_full(path: Path, content: Any) -> int:
        if len(written) == 5:
            write_bytes(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write_bytes(path, content)

    class Look(lightning.Callback):
        def on_train_end(self, *_: Any) -> None:
            assert len([path for path in folder.rglob("*") if path.is_file()]) == 5

    monkeypatch.setattr(Path, "write_bytes", write_until_full)
    got = run(setting, "frozen_neck", "disk", folder, Look())
    monkeypatch.undo()
    assert_close(got, run(setting, "frozen_neck", "off"))
    assert len(got.notices) == 2, "one for each cache"
    assert all("No space left" in notice for notice in got.notices)
    assert "full: 5 images" in got.notices[0]
    assert not folder.exists()


def test_train__memory_budget_exceeded__gives_the_same_weights_and_says_so(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = 2 * 4 * 4 * 32 * 4  # the tokens of two blocks, float32
    items = VIEWS * ROWS + VALIDATION_ROWS
    memory = int((items - 6) * item / CACHE_SHARE)
    small = replace(detect_hardware(), memory=memory)
    monkeypatch.setattr(features, "detect_hardware", lambda: small)
    got = run(setting, "fresh_neck", "memory")
    assert_close(got, run(setting, "fresh_neck", "off"))
    assert items < sum(got.encoded) < EPOCHS * (ROWS + VALIDATION_ROWS)
    assert len(got.notices) == 2, "one for each cache"
    assert all("env.feature_cache='disk'" in notice for notice in got.notices)


def test_train__cache_on_disk_without_a_folder__is_refused(setting: Setting) -> None:
    with pytest.raises(ConfigError, match="cache_folder"):
        run(setting, "fresh_neck", "disk")


def draw_images(rows: int) -> Tensor:
    """Draw images of one size."""
    return torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)


def make_cache(model: SegmentationModel, stage: int, **options: Any) -> FeatureCache:
    """Make a cache in memory without a bound."""
    settings = {"folder": None, "budget": 10**9, "dtype": torch.float32, "on_full": pytest.fail, **options}
    return FeatureCache(model, stage, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])  # at 1 the state holds the tokens of block 0 twice
def test_feature_cache__later_visit__equals_the_first_bit_for_bit(
    stage: int, on_disk: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build("frozen_neck")
    images = draw_images(4)
    with torch.no_grad():
        expected = model.begin(images, stage)
    cache = make_cache(model, stage, folder=tmp_path / "cache" if on_disk else None, dtype=dtype)
    first = cache.states(torch.arange(4), images)
    later = cache.states(torch.tensor([2, 0]), torch.zeros_like(images[:2]))
    assert len(first) == len(later) == len(expected)
    for a, b, exact in zip(first, later, expected, strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
        assert torch.equal(a[[2, 0]], b)
        assert torch.equal(a, exact.to(dtype).float())


def test_feature_cache__batch_of_known_new_and_repeated_items__is_in_order() -> None:
    model = build("fresh_neck")
    images = draw_images(6)
    with torch.no_grad():
        expected = model.begin(images, 3)
    cache = make_cache(model, 3)
    cache.states(torch.tensor([1, 4]), images[[1, 4]])
    rows = [0, 4, 5, 0, 1]
    for got, all_rows in zip(cache.states(torch.tensor(rows), images[rows]), expected, strict=True):
        torch.testing.assert_close(got, all_rows[rows], rtol=1e-5, atol=1e-5)


def test_feature_cache__over_budget__computes_the_rest_every_time_and_says_so_once() -> None:
    model = build("frozen_neck")
    encoded: list[int] = []
    model.encoder.blocks[0].register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    said: list[str] = []
    images = draw_images(4)
    cache = make_cache(model, 4, budget=2 * 32 * 4 * 4 * 2, dtype=torch.bfloat16, on_full=said.append)
    first = cache.states(torch.arange(4), images)
    assert cache.full
    again = cache.states(torch.arange(4), images)
    cache.states(torch.tensor([0, 1]), images[:2])
    assert encoded == [4, 2]
    assert len(said) == 1
    assert "full: 2 images" in said[0]
    torch.testing.assert_close(again[0], first[0], rtol=1e-2, atol=1e-2)


def test_feature_cache__encoder_in_training__is_frozen_while_encoding_and_trains_after() -> None:
    model = build("last_block").train()
    model.encoder.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[bool] = []
    model.encoder.blocks[0].register_forward_hook(lambda block, *_: seen.append(block.training))
    images = draw_images(2)
    states = make_cache(model, 2).states(torch.arange(2), images)
    assert seen == [False]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(part.requires_grad for part in states)
    model.finish(states, 2, images).mask_logits.sum().backward()
    trained = trainable_parameters(model.encoder.blocks[2])
    assert trained["attn.qkv.lora_B"].grad is not None
    assert float(trained["attn.qkv.lora_B"].grad.abs().sum()) > 0


def test_feature_cache__error_while_encoding__leaves_the_modes() -> None:
    model = build("fresh_neck").train()
    with pytest.raises(ConfigError, match="divisible"):
        make_cache(model, 3).states(torch.arange(1), torch.zeros(1, 3, 30, 30))
    assert all(module.training for module in model.modules())
