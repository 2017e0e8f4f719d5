from __future__ import annotations

from model.data.order import image_at, replacement


def images(seed: int, origin: str, positions: range, n: int = 10) -> list[int]:
    return [image_at(seed, origin, n, position) for position in positions]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [images(0, "pretrain", range(10 * epoch, 10 * epoch + 10)) for epoch in range(20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_the_order_depends_on_seed_and_origin() -> None:
    first = images(0, "pretrain", range(10))
    assert first == images(0, "pretrain", range(10))
    assert first != images(1, "pretrain", range(10))
    assert first != images(0, "highres", range(10))


def test_a_replacement_is_a_function_of_the_position() -> None:
    drawn = [replacement(0, "pretrain", 10, position, 1) for position in range(200)]
    assert set(drawn) == set(range(10))
    assert drawn == [replacement(0, "pretrain", 10, position, 1) for position in range(200)]
    assert drawn != [replacement(0, "pretrain", 10, position, 2) for position in range(200)]
