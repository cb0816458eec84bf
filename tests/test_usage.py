"""Which experts are used: counts of a routing made by hand, what they say, and their way into the saved segmentor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.expert_chart import EXPERT_USAGE
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft.conv_lora import ConvLora, ConvLoraLinear
from semseg_automl.peft.lora import Lora
from semseg_automl.peft.usage import (
    ExpertCounter,
    effective_number,
    expert_layers,
    is_collapsed,
    layer_labels,
    usage_summary,
)

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.batch_size": 4,
    "env.precision": "32-true",
    "data.augmentation": "none",
    "optim.max_epochs": 1,
}
VALIDATION_ROWS = 9


def routed_layer() -> ConvLoraLinear:
    """Build a layer of three experts: the larger of two channels chooses expert 0 or 1, and nothing expert 2."""
    layer = ConvLoraLinear(nn.Linear(2, 2), rank=2, experts=3)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(2))
        layer.w_gate.copy_(torch.tensor([[1.0, 0.0, -9.0], [0.0, 1.0, -9.0]]))
    return layer.eval()


def samples(*channels: int) -> torch.Tensor:
    """Return a map of 4 x 4 tokens per entry, 1 in that channel and 0 in the other."""
    return torch.eye(2)[list(channels)][:, None, None, :].expand(-1, 4, 4, -1)


def labelled(*rows: list[int]) -> dict[str, list[int]]:
    """Name each row of counts as the blocks of an encoder would be."""
    return {f"encoder.blocks.{i}.attn.qkv": counts for i, counts in enumerate(rows)}


def test_expert_layers__adapted_encoder__are_found_by_name_in_order() -> None:
    encoder = TinyViT(embed_dim=32, depth=3, num_heads=2, patch_size=8, out_channels=32, grid=4)
    ConvLora(rank=2, experts=4, last_blocks=2).apply(encoder)
    assert list(expert_layers(encoder)) == ["blocks.1.attn.qkv", "blocks.2.attn.qkv"]
    counter = ExpertCounter(encoder.eval())
    with torch.no_grad():
        encoder(torch.randn(5, 3, 32, 32))
    counter.add()
    assert [sum(counts) for counts in counter.counts().values()] == [5, 5]
    plain = TinyViT(embed_dim=32, depth=2, num_heads=2, patch_size=8, out_channels=32, grid=4)
    Lora(rank=2).apply(plain)
    assert ExpertCounter(plain).counts() == {}


def test_counter__routing_made_by_hand__adds_up_batches_until_reset() -> None:
    model = nn.ModuleDict({"a": routed_layer(), "b": routed_layer()})
    counter = ExpertCounter(model)
    for of_a, of_b in (((0, 1, 1), (0, 0, 0)), ((1, 1), (1, 0))):
        model["a"](samples(*of_a))
        model["b"](samples(*of_b))
        counter.add()
    assert counter.counts() == {"a": [1, 4, 0], "b": [4, 1, 0]}
    counter.reset()
    assert counter.counts() == {"a": [0, 0, 0], "b": [0, 0, 0]}


def test_counter__one_pass_added_after_recomputing__counts_it_once() -> None:
    layer = routed_layer()
    counter = ExpertCounter(nn.ModuleDict({"a": layer}))
    for _ in range(3):  # as recomputed activations would
        layer(samples(0, 1))
    counter.add()
    assert counter.counts() == {"a": [1, 1, 0]}


def test_counter__training_mode__counts_nothing() -> None:
    layer = routed_layer()
    counter = ExpertCounter(nn.ModuleDict({"a": layer}))
    layer.train()(samples(0, 1, 1))
    assert len(layer.chosen_expert) == 3
    counter.add()
    assert counter.counts() == {"a": [0, 0, 0]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counter__on_cuda__adds_without_waiting_for_the_device() -> None:
    model = nn.ModuleDict({"a": routed_layer()}).cuda()
    counter = ExpertCounter(model)
    model["a"](samples(0, 1, 1).cuda())
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        counter.add()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert counter.counts() == {"a": [1, 2, 0]}


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=12))
def test_effective_number__any_counts__is_one_to_the_experts_that_were_chosen(counts: list[int]) -> None:
    used = sum(count > 0 for count in counts)
    number = effective_number(counts)
    assert math.isnan(number) if not used else 1 - 1e-9 <= number <= used + 1e-9
    assert effective_number([7] * len(counts)) == pytest.approx(len(counts))
    assert used == 0 or effective_number([*counts, 0]) == pytest.approx(number)


@pytest.mark.parametrize(
    ("counts", "collapsed"),
    [
        ([995, 5], True),
        ([990, 10], False),  # 99 % exactly
        ([0, 0, 40], True),
        ([40], False),  # there is no other expert
        ([0, 0, 2], False),  # fewer choices than experts
        ([0, 0], False),
    ],
)
def test_is_collapsed__counts__tells_whether_one_of_several_took_over(counts: list[int], collapsed: bool) -> None:
    assert is_collapsed(counts) == collapsed


def test_layer_labels__several_layers_in_a_block__say_which() -> None:
    names = ["encoder.blocks.3.attn.qkv", "encoder.blocks.3.attn.proj", "decoder.layer"]
    assert layer_labels(names) == ["block 3 attn.qkv", "block 3 attn.proj", "decoder.layer"]
    assert layer_labels(["encoder.blocks.3.attn.qkv", "encoder.blocks.12.attn.qkv"]) == ["block 3", "block 12"]


def test_usage_summary__even_use__says_how_many_without_a_warning() -> None:
    line = usage_summary(labelled([5, 5, 5, 5], [10, 10, 0, 0]))
    assert line.startswith("experts: 2 layers, 3.0 of 4 used per layer on average")
    assert "WARNING" not in line
    assert usage_summary(labelled([3, 3])).startswith("experts: 1 layer, 2.0 of 2 used")


def test_usage_summary__dead_routers__are_named_in_the_same_line() -> None:
    line = usage_summary(labelled([5, 5], [10, 0], [0, 10]))
    assert "WARNING" in line
    assert "in 2 of 3 layers (block 1, block 2)" in line
    assert "\n" not in line
    assert "(block 0, block 1, block 2, block 3, ...)" in usage_summary(labelled(*[[9, 0]] * 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set, with a checkpoint of a ViT of two blocks beside it."""
    folder = draw_dataset(
        tmp_path_factory.mktemp("data"), kind="binary", train=8, val=VALIDATION_ROWS, test=1, size=(32, 32)
    )
    encoder = TinyViT(embed_dim=64, depth=2, num_heads=1, patch_size=8, out_channels=32, grid=4)
    state = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("neck")}
    torch.save({**state, "pos_embed": state["pos_embed"].flatten(1, 2)}, folder / "vit.pth")
    return folder


