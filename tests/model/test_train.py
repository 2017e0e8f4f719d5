"""Real torchrun jobs on real files: stopped, killed and resumed runs end bit for bit like one left alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from model import config, contract, sealed, storage
from model.contract import Attempt, Cause, CheckpointRef, RankEnd
from model.data import index
from model.data.order import Order
from model.data.threads import untold
from model.job import Loop
from orchestrator import progress
from tests.model.test_checkpoint import make_attempt

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 12, 4
HEAD = {"prototypes": 32, "hidden": 32, "bottleneck": 16}
MODEL: dict[str, Any] = {
    "backbone": {
        "arch": "custom", "dim": 32, "depth": 2, "heads": 2, "patch_size": 8, "registers": 2, "drop_path": 0.25,
        "layer_scale": 1.0, "rope_rescale": 2.0,
    },
    "dino_head": HEAD,
    "ibot_head": HEAD,
}  # fmt: skip


def phase_settings(images: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "pretrain",
        "steps": STEPS,
        "data": {"path": str(images), "workers": 1},
        "optim": {
            "batch_size": 16, "group_size": 4, "accumulate": 2, "lr": {"start": 0.0, "peak": 0.002, "warmup_steps": 3},
            "freeze_last_layer_steps": 2,
        },
        "checkpoints": {"every": EVERY},
        "health": {"every": 5},
        "crops": {
            "resolutions": [{"global_size": 32, "local_size": 16}, {"global_size": 40, "local_size": 16}],
            "local_count": 2,
        },
        "ema": {"start": 0.9, "peak": 0.99, "warmup_steps": 8},
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small pictures, no two alike."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@dataclass(frozen=True)
class Ran:
    """An attempt that is over."""

    attempt: Attempt
    ends: list[RankEnd | None]

    def end(self) -> RankEnd:
        assert self.ends[0] is not None
        return self.ends[0]

    def steps(self) -> list[int]:
        return [step.step for step in progress.steps(self.attempt.run_dir, self.attempt.attempt)]

    def sealed(self) -> list[int]:
        folder = f"{self.attempt.run_dir}/checkpoints/{self.attempt.phase}/{self.attempt.attempt}"
        found = [int(name) for name in storage.names(folder) if storage.exists(f"{folder}/{name}/manifest.json")]
        return sorted(found)

    def log(self) -> str:
        return (Path(self.attempt.run_dir) / contract.rank_log(self.attempt.attempt, 0)).read_text()


def train(
    attempt: Attempt,
    world: int = 2,
    meanwhile: Callable[[], None] = lambda: None,
    seconds: float = 300,
    trainer: str = "model.train",
) -> Ran:
    """Run the attempt as the agent does, `meanwhile` doing something to it."""
    path = f"{attempt.run_dir}/{contract.attempt_yaml(attempt.attempt)}"
    storage.publish(path, msgspec.yaml.encode(attempt))
    storage.remove_tree(str(contract.scratch_dir(attempt.launch_name)))
    contract.scratch_dir(attempt.launch_name).mkdir(parents=True)
    process = subprocess.Popen(
        [
            sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
            "--local-addr", "127.0.0.1", "-m", "model.rank", trainer, path,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        meanwhile()
        process.wait(timeout=seconds)
    finally:
        process.kill()
        process.wait()
        storage.remove_tree(str(contract.scratch_dir(attempt.launch_name)))
    files = [f"{attempt.run_dir}/{contract.rank_file(attempt.attempt, rank)}" for rank in range(world)]
    return Ran(attempt, [contract.decode(storage.read(f), RankEnd, f) if storage.exists(f) else None for f in files])


def describe(run_dir: Path, images: Path, number: int = 1, **changes: Any) -> Attempt:
    values = {
        "model": MODEL, "settings": phase_settings(images), "processes_per_node": 2, "watch_seconds": 0.05,
        "launch_name": f"t{os.getpid()}-{run_dir.name}-{number}",
    }  # fmt: skip
    return make_attempt(run_dir, number, **{**values, **changes})


def ref(ran: Ran, step: int) -> CheckpointRef:
    return ref_of(ran.attempt, step)


def ref_of(attempt: Attempt, step: int) -> CheckpointRef:
    return CheckpointRef(run=attempt.run_dir, phase=attempt.phase, attempt=attempt.attempt, step=step)


def assert_same_state(one: CheckpointRef, other: CheckpointRef) -> None:
    first, second = sealed.read_manifest(one), sealed.read_manifest(other)
    assert first.loop == second.loop
    assert first.parts.keys() == second.parts.keys() == {"student", "optimizer", "teacher_backbone", "teacher_heads"}
    assert_same_tensors(one, other)


def assert_same_tensors(one: CheckpointRef, other: CheckpointRef) -> None:
    for part in sealed.read_manifest(one).parts:
        a, b = sealed.load(one, part), sealed.load(other, part)
        assert a.keys() == b.keys()
        assert [name for name in a if not a[name].equal(b[name])] == []


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def after_step(attempt: Attempt, step: int, then: Callable[[], object]) -> Callable[[], None]:
    def act() -> None:
        wait_for(lambda: (last := progress.latest(attempt.run_dir, attempt.attempt)) is not None and last.step >= step)
        then()

    return act


def kill_rank(attempt: Attempt, rank: int) -> None:
    os.kill(int(contract.pid_file(attempt.launch_name, rank).read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Ran:
    """A run that nothing happened to."""
    return train(describe(tmp_path_factory.mktemp("alone"), images))


@pytest.mark.jobs
def test_a_run_left_alone(alone: Ran) -> None:
    assert [end and end.cause for end in alone.ends] == [Cause.DONE, Cause.DONE], alone.log()
    assert alone.end().step == STEPS
    assert alone.steps() == list(range(1, STEPS + 1))
    assert alone.sealed() == [8, 12]  # keep_last
    recorded = progress.steps(alone.attempt.run_dir, 1)
    assert {"loss", "loss/dino_global", "loss/ibot", "lr", "grad_norm/backbone"} <= recorded[-1].metrics.keys()
    assert "data/replaced" not in recorded[-1].metrics
    assert {"health/effective_rank", "health/entropy", "health/prototypes_used"} <= recorded[4].metrics.keys()
    told = {step.note.split(" (")[0]: step.metrics for step in recorded if step.note}
    assert {"sealed 4", "sealed 8"} <= told.keys()  # the last one's end is told of in the log alone: no step follows
    assert told["sealed 4"]["checkpoint/bytes"] > told["sealed 4"]["checkpoint/save_seconds"] > 0
    assert "sealed 12 (" in alone.log()
    manifest = sealed.read_manifest(ref(alone, STEPS))
    assert Loop.of(manifest) == Loop(step=12, origin="pretrain", clock=12, position=12 * 16)
    fresh = sealed.load(ref(alone, 8), "student")
    trained = sealed.load(ref(alone, STEPS), "student")
    assert any(not tensor.equal(fresh[name]) for name, tensor in trained.items())


@pytest.mark.jobs
def test_stopped_between_two_seals_and_resumed(alone: Ran, tmp_path: Path, images: Path) -> None:
    attempt = describe(tmp_path, images)
    # Asked while it starts, as early as can be: the stop is agreed in the first steps.
    stopped = train(attempt, meanwhile=contract.stop_file(attempt.launch_name).touch)
    assert [end and end.cause for end in stopped.ends] == [Cause.STOPPED, Cause.STOPPED], stopped.log()
    at = stopped.end().step
    assert at == 3
    assert stopped.sealed() == [at]
    resumed = train(describe(tmp_path, images, 2, resume=[ref(stopped, at)]))
    assert resumed.end().cause is Cause.DONE, resumed.log()
    assert resumed.steps() == list(range(at + 1, STEPS + 1))
    assert_same_state(ref(alone, STEPS), ref(resumed, STEPS))


@pytest.mark.jobs
def test_a_rank_killed_after_a_seal(alone: Ran, tmp_path: Path, images: Path) -> None:
    attempt = describe(tmp_path, images)
    killed = train(attempt, meanwhile=after_step(attempt, 5, lambda: kill_rank(attempt, 1)))
    assert killed.ends[1] is None
    newest, *older = reversed(killed.sealed())
    resumed = train(describe(tmp_path, images, 2, resume=[ref(killed, step) for step in (newest, *older)]))
    assert resumed.end().cause is Cause.DONE, resumed.log()
    assert resumed.steps() == list(range(newest + 1, STEPS + 1))
    assert max(killed.steps()) - newest <= EVERY
    assert_same_state(ref(alone, STEPS), ref(resumed, STEPS))


@pytest.mark.jobs
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(alone: Ran, tmp_path: Path, images: Path) -> None:
    first = train(describe(tmp_path, images))
    file = tmp_path / sealed.read_manifest(ref(first, 12)).parts["optimizer"][0].path
    file.write_bytes(file.read_bytes()[:-1])
    second = train(describe(tmp_path, images, 2, resume=[ref(first, 12), ref(first, 8)]))
    assert second.end().cause is Cause.DONE, second.log()
    assert "optimizer.safetensors" in progress.steps(str(tmp_path), 2)[0].note
    assert storage.names(f"{tmp_path}/{contract.BAD_DIR}") == ["pretrain-1-12.json"]
    assert second.steps() == [9, 10, 11, 12]
    assert_same_state(ref(alone, STEPS), ref(second, STEPS))
    third = train(describe(tmp_path, images, 3, resume=[ref(first, 12)]))
    assert third.end().cause is Cause.BAD_CHECKPOINT
    assert "optimizer.safetensors" in third.end().message


@pytest.mark.jobs
def test_going_on_with_another_phases_state(alone: Ran, tmp_path: Path, images: Path) -> None:
    """Gram takes pretrain's full state and a teacher of the same run, whose file it does not copy."""
    settings = {**phase_settings(images), "kind": "gram", "gram_teacher": "pretrain@8", "init": "pretrain@final"}
    settings["steps"] = EVERY + 1
    gram = describe(
        Path(alone.attempt.run_dir), images, 7, phase="gram", settings=settings,
        inputs={"init": ref(alone, STEPS), "gram_teacher": ref(alone, 8)},
    )  # fmt: skip
    ran = train(gram)
    assert ran.end().cause is Cause.DONE, ran.log()
    manifest = sealed.read_manifest(ref(ran, EVERY + 1))
    assert Loop.of(manifest) == Loop(step=5, origin="pretrain", clock=17, position=17 * 16)
    assert manifest.parts["gram_teacher"] == sealed.read_manifest(ref(alone, 8)).parts["teacher_backbone"]
    assert sealed.load(ref(ran, EVERY + 1), "optimizer")
    # Another run has no such file: it is stored once, and later checkpoints refer to it. Larger batches go on in the
    # order of the data.
    settings |= {"optim": {**settings["optim"], "batch_size": 32}}
    other = {"run_dir": str(tmp_path), "launch_name": f"{gram.launch_name}-other", "settings": settings}
    elsewhere = train(msgspec.structs.replace(gram, **other))
    assert elsewhere.end().cause is Cause.DONE, elsewhere.log()
    assert Loop.of(sealed.read_manifest(ref(elsewhere, EVERY + 1))).position == 12 * 16 + 5 * 32
    for step in (EVERY, EVERY + 1):
        (file,) = sealed.read_manifest(ref(elsewhere, step)).parts["gram_teacher"]
        assert file.path == f"checkpoints/gram/7/{EVERY}/gram_teacher.safetensors"
    assert sealed.load(ref(elsewhere, 5), "gram_teacher").keys() == sealed.load(ref(ran, 5), "gram_teacher").keys()


