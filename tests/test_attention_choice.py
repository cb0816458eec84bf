"""Which form of attention a block takes: the faster one, the same output, measured once, kept by a fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from semseg_automl import fitting, training
from semseg_automl.build import build_method
from semseg_automl.data.synthetic import draw_dataset
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import BundleError, ConfigError
from semseg_automl.estimator import SemanticSegmentor
from semseg_automl.inference import Predictor
from semseg_automl.models import ENCODERS, attention, attention_choice
from semseg_automl.models.attention import Form, RelativeAttention
from semseg_automl.models.attention_choice import MARGIN, AttentionShape, choose_attention
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SAM_SIZES, SamViT
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.models.tiny_vit import TinyViT

SMALL: dict[str, Any] = {
    "embed_dim": 32, "depth": 3, "num_heads": 2, "global_blocks": (1,), "window_size": 3, "grid": 4,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test measures for itself."""
    monkeypatch.setattr(attention_choice, "_chosen", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[AttentionShape]:
    """Windows are twice as fast chunked, global blocks fused; what was asked for is listed."""
    asked: list[AttentionShape] = []

    def times(shape: AttentionShape) -> dict[Form, list[float]]:
        asked.append(shape)
        return {"chunked": [1.0], "fused": [2.0 if shape.height == 3 else 0.5]}

    monkeypatch.setattr(attention_choice, "measure", times)
    return asked


def sam() -> SamViT:
    """A small SAM whose relative positions are not zero."""
    encoder = SamViT(**SMALL)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter)
    return encoder.eval()


def choose(encoder: nn.Module, *, training: bool = True, size: tuple[int, int] = (64, 80), **options: Any) -> str:
    settings = {"batch": 2, "device": CPU, "dtype": torch.float32, **options}
    return choose_attention(encoder, size, training=training, **settings)


def forms(encoder: nn.Module) -> list[Form | None]:
    return [module.form for module in encoder.modules() if isinstance(module, RelativeAttention)]


def noted(real: Callable[..., torch.Tensor], ran: list[str], form: str) -> Callable[..., torch.Tensor]:
    """Wrap a form so that its runs are listed."""

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        ran.append(form)
        return real(*tensors)

    return run


