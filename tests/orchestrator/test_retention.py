"""What the controller removes, what it never does, and what attempts are told once checkpoints are bad."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from model import contract, sealed, storage
from model.contract import Cause, CheckpointRef
from orchestrator import attempts, control, handoff, retention
from orchestrator.handoff import BadCheckpointError, HandoffError
from orchestrator.state import State
from tests.orchestrator.checkpoint_files import left, mark, seal
from tests.orchestrator.pretend import Bench, Job, job_spec
from tests.orchestrator.written import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """pretrain: 6 steps, sealed every second one; gram follows."""
    return Run(tmp_path / "runs" / "tiny", checkpoints={"every": 2, "keep_last": 2})


def load(run: Run) -> State:
    return control.load(run.path)


def attempt(
    run: Run, number: int, *steps: int, phase: str = "pretrain", counted: tuple[int, ...] | None = None
) -> None:
    """An attempt that sealed these steps and ended, with those that count."""
    run.launch(number, phase)
    for step in steps:
        seal(run.path, phase, number, step)
    run.end(number, Cause.KILLED, list(steps if counted is None else counted))


def prune(run: Run, phase: str = "pretrain") -> list[str]:
    return [f"{one.ref.attempt}/{one.ref.step} {one.why}" for one in retention.prune(run.path, load(run), phase)]


def test_over_all_attempts_only_the_newest_stay(run: Run) -> None:
    attempt(run, 1, 1, 2)
    attempt(run, 2, 3)
    attempt(run, 3, 4)
    assert prune(run) == ["1/1 not kept", "1/2 not kept"]
    assert left(run.path, "pretrain") == ["2/3", "3/4"]
    assert prune(run) == []


def test_what_never_counted_goes(run: Run) -> None:
    attempt(run, 1, 2, 4, counted=(2,))  # 4 was sealed by a zombie after the close
    storage.publish(f"{run.path}/{contract.checkpoint_dir('pretrain', 1, 5)}/student.safetensors", b"half")
    assert sorted(prune(run)) == ["1/4 sealed after its attempt was closed", "1/5 never finished"]
    assert left(run.path, "pretrain") == ["1/2"]


def test_what_a_live_attempt_makes_and_reads_stays(run: Run) -> None:
    for number, step in enumerate((1, 2, 3), 1):
        attempt(run, number, step)
    told = [CheckpointRef(run.path, "pretrain", 1, 1)]  # a fallback that retention would not keep any more
    run.launch(4, "pretrain")
    run.told(4, "pretrain", resume=told)
    storage.publish(f"{run.path}/{contract.checkpoint_dir('pretrain', 4, 5)}/student.safetensors", b"being written")
    seal(run.path, "pretrain", 4, 4)
    assert prune(run) == []
    run.end(4, Cause.KILLED, [4])
    assert sorted(prune(run)) == ["1/1 not kept", "2/2 not kept", "4/5 never finished"]
    assert left(run.path, "pretrain") == ["3/3", "4/4"]


def test_what_others_take_stays(run: Run) -> None:
    for number, step in enumerate((1, 2, 3, 4), 1):
        attempt(run, number, step)
    other = retention.Pin(run="/runs/other", run_id="c0ffee", parts=("student",))
    storage.publish(f"{run.path}/{contract.pin_file('pretrain', 1, 1, 'c0ffee-init')}", contract.encode(other))
    assert prune(run) == ["2/2 not kept", "1/1 only other parts are kept"]
    assert left(run.path, "pretrain") == ["1/1", "3/3", "4/4"]


def test_a_file_that_a_kept_manifest_names_outlives_its_checkpoint(run: Run) -> None:
    run.launch(1, "pretrain")
    frozen = seal(run.path, "pretrain", 1, 1).parts["teacher_backbone"]
    for step in (2, 3):
        seal(run.path, "pretrain", 1, step, teacher_backbone=frozen)
    run.end(1, Cause.KILLED, [1, 2, 3])
    assert prune(run) == ["1/1 not kept"]
    assert storage.names(f"{run.path}/{contract.checkpoint_dir('pretrain', 1, 1)}") == ["teacher_backbone.safetensors"]
    assert prune(run) == [], "what is left of it is not found again at every end"


def test_a_removal_that_died_halfway_is_finished_by_the_next(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, step in enumerate((1, 2, 3), 1):
        attempt(run, number, step)
    real = storage.remove

    def dies(path: str) -> None:
        if path.endswith(".safetensors"):
            raise storage.StoreError("the machine went away")
        real(path)

    monkeypatch.setattr(storage, "remove", dies)
    with pytest.raises(storage.StoreError):
        prune(run)
    assert not storage.exists(f"{run.path}/{contract.manifest_file('pretrain', 1, 1)}"), "the manifest went first"
    monkeypatch.undo()
    assert prune(run) == ["1/1 never finished"]
    assert left(run.path, "pretrain") == ["2/2", "3/3"]


# --- races ------------------------------------------------------------------------------------------------------------


def test_a_pin_that_comes_while_the_manifest_goes_brings_it_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run pins, then looks whether the checkpoint is there: between our look at the pins and the removal."""
    for number, step in enumerate((1, 2, 3), 1):
        attempt(run, number, step)
    taken = Path(run.path, contract.pin_file("pretrain", 1, 1, "c0ffee-init"))
    real = storage.remove

    def pinned_first(path: str) -> None:
        if path.endswith("manifest.json"):
            pin = retention.Pin(run="/runs/other", run_id="c0ffee", parts=("student",))
            storage.publish(str(taken), contract.encode(pin))
        real(path)

    monkeypatch.setattr(storage, "remove", pinned_first)
    assert prune(run) == []
    assert retention.read_manifest(CheckpointRef(run.path, "pretrain", 1, 1)) is not None
    assert len(storage.names(f"{run.path}/{contract.checkpoint_dir('pretrain', 1, 1)}")) == 4