@pytest.mark.jobs
def test_ends_that_are_no_crash(tmp_path: Path, images: Path) -> None:
    nothing = train(
        describe(tmp_path / "a", images, settings=phase_settings(images, data={"path": "/no/such/folder"})), 1
    )
    assert nothing.end().cause is Cause.USER_ERROR, nothing.log()
    assert "/no/such/folder" in nothing.end().message
    (tmp_path / "b").mkdir()
    closed = describe(tmp_path / "b", images)
    storage.publish(f"{closed.run_dir}/{contract.closed_file(1)}", b"{}")
    superseded = train(closed, 1)
    assert superseded.end().cause is Cause.SUPERSEDED, superseded.log()
    assert superseded.sealed() == []


@pytest.mark.jobs
def test_a_loss_that_stays_non_finite_ends_the_attempt(tmp_path: Path, images: Path) -> None:
    settings = phase_settings(images, losses={"koleo": {"weight": 1e308}, "ibot": {"weight": 1e308}})
    diverged = train(describe(tmp_path, images, settings=settings), 1)
    assert diverged.end().cause is Cause.DIVERGED, diverged.log()
    assert diverged.end().step == 3


def go_bad(folder: Path, attempt: Attempt, settings: dict[str, Any], positions: list[int]) -> list[str]:
    """The images that are due there can't be read any more, once the run knows them. Returns their names."""
    entries = index.build_or_read(config.read(config.Data, settings["data"]), attempt.run_dir, untold).entries
    order = Order(attempt.seed, attempt.phase, np.array([len(entries)]), 1, len(entries))
    bad = [entries[order.number(position)].path for position in positions]
    for name in bad:
        (folder / name).write_bytes(b"not an image")
    return bad


