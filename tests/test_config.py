"""Configuration: presets, aliases, overrides, and errors that name what was meant."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from semseg_automl.config import ALIASES, Config, flatten, known_keys, list_presets, load_config
from semseg_automl.errors import ConfigError
from semseg_automl.peft import METHODS


@pytest.mark.parametrize("name", list_presets())
def test_preset__every_file__validates_and_says_what_it_is_for(name: str) -> None:
    assert isinstance(load_config(name), Config)
    header = list_presets()[name]
    assert header.startswith(f"{name}:"), "the header begins with the preset's name"
    for part in ("Source:", "Command:", "Hardware:", "Expected:"):
        assert part in header


def test_list_presets__checkout__has_the_default_and_the_papers() -> None:
    assert {"auto", "fast", "conv_lora_paper", *METHODS} - {"conv_lora"} <= set(list_presets())


def test_load_config__paper_preset__differs_from_the_default() -> None:
    assert load_config("conv_lora_paper") != load_config("fast")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"conv_lora"}))
def test_load_config__preset_of_a_method__is_the_papers_recipe_with_it(method: str) -> None:
    paper, own = (load_config(name).model_dump() for name in ("conv_lora_paper", method))
    assert own["optim"].pop("peft") == method
    assert paper["optim"].pop("peft") == "conv_lora"
    assert own == paper


def test_load_config__unknown_preset__names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'fastt'; did you mean 'fast'.*conv_lora_paper"):
        load_config("fastt")


@pytest.mark.parametrize("alias", ALIASES)
def test_alias__every_one__sets_what_our_own_name_sets(alias: str) -> None:
    assert ALIASES[alias] in known_keys()
    value = "balanced_bce" if alias.endswith("loss_func") else 4
    assert load_config("fast", {alias: value}) == load_config("fast", {ALIASES[alias]: value}) != load_config("fast")


@pytest.mark.parametrize(
    ("settings", "suggested"),
    [
        ({"optim.lrr": 1e-3}, "optim.lr"),
        ({"optim": {"lora": {"rnk": 4}}}, "optim.lora.rank"),
        ({"optimm": {"max_epochs": 4}}, "optim.max_epochs"),
        ({"env.per_gpu_batchsize": 4}, "env.per_gpu_batch_size"),
    ],
)
def test_load_config__unknown_key__names_the_nearest_known_one(settings: dict[str, Any], suggested: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting.*did you mean '{suggested}'"):
        load_config("fast", settings)


def test_load_config__key_like_no_other__is_named_without_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"^unknown setting 'zzz'\.$"):
        load_config("fast", {"zzz": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 0.0),
        ("optim.lr", -1e-3),
        ("optim.lr", "fast"),
        ("optim.ema", 1.0),
        ("optim.warmup", -0.1),
        ("optim.gradient_clip", 0.0),
        ("optim.max_epochs", 0),
        ("optim.patience", 0),
        ("optim.schedule", "constant"),
        ("optim.lora.rank", 0),
        ("optim.lora.experts", 0),
        ("model.decoder_dim", 40),
        ("model.decoder_dim", 16),
        ("model.num_queries", -1),
        ("model.input_size", [64, 64, 3]),
        ("env.batch_size", 0),
        ("env.micro_batch_size", 2.5),
        ("env.num_workers", -1),
        ("env.image_cache", -1),
        ("env.image_cache", "2 apples"),
        ("env.image_cache", "-2GB"),
        ("env.image_cache", True),
        ("env.precision", "64"),
        ("data.augmentation", "wild"),
    ],
)
def test_load_config__value_out_of_range__names_the_setting_and_the_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("fast", {key: value})
    assert key in str(caught.value)
    assert repr(value) in str(caught.value)


def test_load_config__several_overrides__later_ones_win_key_by_key() -> None:
    config = load_config(
        "conv_lora_paper",
        {"optim.lr": 1e-2, "optim.max_epochs": 5},
        None,
        {"optim": {"lr": 1e-3, "lora": {"r": 6}}},
        {"optim.learning_rate": 2e-3},
    )
    assert config.optim.lr == 2e-3
    assert config.optim.max_epochs == 5
    assert config.optim.lora.rank == 6
    assert config.optim.lora.experts == load_config("conv_lora_paper").optim.lora.experts


def test_load_config__nested_or_dotted__is_the_same() -> None:
    nested = load_config("fast", {"optim": {"lora": {"rank": 5}, "ema": 0.5}, "model": {"input_size": (64, 96)}})
    dotted = load_config("fast", {"optim.lora.rank": 5, "optim.ema": 0.5, "model.input_size": [64, 96]})
    assert nested == dotted
    assert nested.model.input_size == (64, 96)


def test_load_config__preset__is_not_changed_by_overrides() -> None:
    before = load_config("fast")
    load_config("fast", {"optim.lr": 0.5})
    assert load_config("fast") == before


def test_config__assignment__is_refused() -> None:
    with pytest.raises(ValidationError):
        load_config("fast").optim.lr = 1.0  # type: ignore[misc]


def test_flatten__a_configuration__names_every_setting_once() -> None:
    flat = flatten(Config().model_dump())
    assert set(flat) == set(known_keys())
    assert all(description for description in known_keys().values()), "every setting says what it is"


@pytest.mark.parametrize(
    ("asked", "read"),
    [
        ("auto", "auto"),
        ("off", "off"),
        (False, "off"),
        (0, 0),
        (5000, 5000),
        ("7KB", 7000),
        ("512MiB", 2**29),
        ("1.5 gib", 3 * 2**29),
        (" 1TB ", 10**12),
    ],
)
def test_load_config__image_cache__is_read_as_bytes(asked: object, read: object) -> None:
    assert load_config("fast", {"env.image_cache": asked}).env.image_cache == read