def test_a_controller_that_removes_by_an_old_log_takes_nothing_from_a_newer_attempt(bench: Bench) -> None:
    """It closed attempt 1, was suspended, and removes when attempt 2 is long under way or over."""
    spec = job_spec()
    spec["phases"]["pretrain"] |= {"steps": 12, "checkpoints": {"every": 1, "keep_last": 2}}
    bench.submit(spec)
    removals = []
    real = retention.prune
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "prune", lambda *words: removals.append(partial(real, *words)))
        for _ in range(3):
            bench.tick(seconds=700.0)
            bench.launcher.job.train(3)
            bench.launcher.job.end(Cause.KILLED)
            bench.tick()
        bench.tick(seconds=700.0)
    live = bench.launcher.job.attempt
    assert [ref.step for ref in live.resume] == [9, 8]  # not 2, of which gram takes the teacher's backbone
    for removal in removals:
        removal()
        assert all(storage.exists(f"{ref.path}/manifest.json") for ref in live.resume)
    assert left(bench.dir(), "pretrain") == ["1/2", "3/8", "3/9"]
    assert bench.drive().status == "done"


def test_pruning_races_a_load(run: Run) -> None:
    """By the log as it is and as it was, over and over, while everything that the live attempt was told is read."""
    states = []
    for number in range(1, 6):
        attempt(run, number, number)
        states.append(load(run))
    told = retention.resume_points(run.path, states[-1], "pretrain")
    run.launch(6, "pretrain")
    run.told(6, "pretrain", resume=told)
    states.append(load(run))
    over = threading.Event()

    def remove() -> None:
        while not over.is_set():
            for state in states:
                retention.prune(run.path, state, "pretrain")

    with ThreadPoolExecutor(2) as pool:
        removing = [pool.submit(remove) for _ in range(2)]
        try:
            for ref in told * 10:
                assert sealed.load(ref, "optimizer").keys() == sealed.load(ref, "student").keys() == {"w"}
        finally:
            over.set()
        for one in removing:
            one.result()
    assert [ref.step for ref in told] == [5, 4]
    assert left(run.path, "pretrain") == ["4/4", "5/5"]


# --- bad checkpoints --------------------------------------------------------------------------------------------------


def preempted(bench: Bench, updates: int) -> Job:
    """The job of the next attempt after this one was stopped."""
    bench.launcher.job.train(updates)
    bench.launcher.job.end(Cause.STOPPED)
    bench.tick(seconds=700.0)
    bench.tick(seconds=700.0)
    return bench.launcher.job


