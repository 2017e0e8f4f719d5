"""Tar shards of which training sees a part: what is not held out, and what has a caption."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from model import config
from model.data import shards, sources, splits
from model.data.batch import Batch
from model.data.errors import DataError
from model.data.loader import Loader, Stream
from model.data.shards import ShardSource
from model.data.views import PairViews
from tests.model.data.loading import assert_equal
from tests.model.data.tars import four_shards, png, write_tar
from tests.model.data.test_shards import batches, build, settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return four_shards(tmp_path / "tars")


def pairs(data: config.Data, run: Path, rank: int = 0, world: int = 1) -> list[Batch]:
    """The first batches of a text phase."""
    values = {
        "kind": "text", "steps": 100, "data": data.model_dump(), "checkpoints": {"every": 10},
        "optim": {"batch_size": 8, "group_size": 2, "lr": 1e-3},
        "vision_tower": "pretrain@final", "text": {"vocabulary": 300, "context": 12},
    }  # fmt: skip
    text = config.read_phase(values)
    found = sources.build_or_read(text.data, str(run), lambda *_: None)
    return list(Loader(text, Stream(0, "text", range(7), rank, world), found, str(run), lambda _: PairViews(16, 12)))


def test_hold_out_goes_by_the_hash_of_the_key(folder: Path, tmp_path: Path) -> None:
    path = f"{folder}/*.tar"
    keys = [f"{number:04d}" for number in range(40)]
    seen = {}
    for hold_out, hidden in splits.HIDDEN.items():
        data = settings(path, hold_out=hold_out)
        source = ShardSource(build(data, tmp_path), data)
        numbers = range(int(source.counts.sum()))
        seen[hold_out] = [source.label(number) for number in numbers]
        assert seen[hold_out] == [int(key) for key in keys if splits.split_of(key) not in hidden]
        assert [source.name(number)[-4:] for number in numbers] == [
            f"{label:04d}" for label in seen[hold_out] if label is not None
        ]
    assert len(seen["none"]) == 40 > len(seen["test"]) > len(seen["validation"]) > 0
    positions = batches(settings(path, hold_out="test"), tmp_path)
    assert_equal(positions, batches(settings(path, hold_out="test", workers=3), tmp_path))


def test_a_text_phase_takes_the_samples_with_captions(folder: Path, tmp_path: Path) -> None:
    write_tar(folder / "x-04.tar", [(f"{number}.png", png(number)) for number in range(40, 44)])
    path = f"{folder}/*.tar"
    whole = pairs(settings(path, hold_out="test"), tmp_path)
    assert_equal(whole, pairs(settings(path, hold_out="test", workers=3), tmp_path))
    assert_equal([batch.slice(4, 8) for batch in whole], pairs(settings(path, hold_out="test"), tmp_path, 1, 2))
    data = settings(path)
    (source,) = sources.open_sources([build(data, tmp_path)], data, captioned=True)
    assert source.counts.tolist() == [10, 10, 10, 10, 0]
    assert {source.caption(number) for number in range(40)} == {f"Number {number}." for number in range(40)}
    assert len(list((tmp_path / "data").glob("tokenizer-*.json"))) == 1
    with pytest.raises(DataError, match=r"no sample has a caption"):
        pairs(settings(f"{folder}/x-04.tar"), tmp_path / "none")


def test_the_captions_that_a_tokenizer_is_learnt_from_are_few_and_spread_evenly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_CAPTIONS", 4)
    data = settings(f"{folder}/*.tar")
    source = ShardSource(build(data, tmp_path), data, captioned=True)
    assert source.captions().read() == ["Number 0.", "Number 10.", "Number 20.", "Number 30."]
    other = settings(f"{folder}/*.tar", hold_out="test")
    identities = {
        one.captions().identity for one in (source, ShardSource(build(other, tmp_path), other, captioned=True))
    }
    assert len(identities) == 2


def test_an_index_without_splits_is_made_again(folder: Path, tmp_path: Path) -> None:
    data = settings(f"{folder}/*.tar", hold_out="test")
    old = msgspec.structs.replace(build(data, tmp_path), splits={}, captioned={})
    ShardSource(old, settings(f"{folder}/*.tar"))
    with pytest.raises(DataError, match=r"made by an older dinoctl.*remove .*/data/shards, and it is made again"):
        ShardSource(old, data)
