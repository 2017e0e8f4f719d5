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
from orchestrator.launchers.base import Observation, Query
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


def stay(run: str, launcher: PretendLauncher, patch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code and everything that was printed."""
    patch.setattr(launchers, "launcher_for", launcher)
    out = io.StringIO()
    console = Console(file=out, width=200)
    end = watch.stay(run, console, "submit")
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
