"""What a save costs: how long training stands still, how fast it is written, and what memory it takes.

    python -P -m tests.benchmarks.checkpoint [--arch vits16] [--rounds 7] [--folder DIR] [--store] [--json]

The state of a whole pretraining phase (student, AdamW's moments, teacher) is saved as the trainer does it. Each round
saves it, then writes the same bytes to the same place as plainly as can be, then makes a training step: a disk's plain
write is open, write, fsync for each file; a bucket's (`--store`: a real one, SeaweedFS, on this machine) is s3fs's own.
Printed are medians of the rounds. The save's speed is from the end of the copy, which training waits for, to the
published manifest, with all hashing in it; memory is by how much the first save raised the process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch.distributed import HashStore  # type: ignore[attr-defined]

from model import checkpoint, contract, optim, storage
from model.config import Checkpoints
from model.progress import Progress
from model.saver import Saved, Saver
from model.staging import Staged, stage
from tests.benchmarks import options as ask
from tests.benchmarks.products import Timer
from tests.benchmarks.step import Stopwatch, Training, prepare, step
from tests.model.test_checkpoint import make_attempt
from tests.stores import weed

PIECE = 8 << 20
GLOBAL, LOCAL = 96, 48  # pixels of the crops of the step


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with _place(options) as folder:
        report = measure(options, folder)
    if options.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:28} {value:,.4g}" if isinstance(value, float) else f"{name:28} {value}")


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    training = prepare(options)
    parts = {**training.objective.state(), "optimizer": optim.state(training.optimizer)}
    attempt = replace(make_attempt(Path()), run_dir=folder)
    saver = Saver(attempt, Checkpoints(every=1), HashStore(), Progress(attempt, options.rounds))
    watch = Stopwatch(Timer(training.device, of_cpu=False))
    before = _peak()
    saved = _save(saver, parts, 1)
    grown = _peak() - before
    rounds = []
    step(training, watch)
    staged = stage(checkpoint.own_files(parts))  # the bytes of the plain write
    for number in range(2, options.rounds + 2):
        rounds.append((_save(saver, parts, number), _plain(folder, staged, number), _step(training, watch)))
        storage.remove_tree(f"{folder}/checkpoints")
        storage.remove_tree(f"{folder}/plain")
    stall = statistics.median(one.stall for one, _, _ in rounds)
    writing = statistics.median(one.seconds - one.stall for one, _, _ in rounds)
    plain = statistics.median(taken for _, taken, _ in rounds)
    return {
        "megabytes": saved.bytes / 1e6,
        "stall_seconds": stall,
        "first_stall_seconds": saved.stall,
        "step_seconds": statistics.median(taken for _, _, taken in rounds),
        "save_mb_s": saved.bytes / 1e6 / writing,
        "plain_mb_s": saved.bytes / 1e6 / plain,
        "save_of_plain": statistics.median(taken / (one.seconds - one.stall) for one, taken, _ in rounds),
        "peak_memory_copies": grown / saved.bytes,
        "rounds": options.rounds,
    }


def _save(saver: Saver, parts: checkpoint.Parts, number: int) -> Saved:
    saver.start(number, parts, {}, {}, {}, lambda manifest: None)
    saved = saver.ended(wait=True)
    assert saved is not None
    return saved


def _plain(folder: str, staged: Staged, number: int) -> float:
    """Seconds that the same files take, written as plainly as can be."""
    began = time.monotonic()
    system = None
    if storage.is_uri(folder):
        import s3fs

        system = s3fs.S3FileSystem()
    else:
        Path(f"{folder}/plain/{number}").mkdir(parents=True)
    for file in staged.files:
        path = f"{folder}/plain/{number}/{file.name}"
        with system.open(path, "wb") if system else open(path, "wb") as out:
            for piece in file.pieces(PIECE):
                out.write(piece)
            if system is None:
                out.flush()
                os.fsync(out.fileno())
    return time.monotonic() - began


def _step(training: Training, watch: Stopwatch) -> float:
    began = time.monotonic()
    step(training, watch)
    watch.milliseconds()
    return time.monotonic() - began


def _peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _place(options: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-benchmark-") as folder:
        contract.scratch_dir(make_attempt(Path(folder)).launch_name).mkdir(parents=True, exist_ok=True)
        if not options.store:
            yield folder
            return
        with weed.running(Path(folder), volumes=400) as store:
            os.environ.update(store.environment())
            yield f"s3://{weed.BUCKET}/benchmark"


def _options() -> argparse.Namespace:
    parser = ask.parser(__doc__)
    archs = [arch for arch in ask.RELEASED if not any(side % ask.patch_size(arch) for side in (GLOBAL, LOCAL))]
    parser.add_argument("--arch", default="vits16", choices=archs, metavar="ARCH", help="a released architecture")
    parser.add_argument("--prototypes", type=ask.positive, default=4096)
    parser.add_argument("--batch", type=ask.positive, default=16, help="images of the step beside it")
    parser.add_argument("--threads", type=ask.positive, default=os.cpu_count())
    parser.add_argument("--rounds", type=ask.positive, default=7)
    parser.add_argument("--folder", type=ask.folder, help="where to write; the temporary folder if absent")
    parser.add_argument("--store", action="store_true", help="a bucket of a real store on this machine")
    parser.add_argument("--json", action="store_true")
    fixed = {"global_crops": (2, GLOBAL), "local_crops": (4, LOCAL), "gram": 0, "dtype": "fp32", "compile": False}
    parser.set_defaults(**fixed, device="cpu")
    options = parser.parse_args()
    if options.batch < 2:
        parser.error("--batch 1: KoLeo needs 2 images or more")
    return options


if __name__ == "__main__":
    main()
