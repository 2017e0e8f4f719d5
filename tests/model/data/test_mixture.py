from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import config
from model.data.mixture import Deal, MixedOrder, Share
from model.data.order import Order
from model.data.pack import pack
from model.data.views import SslViews
from tests.model.data.conftest import picture, save
from tests.model.data.loading import assert_equal, batches

VIEWS = SslViews(config.Resolution(global_size=16, local_size=8), patch_size=4)


def folder(n: int, origin: str = "pretrain") -> Order:
    return Order(0, origin, np.array([n]), 1, n)


def test_a_deal_is_exact_in_every_thousand_and_counts_each_hand() -> None:
    deal = Deal(0, "x", [100, 250])
    dealt = [deal.at(place) for place in range(3000)]
    for start in range(0, 3000, 1000):
        assert Counter(hand for hand, _ in dealt[start : start + 1000]) == {0: 650, 1: 100, 2: 250}
    for hand, count in enumerate((650, 100, 250)):
        assert [before for one, before in dealt if one == hand] == list(range(3 * count))
    assert [hand for hand, _ in dealt[:1000]] != [hand for hand, _ in dealt[1000:2000]]
    assert Deal(0, "x", [100, 250]).at(2345) == dealt[2345]


def test_images_are_mixed_into_every_batch() -> None:
    orders = [folder(500), folder(70, "pretrain/also-1")]
    mixed = MixedOrder(0, "pretrain", orders, [Share(200, "mixed")], batch=8)
    numbers = [mixed.number(position) for position in range(1000)]
    assert sum(number >= 500 for number in numbers) == 200
    assert [number for number in numbers if number < 500] == [orders[0].number(p) for p in range(800)]
    assert [number - 500 for number in numbers if number >= 500] == [orders[1].number(p) for p in range(200)]


def test_whole_batches_are_of_one_source_and_the_others_of_the_rest() -> None:
    orders = [folder(500), folder(70, "a"), folder(30, "b")]
    shares = [Share(100, "whole"), Share(500, "mixed")]
    mixed = MixedOrder(0, "pretrain", orders, shares, batch=4)
    batches = [[mixed.number(4 * clock + place) for place in range(4)] for clock in range(1000)]
    whole = [batch for batch in batches if any(500 <= number < 570 for number in batch)]
    assert len(whole) == 100
    assert all(500 <= number < 570 for batch in whole for number in batch)
    assert [number - 500 for batch in whole for number in batch] == [orders[1].number(p) for p in range(400)]
    others = [number for batch in batches if batch not in whole for number in batch]
    assert sum(number >= 570 for number in others[:3000]) == 1500


def test_a_replacement_is_of_the_same_source() -> None:
    orders = [folder(500), folder(70, "a")]
    mixed = MixedOrder(0, "pretrain", orders, [Share(300, "mixed")], batch=8)
    for position in range(300):
        same = (mixed.number(position) >= 500) == (mixed.replacement(position, 1) >= 500)
        assert same


@pytest.mark.parametrize("kind", ["mixed", "whole"])
def test_a_folder_and_shards_for_any_workers_and_ranks_and_after_a_resume(
    images: Path, tmp_path: Path, kind: str
) -> None:
    for number in range(100, 120):
        save(picture(number), tmp_path / f"more/{number}.png")
    packed = pack(str(tmp_path / "more"), str(tmp_path / "tars"), "x", 7, 0, lambda done, total: None)
    data: dict[str, Any] = {"path": str(images), "also": [{"path": packed.pattern, "share": 0.5, "batches": kind}]}
    whole = batches({**data, "workers": 0}, tmp_path)
    assert_equal(whole, batches({**data, "workers": 3}, tmp_path))
    assert_equal(whole[4:], batches({**data, "workers": 2}, tmp_path, clocks=(4, 7)))
    for rank in range(2):
        part = batches({**data, "workers": 0}, tmp_path, rank, 2)
        assert_equal(part, [batch.slice(4 * rank, 4 * rank + 4) for batch in whole])
    alone = batches({"path": str(images), "workers": 0}, tmp_path)
    assert any(not torch.equal(a.global_crops, b.global_crops) for a, b in zip(whole, alone, strict=True))  # type: ignore[union-attr]