def test_choice__either_form_faster__is_taken_and_runs(
    clock: list[AttentionShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, images = sam(), torch.randn(2, 3, 64, 80)
    before = encoder(images)
    said = choose(encoder)
    assert said == (
        "attention: chunked in windows, 2.0 x as fast as fused; fused in global blocks, 2.0 x as fast as chunked"
    )
    assert forms(encoder) == ["chunked", "fused", "chunked"]
    ran: list[str] = []
    for form, name in (("chunked", "_chunked_attention"), ("fused", "augmented_attention")):
        monkeypatch.setattr(attention, name, noted(getattr(attention, name), ran, form))
    after = encoder(images)
    assert ran == ["chunked", "fused", "chunked"]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("fused", "expected"), [(1 / MARGIN + 0.01, "chunked"), (1 / MARGIN - 0.01, "fused")])
def test_choice__other_form_a_little_faster__is_taken_only_beyond_the_margin(
    fused: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "measure", lambda shape: {"chunked": [1.0], "fused": [fused]})
    encoder = sam()
    said = choose(encoder)
    assert forms(encoder) == [expected] * 3
    assert f"{expected} in windows, {fused if expected == 'chunked' else 1 / fused:.1f} x as fast as" in said


def test_choice__accelerator__has_the_fused_form_as_its_usual_one(clock: list[AttentionShape]) -> None:
    encoder = sam()
    choose(encoder, device=torch.device("cuda"))
    assert forms(encoder) == ["chunked", "fused", "chunked"]
    assert {shape.device for shape in clock} == {"cuda"}
    assert attention.usual_form(torch.device("cuda")) == "fused"


def test_choice__shapes__are_those_of_the_blocks(clock: list[AttentionShape]) -> None:
    choose(sam(), dtype=torch.bfloat16)
    windows, whole = clock
    assert (windows.height, windows.width, windows.sequences) == (3, 3, 2 * 2 * 2 * 2)  # 2 x 2 windows of a 4 x 5 grid
    assert (whole.height, whole.width, whole.sequences) == (4, 5, 2 * 2)
    assert {(s.head_width, s.dtype, s.gradients) for s in clock} == {(16, torch.bfloat16, True)}
    choose(sam(), size=(1024, 1024), batch=64)
    assert clock[-1].sequences == 1
    assert clock[-2].sequences * 3**4 <= attention_choice.SCORES_ON_CPU


def test_choice__same_shape_again__is_not_measured_again(clock: list[AttentionShape]) -> None:
    choose(sam())
    assert len(clock) == 2, "blocks of one shape are measured once"
    encoder = sam()
    choose(encoder)
    assert len(clock) == 2
    assert forms(encoder) == ["chunked", "fused", "chunked"]
    choose(encoder, training=False)
    assert len(clock) == 4, "without the backward pass the other form may be faster"


def test_choice__blocks_that_are_frozen__are_measured_without_gradients(clock: list[AttentionShape]) -> None:
    encoder = sam()
    encoder.mark_pretrained()
    build_method("lora", {"last_blocks": 2}).apply(encoder)
    said = choose(encoder)
    assert [(shape.height, shape.gradients) for shape in clock] == [(3, False), (4, True), (3, True)]
    assert "chunked in windows that are frozen, " in said


def test_choice__encoder_without_relative_positions__measures_nothing(
    clock: list[AttentionShape], tmp_path: Path
) -> None:
    vit = TinyViT(embed_dim=32, depth=1, num_heads=1, patch_size=8, grid=4, out_channels=32)
    assert choose(vit, file=tmp_path / "kept.json") == ""
    assert choose(nn.Linear(2, 2)) == ""
    assert clock == []
    assert list(tmp_path.iterdir()) == []


def test_choice__meta_device__measures_nothing(clock: list[AttentionShape]) -> None:
    with torch.device("meta"):
        encoder = SamViT(**SMALL)
    assert choose(encoder, device=torch.device("meta")) == ""
    assert clock == []


@pytest.mark.parametrize("form", ["chunked", "fused"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_choice__either_form__compiles_without_a_break_and_exports_torch_s_own_operators(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = 2.0 if form == "chunked" else 0.5
    monkeypatch.setattr(attention_choice, "measure", lambda shape: {"chunked": [1.0], "fused": [other]})
    encoder, images = sam(), torch.randn(1, 3, 64, 64)
    choose(encoder, size=(64, 64))
    assert forms(encoder) == [form] * 3
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), encoder(images), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(encoder, (images,))
    assert "semseg_automl" not in "".join(str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure__any_shape__times_both_forms_and_leaves_the_random_state(
    gradients: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, bool]] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *biases: torch.Tensor, form: Form) -> torch.Tensor:
        out = attention.relative_attention(q, k, v, biases[0], biases[1], form)
        ran.append((form, out.requires_grad))
        assert out.dtype == dtype
        return out

    monkeypatch.setattr(attention_choice, "relative_attention", spy)
    before = torch.get_rng_state()
    with torch.inference_mode():
        seconds = attention_choice.measure(AttentionShape("cpu", 1, dtype, 4, 3, 5, 8, gradients))
    assert set(seconds) == {"chunked", "fused"}
    assert all(0 < value < 9 for values in seconds.values() for value in values)
    assert {entry[1] for entry in ran} == {gradients}
    counts = [sum(entry[0] == form for entry in ran) for form in ("chunked", "fused")]
    assert counts[0] == counts[1] >= 2, "a first run that is not counted, and one at least that is"
    assert torch.equal(torch.get_rng_state(), before)


def test_measure__form_that_is_hopeless_on_few_tokens__is_not_run_on_many(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: dict[str, int] = {"chunked": 0, "fused": 0}
    seconds = {"chunked": 0.01, "fused": 0.03}

    def run(form: Form, tensors: list[torch.Tensor], device: torch.device) -> float:
        largest[form] = max(largest[form], tensors[0].shape[1])
        return seconds[form]

    monkeypatch.setattr(attention_choice, "_run", run)
    shape = AttentionShape("cpu", 1, torch.float32, 1, 40, 8, 8, gradients=False)
    assert attention_choice.measure(shape) == {"chunked": [0.01] * 3, "fused": [0.03] * 3}
    assert largest == {"chunked": 320, "fused": 320}, "three times slower is not more than that"
    largest.update(chunked=0, fused=0)
    seconds["fused"] = 0.031
    assert attention_choice.measure(shape) == {"chunked": [0.01] * 3, "fused": [0.031] * 3}
    assert largest == {"chunked": 256, "fused": 256}
    seconds["chunked"] = 0.1
    attention_choice.measure(shape)
    assert largest["chunked"] == 320, "the usual form is never given up for a trial"


def test_choice__other_form_faster_by_chance__is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "measure", lambda shape: {"chunked": [1.0, 9.0], "fused": [0.5, 0.95]})
    encoder = sam()
    assert "chunked in windows, 0.5 x as fast as fused" in choose(encoder)
    assert forms(encoder) == ["chunked"] * 3


def test_file__kept_choice__holds_in_another_process(clock: list[AttentionShape], tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    choose(sam(), file=file)
    record = json.loads(file.read_text())
    assert [value["form"] for value in record.values()] == ["chunked", "fused"]
    for value in record.values():
        value["form"] = "fused"
    file.write_text(json.dumps(record))
    attention_choice._chosen.clear()
    encoder = sam()
    choose(encoder, file=file)
    assert forms(encoder) == ["fused"] * 3
    assert len(clock) == 2
    choose(encoder, file=file, batch=1)
    assert len(json.loads(file.read_text())) == 4, "other shapes are measured and added"


@pytest.mark.parametrize(
    "content",
    ["", "[1]", '{"a": 3}', '{"a": {"form": "fast", "ratio": 1}}', '{"a": {"form": "fused", "ratio": "x"}}', "\0" * 9],
)
def test_file__damaged__is_refused(content: str, clock: list[AttentionShape], tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"attention.json' is damaged .* Delete it"):
        choose(sam(), file=file)


def test_file__too_large__is_not_read(clock: list[AttentionShape], tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    file.write_text(" " * (attention_choice.MAX_BYTES + 1) + "{}")
    with pytest.raises(ConfigError, match="is larger than"):
        choose(sam(), file=file)


def test_file__cannot_be_written__raises(clock: list[AttentionShape], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot write"):
        choose(sam(), file=tmp_path / "nowhere" / "attention.json")


def test_fit__sam__says_what_it_chose_and_keeps_it(
    clock: list[AttentionShape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SAM_SIZES, "sam_vit_b", {**SAM_SIZES["sam_vit_b"], "embed_dim": 32, "depth": 3})
    monkeypatch.setitem(ENCODERS, "sam_vit_b", partial(SamViT, **SMALL))
    folder = draw_dataset(tmp_path / "drawn", kind="binary", train=4, val=1, test=1, size=(64, 64))
    used: list[list[Form | None]] = []

    def spy(model: SegmentationModel, *given: Any, **options: Any) -> None:
        used.append(forms(model.encoder))
        assert (tmp_path / "run" / "resume" / "attention.json").is_file()
        training.train(model, *given, **options)

    monkeypatch.setattr(fitting, "train", spy)
    settings = {
        "model.encoder": "sam_vit_b", "model.pretrained": False, "model.input_size": 64, "optim.max_epochs": 1,
        "env.batch_size": 4, "env.precision": "32-true",
    }  # fmt: skip
    segmentor = SemanticSegmentor(path=tmp_path / "run", hyperparameters=settings, verbosity=1)
    segmentor.fit(folder / "train.csv", folder / "val.csv")
    assert used == [["chunked", "fused", "chunked"]]
    assert "attention: chunked in windows, 2.0 x as fast as fused; fused in global" in capsys.readouterr().out
    asked = len(clock)
    assert [shape.gradients for shape in clock[:2]] == [True, True]
    assert not any(shape.gradients for shape in clock[2:]), "the report of the fit predicts"
    segmentor.predict(folder / "test.csv")
    SemanticSegmentor.load(tmp_path / "run").predict(folder / "test.csv")
    assert len(clock) == asked


def test_predictor__sam__predicts_with_what_it_chose(clock: list[AttentionShape]) -> None:
    model = SegmentationModel(sam(), MaskDecoder(256)).eval()
    images = (np.full((64, 80, 3), 90, np.uint8),)
    table = MaskTable(images, None, pd.RangeIndex(1))
    (before,) = Predictor(model, (64, 80), 1, CPU).scores(table)
    assert forms(model.encoder) == ["chunked", "fused", "chunked"]
    assert {(shape.gradients, shape.dtype) for shape in clock} == {(False, torch.float32)}
    for module in model.modules():
        if isinstance(module, RelativeAttention):
            module.form = None
    with torch.inference_mode():
        expected = model(torch.from_numpy(images[0]).permute(2, 0, 1)[None]).mask_logits
    assert isinstance(before, torch.Tensor)
    upsampled = nn.functional.interpolate(expected, (64, 80), mode="bilinear").sigmoid()[0]
    torch.testing.assert_close(before, upsampled, rtol=1e-4, atol=1e-5)
