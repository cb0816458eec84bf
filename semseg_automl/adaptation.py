"""Which fine-tuning method a plan gets, with which options, and at what learning rate; each with its reason. Pure."""

from __future__ import annotations

import inspect
import math

from pydantic import BaseModel

from semseg_automl.config import Config, LoraConfig, resolve
from semseg_automl.errors import ConfigError, UnsupportedCombination, check_known
from semseg_automl.models.facts import EncoderFacts
from semseg_automl.peft import METHODS

Options = dict[str, int | float | str | bool]

SECTIONS = {
    "lora": "lora",
    "conv_lora": "lora",
    "adapter": "adapter",
    "vpt": "vpt",
    "lst": "lst",
    "sam_adapter": "sam_adapter",
}
"""The section of ``optim`` that holds a method's options; the others have none."""

AUTO_RANK = 8
PAPER_RANK, PAPER_ALPHA = 3, 32.0


def choose_method(config: Config, encoder: EncoderFacts, reasons: dict[str, str]) -> tuple[str, Options]:
    """Choose the fine-tuning method and its options.

    Raises:
        ConfigError: the method is unknown, or an option does not fit the encoder.
        UnsupportedCombination: the encoder is to stay frozen, but has random weights.
    """
    asked = config.optim.peft
    if encoder.pretrained:
        auto = "conv_lora" if encoder.depth else "full"
        why = "the encoder is pretrained: adapt it, frozen" if encoder.depth else "no transformer blocks to adapt"
    else:
        auto, why = "full", "no pretrained weights: nothing worth freezing"
    method: str = resolve(asked, auto, "peft", why, reasons)
    check_known("optim.peft", method, METHODS)
    if not encoder.pretrained and method != "full":
        raise UnsupportedCombination(
            f"optim.peft is '{method}', which keeps the encoder frozen, but it has no pretrained weights. "
            "Give model.checkpoint, or use optim.peft='full'."
        )
    options = _options(config, method, encoder, reasons)
    METHODS[method](**options)  # its own checks, before anything is built
    _note_unused(config, method, options, reasons)
    return method, options


def _options(config: Config, method: str, encoder: EncoderFacts, reasons: dict[str, str]) -> Options:
    """Return the options of a method that were given or decided; those left to the method itself are not among them."""
    if method not in SECTIONS:
        return {}
    section: BaseModel = getattr(config.optim, SECTIONS[method])
    known = inspect.signature(METHODS[method]).parameters
    options = {name: getattr(section, name) for name in known if getattr(section, name) not in (None, "auto")}
    if isinstance(section, LoraConfig):
        options |= _rank_and_alpha(section, encoder, reasons)
        if options["rank"] > encoder.embed_dim:
            raise ConfigError(
                f"optim.lora.rank is {options['rank']}; the encoder's layers, {encoder.embed_dim} wide, allow 1 to "
                f"{encoder.embed_dim}."
            )
        if section.last_blocks is not None and section.last_blocks > encoder.depth:
            raise ConfigError(
                f"optim.lora.last_blocks is {section.last_blocks}; {encoder.name} has {encoder.depth} blocks."
            )
    return options


def _rank_and_alpha(section: LoraConfig, encoder: EncoderFacts, reasons: dict[str, str]) -> Options:
    """Choose the rank, and alpha such that the scale at the paper's rank is the paper's."""
    auto, why = AUTO_RANK, "rank 8: level with the paper's 3 in short runs, room in longer ones (benchmarks/LOG.md)"
    if encoder.family == "sam":
        auto, why = PAPER_RANK, "rank 3, as the paper has it"
    rank: int = resolve(section.rank, auto, "peft_options", why, reasons)
    if section.alpha != "auto":
        return {"rank": rank, "alpha": section.alpha}
    if section.scaling == "rank":
        return {"rank": rank, "alpha": rank * PAPER_ALPHA / PAPER_RANK}
    return {"rank": rank, "alpha": PAPER_ALPHA / math.sqrt(PAPER_RANK)}


def _note_unused(config: Config, method: str, options: Options, reasons: dict[str, str]) -> None:
    """Name the options that were given for other methods."""
    used = {f"{SECTIONS[method]}.{name}" for name in options} if method in SECTIONS else set()
    given = {
        f"{section}.{name}"
        for section in set(SECTIONS.values())
        for name in getattr(config.optim, section).model_fields_set
        if getattr(getattr(config.optim, section), name) not in (None, "auto")
    }
    unused = sorted(given - used)
    if unused:
        note = f"{method} does not use {', '.join('optim.' + name for name in unused)}"
        reasons["peft_options"] = "; ".join(filter(None, [reasons.get("peft_options"), note]))


def has_frozen_prefix(method: str, options: Options, depth: int) -> bool:
    """Tell whether the first blocks stay frozen and see nothing trained, so that their features can be kept."""
    last = options.get("last_blocks")
    return METHODS[method].frozen_prefix or (isinstance(last, int) and last < depth)


def choose_learning_rate(config: Config, encoder: EncoderFacts, method: str, reasons: dict[str, str]) -> float:
    """Choose the peak learning rate."""
    auto, why = 1e-3, "measured on small data: benchmarks/RESULTS.md"
    if encoder.family == "sam":
        auto, why = 1e-4, "as the paper has it"
    elif encoder.pretrained and method == "full":
        auto, why = 1e-4, "small steps keep what pretraining taught"
    lr: float = resolve(config.optim.lr, auto, "lr", why, reasons)
    return lr
