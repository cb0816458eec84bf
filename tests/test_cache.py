"""Decoded images in shared memory: kept once, found by every process, never over budget, never changed."""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from semseg_automl.data import cache as cache_module
from semseg_automl.data.cache import ImageCache
from semseg_automl.errors import ConfigError, DataError

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def draw_pair(seed: int, height: int = 6, width: int = 9) -> Pair:
    """Draw an image and a mask."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        rng.integers(0, 256, (height, width), dtype=np.uint8),
    )


def assert_holds(cache: ImageCache, entry: int, pair: Pair) -> None:
    found = cache.get(entry)
    assert found is not None
    for got, expected in zip(found, pair, strict=True):
        assert np.array_equal(got, expected)
        assert got.dtype == np.uint8


@pytest.mark.parametrize("shared", [True, False])
def test_cache__images_of_different_sizes__come_back_as_they_were(shared: bool) -> None:
    cache = ImageCache(4, 10_000, shared=shared)
    pairs = {3: draw_pair(0), 0: draw_pair(1, 12, 5), 2: draw_pair(2, 1, 1)}
    for entry, pair in pairs.items():
        assert cache.get(entry) is None
        cache.put(entry, *pair)
    for entry, pair in pairs.items():
        assert_holds(cache, entry, pair)
    assert cache.get(1) is None
    assert cache.used == 4 * (6 * 9 + 12 * 5 + 1)


@pytest.mark.parametrize("shared", [True, False])
def test_cache__budget__is_kept_to_the_byte_and_smaller_images_still_enter(shared: bool) -> None:
    cache = ImageCache(3, 4 * (6 * 9 + 2 * 2), shared=shared)
    cache.put(0, *draw_pair(0))
    cache.put(1, *draw_pair(1))
    assert cache.get(1) is None
    cache.put(2, *draw_pair(2, 2, 2))
    assert_holds(cache, 0, draw_pair(0))
    assert_holds(cache, 2, draw_pair(2, 2, 2))
    assert cache.used == cache.budget


@pytest.mark.parametrize("shared", [True, False])
def test_cache__second_put__neither_replaces_nor_takes_room(shared: bool) -> None:
    cache = ImageCache(1, 1000, shared=shared)
    cache.put(0, *draw_pair(0))
    cache.put(0, *draw_pair(1))
    assert_holds(cache, 0, draw_pair(0))
    assert cache.used == 4 * 6 * 9


@pytest.mark.parametrize("shared", [True, False])
def test_cache__what_it_gives__cannot_be_written_to(shared: bool) -> None:
    cache = ImageCache(1, 1000, shared=shared)
    cache.put(0, *draw_pair(0))
    found = cache.get(0)
    assert found is not None
    for array in found:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_cache__caller_changes_its_own_array__the_shared_one_stays() -> None:
    cache = ImageCache(1, 1000)
    image, mask = draw_pair(0)
    cache.put(0, image, mask)
    image[:] = mask[:] = 0
    assert_holds(cache, 0, draw_pair(0))


@pytest.mark.parametrize("shared", [True, False])
def test_cache__image_and_mask_of_different_sizes__are_refused(shared: bool) -> None:
    cache = ImageCache(1, 1000, shared=shared)
    with pytest.raises(DataError, match=r"shape \(6, 9, 3\) beside a mask of \(4, 9\)"):
        cache.put(0, draw_pair(0)[0], draw_pair(0, 4)[1])
    assert cache.used == 0


def test_cache__more_memory_than_there_is__says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"env\.image_cache"):
        ImageCache(1, 2**62)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")
def test_cache__filled_by_forked_processes__is_found_by_all() -> None:
    context = multiprocessing.get_context("fork")
    cache = ImageCache(6, 4 * 6 * 9 * 4)

    def fill(own: int) -> None:
        for entry in (own, own + 1, own + 2):
            cache.put(entry, *draw_pair(entry))

    processes = [context.Process(target=fill, args=(own,)) for own in (0, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    held = [entry for entry in range(6) if cache.get(entry) is not None]
    assert len(held) == 4, "as many as fit, the one that both had only once"
    for entry in held:
        assert_holds(cache, entry, draw_pair(entry))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")
def test_cache__put_in_for_later_processes__is_found_by_them_only_and_not_copied() -> None:
    context = multiprocessing.get_context("fork")
    cache = ImageCache(3, 4 * 6 * 9 * 2)
    image, mask = draw_pair(0)
    ready, found = context.Event(), context.SimpleQueue()

    def look() -> None:
        ready.wait(30)
        got = cache.get(0)
        found.put(None if got is None else [array.copy() for array in got])
        cache.put(0, *draw_pair(2))  # it is there: nothing to do
        cache.put(1, *draw_pair(1))

    early = context.Process(target=look)
    early.start()
    cache.put(0, image, mask, inherited=True)
    late = context.Process(target=look)
    late.start()
    ready.set()
    answers = [found.get(), found.get()]
    for process in (early, late):
        process.join(30)
        assert process.exitcode == 0
    assert [answer is None for answer in answers].count(True) == 1
    (seen,) = [answer for answer in answers if answer is not None]
    assert all(np.array_equal(got, expected) for got, expected in zip(seen, (image, mask), strict=True))
    own = cache.get(0)
    assert own is not None
    assert np.shares_memory(own[0], image)
    assert not own[0].flags.writeable
    assert_holds(cache, 1, draw_pair(1))
    assert cache.used == cache.budget


@pytest.mark.parametrize("shared", [True, False])
def test_cache__many_threads__give_nobody_a_half_written_image(shared: bool) -> None:
    cache = ImageCache(20, 4 * 32 * 32 * 20, shared=shared)
    pairs = [draw_pair(entry, 32, 32) for entry in range(20)]

    def use(turn: int) -> None:
        entry = turn % 20
        if cache.get(entry) is not None:
            assert_holds(cache, entry, pairs[entry])
        cache.put(entry, *pairs[entry])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(400)))
    assert cache.used == cache.budget
    for entry, pair in enumerate(pairs):
        assert_holds(cache, entry, pair)


def test_cache__sent_to_a_process_that_was_not_forked__starts_empty_with_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = ImageCache(2, 1000)
    cache.put(0, *draw_pair(0))
    assert copy.deepcopy(cache).budget == 1000
    monkeypatch.setattr(cache_module, "get_worker_info", lambda: SimpleNamespace(num_workers=4))
    sent = copy.deepcopy(cache)
    assert (sent.entries, sent.budget, sent.used) == (2, 250, 0)
    assert sent.get(0) is None
    sent.put(0, *draw_pair(1))
    assert_holds(sent, 0, draw_pair(1))
    assert_holds(cache, 0, draw_pair(0))


def test_cache__kept_for_one_process__is_the_array_itself_and_leaves_it_writable() -> None:
    cache = ImageCache(1, 1000, shared=False)
    image, mask = draw_pair(0)
    cache.put(0, image, mask)
    found = cache.get(0)
    assert found is not None
    assert np.shares_memory(found[0], image)
    assert np.shares_memory(found[1], mask)
    image[0] = 0


class Peeking(np.ndarray[tuple[int, ...], np.dtype[np.uint8]]):
    """An image that looks into the cache while it is copied there."""

    cache: ImageCache
    seen: list[object]

    def reshape(self, *shape: object, **options: object) -> NDArray[np.uint8]:  # type: ignore[override]
        self.seen.append(self.cache.get(0))
        return np.asarray(self).reshape(-1)


def test_cache__asked_while_an_image_is_written__has_it_not_yet() -> None:
    image, mask = draw_pair(0)
    peeking = image.view(Peeking)
    peeking.cache, peeking.seen = ImageCache(1, 1000), []
    peeking.cache.put(0, peeking, mask)
    assert peeking.seen == [None]
    assert_holds(peeking.cache, 0, (image, mask))