def test_fit__conv_lora_then_lora__usage_is_said_saved_and_drawn_where_there_are_experts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    segmentor = SemanticSegmentor(
        path=run, verbosity=1, hyperparameters={**SETTINGS, "model.checkpoint": str(folder / "vit.pth")}
    )
    segmentor.fit(folder / "train.csv", folder / "val.csv", hyperparameters={"optim.peft": "conv_lora"})
    usage = segmentor.fit_summary()["expert_usage"]
    assert {name: (len(counts), sum(counts)) for name, counts in usage.items()} == {
        f"encoder.blocks.{i}.attn.qkv": (8, VALIDATION_ROWS) for i in (0, 1)
    }
    assert capsys.readouterr().out.count(f"{usage_summary(usage)}\n") == 1
    assert SemanticSegmentor.load(run).fit_summary()["expert_usage"] == usage
    assert (run / EXPERT_USAGE).is_file()

    segmentor.fit(folder / "train.csv", folder / "val.csv", hyperparameters={"optim.peft": "lora"})
    assert "experts" not in capsys.readouterr().out
    assert SemanticSegmentor.load(run).fit_summary()["expert_usage"] == {}
    assert not (run / EXPERT_USAGE).exists(), "the chart of the fit before would be of other weights"

    record = yaml.safe_load((run / "bundle.yaml").read_text())
    del record["expert_usage"]  # as before usage was counted
    (run / "bundle.yaml").write_text(yaml.safe_dump(record))
    assert SemanticSegmentor.load(run).fit_summary()["expert_usage"] == {}
