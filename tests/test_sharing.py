"""What is refused where frozen weights are to be shared out; `test_distributed_fit` shows that they are."""

from __future__ import annotations

from typing import Any

import pytest

from semseg_automl.errors import UnsupportedCombination
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.processes import built_strategy
from semseg_automl.sharing import Company, FrozenSharing, companions
from semseg_automl.third_party import lightning


def encoder(*, trains: bool) -> TinyViT:
    """Return a small encoder, frozen but for its first block's norm, or not frozen at all."""
    vit = TinyViT(embed_dim=16, depth=2, num_heads=1, grid=2)
    if not trains:
        vit.requires_grad_(False)
        vit.blocks[0].norm1.requires_grad_(True)
    return vit


def test_companions__frozen_blocks__keep_processes_together_in_validation() -> None:
    found = companions({"strategy": FrozenSharing()}, encoder(trains=False), cached=False)
    assert [type(each) for each in found] == [Company]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_companions__other_strategies__need_none(strategy: str) -> None:
    settings = {"strategy": built_strategy(strategy, some_unused=False)}
    assert companions(settings, encoder(trains=True), cached=True) == []
    assert companions({}, encoder(trains=True), cached=True) == []


def test_companions__everything_trains__is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match="trains in all of its blocks"):
        companions({"strategy": FrozenSharing()}, encoder(trains=True), cached=False)


def test_companions__no_blocks__is_refused() -> None:
    vit = encoder(trains=False)
    vit.blocks = type(vit.blocks)()
    with pytest.raises(UnsupportedCombination, match="has no transformer blocks"):
        companions({"strategy": FrozenSharing()}, vit, cached=False)


def test_companions__cached_features__are_refused_where_something_is_cached() -> None:
    vit: Any = encoder(trains=False)
    companions({"strategy": FrozenSharing()}, vit, cached=True)  # the first block trains: nothing to cache
    vit.requires_grad_(False)
    with pytest.raises(UnsupportedCombination, match=r"env\.feature_cache='off'"):
        companions({"strategy": FrozenSharing()}, vit, cached=True)


@pytest.mark.parametrize("some_unused", [True, False])
def test_built_strategy__fsdp__is_ddp_for_what_trains(some_unused: bool) -> None:
    strategy = built_strategy("fsdp", some_unused=some_unused)
    assert type(strategy) is FrozenSharing
    assert isinstance(strategy, lightning.pytorch.strategies.DDPStrategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is some_unused
