"""The controller on real run directories with a stand-in launcher: to the end, crashes, forks, amendments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from model.contract import EVALUATE, Cause, CheckpointRef, Watcher
from orchestrator import attempts, cli, code, control, launchers, store
from orchestrator.control import ControlError
from orchestrator.decide import AskToStop, Rest, Wait
from orchestrator.events import AttemptIntended, AttemptLaunched
from orchestrator.handoff import HandoffError
from tests.orchestrator.pretend import Bench, request

REPOSITORY = Path(__file__).parents[2]


# --- the way of a run -------------------------------------------------------------------------------------------------


def test_a_run_is_driven_to_its_end_and_each_stage_gets_its_inputs(bench: Bench) -> None:
    assert bench.submit().what == "created"
    assert bench.drive().status == "done"
    run = bench.dir()
    told = [job.attempt for job in bench.launcher.jobs]
    assert [attempt.phase for attempt in told] == ["pretrain", "gram", "text", EVALUATE]
    assert told[1].inputs == {
        "init": CheckpointRef(run=run, phase="pretrain", attempt=1, step=4),
        "gram_teacher": CheckpointRef(run=run, phase="pretrain", attempt=1, step=2),
    }
    assert told[3].inputs == {
        "backbone": CheckpointRef(run=run, phase="gram", attempt=2, step=4),
        "text": CheckpointRef(run=run, phase="text", attempt=3, step=4),
    }
    assert (told[0].keep_steps, told[3].keep_steps, told[3].processes_per_node) == ([2, 4], [], 1)
    assert told[0].code_dir == code.code_dir(run, told[0].code_digest)
    assert told[0].on_end == [sys.executable, "-P", "-m", "orchestrator.cli", "tick", run]
    assert isinstance(bench.tick().action, Rest)


def test_the_launch_name_is_cut_at_the_run_alone(bench: Bench) -> None:
    run_id = "0123456789abcdef" * 2
    assert attempts.launch_name("demo", run_id, "gram", 12) == "demo-01234567-gram-12"
    name = attempts.launch_name("a-very-long-name-" * 6, run_id, "gram", 12)
    assert len(name) <= attempts.NAME_LENGTH
    assert name.endswith("-01234567-gram-12")
    with pytest.raises(HandoffError, match="too long"):
        attempts.launch_name("demo", run_id, "p" * 60, 1)


def test_a_preempted_attempt_goes_on_from_its_last_checkpoint(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.job.train(3)
    bench.launcher.job.end(Cause.STOPPED)
    state = bench.tick().state
    assert state.accepted() == {"pretrain": [(1, 2)]}
    bench.tick(seconds=10.0)
    assert [ref.step for ref in bench.launcher.job.attempt.resume] == [2]
    assert bench.drive().status == "done"


def test_what_is_sealed_after_the_close_does_not_count(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    job = bench.launcher.job
    job.train(2)
    job.running = False
    this = bench.controller()
    assert isinstance(bench.tick(this).action, Wait)
    bench.tick(this, 6.0)
    job.seal(3)  # a zombie that did not look
    assert control.load(bench.dir()).accepted() == {"pretrain": [(1, 2)]}
    bench.tick(this, 10.0)
    assert bench.launcher.job.attempt.resume[0].step == 2


def test_a_stop_is_sent_once_and_a_resume_goes_on(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    assert control.request_stop(bench.dir(), by="test").status == "running"
    assert isinstance(bench.tick().action, AskToStop)
    for _ in range(3):
        assert isinstance(bench.tick(bench.controller()).action, Wait)
    assert bench.launcher.job.asked == ["soft"]
    bench.launcher.job.train(2)
    bench.launcher.job.end(Cause.STOPPED)
    assert bench.tick().state.status == "stopped"
    assert control.request_stop(bench.dir(), by="again").status == "stopped"
    assert bench.submit().what == "resumed"
    assert bench.drive().status == "done"


def test_a_second_stop_ends_it_at_once(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    control.request_stop(bench.dir(), by="test")
    bench.tick()
    control.request_stop(bench.dir(), by="test", hard=True)
    this = bench.controller()
    bench.tick(this)
    assert bench.launcher.job.asked == ["soft", "hard"]
    bench.tick(this)
    state = bench.tick(this, 6.0).state
    assert state.attempts[0].end is not None
    assert state.attempts[0].end.cause is Cause.UNSEALED
    assert state.status == "stopped"


def test_cancel_and_resume(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    control.cancel(bench.dir(), by="test")
    bench.tick()
    bench.launcher.job.end(Cause.STOPPED)
    assert bench.tick().state.status == "cancelled"
    assert control.cancel(bench.dir(), by="again").status == "cancelled"
    assert control.resume(bench.dir(), by="test").status == "running"
    assert bench.drive().status == "done"
    with pytest.raises(ControlError, match="nothing to cancel"):
        control.cancel(bench.dir(), by="test")
    with pytest.raises(ControlError, match="nothing to resume"):
        control.resume(bench.dir(), by="test")


def test_a_failure_without_hope_ends_the_run_with_advice(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.job.train(2)
    bench.launcher.job.end(Cause.DISK_FULL)
    bench.tick()
    state = bench.tick().state
    assert state.status == "failed"
    assert state.failed is not None
    assert "make room and resume" in state.failed.message
    assert bench.submit().what == "resumed"
    assert bench.drive().status == "done"


@pytest.mark.parametrize("again", ["submit", "resume"])
def test_an_end_that_could_not_be_logged_is_named_and_the_user_goes_on(bench: Bench, again: str) -> None:
    """The disk was full when the attempt ended, and has room again: nobody has taken that end in yet."""
    bench.submit()
    bench.tick()
    bench.launcher.job.train(2)
    bench.launcher.job.end(Cause.DISK_FULL)
    if again == "submit":
        assert bench.submit().what == "resumed"
    else:
        control.resume(bench.dir(), by="test")
    state = control.load(bench.dir())
    assert state.attempts[0].end is not None
    assert (state.attempts[0].end.cause, state.attempts[0].end.steps) == (Cause.DISK_FULL, [2])
    assert bench.drive().status == "done"


def test_a_launcher_that_refuses_spends_its_budget(bench: Bench) -> None:
    bench.submit()
    bench.launcher.refuses = True
    state = bench.drive()
    assert state.failed is not None
    assert state.failed.cause is Cause.NOT_LAUNCHED
    assert "no such partition" in state.failed.message
    assert len(state.attempts) == 9


def test_a_changed_copy_of_the_code_fails_the_run(bench: Bench) -> None:
    state = bench.submit().state
    file = Path(code.code_dir(bench.dir(), state.code_digest)) / "model" / "train.py"
    file.chmod(0o644)
    file.write_text("STEPS = 0\n")
    assert bench.tick().state.status == "failed"
    control.resume(bench.dir(), by="test", new_code=False)
    assert bench.tick().state.status == "failed"


def test_new_code_is_an_event(bench: Bench, tmp_path: Path) -> None:
    old = bench.submit().state.code_digest
    bench.tick()
    (tmp_path / "tiny" / "train.py").write_text("STEPS = 5\n")
    with pytest.raises(ControlError, match="stop the run first"):
        control.resume(bench.dir(), by="test", new_code=True)
    bench.launcher.job.end(Cause.STOPPED)
    bench.tick()
    assert control.resume(bench.dir(), by="test", new_code=True).code_digest != old
    bench.tick(seconds=10.0)
    assert bench.launcher.job.attempt.code_digest == control.load(bench.dir()).code_digest


# --- ticks ------------------------------------------------------------------------------------------------------------


def test_every_tick_leaves_a_heartbeat(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    (watcher,) = store.watchers(bench.dir())
    assert (watcher.seen_at, watcher.command) == (bench.now, "test")


def test_follow_leaves_once_the_attempt_is_under_way(bench: Bench) -> None:
    bench.submit()
    this = control.controller(bench.dir(), bench.launcher, command="tick", every=0.0)
    state = control.follow(this, clock=lambda: bench.now, sleep=lambda seconds: None).state
    assert state.live is not None
    assert state.live.status == "launched"


PODS = {"launcher": "kubernetes", "kubernetes": {"image": "worker@sha256:" + "a" * 64}}


def submit_to_pods(bench: Bench) -> None:
    control.submit(bench.dir(), request(**PODS), by="test")


def test_a_pod_has_no_last_act_and_no_copy_of_the_code(bench: Bench) -> None:
    submit_to_pods(bench)
    bench.tick()
    attempt = bench.launcher.job.attempt
    assert (attempt.on_end, attempt.code_dir, attempt.code_digest) == ([], "", "a" * 64)
    assert not (Path(bench.dir()) / "code").exists()


def test_of_pods_somebody_has_to_stay_until_their_end(bench: Bench) -> None:
    """One that only looks leaves, and knows that they are left alone, unless somebody watches the run or its folder."""
    submit_to_pods(bench)
    this = control.controller(bench.dir(), bench.launcher, command="tick", every=0.0)
    under_way = bench.tick(), bench.tick()
    assert [result.idle for result in under_way] == [False, True]
    assert not under_way[1].settled
    assert control.follow(this, clock=lambda: bench.now, sleep=lambda seconds: None).left_alone
    there = Watcher(
        host="controller-0", boot_id="b", pid=1, started=0.0, command="watch", seen_at=bench.now, every=10.0
    )  # fmt: skip
    store.heartbeat(f"{bench.folder}/{store.FOLDER}", there)
    assert not control.follow(this, clock=lambda: bench.now, sleep=lambda seconds: None).left_alone
    bench.launcher.job.train(4)
    bench.launcher.job.end(Cause.DONE)
    assert control.follow(this, clock=lambda: bench.now + 3600, sleep=lambda seconds: None).left_alone
    assert len(bench.launcher.jobs) == 2


def test_a_tick_says_that_pods_are_left_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launchers, "launcher_for", bench.launcher)
    submit_to_pods(bench)
    for words in ([bench.dir()], ["--runs", str(bench.folder)]):
        assert cli.main(["tick", *words]) == 0
        assert f"dinoctl: nobody watches {bench.dir()}: " in capsys.readouterr().err
    bench.submit(run="here")
    assert cli.main(["tick", bench.dir("here")]) == 0
    assert capsys.readouterr().err == ""


def test_another_image_is_an_event_too(bench: Bench) -> None:
    submit_to_pods(bench)
    bench.tick()
    other = {**PODS, "kubernetes": {"image": "worker@sha256:" + "b" * 64}}
    control.submit(bench.dir(), request(**other), by="test", amending=True)
    bench.launcher.job.end(Cause.STOPPED)
    bench.tick()
    state = bench.tick(seconds=10.0).state
    assert state.failed is not None
    assert "--code new" in state.failed.message
    assert control.resume(bench.dir(), by="test", new_code=True).code_digest == "b" * 64
    bench.tick(seconds=10.0)
    assert bench.launcher.job.attempt.code_digest == "b" * 64


def test_follow_waits_out_a_pause_unless_somebody_watches(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.job.end(Cause.CRASHED)
    this = control.controller(bench.dir(), bench.launcher, command="tick", every=0.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        bench.now += seconds

    state = control.follow(this, clock=lambda: bench.now, sleep=sleep).state
    assert (len(bench.launcher.jobs), state.live and state.live.number) == (2, 2)
    assert sum(slept) == pytest.approx(1.0)


@pytest.mark.parametrize("alive", [True, False])
def test_who_watches_from_another_machine_has_to_look_again_to_be_counted_on(bench: Bench, alive: bool) -> None:
    bench.submit()
    bench.tick()
    there = Watcher(
        host="elsewhere", boot_id="b", pid=1, started=0.0, command="watch", seen_at=bench.now, every=10.0
    )  # fmt: skip
    store.heartbeat(bench.dir(), there)
    bench.now += 1.0
    bench.launcher.job.running = False
    this = control.controller(bench.dir(), bench.launcher, command="tick", every=0.0, settle_seconds=5.0)

    def sleep(seconds: float) -> None:
        bench.now += seconds
        if alive:
            store.heartbeat(bench.dir(), msgspec.structs.replace(there, seen_at=bench.now))

    state = control.follow(this, clock=lambda: bench.now, sleep=sleep).state
    assert [attempt.number for attempt in state.attempts] == ([1] if alive else [1, 2])


def test_events_are_in_the_order_that_survives_a_crash(bench: Bench) -> None:
    bench.submit()
    bench.launcher.on_submit = lambda attempt: kinds.extend(type(event) for event in store.read(bench.dir())[1:])
    kinds: list[type] = []
    bench.tick()
    assert kinds == [AttemptIntended]
    assert isinstance(store.read(bench.dir())[-1], AttemptLaunched)


def test_there_is_no_run_to_load(bench: Bench) -> None:
    with pytest.raises(ControlError, match="no run at"):
        control.load(bench.dir())


def test_the_controller_imports_no_pydantic_and_no_torch() -> None:
    check = "import sys, orchestrator.control; print({'torch', 'pydantic', 'mlflow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
