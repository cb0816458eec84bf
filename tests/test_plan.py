"""The plan: every "auto" decided with its reason, what was asked kept, and combinations that cannot work refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from semseg_automl.build import build_model
from semseg_automl.config import Config, load_config
from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.fingerprint import ClassShare
from semseg_automl.hardware import Hardware
from semseg_automl.losses import CRITERIA
from semseg_automl.metrics import DEFAULT_METRICS
from semseg_automl.models.facts import EncoderFacts, encoder_facts
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import SegmentationTask

GIB = 2**30
CPU = Hardware("cpu", "CPU with 2 cores", 8 * GIB, 2, bf16=False)
BINARY = SegmentationTask("binary", values=(0, 255), class_names=("background", "polyp"))
MULTICLASS = SegmentationTask("multiclass", values=(0, 1, 5), class_names=("sky", "road", "car"))
CITY = SegmentationTask("multiclass", values=(0, 1, 2, 3), class_names=("sky", "road", "tree", "tram"))
STATS = DataStats(rows=40, sizes=((480, 640),) * 40)
VIT: dict[str, Any] = {"embed_dim": 64, "depth": 4, "num_heads": 1, "patch_size": 8, "grid": 4}
SCRATCH = encoder_facts("tiny_vit")
PRETRAINED = EncoderFacts(
    "tiny_vit", "tiny_vit", VIT | {"neck_taps": [1, 3]}, 8, 64, 4, "absent/vit.safetensors", "a file"
)


def plan_of(
    settings: dict[str, Any] | None = None,
    task: SegmentationTask = BINARY,
    stats: DataStats = STATS,
    hardware: Hardware = CPU,
    encoder: EncoderFacts = SCRATCH,
    **options: Any,
) -> Plan:
    """Make a plan from the default preset and overrides."""
    return make_plan(load_config("fast", settings), task, stats, hardware, encoder, **options)


def with_checkpoint(settings: dict[str, Any] | None = None, **options: Any) -> Plan:
    """Make a plan for an encoder whose weights come from a file; making it opens none."""
    return plan_of(settings, encoder=PRETRAINED, **options)


CASES: dict[str, tuple[dict[str, Any], SegmentationTask, bool]] = {
    "binary": ({}, BINARY, False),
    "binary_pretrained": ({}, BINARY, True),
    "multiclass": ({}, MULTICLASS, False),
    "multiclass_queries": ({"model.multiclass_head": "queries"}, MULTICLASS, False),
    "multiclass_pretrained_lora": ({"optim.peft": "lora"}, MULTICLASS, True),
}


@pytest.mark.parametrize("case", CASES)
def test_make_plan__everything_auto__decides_all_and_says_why(case: str) -> None:
    settings, task, pretrained = CASES[case]
    plan = (with_checkpoint if pretrained else plan_of)(settings, task=task)
    assert "auto" not in yaml.safe_dump(plan.model_dump(mode="json", exclude={"reasons"}))
    decided = {"encoder", "decoder_options", "input_size", "peft", "loss", "lr", "batch_size", "max_epochs"}
    decided |= {"micro_batch_size", "precision", "num_workers", "augmentation", "checkpointing", "feature_cache"}
    decided |= {"peft_options"} if plan.peft_options else set()
    assert decided <= set(plan.reasons) <= set(Plan.model_fields)
    assert all(plan.reasons.values())
    for name, reason in plan.reasons.items():
        assert next(line for line in str(plan).splitlines() if line.startswith(name + " ")).endswith(f" {reason}")


@pytest.mark.parametrize("case", CASES)
def test_make_plan__everything_auto__describes_a_network_that_can_be_built_and_trained(case: str) -> None:
    settings, task, pretrained = CASES[case]
    plan = (with_checkpoint if pretrained else plan_of)(settings, task=task)
    model = build_model(plan, pretrained=False).eval()
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 2 * model.encoder.stride, 2 * model.encoder.stride))
    assert (output.class_logits is not None) == (CRITERIA[plan.loss].head == "queries")
    if output.class_logits is None:
        assert output.mask_logits.shape[1] == task.num_scores
    else:
        assert output.mask_logits.shape[1] >= task.num_classes
    assert (CRITERIA[plan.loss].head == "binary") == (task.kind == "binary")
    assert plan.validation_metric in DEFAULT_METRICS[task.kind]


def test_make_plan__values_asked_for__are_kept_and_marked() -> None:
    asked = {
        "model.input_size": (64, 96),
        "model.decoder_dim": 48,
        "model.detail": False,
        "optim.peft": "conv_lora",
        "optim.lora.rank": 5,
        "optim.lora.alpha": 7.0,
        "optim.lora.experts": 3,
        "optim.loss": "balanced_bce",
        "optim.lr": 0.0123,
        "optim.max_epochs": 17,
        "data.augmentation": "strong",
        "env.batch_size": 6,
        "env.micro_batch_size": 3,
        "env.num_workers": 1,
        "env.precision": "bf16-mixed",
    }
    plan = with_checkpoint(asked, validation_metric="dice", seed=7, time_limit=60.0)
    assert plan.input_size == (64, 96)
    assert plan.decoder_options["dim"] == 48
    assert plan.decoder_options["detail"] is False
    assert (plan.peft, plan.loss, plan.lr, plan.max_epochs) == ("conv_lora", "balanced_bce", 0.0123, 17)
    assert {"rank": 5, "alpha": 7.0, "experts": 3}.items() <= plan.peft_options.items()
    assert (plan.augmentation, plan.precision) == ("strong", "bf16-mixed")
    assert (plan.batch_size, plan.micro_batch_size, plan.num_workers) == (6, 3, 1)
    assert (plan.validation_metric, plan.seed, plan.time_limit) == ("dice", 7, 60.0)
    marked = ["input_size", "decoder_options", "peft", "peft_options", "loss", "lr", "max_epochs", "augmentation"]
    marked += ["batch_size", "micro_batch_size", "num_workers", "precision"]
    assert {plan.reasons[name] for name in marked} == {"as asked"}


def test_make_plan__one_number_as_input_size__is_a_square() -> None:
    assert plan_of({"model.input_size": 64}).input_size == (64, 64)


@pytest.mark.parametrize("size", [(480, 640), (900, 300), (70, 50), (30, 900)])
def test_make_plan__automatic_input_size__keeps_the_aspect_and_fits_the_stride(size: tuple[int, int]) -> None:
    plan = plan_of(stats=DataStats(rows=3, sizes=(size,) * 3))
    height, width = plan.input_size
    stride = int(str(plan.encoder_options["patch_size"]))
    assert height % stride == width % stride == 0
    assert min(height, width) >= stride
    assert height < size[0] + stride
    assert width < size[1] + stride
    drift = abs(math.log(height / width) - math.log(size[0] / size[1]))
    assert drift <= stride / height + stride / width, "rounding to whole patches moves each side by half of one"


def test_make_plan__checkpoint__takes_its_architecture_and_adapts_it_frozen() -> None:
    plan = with_checkpoint()
    assert VIT.items() <= plan.encoder_options.items()
    assert plan.checkpoint == "absent/vit.safetensors"
    assert plan.peft != "full"
    taps = plan.encoder_options["neck_taps"]
    assert isinstance(taps, list)
    assert set(taps) <= set(range(VIT["depth"]))
    assert plan.input_size[0] % VIT["patch_size"] == plan.input_size[1] % VIT["patch_size"] == 0


def test_make_plan__no_checkpoint__trains_everything() -> None:
    assert plan_of().peft == "full"


@pytest.mark.parametrize("memory", [1, 64 * 2**20, GIB, 4 * GIB, 2**42])
@pytest.mark.parametrize("batch_size", [1, 6, 7, 8])
def test_make_plan__less_memory__divides_the_same_effective_batch(batch_size: int, memory: int) -> None:
    plan = plan_of({"env.batch_size": batch_size}, hardware=Hardware("cpu", "CPU", memory, 2, bf16=False))
    assert plan.batch_size == batch_size
    assert plan.batch_size % plan.micro_batch_size == 0
    if memory == 1:
        assert plan.micro_batch_size == 1
    if memory == 2**42:
        assert plan.micro_batch_size == batch_size


def test_make_plan__another_machine__changes_only_what_hardware_may_decide() -> None:
    small = plan_of(hardware=Hardware("cpu", "CPU", GIB, 1, bf16=False))
    large = plan_of(hardware=Hardware("cuda", "H100", 80 * GIB, 32, bf16=True))
    machine = {"micro_batch_size", "precision", "num_workers", "checkpointing", "reasons"}
    machine |= {"feature_cache", "image_cache"}
    for name in set(Plan.model_fields) - machine:
        assert getattr(small, name) == getattr(large, name), name
    assert (small.precision, large.precision) == ("32-true", "bf16-mixed")


@pytest.mark.parametrize("rows", [1, 2, 7, 100, 5000])
def test_make_plan__any_number_of_rows__fills_at_least_one_step_per_epoch(rows: int) -> None:
    plan = plan_of(stats=DataStats(rows=rows, sizes=((64, 64),) * rows))
    assert rows * plan.views >= plan.batch_size >= 1
    assert plan.max_epochs >= 1


def test_make_plan__time_limit__leaves_the_epochs_to_the_clock() -> None:
    limited, free = plan_of(time_limit=60.0), plan_of()
    assert limited.time_limit == 60.0
    assert limited.max_epochs > free.max_epochs
    assert plan_of({"optim.max_epochs": 3}, time_limit=60.0).max_epochs == 3


@pytest.mark.parametrize(("asked", "nearest"), [(99, "96 x 96"), ((64, 93), "64 x 96"), (5, "8 x 8")])
def test_make_plan__input_size_not_divisible__names_the_nearest_allowed(asked: Any, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"divisible by 8\..*{nearest}"):
        with_checkpoint({"model.input_size": asked})


@pytest.mark.parametrize("method", ["conv_lora", "lora", "decoder_only"])
def test_make_plan__frozen_encoder_without_weights__is_refused(method: str) -> None:
    with pytest.raises(UnsupportedCombination, match=f"'{method}'.*model.checkpoint.*full"):
        plan_of({"optim.peft": method})


@pytest.mark.parametrize("loss", CRITERIA)
def test_make_plan__loss_of_another_head__is_refused_with_those_that_fit(loss: str) -> None:
    tasks = {"binary": BINARY, "class_tokens": MULTICLASS, "queries": MULTICLASS}
    head = CRITERIA[loss].head
    for other, task in tasks.items():
        settings = {"optim.loss": loss} | ({} if other == "binary" else {"model.multiclass_head": other})
        if other == head:
            assert plan_of(settings, task=task).loss == loss
            continue
        with pytest.raises(UnsupportedCombination, match=f"'{loss}'") as caught:
            plan_of(settings, task=task)
        fitting = [name for name, criterion in CRITERIA.items() if criterion.head == other]
        assert all(name in str(caught.value) for name in fitting)


def test_make_plan__loss_of_the_queries_head__chooses_that_head() -> None:
    plan = plan_of({"optim.loss": "set_criterion"}, task=MULTICLASS)
    assert plan.decoder_options["num_classes"] == MULTICLASS.num_classes


@pytest.mark.parametrize("key", ["optim.loss", "optim.peft"])
def test_make_plan__unknown_name__is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        plan_of({key: "nonsense"})


@pytest.mark.parametrize("micro", [3, 16])
def test_make_plan__micro_batch_that_does_not_divide_the_batch__is_refused(micro: int) -> None:
    with pytest.raises(ConfigError, match=f"micro_batch_size is {micro}.*divide.*8"):
        plan_of({"env.batch_size": 8, "env.micro_batch_size": micro})


def test_make_plan__detail_maps_and_another_stride__do_not_meet() -> None:
    assert with_checkpoint().decoder_options["detail"] is False
    with pytest.raises(UnsupportedCombination, match=r"stride 16; this one's is 8.*model\.detail=False"):
        with_checkpoint({"model.detail": True})
    assert plan_of({"model.detail": True}).decoder_options["detail"] is True


def test_make_plan__fewer_queries_than_classes__is_refused() -> None:
    settings = {"model.multiclass_head": "queries", "model.num_queries": 2}
    with pytest.raises(ConfigError, match="num_queries is 2; 3 classes"):
        plan_of(settings, task=MULTICLASS)
    assert plan_of(settings | {"model.num_queries": 3}, task=MULTICLASS).decoder_options["num_mask_tokens"] == 3


@pytest.mark.parametrize("case", CASES)
def test_plan__written_as_yaml_and_read__is_equal(case: str) -> None:
    settings, task, pretrained = CASES[case]
    plan = (with_checkpoint if pretrained else plan_of)({**settings, "optim.lr": 1e-05}, task=task, time_limit=600.0)
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False)
    read = Plan.model_validate(yaml.safe_load(text))
    assert read == plan
    assert type(read.decoder_options["detail"]) is bool
    assert str(read) == str(plan)


def test_plan__unknown_or_missing_field__is_refused() -> None:
    content = plan_of().model_dump(mode="json")
    with pytest.raises(ValidationError):
        Plan.model_validate(content | {"colour": "red"})
    content.pop("lr")
    with pytest.raises(ValidationError):
        Plan.model_validate(content)


def test_make_plan__called_twice__changes_nothing_it_was_given() -> None:
    config = Config()
    first = make_plan(config, BINARY, STATS, CPU, SCRATCH)
    assert make_plan(config, BINARY, STATS, CPU, SCRATCH) == first
    assert config == Config()


@pytest.mark.parametrize("settings", [{"model.num_queries": 12}, {"model.multiclass_head": "queries"}])
def test_make_plan__option_of_a_head_that_is_not_there__is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UnsupportedCombination, match="model"):
        plan_of(settings)


def test_make_plan__sam__follows_the_paper() -> None:
    plan = plan_of(encoder=encoder_facts("sam_vit_b"))
    assert (plan.encoder, plan.checkpoint, plan.input_size) == ("sam_vit_b", "official", (1024, 1024))
    assert (plan.peft, plan.peft_options["rank"], plan.peft_options["alpha"]) == ("conv_lora", 3, 32.0)
    assert (plan.lr, plan.batch_size) == (1e-4, 4)
    head = {"num_mask_tokens": 1, "num_classes": None}
    assert plan.decoder_options == {"dim": 256, "mlp_dim": 2048, "detail": False, **head}
    with pytest.raises(UnsupportedCombination, match="256 wide"):
        plan_of({"model.decoder_dim": 128}, encoder=encoder_facts("sam_vit_b"))


def test_make_plan__random_weights_as_asked__train_all_of_sam() -> None:
    plan = plan_of(encoder=encoder_facts("sam_vit_h", pretrained=False))
    assert (plan.peft, plan.checkpoint) == ("full", None)


def test_make_plan__lora_options_of_another_method__are_said_not_to_be_used() -> None:
    settings = {"optim.peft": "lora", "optim.lora.experts": 4, "optim.lora.rank": 2}
    reason = with_checkpoint(settings).reasons["peft_options"]
    assert "lora does not use optim.lora.experts" in reason
    assert "rank" not in reason
    assert "not use optim.lora.rank" in plan_of({"optim.lora.rank": 2}).reasons["peft_options"]


VIT16 = EncoderFacts("tiny_vit", "tiny_vit", VIT | {"patch_size": 16}, 16, 64, 4, "absent/vit.safetensors", "a file")


def classes_of(images: dict[str, int], shares: dict[str, float] | None = None) -> tuple[ClassShare, ...]:
    """Say in how many images, and in which share of the pixels, each class is."""
    pixels = shares or dict.fromkeys(images, 1 / max(1, len(images)))
    return tuple(
        ClassShare(name=name, label=label, share=pixels[name], images=number)
        for label, (name, number) in enumerate(images.items())
    )


def input_of(width: float | None, settings: dict[str, Any] | None = None, **options: Any) -> Plan:
    """Plan for images of 480 x 640 whose objects are typically so many pixels wide at the usual 256 x 256."""
    stats = replace(STATS, sizes=options.pop("sizes", STATS.sizes))
    stats = replace(stats, object_width=None if width is None else width / 256)
    return plan_of(settings, stats=stats, **{"encoder": VIT16, **options})


@pytest.mark.parametrize(("width", "side"), [(None, 256), (4.0, 256), (3.9, 320), (3.2, 320), (3.1, 384), (0.5, 384)])
def test_make_plan__thin_objects__are_seen_with_more_pixels_and_it_says_why(width: float | None, side: int) -> None:
    plan = input_of(width)
    assert math.prod(plan.input_size) == pytest.approx(side**2, rel=0.06)
    told = f"objects are typically {width} px wide in 256 x 256: {side} x {side}"
    assert (told in plan.reasons["input_size"]) == (side > 256)


def test_make_plan__thin_objects_but_no_more_pixels_to_have__keeps_the_images_own_size() -> None:
    assert input_of(2.0, sizes=((208, 320),) * 40).input_size == (208, 320)
    assert input_of(2.0, sizes=((320, 352),) * 40).input_size == (320, 352)


def test_make_plan__thin_objects_and_a_short_clock__says_that_time_decides() -> None:
    short, long = input_of(2.0, time_limit=299.0), input_of(2.0, time_limit=300.0)
    assert short.input_size == input_of(None).input_size
    assert "2.0 px wide" in short.reasons["input_size"]
    assert "299 s are too short" in short.reasons["input_size"]
    assert long.input_size == input_of(2.0).input_size != short.input_size


def test_make_plan__thin_objects__leave_what_was_asked_and_what_is_fixed() -> None:
    assert input_of(2.0, {"model.input_size": 64}).input_size == (64, 64)
    assert input_of(2.0, encoder=SCRATCH).input_size == input_of(None, encoder=SCRATCH).input_size
    assert input_of(2.0, encoder=encoder_facts("sam_vit_b")).input_size == (1024, 1024)


def test_make_plan__thin_objects_in_large_images__leave_more_pixels_to_tiles() -> None:
    large = ((3000, 4000),) * 40
    plan = input_of(1.0, sizes=large)
    assert plan.tile_scale is not None
    assert plan.input_size == (256, 256)
    whole = input_of(1.0, {"data.tiling": "off"}, sizes=large)
    assert math.prod(whole.input_size) > 1.9 * math.prod(plan.input_size)


def test_make_plan__class_in_few_images__is_shown_more_often_and_named() -> None:
    images = {"sky": 40, "road": 40, "tree": 38, "tram": 4}
    plan = plan_of(task=CITY, stats=replace(STATS, classes=classes_of(images)))
    assert plan.sampling == "repeat_factor"
    assert "tram is in 10% of the images, shown 3.1 times as often" in plan.reasons["sampling"]


@pytest.mark.parametrize("images", [{"sky": 40, "road": 40, "tree": 39, "tram": 22}, {}])
def test_make_plan__no_class_is_rare__shows_all_images_alike(images: dict[str, int]) -> None:
    plan = plan_of(task=CITY, stats=replace(STATS, classes=classes_of(images)))
    assert plan.sampling == "uniform"
    assert ("tram is in 55%" in plan.reasons["sampling"]) == bool(images)


def test_make_plan__sampling_asked_for__is_kept_and_binary_data_are_shown_alike() -> None:
    images = {"sky": 40, "road": 40, "tree": 38, "tram": 4}
    plan = plan_of({"data.sampling": "uniform"}, task=CITY, stats=replace(STATS, classes=classes_of(images)))
    assert (plan.sampling, plan.reasons["sampling"]) == ("uniform", "as asked")
    few = replace(STATS, classes=classes_of({"background": 40, "polyp": 2}))
    assert plan_of(stats=few).sampling == "uniform"
    assert plan_of({"data.sampling": "repeat_factor"}, stats=few).sampling == "repeat_factor"
    with pytest.raises(ConfigError, match="sampling"):
        plan_of({"data.sampling": "often"})


def test_plan__saved_before_there_was_sampling__shows_all_images_alike() -> None:
    content = plan_of().model_dump(mode="json")
    del content["sampling"]
    assert Plan.model_validate(content).sampling == "uniform"


def test_make_plan__classes_of_very_unequal_share__weigh_rare_ones_more_and_name_the_rarest() -> None:
    images = dict.fromkeys(CITY.class_names, 40)
    uneven = {"sky": 0.5, "road": 0.3, "tree": 0.16, "tram": 0.04}
    even = uneven | {"tree": 0.14, "tram": 0.06}
    plan = plan_of(task=CITY, stats=replace(STATS, classes=classes_of(images, uneven)))
    assert plan.loss == "balanced_ce_dice"
    assert "tram has 4.0% of the pixels, an even share were 25.0%" in plan.reasons["loss"]
    assert plan_of(task=CITY, stats=replace(STATS, classes=classes_of(images, even))).loss == "ce_dice"
    queries = plan_of({"model.multiclass_head": "queries"}, CITY, replace(STATS, classes=classes_of(images, uneven)))
    assert queries.loss == "set_criterion"
    asked = plan_of({"optim.loss": "ce_dice"}, CITY, replace(STATS, classes=classes_of(images, uneven)))
    assert (asked.loss, asked.reasons["loss"]) == ("ce_dice", "as asked")


def test_make_plan__little_foreground__keeps_a_loss_that_does_not_vanish_and_says_so() -> None:
    classes = classes_of({"background": 40, "crack": 40}, {"background": 0.974, "crack": 0.026})
    plan = plan_of(stats=replace(STATS, classes=classes))
    assert plan.loss == "structure"
    assert "2.6% foreground" in plan.reasons["loss"]
