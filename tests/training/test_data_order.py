"""Which items a training sees: epochs counted over all stages; each epoch, stage and seed has its own order."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_the_data_are_counted_over_all_stages(tmp_path: Path, workers: int) -> None:
    """Stages of two and three epochs of 20 items, whose values say of which epoch they are, whoever loads them."""
    seen = tiny.items_seen(tiny.train(tmp_path, workers=workers))
    assert [epoch for epoch, _ in seen] == [epoch for epoch in range(5) for _ in range(20)]


def test_each_epoch_stage_and_seed_has_its_order(tmp_path: Path) -> None:
    orders = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        seen = tiny.items_seen(tiny.train(tmp_path / name, seed=seed))
        orders[name] = [[index for _, index in epoch] for _, epoch in groupby(seen, key=lambda item: item[0])]
    assert all(len(set(order)) == 20 for order in orders["a"]), "an item at most once an epoch"
    assert orders["a"] == orders["b"]
    assert len({tuple(order) for order in orders["a"]}) == 5, "a second stage does not repeat the first"
    assert not set(map(tuple, orders["a"])) & set(map(tuple, orders["c"])), "seeds share no order, in whatever epoch"
