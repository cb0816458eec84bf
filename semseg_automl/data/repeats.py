"""How much more often rows of rare classes are shown in an epoch.

Not here: whether they are (the plan), in which order an epoch shows its rows (:mod:`semseg_automl.data.sampling`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_REPEATS = 5.0
"""An image is shown at most so many times as often as one of common classes, or a few would be learned by heart."""


def class_repeats(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much more often images of each class should be shown: repeat factors.

    ``max(1, sqrt(t / f))`` for a class in the share f of the images (Gupta et al., "LVIS", 2019, section 4). Their t is
    a constant for a thousand classes; here it is the share of images of the median class, so that it fits few classes
    and many. At most `MOST_REPEATS`.

    Args:
        shares: ``(classes,)`` of the images that have each class, 0 to 1. A class without an image repeats nothing.

    >>> class_repeats(np.array([1.0, 0.9, 0.1])).round(2).tolist()
    [1.0, 1.0, 3.0]
    """
    seen = shares[shares > 0]
    if not seen.size:
        return np.ones_like(shares)
    factors: NDArray[np.float64] = np.sqrt(np.median(seen) / np.where(shares > 0, shares, np.inf))
    return factors.clip(1.0, MOST_REPEATS)


def row_repeats(present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return how much more often each row should be shown: as often as its rarest class asks for.

    Args:
        present: ``(rows, classes)``, which classes the mask of each row holds.

    >>> row_repeats(np.array([[True, False]] * 15 + [[True, True]])).tolist()[-2:]
    [1.0, 2.9154759474226504]
    """
    factors = class_repeats(present.mean(axis=0))
    repeats: NDArray[np.float64] = np.where(present, factors, 1.0).max(axis=1, initial=1.0)
    return repeats
