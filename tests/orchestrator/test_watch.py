"""Staying with a run: to its end, to a stop, past a store out of reach. Jobs are pretended, the rest is real."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from model import storage
from model.contract import Cause
from orchestrator import control, launchers, watch
from orchestrator.decide import Wait
from orchestrator.launchers.base import LaunchError, Observation, Query
from orchestrator.screen import Lines
from tests.orchestrator.pretend import Job, PretendLauncher, request, tiny_code


@dataclass
class Willing(PretendLauncher):
    """Each time somebody looks, `before` has its way, then the job trains a step or does what it was asked; or, if
    it is `deaf`, nothing."""

    before: Callable[[Job], None] = lambda job: None
    deaf: bool = False

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        if self.jobs and not self.job.ended:
            self.before(self.job)
            self._go_on(self.job)
        return super().observe(queries)

    def _go_on(self, job: Job) -> None:
        if self.deaf or job.ended:
            return
        if job.asked:
            job.end(Cause.STOPPED)
        else:
            job.train(1)
            if job.finished():
                job.end(Cause.DONE)


def press(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_once_more(job: Job) -> None:
    """At the first look, and once more when it was asked to stop."""
    if job.step == len(job.asked) < 2:
        job.step += 1
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    tiny_code(tmp_path, monkeypatch)
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.01)
    run_dir = str(tmp_path / "runs" / "demo")
    control.submit(run_dir, request(), by="a test")
    return run_dir


def stay(run: str, launcher: PretendLauncher, patch: pytest.MonkeyPatch, command: str = "submit") -> tuple[int, str]:
    """The exit code and everything that was printed."""
    patch.setattr(launchers, "launcher_for", launcher)
    out = io.StringIO()
    console = Console(file=out, width=200)
    end = watch.stay(run, console, command)
    return watch.conclude(run, end, console), out.getvalue()


def test_to_the_end(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Willing()
    code, text = stay(run, launcher, monkeypatch)
    assert code == 0
    assert [job.attempt.phase for job in launcher.jobs] == ["pretrain", "gram", "text", "evaluate"]
    assert text.rstrip().endswith(f"run demo is done: {run}")


def test_the_first_signal_seals_and_stops_and_says_how_to_go_on(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Willing(before=press)
    code, text = stay(run, launcher, monkeypatch)
    assert code == 130
    assert launcher.job.asked == ["soft"]
    assert "SIGINT: sealing a checkpoint and stopping; once more to stop at once" in text
    assert text.rstrip().endswith(f"to go on: dinoctl resume {run}")
    assert control.load(run).status == "stopped"


def test_the_second_signal_stops_at_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Willing(before=press_once_more, deaf=True)
    monkeypatch.setitem(control.SETTLE_SECONDS, "local", 0.01)
    code, text = stay(run, launcher, monkeypatch)
    assert code == 130
    assert launcher.job.asked[:2] == ["soft", "hard"]
    assert "SIGTERM again: stopping at once" in text
    assert control.load(run).attempts[-1].end.cause is Cause.UNSEALED  # type: ignore[union-attr]


def test_signals_are_as_before_afterwards(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    stay(run, Willing(), monkeypatch)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("cause", "code"), [(Cause.DIVERGED, 1), (Cause.DISK_FULL, 3), (Cause.USER_ERROR, 1)])
def test_a_failure_has_its_exit_code_and_its_page(
    run: str, monkeypatch: pytest.MonkeyPatch, cause: Cause, code: int
) -> None:
    exit_code, text = stay(run, Willing(before=lambda job: job.end(cause)), monkeypatch)
    assert exit_code == code
    assert f"runbooks/{cause.value}.md" in text


def test_a_store_out_of_reach_is_said_once_and_waited_for(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tick, calls = control.tick, []

    def shaky(*arguments: object) -> control.TickResult:
        calls.append(1)
        if 3 <= len(calls) <= 6:
            raise storage.StoreError(5, f"reading {run}: Input/output error")
        return tick(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(control, "tick", shaky)
    code, text = stay(run, Willing(), monkeypatch)
    assert code == 0
    assert text.count("Input/output error; trying again") == 1


def test_a_disk_that_stays_full_ends_the_watch(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> control.TickResult:
        raise storage.DiskFullError(28, "writing: No space left on device")

    monkeypatch.setattr(control, "tick", full)
    monkeypatch.setattr(watch, "DISK_FULL_SECONDS", 0.05)
    with pytest.raises(storage.DiskFullError):
        stay(run, Willing(), monkeypatch)


# --- on a cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    tiny_code(tmp_path, monkeypatch)
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "CLUSTER_TICK_SECONDS", 0.02)
    monkeypatch.setattr(watch, "detach", lambda run_dir: 4711)
    run_dir = str(tmp_path / "runs" / "far")
    control.submit(run_dir, request(run="far", launcher="slurm"), by="a test")
    return run_dir


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_detaches_and_stops_nothing(
    on_a_cluster: str, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    looks: list[int] = []

    def leave(job: Job) -> None:
        looks.append(1)
        if len(looks) == 2:
            os.kill(os.getpid(), number)

    launcher = Willing(before=leave)
    before = signal.getsignal(number)
    code, text = stay(on_a_cluster, launcher, monkeypatch)
    assert code == 130
    assert (launcher.job.asked, launcher.job.running) == ([], True)
    assert control.load(on_a_cluster).status == "running"
    assert "detached, and the run goes on: its jobs keep it going: each looks what is due when it ends" in text
    for command in ("watch", "status", "stop"):
        assert f"dinoctl {command} {on_a_cluster}" in text
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("command", "said"),
    [("submit", "process 4711 in the background keeps it going"), ("watch", "nobody is there to do it until")],
)
def test_who_leaves_before_all_is_under_way_leaves_somebody_behind(
    on_a_cluster: str, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    """The launcher took the job and did not say so: whether it is there has still to be found out."""
    launcher = Willing(mute=True, blind=True)
    submit = launcher.submit

    def submitted(*arguments: object) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGINT)
        return submit(*arguments)  # type: ignore[arg-type]

    launcher.submit = submitted  # type: ignore[method-assign]
    _, text = stay(on_a_cluster, launcher, monkeypatch, command)
    assert said in text


@pytest.mark.parametrize(
    ("command", "said"),
    [("submit", "process 4711 in the background keeps it going"), ("watch", "nobody is there to do it until")],
)
def test_who_leaves_pods_leaves_somebody_behind(
    on_a_cluster: str, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    """All is under way, and nothing looks when it ends."""
    run_dir = on_a_cluster.replace("far", "pods")
    profile = {"launcher": "kubernetes", "kubernetes": {"image": "worker@sha256:" + "a" * 64}}
    control.submit(run_dir, request(run="pods", **profile), by="a test")
    looks: list[int] = []

    def leave(job: Job) -> None:
        looks.append(1)
        if len(looks) == 2:
            press(job)

    _, text = stay(run_dir, Willing(before=leave), monkeypatch, command)
    assert said in text


@pytest.mark.parametrize("answers", [True, False])
def test_a_cluster_that_does_not_take_away_what_is_over_is_asked_again_and_then_left(
    on_a_cluster: str, monkeypatch: pytest.MonkeyPatch, *, answers: bool
) -> None:
    asked: list[int] = []

    def clear(queries: Sequence[Query]) -> None:
        asked.append(len(queries))
        if len(queries) == 4 and (asked.count(4) < 3 or not answers):
            raise LaunchError("jobs that are over cannot be deleted now")

    monkeypatch.setattr(watch, "CLEAR_SECONDS", 0.5)
    launcher = Willing()
    launcher.clear = clear  # type: ignore[method-assign]
    code, text = stay(on_a_cluster, launcher, monkeypatch)
    assert code == 0
    said = f"jobs that are over cannot be deleted now; `dinoctl tick {on_a_cluster}` asks again"
    assert (said in text) is not answers
    assert asked.count(4) == 3 if answers else asked.count(4) > 3
    count = len(asked)
    stay(on_a_cluster, launcher, monkeypatch)
    assert len(asked) == count, "who comes to what is over asks nobody"


def test_a_terminal_that_is_gone_does_not_keep_anybody(on_a_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Lines):
        def __exit__(self, *_: object) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(watch, "screen", Gone)
    code, text = stay(on_a_cluster, Willing(before=press), monkeypatch)
    assert code == 130
    assert "detached" in text


def test_another_watcher_is_named(on_a_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.contract import Watcher, now
    from orchestrator import store

    other = Watcher(
        host="login2", boot_id="b", pid=7, started=1.0, command="watch", seen_at=now(), every=600.0
    )  # fmt: skip
    store.heartbeat(on_a_cluster, other)
    _, text = stay(on_a_cluster, Willing(before=press), monkeypatch)
    assert "process 7 on login2 (watch) keeps it going" in text


def test_the_end_of_a_clusters_run_is_seen_and_the_queue_before_it(
    on_a_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Willing(told={"detail": "Priority", "nodes": ("node1", "node2")}, before=begin)
    launcher.on_submit = lambda attempt: None
    code, text = stay(on_a_cluster, launcher, monkeypatch)
    assert code == 0
    assert "attempt 1 runs on node1, node2" in text
    assert text.count("attempt 1 runs on") == 1


def begin(job: Job) -> None:
    job.pending = False


def test_a_tick_of_a_cluster_is_not_due_every_second(on_a_cluster: str) -> None:
    run = control.load(on_a_cluster)
    rested = control.TickResult(run, Wait(1.0, "it runs"), 1.0)
    acted = control.TickResult(run, Wait(1.0, "it was launched"), 0.0)
    assert (watch.pause(rested), watch.pause(acted)) == (watch.CLUSTER_TICK_SECONDS, 0.0)
