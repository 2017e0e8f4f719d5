"""What every launcher has to do, whatever it launches on. A new launcher is a row in LAUNCHERS.

Each case is a real attempt with a stand-in trainer (tests/model/standin), in a folder whose name a shell would trip on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from model import contract
from model.contract import Cause
from orchestrator.launchers import launcher_for
from orchestrator.launchers.base import Launcher, LaunchState, Query
from tests.model.standin.attempts import Case, make, wait_for

Pulsing = Callable[[Case], bool]

LAUNCHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("", {}),
    "slurm": ("slurm", {"gpus": False, "poll_seconds": 0.2}),
    "kubernetes": ("real_nodes", {"poll_seconds": 0.2, "gpus": False}),
}
"""By name: the fixture that has the machines, and what the launcher's section of a profile says."""

FOLDERS = {
    "local": 'a run\'s "folder"; $(touch no)\nnext',
    "slurm": 'a run\'s "folder"; $(touch no) next',  # no line break: an #SBATCH option is one line, and it is refused
    "kubernetes": 'a run\'s "folder"; $(touch no) $(HOME)\nnext',  # nor are $(NAMES) of pods filled in
}


def _row(name: str) -> Any:
    marks = [] if name == "local" else [pytest.mark.requires(name), pytest.mark.jobs]
    return pytest.param(name, marks=marks)


