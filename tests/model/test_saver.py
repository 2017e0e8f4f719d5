"""Saving beside training, on a real disk, slowed down by its own limit: skipped, given up, closed, full; two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from model import checkpoint, contract, sealed, storage
from model.config import Checkpoints
from model.contract import Manifest
from model.progress import Progress
from model.saver import Saver
from tests.model.test_checkpoint import make_attempt, ref
from tests.model.test_parallel import run_ranks

WEIGHT = torch.zeros(100_000)  # 0.4 MB
SLOW = 1.0  # MB/s


def make_saver(run_dir: Path, attempt: dict[str, Any] | None = None, **settings: Any) -> Saver:
    described = make_attempt(run_dir, **(attempt or {}))
    contract.scratch_dir(described.launch_name).mkdir(parents=True, exist_ok=True)
    chosen = Checkpoints(**{"every": 4, "upload_limit_mb_s": SLOW, **settings})
    return Saver(described, chosen, HashStore(), Progress(described, 100))


def start(saver: Saver, step: int, weight: torch.Tensor = WEIGHT) -> None:
    def nothing(manifest: Manifest) -> None:
        pass

    saver.start(step, {"student": {"w": weight}}, {}, {"step": step}, {}, nothing)


def sealed_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in run_dir.glob("checkpoints/pretrain/1/*/manifest.json"))


def metrics(saver: Saver) -> dict[str, float]:
    """What goes with the next step."""
    saver._progress.step(1, 1.0, {})
    return saver._progress._pending[-1].metrics


def test_training_goes_on_while_the_state_of_the_step_is_written(tmp_path: Path) -> None:
    saver, weight = make_saver(tmp_path), WEIGHT.clone()
    began = time.monotonic()
    start(saver, 4, weight)
    assert time.monotonic() - began < 0.2
    weight += 1  # the next step
    assert saver.ended() is None
    saved = saver.ended(wait=True)
    assert saved is not None
    assert 0.35 < saved.seconds < 5  # 0.4 MB at 1 MB/s
    assert saved.stall < 0.2
    assert saved.bytes == sum(file.bytes for file in saved.manifest.parts["student"])
    assert sealed.load(ref(make_attempt(tmp_path), 4), "student")["w"].equal(WEIGHT)
    assert saver.ended() is None


def test_a_save_that_falls_due_during_another_is_skipped_and_counted(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, {"keep_steps": [12]}, keep_every=16)
    assert [step for step in range(1, 5) if saver.due(step)] == [4]
    start(saver, 4)
    assert [step for step in range(5, 12) if saver.due(step)] == []
    assert metrics(saver)["checkpoint/skipped"] == 1
    assert saver.due(12), "another phase refers to this step"
    assert saver.due(16), "and this one is to be kept for good"
    saver.ended(wait=True)
    assert saver.due(20)


def test_auto_saves_what_is_kept_for_good_too(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, {"keep_steps": [33]}, every="auto", node_mtbf_hours=100.0, keep_every=25)
    assert [step for step in range(1, 60) if saver.due(step)] == [10, 20, 25, 33, 40, 50]


def test_an_attempt_that_is_closed_during_a_save_seals_nothing(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    start(saver, 4)
    storage.publish(f"{tmp_path}/{contract.closed_file(1)}", b"{}")
    with pytest.raises(checkpoint.ClosedError):
        saver.ended(wait=True)
    assert not (tmp_path / contract.checkpoint_dir("pretrain", 1, 4)).exists()


@pytest.mark.parametrize(("left", "steps"), [(float("inf"), [4, 5]), (1e6, [4, 5]), (0.6, [5]), (0.01, [4, 5])])
def test_the_last_save_waits_or_has_the_other_given_up(tmp_path: Path, left: float, steps: list[int]) -> None:
    saver = make_saver(tmp_path)
    start(saver, 4)
    time.sleep(0.1)  # of 0.4 s: 0.3 s are left of this one, which do not fit beside the other's 0.4 s into 0.6 s
    saver.make_way(5, left)
    saver.ended(wait=True)
    start(saver, 5)
    assert saver.ended(wait=True) is not None
    assert sealed_steps(tmp_path) == steps
    assert len(storage.names(f"{tmp_path}/checkpoints/pretrain/1")) == len(steps)


def test_the_end_of_the_process_gives_a_save_up_after_some_patience(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, upload_limit_mb_s=0.1)
    start(saver, 4)
    began = time.monotonic()
    saver.close(patience=0.2)
    assert time.monotonic() - began < 2
    assert not saver._thread.is_alive()
    assert not (tmp_path / contract.checkpoint_dir("pretrain", 1, 4)).exists()
    patient = make_saver(tmp_path)
    start(patient, 8)
    patient.close(patience=60)
    assert sealed_steps(tmp_path) == [8]


def test_auto_settles_after_two_saves(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, every="auto", node_mtbf_hours=0.001, upload_limit_mb_s=None)
    due = []
    for step in range(1, 301):
        time.sleep(0.001)
        saver.ended(wait=True)
        if saver.due(step):
            due.append(step)
            start(saver, step)
    assert due[:3] == [10, 20, 40]
    assert saver.chosen is not None
    assert due[3:] == [step for step in range(41, 301) if step % saver.chosen == 0]
    again = Saver(make_attempt(tmp_path), saver._settings, HashStore(), Progress(make_attempt(tmp_path), 9), 3)
    assert [step for step in range(1, 13) if again.due(step)] == [3, 6, 9, 12]


FULL = """
import resource, sys
from pathlib import Path
from model import storage
from tests.model.test_saver import make_saver, start