@pytest.mark.jobs
def test_every_ranks_unreadable_images_are_counted(tmp_path: Path, images: Path) -> None:
    """Two images that rank 1 meets, and rank 0 does not, go bad once the run knows them."""
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    settings = phase_settings(folder, steps=2, data={"path": str(folder), "workers": 1, "max_skip_rate": 0.5})
    attempt = describe(tmp_path, folder, settings=settings)
    bad = go_bad(folder, attempt, settings, [8, 16 + 15])  # of batches of 16, rank 1 has 8 to 15
    ran = train(attempt)
    assert ran.end().cause is Cause.DONE, ran.log()
    first, second = progress.steps(attempt.run_dir, 1)
    assert (first.metrics["data/replaced"], second.metrics["data/replaced"]) == (1, 2)
    assert "data/unreadable" not in second.metrics
    assert "1 unreadable images replaced so far, over all ranks" in first.note
    assert "2 unreadable images replaced so far, over all ranks" in second.note
    logs = [(Path(attempt.run_dir) / contract.rank_log(1, rank)).read_text() for rank in range(2)]
    assert [[name in text for name in bad] for text in logs] == [[False, False], [True, True]]


@pytest.mark.jobs
def test_too_many_unreadable_images_over_all_ranks_stop_every_rank(tmp_path: Path, images: Path) -> None:
    """Each rank meets two in the first step: for none of them alone that is more than the rate allows."""
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    settings = phase_settings(folder, steps=9, data={"path": str(folder), "workers": 1, "max_skip_rate": 0.06})
    attempt = describe(tmp_path, folder, settings=settings)
    bad = go_bad(folder, attempt, settings, [3, 4, 11, 12])
    ran = train(attempt)
    for end in ran.ends:
        assert end is not None, ran.log()
        assert (end.cause, end.step) == (Cause.BAD_DATA, 1)
        assert "4 of the 32 images that were due are unreadable, more than data.max_skip_rate (0.06)" in end.message
        assert [f"  {name}: not an image" in end.detail for name in bad] == [True] * 4, end.detail
    assert ran.sealed() == []


