from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from model.data.order import Order
from model.draws import generator

SHARDS = np.array([7, 0, 13, 1, 20, 5])


def folder(seed: int = 0, origin: str = "pretrain", n: int = 10) -> Order:
    return Order(seed, origin, np.array([n]), 1, n)


def images(order: Order, positions: range) -> list[int]:
    return [order.number(position) for position in positions]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [images(folder(), range(10 * epoch, 10 * epoch + 10)) for epoch in range(20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_the_order_depends_on_seed_and_origin() -> None:
    first = images(folder(), range(10))
    assert first == images(folder(), range(10))
    assert first != images(folder(seed=1), range(10))
    assert first != images(folder(origin="highres"), range(10))


def test_the_order_of_a_folder_never_changes() -> None:
    """Runs that are under way, and the demo's measured table, hang on it: one draw of (seed, origin/order, epoch)."""
    order = folder(seed=3, n=950)
    for epoch in range(3):
        drawn = generator(3, "pretrain/order", epoch).permutation(950)
        assert images(order, range(950 * epoch, 950 * epoch + 950)) == drawn.tolist()
    assert images(folder(), range(10)) == [1, 6, 0, 9, 8, 7, 5, 3, 4, 2]


@pytest.mark.parametrize("lanes", [1, 3, 4, 46, 100])
@pytest.mark.parametrize("window", [1, 5, 100])
def test_every_image_of_every_shard_once_an_epoch(lanes: int, window: int) -> None:
    order = Order(0, "pretrain", SHARDS, lanes, window)
    epochs = [images(order, range(46 * epoch, 46 * epoch + 46)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(46)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_lane_reads_its_shards_in_sequence_and_shuffles_within_windows() -> None:
    order = Order(0, "pretrain", np.full(40, 100), lanes=4, window=50)
    lane = [order.number(position) for position in range(1, 4000, 4)]
    shards = [number // 100 for number in lane]
    assert [shards[at] for at in range(0, 1000, 100)] == list(dict.fromkeys(shards))
    assert all(len(set(shards[at : at + 100])) == 1 for at in range(0, 1000, 100))
    for at in range(0, 1000, 50):
        window = lane[at : at + 50]
        assert sorted(window) == list(range(min(window), min(window) + 50))
        assert window != sorted(window)


def test_shards_are_shuffled_over_all_lanes() -> None:
    order = Order(0, "pretrain", np.full(40, 100), lanes=4, window=50)
    first, second = ({order.number(4000 * epoch + 4 * turn) // 100 for turn in range(1000)} for epoch in (0, 1))
    assert len(first) == len(second) == 10
    assert first != second


def test_a_position_needs_none_before_it() -> None:
    order, fresh = (Order(0, "pretrain", SHARDS, 3, 5) for _ in range(2))
    whole = images(order, range(200))
    assert fresh.number(173) == whole[173]
    assert fresh.number(2) == whole[2]


def test_a_replacement_is_a_function_of_the_position() -> None:
    order = folder()
    drawn = [order.replacement(position, 1) for position in range(200)]
    assert set(drawn) == set(range(10))
    assert drawn == [order.replacement(position, 1) for position in range(200)]
    assert drawn != [order.replacement(position, 2) for position in range(200)]


def test_memory_is_of_the_shards_and_not_of_the_images() -> None:
    counts = np.full(10_000, 1_000_000)
    tracemalloc.start()
    order = Order(0, "pretrain", counts, 64, 4096)
    numbers = images(order, range(10**9, 10**9 + 1000))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(numbers)) == 1000
    assert most < 8 * 2**20
