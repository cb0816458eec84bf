"""Several saliency measures of one image at once: what they need alike is worked out once, by two threads if it pays.

The measures are those of `semseg_automl.saliency` and `semseg_automl.weighted_f`. Not here: accumulation over a data
set, which lives in `semseg_automl.metrics`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from semseg_automl import saliency
from semseg_automl.errors import ConfigError, nearest
from semseg_automl.soft_map import SoftMap
from semseg_automl.weighted_f import weighted_errors, weighted_f_measure_of

__all__ = ["MEASURES", "saliency_scores"]

_WEIGHTED = {"wf": 1.0, "wf_03": 0.3}  # beta2; the errors behind them take most of the time

MEASURES: dict[str, Callable[[SoftMap], Tensor]] = {
    "s_measure": saliency.s_measure_of,
    "e_measure": saliency.e_measure_of,
    "e_measure_curve": saliency.e_measure_curve_of,
    "e_measure_adaptive": saliency.e_measure_adaptive_of,
    "wf": weighted_f_measure_of,
    "wf_03": functools.partial(weighted_f_measure_of, beta2=_WEIGHTED["wf_03"]),
    "mae": saliency.mean_absolute_error_of,
}
"""Name to measure; the names are those of `semseg_automl.metrics.METRICS` where that has the mean over images."""

_FIELD = ("s_measure", "e_measure", "wf", "mae")


def saliency_scores(
    prediction: Tensor,
    mask: Tensor,
    measures: Sequence[str] = _FIELD,
    *,
    valid: Tensor | None = None,
    stretch: bool = True,
) -> dict[str, Tensor]:
    """Score one image by each of `measures`, as their functions would one by one.

    Args:
        prediction: ``(H, W)``, foreground probability in [0, 1], or uint8 levels of 255.
        mask: ``(H, W)``, bool.
        measures: Keys of `MEASURES`.
        valid: ``(H, W)``, bool; the other pixels are left out.
        stretch: Map the prediction's range to [0, 1] first.

    Returns:
        By name, in that order; NaN without a valid pixel.

    Raises:
        ConfigError: A measure is not known.
        DataError: A shape, a type or a range is not as above.

    >>> import torch
    >>> mask = torch.tensor([[False, True], [False, True]])
    >>> {name: round(score.item(), 4) for name, score in saliency_scores(mask.double(), mask).items()}
    {'s_measure': 1.0, 'e_measure': 1.3294, 'wf': 1.0, 'mae': 0.0}
    """
    for name in measures:
        if name not in MEASURES:
            raise ConfigError(f"unknown measure {name!r}{nearest(name, MEASURES)}; there are: {', '.join(MEASURES)}")
    image = SoftMap(prediction, mask, valid=valid, stretch=stretch)
    found: dict[str, Tensor] = {}

    def score_others() -> None:
        found.update({name: MEASURES[name](image) for name in measures if name not in _WEIGHTED})

    weighted = [name for name in measures if name in _WEIGHTED]
    if weighted:
        errors = weighted_errors(image, score_others)
        found.update({name: errors.f_measure(_WEIGHTED[name]) for name in weighted})
    else:
        score_others()
    return {name: found[name] for name in measures}
