"""All runs of a folder kept going by one process: each as if it were alone, and one question for all."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from model.contract import Cause
from orchestrator import cli, control, launchers, many, store, watch
from orchestrator.launchers.base import LaunchError
from orchestrator.many import Keeper, Pass
from tests.orchestrator.pretend import Bench, PretendLauncher

NAMES = ("one", "two", "three")


@pytest.fixture
def runs(bench: Bench) -> Bench:
    for name in NAMES:
        bench.submit(run=name)
    return bench


def keeper(bench: Bench, every: float = 0.0) -> Keeper:
    return many.keeper(str(bench.folder), bench.launcher, command="tick", every=every)


def pass_over(bench: Bench, this: Keeper, seconds: float = 1.0) -> Pass:
    bench.now += seconds
    return many.pass_over(this, bench.now)


def test_a_pass_asks_once_for_all_and_brings_each_run_on(runs: Bench) -> None:
    this = keeper(runs)
    assert len(pass_over(runs, this).results) == 3
    assert (len(runs.launcher.jobs), runs.launcher.questions) == (3, 0), "there was nothing to ask about"
    pass_over(runs, this)
    assert runs.launcher.questions == 1
    runs.launcher.jobs[0].train(2)
    runs.launcher.jobs[0].end(Cause.STOPPED)
    done = pass_over(runs, this)
    assert runs.launcher.questions == 2
    ended = runs.launcher.jobs[0].attempt.run_dir
    assert [run for run, result in done.results.items() if result.state.live is None] == [ended]


def test_to_the_end(runs: Bench) -> None:
    this = keeper(runs)
    for _ in range(40):
        pass_over(runs, this, 10.0)
        for job in runs.launcher.jobs:
            if job.running and not job.ended:
                job.train(10)
                job.end(Cause.DONE)
    assert {control.load(runs.dir(name)).status for name in NAMES} == {"done"}
    assert pass_over(runs, this).results == {}, "no live run is left"


def test_a_lost_attempt_is_looked_for_twice_by_the_same_process(runs: Bench) -> None:
    this = keeper(runs)
    this = many.Keeper(this.runs, many.replace(this.me, settle_seconds=5.0))
    pass_over(runs, this)
    runs.launcher.jobs[0].running = False
    pass_over(runs, this)
    assert control.load(runs.launcher.jobs[0].attempt.run_dir).live is not None
    pass_over(runs, this, 6.0)
    assert control.load(runs.launcher.jobs[0].attempt.run_dir).live is None


def test_what_is_wrong_with_one_run_is_said_and_the_others_go_on(runs: Bench) -> None:
    torn = runs.folder / "two" / "events" / "000001.json"
    torn.unlink()
    torn.write_text("{")
    (runs.folder / "no-run").mkdir()
    done = pass_over(runs, keeper(runs))
    assert set(done.results) == {runs.dir("one"), runs.dir("three")}
    assert "torn" in done.errors[runs.dir("two")]


def test_each_cluster_is_asked_once_and_one_that_cannot_be_is_said(bench: Bench) -> None:
    other = PretendLauncher(clock=lambda: bench.now)

    def launcher_for(cluster: Any) -> PretendLauncher:
        if cluster["name"] == "nowhere":
            raise LaunchError("no squeue here")
        return other if cluster["name"] == "other" else bench.launcher

    for run, name in (("a", "here"), ("b", "other"), ("c", "other"), ("d", "nowhere")):
        request = control.Request(
            run, control.load(bench.dir("a")).spec if run != "a" else _spec(), {"name": name, "launcher": "local"},
            lambda *recorded: recorded,
        )  # fmt: skip
        control.submit(bench.dir(run), request, by="test")
    this = many.keeper(str(bench.folder), launcher_for, command="tick", every=0.0)
    pass_over(bench, this)
    done = pass_over(bench, this)
    assert (bench.launcher.questions, other.questions) == (1, 1)
    assert done.errors == {bench.dir("d"): "no squeue here"}


def test_a_run_that_is_over_is_kept_until_its_cluster_has_taken_away_what_it_had(runs: Bench) -> None:
    this = keeper(runs)
    for name in NAMES:
        control.cancel(runs.dir(name), by="test")
    assert pass_over(runs, this).results == {}, "they never began"
    runs.submit(run="four")
    pass_over(runs, this)
    control.cancel(runs.dir("four"), by="test")
    runs.launcher.job.end(Cause.STOPPED)
    runs.launcher.job.requeued = True
    runs.launcher.blind = True
    for _ in range(2):
        done = pass_over(runs, this)
        assert done.results[runs.dir("four")].state.status == "cancelled"
        assert done.errors == {runs.dir("four"): "no answer"}
    runs.launcher.blind = False
    assert pass_over(runs, this).errors == {}
    assert not runs.launcher.job.requeued
    assert pass_over(runs, this).results == {}


def _spec() -> dict[str, Any]:
    from tests.orchestrator.pretend import job_spec

    return job_spec()


def test_a_run_of_another_machine_itself_is_left_to_that_machine(runs: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = runs.launcher.submit
    monkeypatch.setattr(runs.launcher, "submit", lambda *of: {**submit(*of), "host": "a-workstation"})
    pass_over(runs, keeper(runs))
    assert len(runs.launcher.jobs) == 3
    assert pass_over(runs, keeper(runs)).results == {}


def test_following_leaves_once_each_run_is_under_way(runs: Bench) -> None:
    slept: list[float] = []
    done = many.follow(keeper(runs), clock=lambda: runs.now, sleep=slept.append)
    assert all(result.settled for result in done.results.values())
    assert len(runs.launcher.jobs) == 3


def test_who_keeps_the_folder_watches_each_of_its_runs(runs: Bench) -> None:
    this = keeper(runs, every=10.0)
    pass_over(runs, this)
    for name in NAMES:
        (watcher,) = store.watchers(runs.dir(name), of_folder=True)
        assert store.is_alive(watcher, runs.now)
        assert store.watchers(runs.dir(name)) == []
    assert not (runs.folder / "one" / "watchers").exists(), "one heartbeat for all"


def test_keeping_says_what_happens_and_goes_when_told(runs: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "now", lambda: runs.now)
    left, said = threading.Event(), list[str]()

    def say(line: str) -> None:
        said.append(line)
        if "one: attempt 1 of pretrain ended" in line:
            left.set()
        elif line == "one: attempt 1 of pretrain is launched":
            job = next(job for job in runs.launcher.jobs if job.attempt.run == "one")
            job.end(Cause.STOPPED)

    many.keep(keeper(runs, 10.0), left, say, 0.01)
    assert "two: attempt 1 of pretrain is launched" in said
    assert len(said) == len(set(said)), "nothing is said twice"


def test_keeping_says_once_that_a_cluster_does_not_answer(runs: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "now", lambda: runs.now)
    left, said = threading.Event(), list[str]()

    def say(line: str) -> None:
        said.append(line)
        runs.launcher.blind = True
        if sum("connection refused" in known for known in said) == len(NAMES):
            left.set()

    many.keep(keeper(runs, 10.0), left, say, 0.01)
    told = "one: attempt 1 of pretrain is launched; nothing is heard of it: connection refused"
    assert said.count(told) == 1


def test_the_commands(runs: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launchers, "launcher_for", runs.launcher)
    assert cli.main(["tick", "--runs", str(runs.folder)]) == 0
    assert capsys.readouterr().out == f"3 live runs in {runs.folder}\n"
    assert len(runs.launcher.jobs) == 3
    monkeypatch.setattr(watch, "keep_all", lambda folder: None)
    assert cli.main(["watch", "--runs", str(runs.folder)]) == 130
    assert cli.main(["tick", "--runs", str(runs.folder / "nowhere")]) == 2
    assert "no such folder of runs" in capsys.readouterr().err
    first = Path(runs.dir("two")) / "events" / "000001.json"
    first.unlink()
    first.write_text("{")
    assert cli.main(["tick", "--runs", str(runs.folder)]) == 1


def test_a_tick_says_what_a_cluster_did_not_take_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launchers, "launcher_for", bench.launcher)
    bench.submit()
    bench.drive()
    bench.launcher.blind = True
    assert cli.main(["tick", bench.dir()]) == 1
    assert capsys.readouterr().err == f"dinoctl: {bench.dir()}: no answer; tick again later\n"
    bench.launcher.blind = False
    assert cli.main(["tick", bench.dir()]) == 0
