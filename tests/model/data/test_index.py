from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import config, contract
from model.data import duplicates, index
from model.data.errors import BadDataError, DataError
from model.data.splits import split_of
from model.data.threads import untold
from tests.model.data.conftest import PHOTOGRAPHS, picture, save


def settings(root: Path, **values: object) -> config.Data:
    return config.read(config.Data, {"path": str(root), **values})


def test_what_an_entry_knows(images: Path, tmp_path: Path) -> None:
    save(Image.new("RGB", (30, 20), "navy"), images / "flat.jpg")
    entries = {entry.path: entry for entry in index.build_or_read(settings(images), str(tmp_path), untold).entries}
    assert list(entries) == sorted(entries)
    one = entries["a/02.png"]
    assert (one.label, one.caption, one.has_alpha) == ("a", "A picture of number 2.", True)
    flat = entries["flat.jpg"]
    assert (flat.label, flat.caption, flat.has_alpha, flat.width, flat.height) == (None, None, False, 30, 20)


def test_mirrored_and_brighter_copies_are_one_group_and_others_are_not(images: Path) -> None:
    built = index.build(images, PHOTOGRAPHS, untold)
    group = {entry.path: entry.group for entry in built.entries}
    assert group["a/00.png"] == group["a/mirrored.png"] == group["b/brighter.png"]
    assert len(set(group.values())) == len(built.entries) - 2


def test_no_group_is_split_and_the_shares_are_as_said(tmp_path: Path) -> None:
    for number in range(300):
        save(picture(number), tmp_path / f"images/{number}.png")
        if number % 10 == 0:
            save(picture(number), tmp_path / f"images/copies/{number}.png")
    entries = index.build(tmp_path / "images", PHOTOGRAPHS, untold).entries
    splits: dict[int, set[str]] = defaultdict(set)
    for entry in entries:
        splits[entry.group].add(entry.split)
    assert len(splits) == 300
    assert all(len(found) == 1 for found in splits.values())
    assert sum(found == {"test"} for found in splits.values()) == pytest.approx(100, abs=25)
    assert sum(found == {"validation"} for found in splits.values()) == pytest.approx(45, abs=20)


def test_the_split_of_a_path_never_changes() -> None:
    found = [split_of(f"{number}.png") for number in range(12)]
    assert " ".join(found) == "validation validation test train test train train test train train test train"


def test_hold_out(images: Path, tmp_path: Path) -> None:
    built = index.build_or_read(settings(images), str(tmp_path), untold)
    seen = {
        hold_out: {entry.split for entry in index.training_entries(built, settings(images, hold_out=hold_out))}
        for hold_out in ("none", "test", "validation")
    }
    assert seen == {
        "none": {"train", "validation", "test"},
        "test": {"train", "validation"},
        "validation": {"train"},
    }


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(50) if split_of(f"{number}.png") == "test"]
    save(picture(1), tmp_path / "images" / names[0])
    data = settings(tmp_path / "images", hold_out="test")
    with pytest.raises(DataError, match="none of the 1 images"):
        index.training_entries(index.build_or_read(data, str(tmp_path), untold), data)


def test_families() -> None:
    assert duplicates.families(["people/fireman240a.png", "x/fireman.png"]) == ["fireman", "fireman"]
    assert duplicates.families(["a/001.png", "b/001.png"]) == ["a/001.png", "b/001.png"]
    photos = [f"img_{number:04d}.jpg" for number in range(50)]
    assert duplicates.families(photos) == photos


def test_a_family_still_needs_likeness() -> None:
    alike = picture(1).convert("RGB")
    changed = Image.blend(alike, picture(2).convert("RGB"), 0.35)
    looks = np.stack([duplicates.thumbnail(np.asarray(image)) for image in (alike, changed, picture(3).convert("RGB"))])
    assert 0.80 < float((looks[0] * looks[1]).sum()) < 0.93
    contents = ["x", "y", "z"]
    assert duplicates.near_duplicates(["lorry1.png", "lorry2.png", "lorry3.png"], contents, looks) == [0, 0, 1]
    assert duplicates.near_duplicates(["lorry1.png", "bus2.png", "van3.png"], contents, looks) == [0, 1, 2]


def test_equal_files_of_one_colour_are_one_group(tmp_path: Path) -> None:
    for name, colour in (("1.png", "red"), ("2.png", "red"), ("3.png", "blue")):
        save(Image.new("RGB", (8, 8), colour), tmp_path / "images" / name)
    assert [entry.group for entry in index.build(tmp_path / "images", PHOTOGRAPHS, untold).entries] == [0, 0, 1]