@pytest.mark.jobs
def test_what_the_index_left_out_counts_with_what_goes_bad_later(tmp_path: Path, images: Path) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    for name in ("bad-1.png", "bad-2.png"):
        (folder / name).write_bytes(b"not an image")
    settings = phase_settings(folder, steps=9, data={"path": str(folder), "workers": 1, "max_skip_rate": 0.05})
    attempt = describe(tmp_path, folder, settings=settings)
    (bad,) = go_bad(folder, attempt, settings, [3])
    ran = train(attempt)
    assert (ran.end().cause, ran.end().step) == (Cause.BAD_DATA, 1), ran.log()
    assert "1 of the 32 images that were due, beside 2 that the index left out, are unreadable" in ran.end().message
    assert f"  {bad}: not an image" in ran.end().detail


# --- saves that take long ---------------------------------------------------------------------------------------------


def slowly(alone: Ran, images: Path, seconds: float, **changes: Any) -> dict[str, Any]:
    """A phase whose saves take so long, as rank 0 may not write faster."""
    parts = sealed.read_manifest(ref(alone, STEPS)).parts
    by_rank_0 = sum(parts[part][0].bytes for part in sorted(parts)[::2])
    limit = {"every": EVERY, "upload_limit_mb_s": by_rank_0 / seconds / 1e6}
    return phase_settings(images, checkpoints=limit, **changes)


