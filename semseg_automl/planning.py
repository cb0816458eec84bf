"""From settings and checked rows to plans: what `make_plan` depends on, collected once, for one plan or for many.

A fit needs one plan; a search plans every candidate for the same rows on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from semseg_automl.choosing import AUTO, choose_preset
from semseg_automl.config import Config, Hyperparameters, flatten, load_config
from semseg_automl.data.checks import RowCheck
from semseg_automl.data.dataset import loading_seconds
from semseg_automl.data.table import MaskTable
from semseg_automl.errors import ConfigError
from semseg_automl.fingerprint import fingerprint, object_widths
from semseg_automl.hardware import Hardware, detect_hardware
from semseg_automl.metrics import MetricChoice, build_metrics
from semseg_automl.models.facts import EncoderFacts, encoder_facts
from semseg_automl.plan import DataStats, Plan, make_plan
from semseg_automl.task import SegmentationTask

PLANNED = {
    "max_epochs": "optim.max_epochs",
    "precision": "env.precision",
    "gradient_clip_val": "optim.gradient_clip",
}
"""Options of Lightning's trainer that a plan decides, and the settings that they stand for."""


@dataclass(frozen=True)
class Chosen:
    """Settings, and what they were laid over.

    Attributes:
        preset: name of the preset; never ``auto``, but what that came to.
        why: the reason, as a sentence.
        layers: settings over the preset, later ones winning.
        asked: dotted settings that the user gave.
        automatic: whether the preset, and with it the encoder, was ours to choose.
    """

    preset: str
    why: str
    layers: tuple[Hyperparameters, ...]
    asked: tuple[str, ...] = ()
    automatic: bool = False

    @cached_property
    def config(self) -> Config:
        """The settings, typed and checked.

        Raises:
            ConfigError: a setting is unknown, or out of range.
        """
        return load_config(self.preset, *self.layers)

    @cached_property
    def encoder(self) -> EncoderFacts:
        """What the settings' encoder is.

        Raises:
            ConfigError: it is unknown, or does not fit its options.
            CheckpointError: the checkpoint cannot be read.
        """
        asked = self.config.model
        return encoder_facts(
            asked.encoder,
            checkpoint=asked.checkpoint,
            pretrained=asked.pretrained,
            accept_license=asked.accept_license,
            window_size=asked.window_size,
        )

    def over(self, settings: Hyperparameters) -> Chosen:
        """Return these settings with others over them."""
        return replace(self, layers=(*self.layers, settings))


def choose_settings(
    preset: str,
    asked: Sequence[Mapping[str, Any] | None],
    trainer_options: dict[str, Any],
) -> Chosen:
    """Lay what was asked over a preset.

    Args:
        preset: its name; ``auto`` chooses by the machine and the weights at hand.
        asked: settings, later ones winning; None counts as empty.
        trainer_options: of Lightning's trainer; loses what a plan decides.

    Raises:
        ConfigError: the preset or a setting is unknown, or out of range.
    """
    extra = {key: trainer_options.pop(option) for option, key in PLANNED.items() if option in trainer_options}
    layers = tuple(each for each in (*asked, extra) if each)
    named = {key: value for each in layers for key, value in flatten(each).items()}
    given = tuple(key for key, value in named.items() if value != "auto")
    if preset != AUTO:
        chosen = Chosen(preset, "as asked", layers, given)
    else:
        choice = choose_preset(detect_hardware(), named)
        why = f"auto: {choice.reason}"
        chosen = Chosen(choice.preset, why, (choice.settings, *layers), given, automatic=not choice.by_user)
    chosen.config  # noqa: B018 - errors now, before any file is read
    return chosen


@dataclass(frozen=True)
class Planning:
    """What a plan depends on besides the settings.

    Attributes:
        task: what the masks hold.
        table: training rows.
        checks: what was found in every row, of validation too.
        hardware: the machine.
        metrics: that will be computed after the fit.
        validation_metric: chooses the best epoch; None for the task's usual one.
        seed: of weights, order and augmentation.
        time_limit: seconds for the whole fit, or None.
    """

    task: SegmentationTask
    table: MaskTable
    checks: Sequence[RowCheck]
    hardware: Hardware
    metrics: Sequence[MetricChoice]
    validation_metric: str | None
    seed: int
    time_limit: float | None

    def plan(self, chosen: Chosen) -> Plan:
        """Decide everything that the settings left open.

        Raises:
            ConfigError: a setting does not fit the data or the encoder, or a metric the masks.
            UnsupportedCombination: two settings exclude each other.
            CheckpointError: the checkpoint cannot be read.
        """
        config, task = chosen.config, self.task
        encoder = chosen.encoder
        plan = make_plan(
            config,
            task,
            self._stats(config),
            self.hardware,
            encoder,
            validation_metric=self.validation_metric,
            seed=self.seed,
            time_limit=self.time_limit,
        )
        names = list(dict.fromkeys([plan.validation_metric, *self.metrics]))
        build_metrics(names, kind=task.kind, num_classes=task.num_classes)  # errors now, not after training
        return plan.model_copy(
            update={"preset": chosen.preset, "reasons": {"preset": chosen.why, **plan.reasons}}
        )

    def _stats(self, config: Config) -> DataStats:
        # A processor that trains loads between its steps, whatever that takes.
        timed = self.hardware.device != "cpu" and config.env.num_workers == "auto"
        return replace(self._counted, loading_seconds=self._loading_seconds if timed else None)

    @cached_property
    def _counted(self) -> DataStats:
        """What the checks tell, the same for every plan."""
        sizes = tuple(check.size for check in self.checks)
        typical, _ = object_widths(self.task, self.checks) or (None, None)
        classes = fingerprint(self.task, self.checks).classes
        return DataStats(len(self.table), sizes, classes=classes, object_width=typical)

    @cached_property
    def _loading_seconds(self) -> float:
        return loading_seconds(self.table, self.task)


def check_plan(given: Plan, task: SegmentationTask) -> None:
    """Refuse a plan for masks of another kind.

    Raises:
        ConfigError: it does not fit the masks, or names an unknown metric.
    """
    options = given.decoder_options
    outputs = options.get("num_classes") or options.get("num_mask_tokens")
    if outputs != task.num_scores:
        raise ConfigError(
            f"the plan is for masks of {outputs} scores, these masks have {task.num_scores} ({task.kind}, "
            f"{task.num_classes} classes). Plan anew for them."
        )
    if given.batch_size % given.micro_batch_size:
        raise ConfigError(
            f"the plan's micro_batch_size is {given.micro_batch_size}; it must divide batch_size, {given.batch_size}."
        )
    if given.merged:
        raise ConfigError("the plan is of a merged segmentor, which has nothing left to train. Set merged: false.")
    build_metrics([given.validation_metric], kind=task.kind, num_classes=task.num_classes)


def planned_choices(given: Plan, decided: Sequence[Any]) -> tuple[int, float | None]:
    """Return seed and time limit of a given plan.

    Raises:
        ConfigError: something that a plan decides is asked for beside it.
    """
    if any(decided):
        raise ConfigError(
            "plan= holds what presets, hyperparameters, seed, time_limit, epochs and precision would decide. "
            "Edit the plan, or leave it out."
        )
    return given.seed, given.time_limit
