"""What `model.storage` promises of a file system."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model import storage


def test_two_may_remove_one_folder(tmp_path: Path) -> None:
    """Both controllers of an attempt that is gone remove its scratch folder."""
    folder = tmp_path / "scratch"
    with ThreadPoolExecutor(4) as removers:
        for _ in range(20):
            for number in range(50):
                (folder / str(number)).mkdir(parents=True)
            list(removers.map(storage.remove_tree, [str(folder)] * 4))
            assert not folder.exists()


def test_pieces_are_one_file_and_a_name_is_taken_once(tmp_path: Path) -> None:
    path = f"{tmp_path}/a/file"
    storage.publish_pieces(path, [b"one", memoryview(b" two"), b""])
    assert storage.read(path) == b"one two"
    storage.publish(path, b"one two")  # one's own bytes: a retry that has succeeded
    with pytest.raises(storage.AlreadyPublished):
        storage.publish_pieces(path, [b"one", b" six"])
    assert storage.names(f"{tmp_path}/a") == ["file"]
