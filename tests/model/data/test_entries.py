"""What a process holds of a folder's images: few bytes each, the file and the order as they were."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import pytest

from model import config, contract, storage
from model.contract import ContractError
from model.data import index
from model.data.entries import Entries, Entry
from model.data.index import Index
from model.data.sources import build_or_read, open_sources
from model.data.splits import SPLITS
from model.data.threads import untold

MANY = 20_000
MOST_BYTES = 100
"""An image: 38 of numbers, 4 of its place among those that are seen, and a path of 32."""


def entry(number: int) -> Entry:
    label = f"n{10_000_000 + number % 1000}"
    return Entry(
        path=f"{label}/{label}_{number:08d}.JPEG",
        label=label,
        caption=None,
        group=number,
        split=SPLITS[number % 3],
        has_alpha=False,
        width=500,
        height=375 + number % 2,
    )


def odd() -> list[Entry]:
    """Without a label, with captions, in letters of several bytes."""
    named = [("é.png", None, "日本"), ("ü/a.png", "ü", None)]
    return [
        Entry(path=path, label=label, caption=caption, group=7, split=split, has_alpha=label is None, width=1, height=9)
        for split in SPLITS
        for path, label, caption in named
    ]


def stored(tmp_path: Path, entries: list[Entry]) -> tuple[config.Data, Path]:
    """A folder without any image, and its index in the run `tmp_path`."""
    root = tmp_path / "images"
    root.mkdir()
    data = config.read(config.Data, {"path": str(root), "hold_out": "test"})
    key = f"{index.VERSION}\0{root}\0{data.background}"
    file = tmp_path / f"data/index-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    made = Index(root=str(root), grouping="equal files", entries=entries, skipped=[])
    storage.publish(str(file), contract.encode(made))
    return data, file


def test_entries_are_those_they_were_made_of() -> None:
    plain = odd()
    held = Entries.of(plain)
    assert (list(held), held[1:3], held[-1]) == (plain, plain[1:3], plain[-1])
    assert held == plain
    assert held != [*plain[:-1], plain[0]]
    assert list(held.outside(("validation", "test"))) == plain[:2]
    assert list(held.captioned().outside(["train"])) == plain[2::2]
    assert held.captioned().pixels() == 3 * 9
    assert len(Entries.of([])) == 0


def test_the_file_of_an_index_is_read_as_ever(tmp_path: Path) -> None:
    plain = [*odd(), *map(entry, range(10))]
    data, file = stored(tmp_path, plain)
    found = index.build_or_read(data, str(tmp_path), untold)
    assert found.entries == contract.decode(file.read_bytes(), Index, "").entries == plain
    assert list(index.training_entries(found, data)) == [one for one in plain if one.split != "test"]
    file.write_bytes(file.read_bytes().replace(b'"group":9', b'"group":"9"'))
    with pytest.raises(ContractError, match=r"index-.*\.json: not an Index .* entry 15: Expected `int`"):
        index.build_or_read(data, str(tmp_path), untold)


def test_an_image_costs_few_bytes(tmp_path: Path) -> None:
    data, _ = stored(tmp_path, [entry(number) for number in range(MANY)])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        (source,) = open_sources(
            build_or_read(data, str(tmp_path), lambda what, done, total: None), data, captioned=False
        )
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert source.counts.sum() == sum(SPLITS[number % 3] != "test" for number in range(MANY))
    assert source.name(2) == entry(3).path
    assert held / MANY < MOST_BYTES