@pytest.fixture(params=[_row(name) for name in sorted(LAUNCHERS)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def disks(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """The temporary folders of all machines that an attempt may run on, once those machines are there."""
    if name == "local":
        return [Path(tempfile.gettempdir())]
    machines = request.getfixturevalue(LAUNCHERS[name][0])
    if name == "kubernetes":
        return [tmp_path / "tmp"]
    return [machines.node_tmp(node) for node in machines.settings.node_names]


@pytest.fixture
def pulsing(disks: list[Path]) -> Pulsing:
    """Whether the attempt trains, on whichever machine."""

    def look(case: Case) -> bool:
        file = contract.pulse_file(case.attempt.launch_name, 0).relative_to(tempfile.gettempdir())
        return any((disk / file).exists() for disk in disks)

    return look


@pytest.fixture
def profile(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    fixture, section = LAUNCHERS[name]
    if name == "kubernetes":
        told = request.getfixturevalue(fixture).pod_section(tmp_path)
        section = {**told, **section, "env": {**told["env"], "TMPDIR": str(tmp_path / "tmp")}}
        (tmp_path / "tmp").mkdir()
    return {"launcher": name, name: section}


@pytest.fixture
def launcher(profile: dict[str, Any]) -> Launcher:
    return launcher_for(profile)


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    return tmp_path / FOLDERS[name]


def ask(case: Case, handle: dict[str, Any] | None = None) -> Query:
    attempt = case.attempt
    return Query(attempt.run_dir, attempt.run_id, attempt.attempt, attempt.launch_name, case.digest, handle)


def state(launcher: Launcher, query: Query) -> LaunchState:
    return launcher.observe([query])[0].state


def wait_until(launcher: Launcher, query: Query, wanted: LaunchState) -> None:
    wait_for(lambda: state(launcher, query) is wanted)


def test_render_says_what_would_be_sent_and_does_nothing(launcher: Launcher, folder: Path) -> None:
    case = make(folder, ["steps:1"])
    before = sorted(folder.rglob("*"))
    text = launcher.render(case.attempt, case.digest)
    assert text == launcher.render(case.attempt, case.digest)
    assert "model.agent" in text
    assert contract.attempt_yaml(1) in text
    assert case.digest in text
    assert sorted(folder.rglob("*")) == before
    assert state(launcher, ask(case)) is LaunchState.ABSENT


def test_an_attempt_runs_to_its_end_and_is_seen_with_and_without_its_handle(
    launcher: Launcher, folder: Path, pulsing: Pulsing
) -> None:
    case = make(folder, ["steps:100000"])
    handle = launcher.submit(case.attempt, case.digest)
    assert json.loads(json.dumps(handle)) == handle  # it goes into an event
    assert state(launcher, ask(case, handle)) in (LaunchState.PENDING, LaunchState.RUNNING)

    wait_until(launcher, ask(case, handle), LaunchState.RUNNING)
    seen = launcher.observe([ask(case, handle), ask(case)])
    assert [one.state for one in seen] == [LaunchState.RUNNING] * 2
    assert all(one.detail for one in seen)
    assert seen[0].handle == handle
    adopted = seen[1].handle
    assert adopted is not None
    assert state(launcher, ask(case, adopted)) is LaunchState.RUNNING

    wait_for(lambda: pulsing(case))
    launcher.cancel(ask(case, handle), hard=False)
    wait_until(launcher, ask(case, handle), LaunchState.ENDED)
    assert case.outcome.cause is Cause.STOPPED
    assert state(launcher, ask(case)) is LaunchState.ENDED  # its claim says that it was there
    assert "ranks" in (folder / contract.agent_log(1)).read_text()
    assert not (folder.parent / "no").exists()


def test_only_the_same_run_and_digest_are_adopted(launcher: Launcher, folder: Path) -> None:
    case = make(folder, ["deaf"])
    handle = launcher.submit(case.attempt, case.digest)
    case.facts()
    assert state(launcher, replace(ask(case), digest="0" * 64)) is not LaunchState.RUNNING
    assert state(launcher, replace(ask(case), run_id="0" * 32)) is not LaunchState.RUNNING
    launcher.cancel(replace(ask(case), run_id="0" * 32), hard=False)
    assert state(launcher, ask(case)) is LaunchState.RUNNING
    launcher.cancel(ask(case, handle), hard=True)


def seen_here(case: Case, pid: int) -> psutil.Process:
    """A process of the attempt that calls itself `pid`: in a pod that is its number there, not on this machine."""
    for process in case.processes():
        status = Path(f"/proc/{process.pid}/status")
        own = re.search(r"NSpid:.*\b(\d+)\n", status.read_text()) if status.exists() else None
        if pid == (int(own[1]) if own else process.pid):
            return process
    raise AssertionError(f"{pid} is not there")


def test_hard_cancel_leaves_no_process(launcher: Launcher, folder: Path, pulsing: Pulsing) -> None:
    case = make(folder, ["children"])
    handle = launcher.submit(case.attempt, case.digest)
    pid = case.facts()["pid"]
    wait_for(lambda: pulsing(case))
    child = seen_here(case, pid).children()[0]  # in a session of its own, and it knows nothing of the attempt
    launcher.cancel(ask(case, handle), hard=True)
    assert case.processes() == []
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert state(launcher, ask(case, handle)) is LaunchState.ENDED


def test_cancel_by_name_as_after_a_lost_answer(launcher: Launcher, folder: Path, pulsing: Pulsing) -> None:
    case = make(folder, ["steps:100000"])
    launcher.submit(case.attempt, case.digest)
    wait_for(lambda: pulsing(case))
    launcher.cancel(ask(case), hard=False)
    wait_until(launcher, ask(case), LaunchState.ENDED)
    assert case.outcome.cause is Cause.STOPPED


@pytest.mark.parametrize("hard", [False, True])
def test_to_cancel_what_is_gone_is_nothing(launcher: Launcher, folder: Path, hard: bool) -> None:
    case = make(folder, ["steps:1"])
    launcher.cancel(ask(case), hard=hard)
    handle = launcher.submit(case.attempt, case.digest)
    wait_until(launcher, ask(case, handle), LaunchState.ENDED)
    launcher.cancel(ask(case, handle), hard=hard)
    assert case.outcome.cause is Cause.DONE


def test_answers_come_in_the_order_of_the_queries(launcher: Launcher, folder: Path) -> None:
    running, ended, absent = (
        make(folder / one, [behaviour]) for one, behaviour in [("1", "deaf"), ("2", "steps:1"), ("3", "steps:1")]
    )
    handles = [launcher.submit(case.attempt, case.digest) for case in (running, ended)]
    wait_until(launcher, ask(ended, handles[1]), LaunchState.ENDED)
    seen = launcher.observe([ask(absent), ask(running, handles[0]), ask(ended, handles[1]), ask(running)])
    assert [one.state for one in seen] == [
        LaunchState.ABSENT,
        LaunchState.RUNNING,
        LaunchState.ENDED,
        LaunchState.RUNNING,
    ]
    assert launcher.observe([]) == []
    launcher.cancel(ask(running), hard=True)


def test_an_attempt_submitted_twice_is_trained_once(launcher: Launcher, folder: Path) -> None:
    case = make(folder, ["steps:40"])
    handles = [launcher.submit(case.attempt, case.digest) for _ in range(2)]
    for handle in handles:
        wait_until(launcher, ask(case, handle), LaunchState.ENDED)
    assert case.outcome.cause is Cause.DONE  # a second trainer would have failed to publish its facts
    if handles[0] != handles[1]:  # where names are unique the second was the first
        assert "superseded, nothing was started" in (folder / contract.agent_log(1)).read_text()


def test_it_outlives_who_submitted_it(
    profile: dict[str, Any], launcher: Launcher, folder: Path, pulsing: Pulsing
) -> None:
    case = make(folder, ["steps:100000"])
    script = (
        "import sys, time; from pathlib import Path; from model.contract import read_attempt\n"
        f"from orchestrator.launchers import launcher_for; launcher = launcher_for({profile!r})\n"
        "launcher.submit(read_attempt(Path(sys.argv[1]).read_bytes(), ''), sys.argv[2]); print('sent', flush=True)\n"
        "time.sleep(1000)"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script, case.yaml, case.digest], stdout=subprocess.PIPE, start_new_session=True
    ) as controller:
        assert controller.stdout is not None
        assert controller.stdout.readline() == b"sent\n"
        os.killpg(controller.pid, signal.SIGKILL)  # as a closed terminal would, and harder
    wait_for(lambda: pulsing(case))
    assert state(launcher, ask(case)) is LaunchState.RUNNING
    launcher.cancel(ask(case), hard=True)
