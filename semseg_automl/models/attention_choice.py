"""Which form of SAM's attention each block takes: both are run for a moment, and the faster one is kept.

A block leaves its device's usual form only where the other one is clearly faster, and what was measured once holds for
the whole process: a close race must not go one way today and the other way tomorrow, because the two forms round
differently. For the same reason a fit keeps its choice in a file, from which it goes on.

Blocks without relative positions have one form, and nothing is measured for them. Not here: the two forms
(:mod:`semseg_automl.models.attention`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from semseg_automl.errors import BundleError, ConfigError
from semseg_automl.files import replaced
from semseg_automl.models.attention import Form, RelativeAttention, relative_attention, usual_form
from semseg_automl.models.encoder import Encoder

MARGIN = 1.15
"""How many times faster the other form must be to be taken, at its slowest."""
RUNS = 3
SECONDS = 0.25
"""Of timing per form and shape, after the first run, unless one run takes longer; the windows and the global blocks of
SAM ViT-B at 1024 pixels take about two seconds together on two cores."""
TRIAL = 32
"""Tokens per side, at most, of a trial before the measurement."""
HOPELESS = 3.0
"""How many times slower a form must be in the trial to be given up."""
SCORES_ON_CPU, SCORES = 2**22, 2**28
"""Attention scores at most in a measurement; beyond them the time grows with the number of sequences."""
MAX_BYTES = 2**20
"""Of a file of choices; a real one has a few hundred."""


@dataclass(frozen=True)
class AttentionShape:
    """What decides which form is faster.

    Attributes:
        device: type of the device.
        threads: of the processor.
        dtype: of queries, keys and values.
        sequences: heads of windows that are measured together.
        height: of the grid or window, in tokens.
        width: of the grid or window, in tokens.
        head_width: d, of a query.
        gradients: the backward pass counts as well.
    """

    device: str
    threads: int
    dtype: torch.dtype
    sequences: int
    height: int
    width: int
    head_width: int
    gradients: bool

    def __str__(self) -> str:
        """Return all of it, in one line."""
        what = f"{self.sequences} x {self.height} x {self.width} x {self.head_width}"
        way = "and back" if self.gradients else "forward"
        return f"{self.device}, {self.threads} threads, {self.dtype}, {what}, {way}"


class Choice(NamedTuple):
    """The form taken, and how many times faster than the other one it was."""

    form: Form
    ratio: float


_chosen: dict[str, Choice] = {}


def choose_attention(
    encoder: nn.Module,
    input_size: tuple[int, int],
    *,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    file: Path | None = None,
) -> str:
    """Set the form of every attention with relative positions in an encoder to the faster one.

    The random state of torch stays as it is, and so does the encoder but for the forms.

    Args:
        encoder: its blocks are looked through, wherever its parameters are.
        input_size: height and width of its images, in pixels.
        batch: images at a time.
        device: on which it will run.
        dtype: of the activations, that of autocast where there is one.
        training: the backward pass counts, where there will be one.
        file: where choices are kept; those in it are taken without measuring again.

    Returns:
        What was chosen, in a sentence for the user; empty for an encoder that has no choice.

    Raises:
        ConfigError: the file is damaged.
        BundleError: the file cannot be written.
    """
    stored = {} if file is None else _read(file)
    used: dict[str, Choice] = {}
    said: dict[str, None] = {}
    for attention, shape in _attentions(encoder, input_size, batch, device, dtype, training):
        key = str(shape)
        choice = used[key] = stored[key] if key in stored else _choose(key, shape)
        attention.form = choice.form
        place = ("windows" if attention.window_size else "global blocks") + (
            " that are frozen" if training and not shape.gradients else ""
        )
        said[f"{choice.form} in {place}, {choice.ratio:.1f} x as fast as {_other(choice.form)}"] = None
    if file is not None and not used.keys() <= stored.keys():
        _write(file, stored | used)
    return f"attention: {'; '.join(said)}" if said else ""


def _attentions(
    encoder: nn.Module,
    input_size: tuple[int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> Iterator[tuple[RelativeAttention, AttentionShape]]:
    """Yield every attention that has a choice, with what its choice depends on."""
    if not isinstance(encoder, Encoder) or device.type == "meta":
        return
    grid = input_size[0] // encoder.stride, input_size[1] // encoder.stride
    limit = SCORES_ON_CPU if device.type == "cpu" else SCORES
    frozen = encoder.frozen_stage() if training else len(encoder.blocks)
    for index, block in enumerate(encoder.blocks):
        for attention in block.modules():
            if isinstance(attention, RelativeAttention):
                window = attention.window_size
                height, width = (window, window) if window else grid
                windows = math.ceil(grid[0] / height) * math.ceil(grid[1] / width)
                sequences = min(batch * windows * attention.num_heads, max(1, limit // (height * width) ** 2))
                yield attention, AttentionShape(
                    device=device.type,
                    threads=torch.get_num_threads(),
                    dtype=dtype,
                    sequences=sequences,
                    height=height,
                    width=width,
                    head_width=attention.rel_pos_h.shape[1],
                    gradients=training and index >= frozen,
                )


def _choose(key: str, shape: AttentionShape) -> Choice:
    """Measure a shape, once per process, and keep the usual form unless the other one is clearly faster."""
    if key not in _chosen:
        seconds = measure(shape)
        usual = usual_form(torch.device(shape.device))
        other = _other(usual)
        # Its slowest run against the fastest: where other programs run, the best of a few may be bad by chance.
        form = other if min(seconds[usual]) > MARGIN * max(seconds[other]) else usual
        _chosen[key] = Choice(form, min(seconds[_other(form)]) / min(seconds[form]))
    return _chosen[key]


def _other(form: Form) -> Form:
    return "fused" if form == "chunked" else "chunked"


def measure(shape: AttentionShape) -> dict[Form, list[float]]:
    """Return the seconds of a few runs of each form on random numbers, after one of each, the forms in turns.

    A form that is hopeless on few tokens, as bfloat16 is in some kernels of a processor without its instructions, is
    not run on many: that could take minutes.
    """
    usual = usual_form(torch.device(shape.device))
    small = replace(shape, sequences=1, height=min(shape.height, TRIAL), width=min(shape.width, TRIAL))
    times = _measure(small)
    # Only the other form can be given up: in a trial this short, the usual one may be slow by chance.
    return times if min(times[_other(usual)]) > HOPELESS * min(times[usual]) else _measure(shape)


def _measure(shape: AttentionShape) -> dict[Form, list[float]]:
    device = torch.device(shape.device)
    random = torch.Generator(device).manual_seed(0)  # not torch's own: what is learned must not depend on measuring
    cells = shape.height * shape.width
    forms: tuple[Form, ...] = get_args(Form)
    times: dict[Form, list[float]] = {form: [] for form in forms}
    with torch.inference_mode(False), torch.set_grad_enabled(shape.gradients):
        tensors = [
            torch.randn(shape.sequences, cells, columns, generator=random, device=device)
            .to(shape.dtype)
            .requires_grad_(shape.gradients)
            for columns in (shape.head_width, shape.head_width, shape.head_width, shape.height, shape.width)
        ]
        while len(times["fused"]) <= RUNS and sum(sum(each[1:]) for each in times.values()) < SECONDS * len(forms):
            for form in forms:
                times[form].append(_run(form, tensors, device))
    return {form: each[1:] for form, each in times.items()}


def _run(form: Form, tensors: list[torch.Tensor], device: torch.device) -> float:
    """Return the seconds of one run."""
    _wait(device)
    start = time.perf_counter()
    q, k, v, bias_h, bias_w = tensors
    out = relative_attention(q, k, v, bias_h, bias_w, form=form)
    if out.requires_grad:
        torch.autograd.grad(out.sum(), tensors)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _read(file: Path) -> dict[str, Choice]:
    """Return the choices in a file; none if there is no file.

    Raises:
        ConfigError: it is damaged.
    """
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        record: Any = json.loads(file.read_text(encoding="utf-8"))
        choices = {str(key): Choice(value["form"], float(value["ratio"])) for key, value in record.items()}
        unknown = [choice.form for choice in choices.values() if choice.form not in get_args(Form)]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no form")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"'{file}' is damaged ({error}). Delete it, or fit without resume=True.") from error
    return choices


def _write(file: Path, choices: dict[str, Choice]) -> None:
    """Write choices.

    Raises:
        BundleError: the file cannot be written.
    """
    record = {key: choice._asdict() for key, choice in choices.items()}
    try:
        with replaced(file) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
    except OSError as error:
        raise BundleError(f"cannot write '{file}' ({error}). Check space and permissions.") from error
