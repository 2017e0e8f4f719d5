"""Checkpoints of which only some parts stay: what goes, what never does, and what they can still be used for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model import contract, sealed, storage
from model.contract import Cause, CheckpointRef
from orchestrator import attempts, checkpoints, control, handoff, retention
from orchestrator.handoff import HandoffError
from tests.orchestrator.checkpoint_files import seal
from tests.orchestrator.pretend import Bench, job_spec
from tests.orchestrator.written import Run

TEACHER = ("teacher_backbone",)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """pretrain@2 is what gram takes its Gram teacher from."""
    return Run(
        tmp_path / "runs" / "tiny", checkpoints={"every": 2, "keep_last": 1}, inputs={"gram_teacher": "pretrain@2"}
    )


def ref(run: Run, step: int, attempt: int = 1) -> CheckpointRef:
    return CheckpointRef(run.path, "pretrain", attempt, step)


def attempt(run: Run, number: int, *steps: int) -> None:
    run.launch(number, "pretrain")
    for step in steps:
        seal(run.path, "pretrain", number, step)
    run.end(number, Cause.KILLED, list(steps))


def prune(run: Run) -> list[str]:
    return [f"{one.what}: {one.why}" for one in retention.prune(run.path, control.load(run.path), "pretrain")]


def files(ref: CheckpointRef) -> list[str]:
    return storage.names(ref.path)


def pin(ref: CheckpointRef, *parts: str) -> None:
    """As another run does."""
    taken = retention.Pin(run="/runs/other", run_id="c0ffee", parts=parts)
    path = contract.pin_file(ref.phase, ref.attempt, ref.step, f"c0ffee-{'-'.join(parts)}")
    storage.publish(f"{ref.run}/{path}", contract.encode(taken))


THINNED = ["manifest.json", "optimizer.dropped", "student.dropped", "teacher_backbone.safetensors"]


def test_of_what_a_phase_refers_to_the_parts_stay_that_it_takes(run: Run) -> None:
    attempt(run, 1, 2, 4)
    assert prune(run) == ["student, optimizer of pretrain@2 (attempt 1): only other parts are kept"]
    assert files(ref(run, 2)) == THINNED
    assert prune(run) == []
    assert sealed.load(ref(run, 2), "teacher_backbone")["w"].tolist() == [1, 2, 2]
    with pytest.raises(
        sealed.CheckpointError, match="no part 'student', only teacher_backbone; it was removed"
    ) as found:
        sealed.load(ref(run, 2), "student")
    assert not isinstance(found.value, sealed.DamagedError), "so nobody marks it as bad"
    found_whole = checkpoints.verify_one(ref(run, 2))
    assert found_whole is not None
    assert (found_whole.wrong, found_whole.files) == ([], 1)


def test_pins_keep_the_parts_that_they_name(run: Run) -> None:
    attempt(run, 1, 1, 2, 3, 4)
    pin(ref(run, 1), "student", "teacher_backbone")
    pin(ref(run, 1), "optimizer")
    pin(ref(run, 3), "student")
    assert prune(run) == [
        "student, optimizer of pretrain@2 (attempt 1): only other parts are kept",
        "optimizer, teacher_backbone of pretrain@3 (attempt 1): only other parts are kept",
    ]
    assert sealed.read_manifest(ref(run, 1)).parts.keys() == {"student", "optimizer", "teacher_backbone"}
    assert sealed.read_manifest(ref(run, 3)).parts.keys() == {"student"}
    storage.remove(f"{run.path}/{contract.pin_file('pretrain', 1, 1, 'c0ffee-optimizer')}")
    assert prune(run) == ["optimizer of pretrain@1 (attempt 1): only other parts are kept"]


def test_nothing_is_gone_on_from_that_has_lost_parts(run: Run) -> None:
    attempt(run, 1, 2, 4)
    prune(run)
    state = control.load(run.path)
    assert [one.step for one in retention.resume_points(run.path, state, "pretrain")] == [4]
    storage.publish(f"{run.path}/{contract.bad_file('pretrain', 1, 4)}", contract.encode(contract.Bad("torn", "me", 1)))
    with pytest.raises(handoff.BadCheckpointError, match="torn"):
        retention.resume_points(run.path, state, "pretrain")
    # Nor once the rule would keep all of it: the spec may be amended.
    keeps_two = Run(run.path + "2", checkpoints={"every": 2, "keep_last": 2})
    attempt(keeps_two, 1, 2, 4)
    storage.publish(f"{keeps_two.path}/{contract.dropped_file('pretrain', 1, 2, 'student')}", b"")
    state = control.load(keeps_two.path)
    assert [one.step for one in retention.resume_points(keeps_two.path, state, "pretrain")] == [4]


def test_a_file_that_another_manifest_names_outlives_its_part(run: Run) -> None:
    run.launch(1, "pretrain")
    frozen = seal(run.path, "pretrain", 1, 2).parts["student"]
    for step in (4, 6):
        seal(run.path, "pretrain", 1, step, student=frozen)
    run.end(1, Cause.KILLED, [2, 4])  # 6 never counted
    assert prune(run) == [
        "pretrain@6 (attempt 1): sealed after its attempt was closed",
        "student, optimizer of pretrain@2 (attempt 1): only other parts are kept",
    ]
    assert "student.safetensors" in files(ref(run, 2))
    assert sealed.load(ref(run, 4), "student")["w"].tolist() == [1, 2, 0]
    assert prune(run) == [], "what others need is not found again at every end"
    attempt(run, 2, 5)
    assert prune(run) == ["pretrain@4 (attempt 1): not kept"]
    assert prune(run) == ["pretrain@2 (attempt 1): only other parts are kept"]
    assert files(ref(run, 2)) == THINNED


def test_what_a_live_attempt_was_told_to_read_keeps_all_its_parts(run: Run) -> None:
    attempt(run, 1, 2, 4)
    run.launch(2, "pretrain")
    run.told(2, "pretrain", resume=[ref(run, 2)])
    assert prune(run) == []
    run.end(2, Cause.KILLED, [])
    assert len(prune(run)) == 1


# --- crashes and races ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies_at", [0, 1, 2, 3])
def test_killed_in_the_middle_the_next_one_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
    """Before the second note, before either file, and before the last: it is whole, or says what it has not."""
    attempt(run, 1, 2, 4)
    done = []

    def dying(name: str) -> None:
        real = getattr(storage, name)

        def act(path: str, *words: bytes) -> None:
            if len(done) == dies_at:
                raise storage.StoreError("the machine went away")
            done.append(path)
            real(path, *words)

        monkeypatch.setattr(storage, name, act)

    dying("publish")
    dying("remove")
    with pytest.raises(storage.StoreError):
        prune(run)
    monkeypatch.undo()
    found = checkpoints.verify_one(ref(run, 2))
    assert found is not None
    assert found.wrong == []
    for part in sealed.read_manifest(ref(run, 2)).parts:
        sealed.load(ref(run, 2), part)
    assert len(prune(run)) == 1
    assert files(ref(run, 2)) == THINNED


def test_a_pin_that_comes_while_parts_go_keeps_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run pins, then looks what is there: between our look at the pins and the notes."""
    attempt(run, 1, 2, 4)
    real = storage.publish

    def pinned_first(path: str, data: bytes) -> None:
        if path.endswith("student.dropped"):
            monkeypatch.undo()
            pin(ref(run, 2), "student")
        real(path, data)

    monkeypatch.setattr(storage, "publish", pinned_first)
    assert prune(run) == []
    assert not sealed.dropped(ref(run, 2))
    assert prune(run) == ["optimizer of pretrain@2 (attempt 1): only other parts are kept"]
    assert sealed.load(ref(run, 2), "student")


