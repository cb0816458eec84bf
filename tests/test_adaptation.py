"""Which fine-tuning method and options a plan gets: per method, from the settings, before anything is built."""

from __future__ import annotations

import math
from typing import Any

import pytest

from semseg_automl.adaptation import SECTIONS, Options, choose_learning_rate, choose_method
from semseg_automl.build import build_method
from semseg_automl.config import Config, load_config
from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.hardware import Hardware
from semseg_automl.models.facts import EncoderFacts, encoder_facts
from semseg_automl.peft import METHODS
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import SegmentationTask

SHAPE: dict[str, Any] = {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16, "grid": 14}
DEIT = EncoderFacts("tiny_vit", "tiny_vit", SHAPE, 16, 192, 12, "absent/vit.safetensors", "a file", taps=4)
SCRATCH = encoder_facts("tiny_vit")
SAM = encoder_facts("sam_vit_b")
PYRAMID = EncoderFacts("timm/resnet18", "timm", {}, 16, 512, 0, "official", "a convolutional one")
BINARY = SegmentationTask("binary", values=(0, 255), class_names=("background", "polyp"))

LORA: Options = {"rank": 8, "alpha": 8 * 32 / 3, "scaling": "rank", "dora": False, "decoder_rank": 0, "b_lr_ratio": 1.0}
EXPERTS: Options = {
    **{"experts": 8, "activation": "gelu", "interpolation": "bicubic", "gate": "balanced"},
    "windowed": True,
}
DEFAULTS: dict[str, Options] = {
    "decoder_only": {},
    "bitfit": {},
    "adapter": {"width": 2},
    "vpt": {"tokens": 12},
    "lst": {},  # the width follows from the encoder's
    "sam_adapter": {},
    "ssf": {},
    "lora": LORA,
    "conv_lora": LORA | EXPERTS,
    "full": {},
}


def choose(method: str, settings: dict[str, Any], encoder: EncoderFacts = DEIT) -> tuple[Options, dict[str, str]]:
    """Choose a named method's options."""
    reasons: dict[str, str] = {}
    name, options = choose_method(load_config("fast", {"optim.peft": method, **settings}), encoder, reasons)
    assert name == method
    return options, reasons


def plan_of(method: str, settings: dict[str, Any] | None = None, *, rows: int = 10) -> Plan:
    """Plan a fit whose encoder comes from a file that does not exist."""
    stats = DataStats(rows=rows, sizes=((256, 256),) * rows)
    config = load_config("fast", {"optim.peft": method, **(settings or {})})
    return make_plan(config, BINARY, stats, Hardware("cpu", "CPU", 8 * 2**30, 2, bf16=False), DEIT)


def test_choose_method__nothing_asked__depends_on_weights_and_blocks() -> None:
    chosen = {facts.why: choose_method(Config(), facts, {})[0] for facts in (DEIT, SAM, SCRATCH, PYRAMID)}
    assert list(chosen.values()) == ["conv_lora", "conv_lora", "full", "full"]


@pytest.mark.parametrize("method", METHODS)
def test_choose_method__options_left_alone__are_the_method_s_own(method: str) -> None:
    options, reasons = choose(method, {})
    assert options == DEFAULTS[method]
    assert reasons["peft"] == "as asked"
    assert ("peft_options" in reasons) == (SECTIONS.get(method) == "lora")
    assert build_method(method, options).name == method


@pytest.mark.parametrize(
    ("method", "settings", "changed"),
    [
        ("adapter", {"optim.adapter.width": 5}, {"width": 5}),
        ("vpt", {"optim.vpt.tokens": 3}, {"tokens": 3}),
        ("lst", {"optim.lst.width": 24}, {"width": 24}),
        ("lst", {"optim.lst.width": "auto"}, {}),
        ("sam_adapter", {"optim.sam_adapter.width": 7}, {"width": 7}),
        ("lora", {"optim.lora.rank": 4}, {"rank": 4, "alpha": 4 * 32 / 3}),
        ("lora", {"optim.lora.alpha": 5.0}, {"alpha": 5.0}),
        ("lora", {"optim.lora.last_blocks": 2}, {"last_blocks": 2}),
        ("lora", {"optim.lora.dora": True, "optim.lora.decoder_rank": 2}, {"dora": True, "decoder_rank": 2}),
        ("conv_lora", {"optim.lora.b_lr_ratio": 16.0, "optim.lora.experts": 3}, {"b_lr_ratio": 16.0, "experts": 3}),
        ("conv_lora", {"optim.lora.gate": "learned"}, {"gate": "learned"}),
        ("conv_lora", {"optim.lora.windowed": False}, {"windowed": False}),
    ],
)
def test_choose_method__options_given__are_taken_and_nothing_else_changes(
    method: str, settings: dict[str, Any], changed: Options
) -> None:
    options, reasons = choose(method, settings)
    assert options == DEFAULTS[method] | changed
    assert "does not use" not in reasons.get("peft_options", "")
    build_method(method, options)


