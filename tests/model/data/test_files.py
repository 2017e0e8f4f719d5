"""A file that is at fault is told from a store that fails: with real files, and errors of a real kernel."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model import config, job
from model.data import check, files, index, patience
from model.data.__main__ import main
from model.data.errors import BadDataError, DataError, Skipped, StalledDataError, UnreadableImageError
from model.data.images import decode
from model.data.pack import pack
from model.data.threads import untold
from model.data.whole import open_whole
from model.storage import StoreError
from orchestrator import data_places
from tests.model.data import loading
from tests.model.data.conftest import PHOTOGRAPHS

FAILS = "/proc/self/mem"
"""Whoever reads it at its beginning gets EIO from the kernel, as from a disk that is going."""


def data_of(root: Path) -> config.Data:
    return config.read(config.Data, {"path": str(root)})


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))


@pytest.mark.usefixtures("hasty")
def test_a_disk_that_fails_is_no_unreadable_image_and_nothing_of_it_gets_into_the_index(
    images: Path, tmp_path: Path
) -> None:
    (images / "a/bad.png").symlink_to(FAILS)
    with pytest.raises(StalledDataError, match=r"reading .*a/bad.png: Input/output error, after 3 tries"):
        index.build_or_read(data_of(images), str(tmp_path), untold)
    with pytest.raises(StalledDataError, match=r"bad\.png"):
        list(check.problems(open_whole(data_of(images), "", untold), untold))
    with pytest.raises(StalledDataError, match=r"bad\.png"):
        decode(images / "a/bad.png", PHOTOGRAPHS)
    assert not (tmp_path / "data").exists()
    (images / "a/bad.png").unlink()
    assert index.build_or_read(data_of(images), str(tmp_path), untold).skipped == []


@pytest.mark.usefixtures("hasty")
def test_a_disk_that_fails_in_training_ends_the_attempt(images: Path, tmp_path: Path) -> None:
    made = loading.loader({"path": str(images), "workers": 2}, tmp_path / "run")
    for path in images.glob("*/*.png"):
        path.unlink()
        path.symlink_to(FAILS)
    with pytest.raises(StalledDataError, match="Input/output error, after 3 tries"):
        list(made)
    assert made.skipped.count == 0


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("how", ["gone", "not mounted"])
def test_a_folder_that_is_gone_is_the_stores(images: Path, tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    made = loading.loader({"path": str(images), "workers": 0}, run)
    images.rename(tmp_path / "elsewhere")
    if how == "not mounted":
        images.mkdir()
    with pytest.raises(StalledDataError, match=r"No such file .*, and .*/images is empty, not there or .*mounted"):
        list(made)
    with pytest.raises(StalledDataError):  # as the next attempt, which has the index
        list(loading.loader({"path": str(images), "workers": 0}, run))


def test_a_folder_that_comes_back_is_waited_for(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.1,) * 1000)
    made = loading.loader({"path": str(images), "workers": 2}, tmp_path / "run")
    images.rename(tmp_path / "elsewhere")

    def bring_back() -> None:
        deadline = time.monotonic() + 60
        while "again in 0.1 s" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "elsewhere").rename(images)

    thread = threading.Thread(target=bring_back)
    thread.start()
    batches = list(made)
    thread.join()
    assert (len(batches), made.skipped.replaced) == (7, 0)
    assert "again in 0.1 s" in caplog.text


def test_a_single_image_that_is_gone_is_that_images(images: Path, tmp_path: Path) -> None:
    made = loading.loader({"path": str(images), "workers": 0, "max_skip_rate": 0.5}, tmp_path / "run")
    for path in images.glob("a/*.png"):
        path.unlink()
    assert len(list(made)) == 7
    assert {one.reason for one in made.skipped.last} == {"No such file or directory"}


def test_a_file_that_may_not_be_read_is_that_files(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = files._bytes

    def refused(path: Path, most: int = -1) -> bytes:  # nothing is refused to root
        if path.name in ("02.png", "03.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return ours(path, most)

    monkeypatch.setattr(files, "_bytes", refused)
    found = index.build(images, PHOTOGRAPHS, untold)
    assert [(one.path, one.reason) for one in found.skipped] == [
        ("a/02.png", "Permission denied"),
        ("b/03.png", "its caption 03.txt: Permission denied"),
    ]
    assert list(check.problems(open_whole(data_of(images), "", untold), untold)) == found.skipped
    monkeypatch.setattr(files, "_holds_something", lambda root: False)
    with pytest.raises(StalledDataError, match="after 1 tries"):
        index.build(images, PHOTOGRAPHS, untold)


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Has a folder refused by whoever lists it, as to another user: nothing is refused to root."""
    ours, closed = os.scandir, set[str]()

    def scandir(path: str) -> os._ScandirIterator[str]:
        if str(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return ours(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return lambda folder: closed.add(str(folder))


def test_a_folder_that_may_not_be_listed_counts_as_one_unreadable_image(
    images: Path, tmp_path: Path, refuses: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(images / "b")
    expected = Skipped(path="b", reason="a folder that may not be listed: Permission denied")
    found = index.build(images, PHOTOGRAPHS, untold)
    assert (len(found.entries), found.skipped) == (20, [expected])
    with pytest.raises(BadDataError, match=r"(?s)1 of 21 images .*\n  b: a folder that may not be listed"):
        index.build_or_read(data_of(images), str(tmp_path), untold)
    assert "1 of 21 images are unreadable and left out, last: b (a folder that may" in job._left_out(found)
    assert main(["check", str(images)]) == 1
    assert capsys.readouterr().out == f"{expected}\n20 images of {images} looked at, 1 problems\n"
    assert main(["pack", str(images), str(tmp_path / "tars")]) == 2
    said = "a folder that may not be listed: Permission denied; repair or remove it, as a shard has to hold it"
    assert capsys.readouterr().err == f"dinoctl: {images}/b: {said}\n"
    assert not (tmp_path / "tars").exists()
    assert main(["stats", str(images)]) == 0
    assert capsys.readouterr().out.endswith(f"# of 20 images of {images}; left out: {expected}\n")
    refuses(images / "a")
    with pytest.raises(DataError, match=r"no images under .*; a: a folder that may not be listed: Permission denied"):
        index.build(images, PHOTOGRAPHS, untold)
    refuses(images)
    with pytest.raises(StalledDataError, match=r"listing .*/images: Permission denied"):
        index.build(images, PHOTOGRAPHS, untold)


def test_links_to_folders_are_folders_and_loops_end(images: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name, to in (("x", "../images/a"), ("y", "../images"), ("gone", "../nowhere"), (".hidden", "../images/a")):
        (linked / name).symlink_to(to)
    (images / "a/up").symlink_to("..")
    (images / "b/a").symlink_to("../a")
    (images / "a/b").symlink_to("../b")
    found = index.list_images(linked)
    of_a = {file.name for file in images.glob("a/*.png")}
    assert {path.removeprefix("x/") for path in found if path.startswith("x/") and path.count("/") == 1} == of_a
    assert {path.rsplit("/", 1)[0] for path in found} == {
        *("x", "x/b", "x/up/b"),  # x/up/a is x itself, and x/b/a too
        *("y/a", "y/a/b", "y/b", "y/b/a"),
    }
    walked = [file.relative_to(linked).as_posix() for file in data_places.images(linked, PHOTOGRAPHS.suffixes)]
    assert sorted(walked) == found
    labels = {entry.path: entry.label for entry in index.build(linked, PHOTOGRAPHS, untold).entries}
    assert labels["x/00.png"] == "x"


def test_too_many_open_files_are_this_machines(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", ())

    def full(path: Path, most: int = -1) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(files, "_bytes", full)
    with pytest.raises(StoreError, match=r"reading .*\.png: Too many open files"):
        files.read(images / "a/02.png", images)


def test_what_is_wrong_with_one_name(images: Path) -> None:
    (images / "a/loop.png").symlink_to("loop.png")
    (images / "a/nowhere.png").symlink_to("nothing.png")
    (images / "a/00.txt").unlink()
    (images / "a/00.txt").mkdir()
    found = index.build(images, PHOTOGRAPHS, untold)
    assert {one.path: one.reason for one in found.skipped} == {
        "a/00.png": "its caption 00.txt: Is a directory",
        "a/loop.png": "Too many levels of symbolic links",
        "a/nowhere.png": "No such file or directory",
    }
    with pytest.raises(UnreadableImageError, match="Is a directory"):
        files.read(images / "a", images)


def test_a_pipe_a_device_and_a_file_of_60_gb_do_not_hold_up_an_index_or_a_check(images: Path, tmp_path: Path) -> None:
    os.mkfifo(images / "a/pipe.jpg")
    (images / "a/zeros.png").symlink_to("/dev/zero")
    (images / "b/linked.png").symlink_to(images / "b/01.png")
    with (images / "b/huge.tif").open("wb") as file:
        file.truncate(60 * 10**9)  # sparse
    huge = "a file of 60,000,000,000 bytes, more than 1,073,741,824: save one image a file, or cut it into tiles"
    expected = {
        "a/pipe.jpg": "not a file but a pipe, a device or the like",
        "a/zeros.png": "not a file but a pipe, a device or the like",
        "b/huge.tif": huge,
    }
    found = index.build(images, PHOTOGRAPHS, untold)
    assert {one.path: one.reason for one in found.skipped} == expected
    group = {entry.path: entry.group for entry in found.entries}
    assert group["b/linked.png"] == group["b/01.png"]
    checked = check.problems(open_whole(data_of(images), "", untold), untold)
    assert {one.path: one.reason for one in checked} == expected
    with pytest.raises(DataError, match=r"(pipe|device).* or the like; repair or remove it|60,000,000,000 bytes"):
        pack(str(images), str(tmp_path / "shards"), "x", 100, 0, untold)
    assert not list((tmp_path / "shards").glob("*.tar"))


def test_a_caption_that_is_a_pipe_or_has_no_end(images: Path) -> None:
    (images / "a/00.txt").unlink()
    os.mkfifo(images / "a/00.txt")
    with (images / "a/02.txt").open("r+b") as file:
        file.truncate(60 * 10**9)
    found = index.build(images, PHOTOGRAPHS, untold)
    assert [one.reason for one in found.skipped] == ["its caption 00.txt: not a file but a pipe, a device or the like"]
    assert list(check.problems(open_whole(data_of(images), "", untold), untold)) == found.skipped
    captions = {entry.path: entry.caption for entry in found.entries}
    assert captions["a/02.png"] == "A picture of number 2."


def test_the_digest_by_which_equal_files_are_found_is_that_of_their_bytes(images: Path) -> None:
    look = index._look(images / "a/02.png", images, PHOTOGRAPHS, False)
    assert not isinstance(look, str)
    assert look.content == hashlib.blake2b((images / "a/02.png").read_bytes(), digest_size=16).hexdigest()