def being_saved(attempt: Attempt, step: int) -> bool:
    folder = Path(attempt.run_dir) / contract.checkpoint_dir(attempt.phase, attempt.attempt, step)
    return folder.exists() and not (folder / "manifest.json").exists()


@pytest.mark.jobs
def test_a_rank_killed_during_a_save(alone: Ran, tmp_path: Path, images: Path) -> None:
    attempt = describe(tmp_path, images, settings=slowly(alone, images, 3.0))

    def kill_while_the_last_step_is_saved() -> None:
        wait_for(lambda: being_saved(attempt, STEPS))
        kill_rank(attempt, 1)

    killed = train(attempt, meanwhile=kill_while_the_last_step_is_saved)
    assert killed.ends[1] is None
    assert killed.sealed() == [4]
    notes = "; ".join(step.note for step in progress.steps(attempt.run_dir, 1))
    assert "step 8 is not sealed: the save before it is still being written (1 skipped so far" in notes
    resumed = train(describe(tmp_path, images, 2, resume=[ref(killed, 4)]))
    assert resumed.end().cause is Cause.DONE, resumed.log()
    assert resumed.steps() == list(range(5, STEPS + 1))
    assert_same_state(ref(alone, STEPS), ref(resumed, STEPS))


@pytest.mark.jobs
@pytest.mark.parametrize(("notice", "waits"), [(7.5, False), (120.0, True)])
def test_a_stop_during_a_save(alone: Ran, tmp_path: Path, images: Path, notice: float, waits: bool) -> None:
    """A save takes 4 s. Two fit into two minutes but not into 7.5 s; then it is the later one that counts."""
    settings = slowly(alone, images, 4.0, steps=10 * STEPS, health={"notice_seconds": notice})
    attempt = describe(tmp_path, images, settings=settings)

    def stop_while_step_4_is_saved() -> None:
        wait_for(lambda: being_saved(attempt, EVERY))
        contract.stop_file(attempt.launch_name).touch()

    stopped = train(attempt, meanwhile=stop_while_step_4_is_saved)
    assert [end and end.cause for end in stopped.ends] == [Cause.STOPPED, Cause.STOPPED], stopped.log()
    at = stopped.end().step
    assert stopped.sealed() == ([EVERY, at] if waits else [at])
    assert ("is given up for that of step" in stopped.log()) is not waits
    assert storage.names(f"{tmp_path}/checkpoints/pretrain/1") == [str(step) for step in stopped.sealed()]
