"""Tar shards: what an index knows, what a damaged shard does, the same batches as ever, a store that fails."""

from __future__ import annotations

import gzip
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from model import config, storage
from model.data import patience, shards, tar_shard
from model.data.batch import Batch, SslBatch
from model.data.errors import BadDataError, DataError, UnreadableImageError
from model.data.shards import ShardSet, ShardSource
from model.data.views import SslViews
from tests.model.data import loading
from tests.model.data.conftest import picture
from tests.model.data.loading import assert_equal
from tests.model.data.tars import four_shards, png, sample, write_tar

VIEWS = SslViews(config.Resolution(global_size=16, local_size=8), patch_size=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return four_shards(tmp_path / "tars")


def settings(path: str | list[str], **values: Any) -> config.Data:
    return config.read(config.Data, {"path": path, "lanes": 3, "window": 4, "workers": 0, **values})


def build(data: config.Data, run: Path) -> ShardSet:
    return shards.build_or_read(data, str(run), lambda done, total: None)


def batches(data: config.Data, run: Path, *rank: int, **clocks: tuple[int, int]) -> list[Batch]:
    return loading.batches(data.model_dump(), run, *rank, **clocks)


# --- what is in a shard -----------------------------------------------------------------------------------------------


def test_images_captions_labels_and_keys(folder: Path, tmp_path: Path) -> None:
    data = settings(f"{folder}/x-{{00..03}}.tar", background=(0.0, 0.0, 0.0))
    found = build(data, tmp_path / "run")
    assert found.samples == [10, 10, 10, 10]
    assert found.skipped == []
    source = ShardSource(found, data)
    for number in (0, 9, 10, 39):
        black = Image.new("RGBA", picture(number).size, "black")
        assert source.image(number).tobytes() == Image.alpha_composite(black, picture(number)).convert("RGB").tobytes()
        assert source.caption(number) == f"Number {number}."
        assert source.label(number) == number
        assert source.name(number) == f"{folder}/x-{number // 10:02d}.tar: {number:04d}"


def test_naming_is_webdatasets(tmp_path: Path) -> None:
    long = "a/" + "long-name-" * 30
    path = write_tar(
        tmp_path / "odd.tar",
        [
            ("./d.ir/one.JPG", b"i"), ("./d.ir/one.json", b"{}"), ("only.txt", b"no image"), ("two.left.png", b"?"),
            ("two.png", b"jj"), ("two.cls", b"cat"), (".hidden.png", b"h"), ("none", b""), (f"{long}.webp", b"kkk"),
        ],
    )  # fmt: skip
    shard = tar_shard.ensure(str(tmp_path / "index"), str(path))
    samples = tar_shard.read(tar_shard.file_of(str(tmp_path / "index"), str(path), path.stat().st_size))
    assert (shard.samples, shard.without_image, shard.damage) == (3, 1, "")
    assert [samples.key(number) for number in range(3)] == ["./d.ir/one", "two", long]
    data = path.read_bytes()
    images = [data[r["image"] : r["image"] + r["image_bytes"]] for r in samples.records]
    assert images == [b"i", b"jj", b"kkk"]
    assert samples.records["label"].tolist() == [-1, -1, -1]


def test_a_list_a_glob_and_a_uri_are_the_same_shards(folder: Path, tmp_path: Path) -> None:
    first = batches(settings(f"{folder}/x-{{00..03}}.tar"), tmp_path / "a")
    assert_equal(first, batches(settings(f"{folder}/*.tar"), tmp_path / "b"))
    assert_equal(first, batches(settings([f"{folder}/x-0{n}.tar" for n in range(4)]), tmp_path / "c"))
    assert_equal(first, batches(settings(f"file://{folder}/*.tar"), tmp_path / "d"))
    for shard in folder.glob("*.tar"):
        with fsspec.open(f"memory://tars-{tmp_path.name}/{shard.name}", "wb") as file:
            file.write(shard.read_bytes())
    assert_equal(first, batches(settings(f"memory://tars-{tmp_path.name}/x-{{00..03}}.tar"), tmp_path / "e"))


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_is_made_once_and_may_be_shared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    patterns = [f"{folder}/*.tar"]
    shards.index_shards(patterns, str(tmp_path / "index"), lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    monkeypatch.setattr(tar_shard, "scan", None)  # whoever looks into a shard again fails
    monkeypatch.setattr(shards, "locate", None)
    data = settings(patterns[0], index=str(tmp_path / "index"))
    first = build(data, tmp_path / "run")
    for file in (tmp_path / "index").glob("set-*"):
        file.unlink()
    assert build(data, tmp_path / "run") == first  # the run keeps its own copy of the set
    monkeypatch.undo()
    monkeypatch.setattr(tar_shard, "scan", None)  # an interrupted making left all but the set
    assert build(data, tmp_path / "another") == first


def test_a_run_keeps_the_shards_it_began_with(folder: Path, tmp_path: Path) -> None:
    data = settings(f"{folder}/*.tar")
    first = build(data, tmp_path / "run")
    write_tar(folder / "x-04.tar", sample(40))
    assert build(data, tmp_path / "run") == first
    assert len(build(data, tmp_path / "new").paths) == 5
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = build(data, tmp_path / "moved")
    assert ShardSource(moved, data).caption(3) == "Number 3."


def test_shards_that_are_not_there_or_empty(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such tar shard: .*x-04.tar"):
        build(settings(f"{folder}/x-{{03..04}}.tar"), tmp_path / "a")
    with pytest.raises(DataError, match=r"no such tar shard: memory://nowhere/x.tar"):  # at once: nothing is retried
        build(settings("memory://nowhere/x.tar"), tmp_path / "a")
    (folder / "empty.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"no images in 1 tar shards .*empty.tar: not a whole tar: empty file"):
        build(settings(f"{folder}/empty.tar"), tmp_path / "b")


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_same_batches_for_any_workers_and_ranks_and_after_a_resume(folder: Path, tmp_path: Path) -> None:
    path = f"{folder}/*.tar"
    whole = batches(settings(path), tmp_path)
    assert_equal(whole, batches(settings(path, workers=3), tmp_path))
    assert_equal(whole[4:], batches(settings(path, workers=2), tmp_path, clocks=(4, 7)))
    for rank in range(2):
        part = batches(settings(path), tmp_path, rank, 2)
        assert_equal(part, [batch.slice(4 * rank, 4 * rank + 4) for batch in whole])


# --- damage -----------------------------------------------------------------------------------------------------------


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_an_unreadable_image_is_replaced_named_and_shifts_nothing(folder: Path, tmp_path: Path) -> None:
    data = settings(f"{folder}/*.tar", max_skip_rate=0.1)
    before = batches(data, tmp_path)
    shard = folder / "x-01.tar"
    samples = tar_shard.read(tar_shard.file_of(f"{tmp_path}/data/shards", str(shard), shard.stat().st_size))
    overwrite(shard, int(samples.records[4]["image"]), b"damaged!")
    after = batches(data, tmp_path)
    changed = 0
    for one, other in zip(before, after, strict=True):
        assert isinstance(one, SslBatch)
        assert isinstance(other, SslBatch)
        assert torch.equal(one.positions, other.positions)
        changed += int((one.global_crops != other.global_crops).flatten(2).any(2).any(0).sum())
    assert changed in (1, 2)  # 56 of 40 images
    assert_equal(after, batches(settings(f"{folder}/*.tar", max_skip_rate=0.1, workers=3), tmp_path))
    source = ShardSource(build(data, tmp_path), data)
    with pytest.raises(UnreadableImageError, match="not an image"):
        source.image(14)
    assert source.name(14) == f"{shard}: 0014"


def test_a_shard_that_went_bad_is_counted_and_named(folder: Path, tmp_path: Path) -> None:
    build(settings(f"{folder}/*.tar"), tmp_path)
    shard = folder / "x-02.tar"
    overwrite(shard, 0, b"\0" * shard.stat().st_size)
    made = loading.loader(settings(f"{folder}/*.tar").model_dump(), tmp_path)
    assert sum(len(batch.positions) for batch in made) == 56
    assert made.skipped.replaced >= made.skipped.count == 10
    assert all(str(one).startswith(f"{shard}: 00") and "not an image" in one.reason for one in made.skipped.last)


def test_a_repaired_shard_is_looked_at_anew(folder: Path, tmp_path: Path) -> None:
    shard, index = folder / "x-02.tar", str(tmp_path / "index")
    whole = shard.read_bytes()
    data = settings(f"{folder}/*.tar", index=index)
    overwrite(shard, 0, b"garbage")
    for _ in range(2):
        with pytest.raises(BadDataError, match=r"1 of 4 tar shards .* are unreadable"):
            build(data, tmp_path / "run")
    shard.write_bytes(whole)  # as long as it was when it was damaged
    assert build(data, tmp_path / "run").samples == [10, 10, 10, 10]


def test_a_shared_index_is_made_anew_by_its_command(folder: Path, tmp_path: Path) -> None:
    index, patterns = str(tmp_path / "index"), [f"{folder}/*.tar"]
    data = settings(patterns[0], index=index)
    before = build(data, tmp_path / "run")
    write_tar(folder / "x-04.tar", sample(40))
    write_tar(folder / "x-00.tar", sample(7))
    assert build(data, tmp_path / "new") == before
    anew = shards.index_anew(patterns, index, lambda done, total: None)
    assert anew.samples == [1, 10, 10, 10, 1]
    assert build(data, tmp_path / "newest") == anew
    assert build(data, tmp_path / "run") == before


def test_a_shard_that_is_rewritten_as_long_as_it_was_is_not_misread(folder: Path, tmp_path: Path) -> None:
    shard = write_tar(folder / "x-00.tar", [*sample(1), *sample(2)])
    long, data = shard.stat().st_size, settings(str(shard))
    source = ShardSource(build(data, tmp_path / "run"), data)
    write_tar(shard, [*sample(2), *sample(1)])
    assert shard.stat().st_size == long
    for read in (source.image, source.caption):
        with pytest.raises(UnreadableImageError, match="its shard was rewritten; `dinoctl data index` again"):
            read(0)
    anew = tar_shard.ensure(str(tmp_path / "run/data/shards"), str(shard))
    assert tar_shard.read(tar_shard.file_of(str(tmp_path / "run/data/shards"), str(shard), anew.bytes)).key(0) == "0002"


def test_what_a_tar_holds_and_no_sample_has_is_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(1))
    (tmp_path / "in/b.png").symlink_to("a.png")
    (tmp_path / "in/c.png").hardlink_to(tmp_path / "in/a.png")
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    write_tar(tmp_path / "twice.tar", [("a.png", png(1)), ("a.txt", b"one"), ("a.png", png(2)), ("a.txt", b"two")])
    found = build(settings([str(tmp_path / "linked.tar"), str(tmp_path / "twice.tar")]), tmp_path / "run")
    assert found.samples == [1, 1]
    links, repeated = found.lost
    assert links.startswith("2 files are links, of which a tar holds no bytes")
    assert repeated.startswith("2 files are passed over")


def test_tars_that_were_joined_with_cat_or_compressed_are_damaged(folder: Path, tmp_path: Path) -> None:
    both = (folder / "x-00.tar").read_bytes() + (folder / "x-01.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(both)
    joined = tar_shard.ensure(str(tmp_path), str(tmp_path / "both.tar"))
    assert joined.samples == 10
    assert joined.damage.endswith(": join tars with tar -A and not with cat")
    (tmp_path / "small.tar").write_bytes(gzip.compress(both))
    assert tar_shard.ensure(str(tmp_path), str(tmp_path / "small.tar")).damage == "compressed with gzip: unpack it"


@pytest.mark.parametrize(
    ("sample", "bytes_more", "samples", "says"),
    [(6, 10, 6, "it ends within 0016.png"), (0, -600, 0, "empty file"), (0, -100, 0, "not a whole tar")],
)
def test_a_truncated_shard_keeps_what_is_whole(
    folder: Path, tmp_path: Path, sample: int, bytes_more: int, samples: int, says: str
) -> None:
    path = folder / "x-01.tar"
    shard = tar_shard.ensure(str(tmp_path), str(path))
    records = tar_shard.read(tar_shard.file_of(str(tmp_path), str(path), shard.bytes)).records
    with path.open("r+b") as file:
        file.truncate(max(0, int(records[sample]["image"]) + bytes_more))
    data = settings(f"{folder}/*.tar", max_skip_rate=0.3)
    found = build(data, tmp_path)
    assert [one.path for one in found.skipped] == [str(path)]
    assert says in found.skipped[0].reason
    assert found.samples[1] == samples
    source = ShardSource(found, data)
    for number in range(found.total):
        source.image(number)
    with pytest.raises(BadDataError, match=r"1 of 4 tar shards .* are unreadable"):
        ShardSource(found, settings(f"{folder}/*.tar"))


def test_damage_between_samples_is_noticed(folder: Path, tmp_path: Path) -> None:
    path = folder / "x-03.tar"
    whole = tar_shard.ensure(str(tmp_path), str(path))
    samples = tar_shard.read(tar_shard.file_of(str(tmp_path), str(path), whole.bytes))
    overwrite(path, int(samples.records[5]["image"]) - tar_shard.BLOCK, b"garbage")
    shard = tar_shard.ensure(str(tmp_path / "new"), str(path))
    assert shard.samples == 5
    assert shard.damage == f"damaged at byte {int(samples.records[5]['image']) - tar_shard.BLOCK}"


def test_an_index_lies_in_a_folder() -> None:
    with pytest.raises(ValueError, match=r"index: s3://b/i: a folder that every process of the run sees"):
        settings("x.tar", index="s3://b/i")


def test_a_torn_index_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    path = folder / "x-00.tar"
    shard = tar_shard.ensure(str(tmp_path), str(path))
    file = Path(tar_shard.file_of(str(tmp_path), str(path), shard.bytes))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"the index is torn; remove it"):
        tar_shard.read(str(file))
    file.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"not an index of this version"):
        tar_shard.ensure(str(tmp_path), str(path))


# --- a store that fails -----------------------------------------------------------------------------------------------


def test_a_failing_store_is_asked_again_and_is_no_skip(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = settings(f"{folder}/*.tar")
    whole = batches(data, tmp_path)
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    asked, read = Counter[tuple[str, int]](), storage.read_range

    def failing(uri: str, start: int, length: int) -> bytes:
        asked[uri, start] += 1
        if asked[uri, start] % 3:
            raise storage.StoreError(5, f"reading {uri}: no answer")
        return read(uri, start, length)

    monkeypatch.setattr(storage, "read_range", failing)
    assert_equal(whole, batches(data, tmp_path))
    monkeypatch.setattr(patience, "WAITS", (0.0,))
    with pytest.raises(storage.StoreError, match="no answer"):
        batches(data, tmp_path)


def test_a_shard_that_is_gone_is_the_stores_failure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    data = settings(f"{folder}/*.tar")
    source = ShardSource(build(data, tmp_path), data)
    (folder / "x-01.tar").unlink()
    source.image(0)
    with pytest.raises(storage.StoreError, match=r"no such file: .*x-01.tar, after 3 tries"):
        source.image(10)


def test_asking_again_does_not_help_who_may_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(*_: object, **__: object) -> bytes:
        asked.append(1)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", refused)
    with pytest.raises(storage.StoreError, match=r"reading memory://b/x.tar: Access Denied"):
        patience.patiently(lambda: storage.read_range("memory://b/x.tar", 0, 1))
    assert len(asked) == 1


def test_what_is_refused() -> None:
    for path, says in (
        ("x.tar.gz", "compressed"), (["a.tar", "b.tgz"], "compressed"),
        (["a.tar", "b"], "only tar shards can be listed"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            settings(path)


def test_places() -> None:
    found = ShardSet("", ["a", "b", "c"], [1, 1, 1], [2, 0, 3], 0, [])
    source = ShardSource(found, settings("a.tar"))
    assert [vars(source.place(number)) for number in range(5)] == [
        {"shard": shard, "sample": at} for shard, at in ((0, 0), (0, 1), (2, 0), (2, 1), (2, 2))
    ]
    assert source.counts.dtype == np.int64
