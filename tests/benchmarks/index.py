"""What the index of very many shards costs: `python -P -m tests.benchmarks.index`.

A synthetic set of 170,000 shards of 10,000 images (1.7 billion): no tar is written for it, only another one, of which
the speed of scanning is measured. The rest is real: the set is gathered and published, read back as a run does that
starts, and the first batch's images are found through the indices of the shards that they lie in (these few are
written). Memory is the process's peak, interpreter and libraries included.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from model import config, storage
from model.data import shards, tar_shard
from model.data.order import Order
from model.data.shards import ShardSet, ShardSource
from model.data.tar_shard import MAGIC, RECORD, Shard
from tests.benchmarks import options as ask

BATCH = 4096
BYTES = 1_000_000_000  # of a shard
PATTERN = "s3://bucket/lvd-1689m/part-{000000..%06d}.tar"


@dataclass
class Told:
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, since: float) -> float:
        now = time.monotonic()
        self.seconds[name] = round(now - since, 3)
        return now


def main() -> None:
    parser = ask.parser(__doc__)
    parser.add_argument("--shards", type=ask.positive, default=170_000)
    parser.add_argument("--images", type=ask.positive, default=10_000, help="in each shard")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.shards * options.images < BATCH:
        parser.error(f"--shards {options.shards} --images {options.images}: fewer images than a batch has ({BATCH})")
    with tempfile.TemporaryDirectory() as scratch:
        told = measure(scratch, options.shards, options.images)
    if options.json:
        print(json.dumps(told))
        return
    for name, value in told.items():
        print(f"{name:<44} {value:,}")


def measure(scratch: str, count: int, images: int) -> dict[str, float]:
    told, began = Told(), time.monotonic()
    scanned = scan_rate(Path(scratch), images)
    began = time.monotonic()
    publish(scratch, count, images)
    told.timed("gathering and publishing the set, s", began)
    began = time.monotonic()
    data = config.read(config.Data, {"path": PATTERN % (count - 1), "index": f"{scratch}/index"})
    found = shards.build_or_read(data, f"{scratch}/run", _silent)
    source = ShardSource(found, data)
    order = Order(0, "pretrain", source.counts, data.lanes, data.window)
    numbers = [order.number(position) for position in range(BATCH)]
    began = told.timed("start: set read, first batch drawn, s", began)
    write_indices(found, source, numbers, images)
    began = time.monotonic()
    names = {source.name(number) for number in numbers}
    told.timed("first batch found in its shards' indices, s", began)
    began = time.monotonic()
    later = order.total + min(10**6, order.total - BATCH)  # a whole batch of the second epoch
    drawn = {order.number(position) for position in range(later, later + BATCH)}
    told.timed("a batch of the next epoch drawn, s", began)
    if not len(names) == len(drawn) == BATCH:
        raise AssertionError("an image came twice in a batch")
    return {
        "images": order.total,
        "shards": count,
        **told.seconds,
        "images scanned a second, one thread": scanned,
        "peak memory, MiB": round(peak_kib() / 1024, 1),
    }


def peak_kib() -> int:
    """This process's own peak: that of getrusage begins with what the process that forked it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def scan_rate(folder: Path, images: int) -> float:
    """Images a second, of a tar that is in the page cache."""
    path = folder / "real.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = 4096
            tar.addfile(member, io.BytesIO(bytes(4096)))
    began = time.monotonic()
    if tar_shard.ensure(str(folder / "real"), str(path)).samples != images:
        raise AssertionError("not all samples were found")
    return round(images / (time.monotonic() - began))


def publish(scratch: str, count: int, images: int) -> None:
    """The set, gathered by `build` as if every shard had been scanned before."""
    ensure: Callable[[str, str], Shard] = tar_shard.ensure
    splits = (images - 4000, 1000, 3000)
    tar_shard.ensure = lambda index, path: Shard(path, BYTES, images, splits=splits, captioned=splits)
    try:
        pattern = PATTERN % (count - 1)
        shards.index_shards([pattern], f"{scratch}/index", _silent)
    finally:
        tar_shard.ensure = ensure


def write_indices(found: ShardSet, source: ShardSource, numbers: Iterable[int], images: int) -> None:
    """The indices of those shards that the images lie in."""
    records = np.zeros(images, RECORD)
    records["key"] = 9 * np.arange(images)
    keys = "".join(f"{number:09d}" for number in range(images)).encode()
    for number in sorted({source.place(number).shard for number in numbers}):
        shard = Shard(found.paths[number], BYTES, images)
        file = tar_shard.file_of(found.index, shard.path, shard.bytes)
        storage.replace(file, MAGIC + msgspec.json.encode(shard) + b"\n" + records.tobytes() + keys)


def _silent(done: int, total: int) -> None:
    """Nobody watches."""


if __name__ == "__main__":
    main()
