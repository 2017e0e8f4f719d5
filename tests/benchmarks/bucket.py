"""How fast a bucket feeds the loader, and in how many requests, at a latency of its own making.

    python -P -m tests.benchmarks.bucket [--latency 0.02] [--images 8192] [--windows 4096 256 64] [--json]

A real store (SeaweedFS) on this machine, behind a proxy that waits before each answer; 256-pixel JPEGs of noise on
coloured blocks; one process with two loader threads and crops of 32 pixels, so that reading is what takes time.
`alone`: every image is a request of its own, made by the loader thread that needs it, as without reading ahead.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model import config
from model.data import loader, pack, sources
from model.data.read_ahead import read_now
from model.data.views import SslViews
from tests.benchmarks import options as ask
from tests.stores import weed

BATCH, LANES, SIDE = 64, 64, 256
SHARDS = 16
PLAIN_PART = 4  # `alone` is slow: it reads a quarter of the batches


class Alone:
    """In the place of ReadAhead: nothing is read ahead."""

    def __init__(self, *_: object, **__: object) -> None:
        self.read = read_now

    def batch(self, clock: int) -> nullcontext[None]:
        return nullcontext()

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def draw_images(folder: Path, count: int) -> int:
    """64 different JPEGs again and again; the bytes of all."""
    rng, size = np.random.default_rng(0), 0
    noise = rng.integers(0, 40, (SIDE, SIDE, 3), dtype=np.uint8)
    different = []
    for _ in range(64):
        blocks = rng.integers(0, 215, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        image = Image.fromarray(np.kron(blocks, np.ones((SIDE // 8, SIDE // 8, 1), np.uint8)) + noise)
        image.save(buffer, "jpeg", quality=75)
        different.append(buffer.getvalue())
    for number in range(count):
        data = different[number % len(different)]
        (folder / f"{number:06d}.jpg").write_bytes(data)
        size += len(data)
    return size


@contextmanager
def slow_proxy(upstream: str, latency: float) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-P", "-m", "tests.stores.proxy", upstream, str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def counted(proxy: subprocess.Popen[str]) -> dict[str, int]:
    assert proxy.stdin is not None
    assert proxy.stdout is not None
    proxy.stdin.write("\n")
    proxy.stdin.flush()
    told: dict[str, int] = json.loads(proxy.stdout.readline())
    return told


def measure(data: dict[str, Any], run: Path, batches: int, proxy: subprocess.Popen[str]) -> dict[str, float]:
    values = {
        "kind": "pretrain", "steps": batches, "data": data, "checkpoints": {"every": batches},
        "optim": {"batch_size": BATCH, "group_size": 2, "lr": 1e-3},
        "crops": {"resolutions": [{"global_size": 32, "local_size": 16}], "local_count": 1},
    }  # fmt: skip
    settings = config.read_phase(values)
    found = sources.build_or_read(settings.data, str(run), lambda *_: None)
    views = SslViews(settings.crops.resolutions[0], patch_size=4)  # type: ignore[union-attr]
    made = loader.Loader(settings, loader.Stream(0, "pretrain", range(batches)), found, str(run), lambda _: views)
    before, began = counted(proxy), time.perf_counter()
    for _ in made:
        pass
    seconds, after = time.perf_counter() - began, counted(proxy)
    images = batches * BATCH
    return {
        "images/s": round(images / seconds, 1),
        "images a request": round(images / (after["requests"] - before["requests"]), 2),
        "KB an image": round((after["bytes"] - before["bytes"]) / images / 1000, 1),
    }


def main(arguments: Sequence[str]) -> None:
    parser = ask.parser(__doc__)
    parser.add_argument("--latency", type=ask.seconds, default=0.02, help="seconds before each answer")
    parser.add_argument("--images", type=ask.positive, default=8192)
    parser.add_argument("--batches", type=ask.positive, default=64)
    parser.add_argument("--windows", type=ask.positive, nargs="+", default=[4096, 256, 64])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    for name, least in (("images", SHARDS), ("batches", PLAIN_PART)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: {least} or more")
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("images", "store"):
            (folder / name).mkdir()
        size = draw_images(folder / "images", options.images)
        with weed.running(folder / "store") as store, slow_proxy(store.endpoint, options.latency) as (endpoint, proxy):
            os.environ.update(store.environment(endpoint))
            target = f"s3://{weed.BUCKET}/tars"
            packed = pack.pack(str(folder / "images"), target, "x", options.images // SHARDS, 0, lambda *_: None)
            ahead = loader.ReadAhead
            for name, reader in (("alone", Alone), ("ahead", ahead)):
                loader.ReadAhead = reader  # type: ignore[misc,assignment]
                for window in options.windows if reader is ahead else options.windows[:1]:
                    data = {"path": packed.pattern, "lanes": LANES, "window": window, "workers": 2}
                    batches = options.batches if reader is ahead else options.batches // PLAIN_PART
                    table[f"{name}, window {window}"] = measure(data, folder / "run", batches, proxy)
    if options.json:
        print(json.dumps(table))
        return
    print(f"{options.images} images of {size / options.images / 1000:.1f} KB, latency {1000 * options.latency:g} ms")
    for name, told in table.items():
        print(f"{name:24}", "  ".join(f"{what} {value:g}" for what, value in told.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