def test_dropping_parts_races_loads(run: Run) -> None:
    """Whoever reads a part that is kept has it; of one that is going it is whole, or the reader hears that it went."""
    attempt(run, 1, 2, 4)
    state, over = control.load(run.path), threading.Event()

    def remove() -> None:
        while not over.is_set():
            retention.prune(run.path, state, "pretrain")

    said: Exception | None = None
    with ThreadPoolExecutor(2) as pool:
        removing = [pool.submit(remove) for _ in range(2)]
        try:
            while said is None:
                assert sealed.load(ref(run, 2), "teacher_backbone")["w"].tolist() == [1, 2, 2]
                try:
                    assert sealed.load(ref(run, 2), "optimizer")["w"].tolist() == [1, 2, 1]
                except sealed.CheckpointError as error:
                    said = error
        finally:
            over.set()
        for one in removing:
            one.result()
    assert not isinstance(said, sealed.DamagedError)
    assert files(ref(run, 2)) == THINNED


def test_a_reader_that_had_the_manifest_before(run: Run) -> None:
    attempt(run, 1, 2, 4)
    before = sealed.read_manifest(ref(run, 2))
    prune(run)
    with pytest.raises(sealed.CheckpointError, match="removed meanwhile") as found:
        sealed.load_files(ref(run, 2), before, "student")
    assert not isinstance(found.value, sealed.DamagedError)
    Path(ref(run, 2).path, "teacher_backbone.safetensors").unlink()
    with pytest.raises(sealed.DamagedError, match="is not there, though the manifest names it"):
        sealed.load_files(ref(run, 2), before, "teacher_backbone")


# --- whoever comes later ----------------------------------------------------------------------------------------------


def test_a_run_that_comes_later_takes_what_is_left_and_is_told_what_is_not(bench: Bench) -> None:
    spec = job_spec()
    spec["phases"]["pretrain"]["checkpoints"]["keep_last"] = 1
    spec["phases"]["gram"]["gram_teacher"] = "pretrain@2"
    bench.submit(spec)
    bench.drive(until="gram")
    source = CheckpointRef(bench.dir(), "pretrain", 1, 2)
    told = bench.launcher.jobs[0].attempt
    assert (told.keep_steps, told.keep_parts) == ([2, 4], {2: ["teacher_backbone"]})
    gone = contract.dropped_file("pretrain", 1, 2, "student")
    storage.publish(f"{bench.dir()}/{gone}", b"")

    assert attempts.take("c0ffee", bench.dir("other"), handoff.parse(f"{bench.dir()}#pretrain@2"), ["gram_teacher"])
    taking = job_spec()
    taking["phases"]["pretrain"]["init"] = f"{bench.dir()}#pretrain@2"
    with pytest.raises(HandoffError, match=r"pretrain@2: student of that checkpoint went, as nothing kept them"):
        bench.submit(taking, run="other")
    with pytest.raises(HandoffError, match="student of that checkpoint went"):
        bench.submit(run="fork", fork=f"{bench.dir()}#pretrain@2")
    storage.publish(f"{bench.dir()}/{contract.dropped_file('pretrain', 1, 2, 'teacher_backbone')}", b"")
    spec["phases"]["text"]["vision_tower"] = "pretrain@2"
    with pytest.raises(HandoffError, match=f"teacher_backbone of that checkpoint went.*ckpt ls {source.run}"):
        bench.submit(spec, amending=True)
