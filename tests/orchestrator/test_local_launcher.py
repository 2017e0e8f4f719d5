"""What is the local launcher's own: hosts, leftovers, what it takes for an agent. The rest: test_launcher_contract."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from model import contract, storage
from model.contract import Attempt, Claim
from orchestrator.launchers.base import LaunchError, LaunchState, Query
from orchestrator.launchers.local import LocalLauncher, end_orphans
from tests.model.standin.attempts import Case, make, wait_for

launcher = LocalLauncher()


def ask(case: Case) -> Query:
    attempt = case.attempt
    return Query(attempt.run_dir, attempt.run_id, attempt.attempt, attempt.launch_name, case.digest, None)


def claim_elsewhere(attempt: Attempt) -> None:
    claim = Claim(
        launch_name=attempt.launch_name, host="far-away", boot_id="another", pid=os.getpid(), started=0.0, nonce="1"
    )
    Path(attempt.run_dir, contract.claim_file(attempt.attempt)).write_bytes(contract.encode(claim))


def sleeper(*words: str) -> subprocess.Popen[bytes]:
    """A process with that end to its command line."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", *words])


def test_render_is_a_command_for_a_shell(tmp_path: Path) -> None:
    case = make(tmp_path / "it's", ["steps:3"])
    log = tmp_path / "it's" / contract.agent_log(1)
    log.parent.mkdir(parents=True)
    subprocess.run(launcher.render(case.attempt, case.digest), shell=True, check=True, timeout=30)
    assert case.outcome.step == 3
    assert "done" in log.read_text()
    assert shlex.quote(case.yaml) in launcher.render(case.attempt, case.digest)


def test_another_machines_attempt_is_unknown_and_not_cancelled_here(tmp_path: Path) -> None:
    case = make(tmp_path, ["steps:1"])
    claim_elsewhere(case.attempt)
    by_claim = launcher.observe([ask(case)])[0]
    assert by_claim.state is LaunchState.UNKNOWN
    assert "far-away" in by_claim.detail
    handle = {"pid": os.getpid(), "started": 0.0, "boot_id": "another", "host": "far-away"}
    assert launcher.observe([replace(ask(case), handle=handle)])[0].state is LaunchState.UNKNOWN
    with pytest.raises(LaunchError, match="cancel it there"):
        launcher.cancel(ask(case), hard=True)


def test_a_pid_that_is_somebody_elses_by_now_is_not_the_agent(tmp_path: Path) -> None:
    case = make(tmp_path, ["steps:1"])
    handle = {"pid": os.getpid(), "started": 0.0, "boot_id": contract.boot_id(), "host": contract.hostname()}
    query = replace(ask(case), handle=handle)
    assert launcher.observe([query])[0].state is LaunchState.ENDED
    launcher.cancel(query, hard=True)  # would end this test


def test_a_killed_agent_is_ended_at_once_though_its_parent_has_not_buried_it(tmp_path: Path) -> None:
    case = make(tmp_path, ["deaf"])
    handle = launcher.submit(case.attempt, case.digest)
    case.facts()
    os.kill(handle["pid"], signal.SIGKILL)
    wait_for(lambda: case.processes() == [], seconds=2)
    assert psutil.Process(handle["pid"]).status() == psutil.STATUS_ZOMBIE
    assert launcher.observe([replace(ask(case), handle=handle)])[0].state is LaunchState.ENDED
    assert not psutil.pid_exists(handle["pid"])
    launcher.cancel(ask(case), hard=True)
    assert not contract.scratch_dir(case.attempt.launch_name).exists()


def test_orphans_of_a_run_end_before_its_next_attempt_and_nothing_else_does(tmp_path: Path) -> None:
    first, led = make(tmp_path, ["steps:1"]), make(tmp_path, ["deaf"], number=2)
    other = make(tmp_path / "other", ["steps:1"])
    launcher.submit(led.attempt, led.digest)
    led_rank = led.facts()["pid"]
    orphan = sleeper("-m", "model.train", first.yaml)
    bystanders = [sleeper("less", first.yaml), sleeper("-m", "model.train", other.yaml)]
    try:
        wait_for(lambda: len(first.processes()) == 2)
        end_orphans(first.attempt.run_dir)
        assert orphan.wait(5) == -signal.SIGKILL
        assert [process.poll() for process in bystanders] == [None, None]
        assert psutil.pid_exists(led_rank)
    finally:
        for process in bystanders:
            process.kill()
            process.wait()
        launcher.cancel(ask(led), hard=True)


def test_what_cannot_be_started_is_refused(tmp_path: Path) -> None:
    case = make(tmp_path, ["steps:1"])
    (tmp_path / contract.log_dir(1)).write_text("a file where the folder should be")
    with pytest.raises(LaunchError, match="could not be started here"):
        launcher.submit(case.attempt, case.digest)


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_in_a_bucket_another_machines_attempt_is_over_once_its_claim_is_no_longer_renewed(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = Query(f"{s3}/run", "id", 1, "run-id-pretrain-1", "digest", None)
    assert launcher.observe([query])[0].state is LaunchState.ABSENT
    claim = Claim(launch_name=query.launch_name, host="far-away", boot_id="another", pid=1, started=0.0, nonce="1")
    storage.publish(f"{query.run_dir}/{contract.claim_file(1)}", contract.encode(claim))
    assert launcher.observe([query])[0].state is LaunchState.UNKNOWN
    with pytest.raises(LaunchError, match="cancel it there"):
        launcher.cancel(query, hard=True)
    later = contract.now() + 301
    monkeypatch.setattr(contract, "now", lambda: later)
    over = launcher.observe([query])[0]
    assert over.state is LaunchState.ENDED
    assert "on far-away, and its agent has not reached the bucket for 30" in over.detail
    launcher.cancel(query, hard=True)
    with pytest.raises(LaunchError, match="cancel it there"):
        launcher.cancel(query, hard=False)