saver = make_saver(Path(sys.argv[1]), upload_limit_mb_s=None)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
start(saver, 4)
try:
    saver.ended(wait=True)
except storage.DiskFullError as error:
    print(error)
    raise SystemExit(86)
"""


@pytest.mark.jobs
def test_a_full_disk_is_raised_where_training_looks(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-c", FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 86, result.stdout + result.stderr
    assert "student.safetensors" in result.stdout
    assert not (tmp_path / contract.checkpoint_dir("pretrain", 1, 4)).exists()


TWO_RANKS = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from model import checkpoint, contract, parallel, storage
from model.config import Checkpoints
from model.progress import Progress
from model.saver import Saver
from tests.model.test_checkpoint import make_attempt

store = parallel.join("gloo")
rank, what = parallel.rank(), sys.argv[2]
attempt = make_attempt(Path(sys.argv[1]), launch_name=sys.argv[3])
contract.scratch_dir(attempt.launch_name).mkdir(parents=True, exist_ok=True)
saver = Saver(attempt, Checkpoints(every=4, upload_limit_mb_s=1.0), store, Progress(attempt, 100))
parts = {"a": {"w": torch.zeros(100_000)}, "b": {"w": torch.zeros(100_000)}}  # one file each

def start(step):
    saver.start(step, parts, {}, {}, {}, lambda manifest: None)

def answers(text):
    parallel.gather_text(text)
    parallel.leave()
    print(text)

start(4)
if what == "skipped":
    time.sleep(0.35 * rank)  # the ranks see the end of the save at different steps
    answers(str(next(step for step in range(8, 2000, 4) if not time.sleep(0.02) and saver.due(step))))
elif what == "full":
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        saver.ended(wait=True)
    except storage.DiskFullError as error:
        answers("full")
elif what == "given up":
    time.sleep(0.1)
    saver.make_way(5, 0.6)
    assert saver.ended(wait=True) is None
    start(5)
    answers(str(saver.ended(wait=True).manifest.step))
elif what == "killed":
    time.sleep(0.1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    saver.close(1.0)
    print("left", saver._thread.is_alive(), flush=True)
    os._exit(0)
"""


def two_ranks(tmp_path: Path, what: str) -> list[str]:
    results = run_ranks(TWO_RANKS, 2, str(tmp_path), what, f"saver-{os.getpid()}-{what.replace(' ', '-')}")
    assert [result.stderr for result in results if result.returncode > 0] == []
    return [result.stdout.strip() for result in results]


@pytest.mark.jobs
def test_two_ranks_skip_the_same_saves(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, "skipped")
    assert first == second
    assert int(first) > 8


@pytest.mark.jobs
def test_two_ranks_fail_together(tmp_path: Path) -> None:
    assert two_ranks(tmp_path, "full") == ["full", "full"]
    assert not (tmp_path / contract.checkpoint_dir("pretrain", 1, 4)).exists()


@pytest.mark.jobs
def test_two_ranks_give_a_save_up_together(tmp_path: Path) -> None:
    assert two_ranks(tmp_path, "given up") == ["5", "5"]
    assert sealed_steps(tmp_path) == [5]


@pytest.mark.jobs
def test_a_rank_killed_during_a_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    said, nothing = two_ranks(tmp_path, "killed")
    assert (said, nothing) == ("left False", "")
    assert sealed_steps(tmp_path) == []
