"""Which rows an epoch shows, in which order and in which of their views: evenly, or those with rare classes more often.

Pure: counts and a seed in, numbers out; the same for any number of loader processes. Not here: reading and augmenting
what was chosen (:mod:`semseg_automl.data.dataset`), how much more often (:mod:`semseg_automl.data.repeats`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from semseg_automl.processes import ALONE, Processes


class ViewSampler(Sampler[int]):
    """Every row `views` times an epoch, shuffled anew; the indices name views of the rows (see `MaskDataset`).

    Args:
        rows: rows of the table.
        views: times each row is shown per epoch.
        seed: of the order.
        cached_views: different views of a row in the whole training, which come round and round; 0 for new ones
            every epoch.
        batch_size: samples per batch of one process.
        processes: that share the epoch, batch by batch in turns: what one process would see in so many batches, they
            see in one each. The last turn is left out if it is not whole.
        repeats: ``(rows,)`` above 0, how often each row is shown beside the others; an epoch has as many samples all
            the same, and a row its share of them, rounded up in some epochs and down in others. None for all alike.
    """

    def __init__(
        self,
        rows: int,
        views: int,
        seed: int,
        cached_views: int = 0,
        batch_size: int = 1,
        processes: Processes = ALONE,
        repeats: NDArray[np.float64] | None = None,
    ) -> None:
        self.rows = rows
        self.views = views
        self.seed = seed
        self.cached_views = cached_views
        self.batch_size = batch_size
        self.processes = processes
        self.repeats = repeats
        self.epoch = 0
        self.done = 0
        self._counted = 0
        self._shown = np.zeros(rows, np.int64)

    def start_at(self, epoch: int, done: int) -> None:
        """Begin with what is left of an epoch of which all processes had trained on `done` samples before a kill."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        """Return the samples of one epoch that this process gets."""
        samples, count = self.rows * self.views, self.processes.count
        return samples if count == 1 else samples // (self.batch_size * count) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch to draw next; Lightning calls this."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __iter__(self) -> Iterator[int]:
        """Yield the epoch's indices of this process."""
        if not self.processes.are_several:
            yield from self._all()
            return
        turn = self.batch_size * self.processes.count
        for place, index in enumerate(self._all(), start=self.done):
            if place >= self.rows * self.views // turn * turn:
                return
            if place % turn // self.batch_size == self.processes.rank:
                yield index

    def _all(self) -> Iterator[int]:
        """Yield the epoch's indices, of all processes."""
        if self.repeats is not None:
            yield from self._repeated(self.repeats)[self.done :]
            return
        rng = np.random.default_rng([self.seed, self.epoch])
        first_view = self.epoch * self.views
        left = self.done
        for view in range(first_view, first_view + self.views):
            shown = view % self.cached_views if self.cached_views else view
            order = (shown * self.rows + rng.permutation(self.rows)).tolist()
            yield from order[left:]
            left = max(0, left - self.rows)

    def _repeated(self, repeats: NDArray[np.float64]) -> list[int]:
        """Return the epoch's indices of rows shown unequally often; each row's views count on over the epochs."""
        if self._counted > self.epoch:
            self._counted, self._shown = 0, np.zeros(self.rows, np.int64)
        while self._counted < self.epoch:
            self._shown += self._counts(repeats, self._counted)[0]
            self._counted += 1
        counts, rng = self._counts(repeats, self.epoch)
        row = np.repeat(np.arange(self.rows), counts)
        view = np.concatenate([before + np.arange(n) for before, n in zip(self._shown, counts, strict=True)])
        if self.cached_views:
            view %= self.cached_views
        indices: list[int] = rng.permutation(view * self.rows + row).tolist()
        return indices

    def _counts(self, repeats: NDArray[np.float64], epoch: int) -> tuple[NDArray[np.int64], np.random.Generator]:
        """Draw how often each row is shown in an epoch (systematic sampling: the total is exact), and what draws on."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.rows)  # or neighbours would be rounded alike
        ends = np.cumsum(repeats[order])
        ends *= self.rows * self.views / ends[-1]
        ends[-1] = self.rows * self.views
        counts = np.empty(self.rows, np.int64)
        counts[order] = np.diff(np.floor(ends + rng.random()), prepend=0)
        return counts, rng