def test_a_large_folder_is_grouped_by_equal_files_and_says_so(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "COMPARE_AT_MOST", 10)
    save(picture(3), images / "c/copy.png")
    built = index.build(images, PHOTOGRAPHS, untold)
    group = {entry.path: entry.group for entry in built.entries}
    assert built.grouping == "equal files"
    assert group["c/copy.png"] == group["b/03.png"]
    assert group["a/00.png"] != group["a/mirrored.png"]


def test_unreadable_images_are_named_and_too_many_of_them_stop_the_run(images: Path, tmp_path: Path) -> None:
    (images / "a/empty.png").write_bytes(b"")
    (images / "a/torn.png").write_bytes((images / "a/02.png").read_bytes()[:80])
    few = settings(images, max_skip_rate=0.05)
    built = index.build_or_read(few, str(tmp_path), untold)
    assert [one.path for one in built.skipped] == ["a/empty.png", "a/torn.png"]
    assert len(built.entries) == 40
    assert len(index.training_entries(built, few)) == 40
    with pytest.raises(BadDataError, match=r"2 of 42 images .*\n.*\n  a/empty.png: empty file\n  a/torn.png: "):
        index.training_entries(built, settings(images))


def test_files_that_are_passed_over_for_their_endings_are_counted(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.heic", "b/2.HEIC", "notes.pdf", "LICENCE", ".hidden.heic"):
        (images / name).touch()
    assert len(index.list_images(images)) == 40
    (said,) = caplog.messages
    assert said.endswith(": 2 .heic, 1 .pdf")


def test_a_folder_that_was_repaired_is_looked_at_anew(images: Path, tmp_path: Path) -> None:
    torn = images / "a/torn.png"
    torn.write_bytes((images / "a/02.png").read_bytes()[:80])
    with pytest.raises(BadDataError, match=r"1 of 41 images"):
        index.build_or_read(settings(images), str(tmp_path), untold)
    torn.unlink()
    assert not index.build_or_read(settings(images), str(tmp_path), untold).skipped


def test_missing_and_empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"no such folder: .*nowhere"):
        index.build_or_read(settings(tmp_path / "nowhere"), str(tmp_path), untold)
    with pytest.raises(DataError, match=r"cache:birds: .*dinoctl/birds is not there; `make data`"):
        index.build_or_read(config.Data(path="cache:birds"), str(tmp_path), untold)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images under"):
        index.build_or_read(settings(tmp_path / "empty"), str(tmp_path), untold)
    (tmp_path / "empty/x.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of the 1 images .* can be read; x.png: not an image"):
        index.build_or_read(settings(tmp_path / "empty"), str(tmp_path), untold)


def test_a_run_keeps_its_index_whatever_happens_to_the_folder(images: Path, tmp_path: Path) -> None:
    first = index.build_or_read(settings(images), str(tmp_path), untold)
    save(picture(99), images / "a/later.png")
    assert index.build_or_read(settings(images), str(tmp_path), untold) == first


def test_it_is_told_how_far_the_looking_is(images: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    index.build_or_read(settings(images), str(tmp_path), lambda done, total: told.append((done, total)))
    assert (told[0], told[2]) == ((0, 0), (0, 40))  # after each folder
    assert told[3:] == [(done, 40) for done in range(1, 41)]
    told.clear()
    index.build_or_read(settings(images), str(tmp_path), lambda done, total: told.append((done, total)))
    assert told == []


def test_two_that_build_at_once_agree(images: Path, tmp_path: Path) -> None:
    found: list[index.Index] = []
    threads = [
        threading.Thread(target=lambda: found.append(index.build_or_read(settings(images), str(tmp_path), untold)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]


STAMPS = contract.cache_dir() / "tuxpaint-stamps"


@pytest.mark.requires("stamps")
def test_the_demos_images() -> None:
    built = index.build(STAMPS, PHOTOGRAPHS, untold)
    group = {entry.path: entry.group for entry in built.entries}
    assert len(built.entries) == 950
    assert built.skipped == []
    assert len({entry.label for entry in built.entries}) == 16
    assert all(entry.caption for entry in built.entries)
    assert group["military/fireman240a.png"] == group["people/fireman240a.png"]
    assert group["food/fruit/orange.png"] != group["household/electronics/mouse.png"]
    assert max(map(list(group.values()).count, set(group.values()))) < 40
