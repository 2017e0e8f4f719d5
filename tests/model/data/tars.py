"""Tar shards as tests plant them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.model.data.conftest import picture

PER_SHARD = 10


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int) -> list[tuple[str, bytes]]:
    key = f"{number:04d}"
    return [
        (f"{key}.png", png(number)),
        (f"{key}.txt", f"Number {number}.\nmore".encode()),
        (f"{key}.cls", b"%d" % number),
    ]


def four_shards(folder: Path) -> Path:
    """x-00.tar to x-03.tar, of ten images each, with captions and labels."""
    for shard in range(4):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_tar(folder / f"x-{shard:02d}.tar", [member for n in numbers for member in sample(n)])
    return folder