def test_marked_ones_are_not_gone_on_from(bench: Bench) -> None:
    spec = job_spec()
    spec["phases"]["pretrain"] |= {"steps": 12, "checkpoints": {"every": 1, "keep_last": 3}}
    bench.submit(spec)
    bench.tick()
    job = preempted(bench, 5)
    assert [ref.step for ref in job.attempt.resume] == [5, 4, 3]
    mark(job.attempt.resume[0])
    job.step = 4  # it fell back
    job.end(Cause.KILLED)
    for _ in range(2):
        bench.tick(seconds=700.0)
    assert [ref.step for ref in bench.launcher.job.attempt.resume] == [4, 3, 2]
    bench.launcher.job.train(1)
    assert bench.drive().status == "done"


def test_a_phase_whose_checkpoints_are_all_bad_does_not_begin_again(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.job.train(2)
    bench.launcher.job.end(Cause.STOPPED)
    bench.tick()
    ref = CheckpointRef(bench.dir(), "pretrain", 1, 2)
    mark(ref, "student.safetensors is torn")
    state = bench.drive()
    assert (state.status, len(bench.launcher.jobs)) == ("failed", 1)
    assert state.failed is not None
    assert state.failed.cause is Cause.BAD_CHECKPOINT
    for said in ("student.safetensors is torn", "runbooks/bad-checkpoint.md"):
        assert said in state.failed.message
    storage.remove(f"{ref.run}/{contract.bad_file('pretrain', 1, 2)}")  # repaired
    control.resume(bench.dir(), by="test")
    assert bench.drive().status == "done"


def test_an_input_that_is_marked_is_refused_with_what_to_do(bench: Bench) -> None:
    bench.submit()
    bench.drive(until="gram")
    bench.launcher.job.end(Cause.STOPPED)
    mark(CheckpointRef(bench.dir(), "pretrain", 1, 4))
    state = bench.drive()
    assert state.failed is not None
    assert state.failed.cause is Cause.BAD_CHECKPOINT
    assert "pretrain@final: that checkpoint is damaged, and marked so" in state.failed.message
    assert f"dinoctl ckpt verify {bench.dir()} --mark" in state.failed.message
    for refused in (handoff.Reference("pretrain", 4, run=bench.dir()), handoff.parse(f"{bench.dir()}#pretrain@final")):
        with pytest.raises(BadCheckpointError, match="damaged"):
            attempts.find(refused, bench.dir())
    with pytest.raises(BadCheckpointError):
        bench.submit(run="fork", fork=f"{bench.dir()}#pretrain@4")


def test_of_two_attempts_that_sealed_a_step_the_whole_one_is_taken() -> None:
    refs = {"p": [(1, 4), (2, 4)]}
    spec = {"phases": {"p": {"steps": 4}}}
    found = handoff.own(spec, handoff.parse("p@4"), refs, "/r", lambda ref: ref.attempt == 2)
    assert found.attempt == 1


def test_an_amendment_cannot_refer_to_what_was_pruned(bench: Bench) -> None:
    spec = job_spec()
    spec["phases"]["pretrain"]["checkpoints"]["keep_last"] = 1
    spec["phases"]["gram"]["gram_teacher"] = "pretrain@final"
    bench.submit(spec)
    bench.drive(until="gram")
    assert left(bench.dir(), "pretrain") == ["1/4"]
    spec["phases"]["text"]["vision_tower"] = "pretrain@2"
    with pytest.raises(HandoffError, match="pretrain@2: that checkpoint is no longer there"):
        bench.submit(spec, amending=True)


def test_a_checkpoint_is_named_by_its_folder(bench: Bench, tmp_path: Path) -> None:
    """As a copy is, which has no log."""
    seal(str(tmp_path / "copy"), "pretrain", 3, 6)
    spec = job_spec()
    folder = f"{tmp_path}/copy/checkpoints/pretrain/3/6"
    spec["phases"]["pretrain"]["init"] = folder
    bench.submit(spec)
    bench.tick()
    ref = CheckpointRef(f"{tmp_path}/copy", "pretrain", 3, 6)
    assert bench.launcher.job.attempt.inputs == {"init": ref}
    assert str(handoff.parse(folder)) == folder
    mark(ref)
    with pytest.raises(BadCheckpointError):
        bench.submit(spec, run="other")
    spec["phases"]["pretrain"]["init"] = f"{tmp_path}/copy/checkpoints/pretrain/3/7"
    with pytest.raises(HandoffError, match="no longer there"):
        bench.submit(spec, run="other")