@pytest.mark.parametrize(
    ("method", "settings", "unused"),
    [
        ("full", {"optim.vpt.tokens": 3, "optim.lora.rank": 2}, ["optim.lora.rank", "optim.vpt.tokens"]),
        ("adapter", {"optim.adapter.width": 3, "optim.lst.width": 8}, ["optim.lst.width"]),
        ("lora", {"optim.lora.experts": 3, "optim.lora.rank": 2}, ["optim.lora.experts"]),
        ("lora", {"optim.lora.windowed": False}, ["optim.lora.windowed"]),
        ("conv_lora", {"optim.sam_adapter.width": 8}, ["optim.sam_adapter.width"]),
    ],
)
def test_choose_method__options_of_other_methods__are_named_as_not_used(
    method: str, settings: dict[str, Any], unused: list[str]
) -> None:
    reason = choose(method, settings)[1]["peft_options"]
    assert reason.endswith(f"{method} does not use {', '.join(unused)}")


@pytest.mark.parametrize(("rank", "root"), [(3, math.sqrt(3)), (12, math.sqrt(12))])
def test_choose_method__alpha_left_open__gives_the_paper_s_scale_at_the_paper_s_rank(rank: int, root: float) -> None:
    plain = choose("lora", {"optim.lora.rank": rank})[0]
    assert float(plain["alpha"]) / rank == pytest.approx(32 / 3)  # at every rank
    stable = choose("lora", {"optim.lora.rank": rank, "optim.lora.scaling": "sqrt_rank"})[0]
    assert stable["scaling"] == "sqrt_rank"
    assert float(stable["alpha"]) / root == pytest.approx(32 / 3 * math.sqrt(3 / rank))
    given = choose("lora", {"optim.lora.rank": rank, "optim.lora.scaling": "sqrt_rank", "optim.lora.alpha": 1.5})[0]
    assert given["alpha"] == 1.5


def test_choose_method__sam__has_the_paper_s_rank_and_alpha() -> None:
    options, reasons = choose("conv_lora", {}, SAM)
    assert (options["rank"], options["alpha"]) == (3, 32.0)
    assert "paper" in reasons["peft_options"]


@pytest.mark.parametrize("method", ["lora", "conv_lora"])
def test_make_plan__rank_above_the_encoder_s_width__is_refused_before_its_file_is_looked_for(method: str) -> None:
    assert plan_of(method, {"optim.lora.rank": 192}).peft_options["rank"] == 192
    with pytest.raises(ConfigError, match=r"optim\.lora\.rank is 193; .* 192 wide, allow 1 to 192"):
        plan_of(method, {"optim.lora.rank": 193})


def test_choose_method__option_that_the_method_refuses__is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lst\.width is 12; .*8 heads"):
        plan_of("lst", {"optim.lst.width": 12})
    with pytest.raises(ConfigError, match=r"optim\.vpt\.tokens is 2000; allowed: 1 to 1024"):
        plan_of("vpt", {"optim.vpt.tokens": 2000})


@pytest.mark.parametrize(
    ("asked", "nearest"), [("conv_lor", "conv_lora"), ("adaptor", "adapter"), ("sam-adapter", "sam_adapter")]
)
def test_choose_method__unknown_name__is_refused_with_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown optim\.peft '{asked}'.*did you mean '{nearest}'.*Known: "):
        plan_of(asked)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_choose_method__random_weights__leave_nothing_to_freeze(method: str) -> None:
    with pytest.raises(UnsupportedCombination, match=rf"'{method}'.*model\.checkpoint.*'full'"):
        choose(method, {}, SCRATCH)


@pytest.mark.parametrize("method", METHODS)
def test_make_plan__method_that_leaves_all_blocks_frozen__caches_their_features(method: str) -> None:
    plan = plan_of(method)
    cached = ("memory", 4) if method in ("decoder_only", "lst") else ("off", 0)
    assert (plan.feature_cache, plan.cached_views) == cached


def test_make_plan__lst__counts_the_tokens_after_every_block() -> None:
    # 4 views of 16 x 16 tokens of 192 floats: 0.75 MiB for each grid of an image.
    rows = 512
    alone, ladder = plan_of("decoder_only", rows=rows), plan_of("lst", rows=rows)
    assert alone.reasons["feature_cache"].startswith("about 1.5 GiB for 4 views")  # the neck's 4 grids
    assert ladder.reasons["feature_cache"].startswith("about 4.5 GiB for 4 views")  # all 12
    assert (alone.feature_cache, ladder.feature_cache) == ("memory", "disk")


@pytest.mark.parametrize(
    ("method", "encoder", "lr"),
    [
        ("conv_lora", DEIT, 1e-3),
        ("vpt", DEIT, 1e-3),
        ("full", DEIT, 1e-4),
        ("full", SCRATCH, 1e-3),
        ("lora", SAM, 1e-4),
    ],
)
def test_choose_learning_rate__left_open__is_small_for_pretrained_weights_that_move(
    method: str, encoder: EncoderFacts, lr: float
) -> None:
    reasons: dict[str, str] = {}
    assert choose_learning_rate(Config(), encoder, method, reasons) == lr
    assert choose_learning_rate(load_config("fast", {"optim.lr": 0.02}), encoder, method, reasons) == 0.02
    assert reasons["lr"] == "as asked"


def test_last_blocks__as_many_as_there_are_or_more__are_no_frozen_prefix_or_refused() -> None:
    assert plan_of("lora", {"optim.lora.last_blocks": 11}).feature_cache != "off"
    assert plan_of("lora", {"optim.lora.last_blocks": 12}).feature_cache == "off"
    with pytest.raises(ConfigError, match=r"last_blocks is 13; tiny_vit has 12 blocks"):
        plan_of("lora", {"optim.lora.last_blocks": 13})
