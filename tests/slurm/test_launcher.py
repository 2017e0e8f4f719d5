"""The Slurm launcher on a real Slurm: what its contract tests do not ask, as it is of Slurm alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from model import contract, storage
from model.contract import Cause
from orchestrator.launchers import slurm as slurm_launcher, slurm_queue
from orchestrator.launchers.base import LaunchError, LaunchState, UnansweredError
from tests.model.standin.attempts import Case, make, wait_for
from tests.slurm.attempts import PROFILE, ask, impostor, jobs_of, launcher, look, trains, wait_until
from tests.slurm.cluster import Cluster

__all__ = ["impostor"]

pytestmark = [pytest.mark.requires("slurm"), pytest.mark.jobs]

Impostor = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def fresh() -> None:
    slurm_queue.forget()
    slurm_launcher._last_seen.clear()


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", 'a run\'s "folder"; $(touch no) next'])
def test_what_a_dry_run_prints_is_what_slurm_has(slurm: Cluster, tmp_path: Path, name: str) -> None:
    case = make(tmp_path / name, ["deaf"])
    mine = launcher(setup=["# of the site", "export SITE='a b'"], extra={"mem": "0", "exclusive": ""})
    handle = mine.submit(case.attempt, case.digest)
    assert slurm.run("scontrol", "write", "batch_script", handle["job"], "-") == mine.render(case.attempt, case.digest)
    mine.cancel(ask(case, handle), hard=True)
    folder = case.run_dir / "attempts" / "1" / "slurm"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_surrounding_job_says_nothing_to_the_new_one(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SBATCH_PARTITION": "nope", "SQUEUE_STATES": "FAILED", "SLURM_NODEID": "7"}.items():
        monkeypatch.setenv(name, value)
    case = make(tmp_path / "run", ["steps:1"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_until(case, handle, LaunchState.ENDED)
    assert case.outcome.cause is Cause.DONE


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ({"partition": "nope"}, {}, ["nvalid partition", "slurm.partition", "sinfo -s"]),
        ({"constraint": "nope"}, {}, ["Invalid feature specification", "slurm.constraint"]),
        ({"reservation": "nope"}, {}, ["reservation is invalid", "slurm.reservation"]),
        ({"exclude": ["nope"]}, {}, ["Invalid node name", "slurm.exclude"]),
    ],
)
def test_a_refusal_is_told_in_slurms_words_and_what_to_do(
    slurm: Cluster, tmp_path: Path, section: dict[str, object], changes: dict[str, object], words: list[str]
) -> None:
    case = make(tmp_path / "run", ["steps:1"], **changes)
    with pytest.raises(LaunchError) as refused:
        launcher(**section).submit(case.attempt, case.digest)
    assert not isinstance(refused.value, UnansweredError)
    assert all(word in str(refused.value) for word in words)
    assert look(case).state is LaunchState.ABSENT


def test_excluded_nodes_are_left_out(slurm: Cluster, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["deaf"], exclude=["node1"])
    handle = launcher().submit(case.attempt, case.digest)
    assert wait_until(case, handle, LaunchState.RUNNING).nodes == ("node2",)
    assert launcher().usable_nodes({}, []) == 2
    assert launcher(exclude=["node2"]).usable_nodes({}, ["node1"]) == 0
    assert launcher(exclude=["node2"]).usable_nodes({"slurm": {"exclude": [], "partition": "high"}}, []) == 2
    assert launcher().usable_nodes({"slurm": {"partition": "nope"}}, []) in (0, None)
    launcher().cancel(ask(case, handle), hard=True)


# --- exactly once -----------------------------------------------------------------------------------------------------


@contextmanager
def submitter(case: Case) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that submits the attempt; killed at the end of the block."""
    script = (
        "import sys; from pathlib import Path; from model.contract import read_attempt\n"
        f"from orchestrator.launchers.slurm import SlurmLauncher\nlauncher = SlurmLauncher({PROFILE})\n"
        "launcher.submit(read_attempt(Path(sys.argv[1]).read_bytes(), ''), sys.argv[2])"
    )
    command = [sys.executable, "-P", "-c", script, case.yaml, case.digest]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("script", ['touch $0.on; sleep 3; exec $REAL "$@"', '$REAL "$@"; touch $0.on; sleep 1000'])
def test_a_job_whose_submitter_is_killed_within_sbatch_is_adopted_and_trains(
    slurm: Cluster, tmp_path: Path, impostor: Impostor, script: str
) -> None:
    """Before Slurm has the job, and after, when only the answer is missing."""
    case = make(tmp_path / "run", ["steps:100000"])
    sbatch = impostor("sbatch", script)
    with submitter(case) as process:
        wait_for(lambda: (sbatch.parent / "sbatch.on").exists())
        process.send_signal(signal.SIGKILL)
    handle = wait_until(case, None, LaunchState.PENDING, LaunchState.RUNNING).handle
    assert list(jobs_of(slurm, case)) == [handle and handle["job"]]
    wait_for(lambda: trains(slurm, case), 60)
    launcher().cancel(ask(case, handle), hard=True)


def test_a_submitter_that_is_killed_before_sbatch_leaves_nothing(
    slurm: Cluster, tmp_path: Path, impostor: Impostor
) -> None:
    case = make(tmp_path / "run", ["steps:1"])
    timeout = impostor("timeout", "touch $0.on; sleep 1000")
    with submitter(case):
        wait_for(lambda: (timeout.parent / "timeout.on").exists())
    assert look(case).state is LaunchState.ABSENT
    assert jobs_of(slurm, case) == {}


def test_of_two_jobs_of_an_attempt_the_one_with_the_claim_counts_and_the_other_is_cleared(
    slurm: Cluster, tmp_path: Path
) -> None:
    case = make(tmp_path / "run", ["steps:100000"])
    first = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 60)
    second = launcher(extra={"begin": "now+1hour"}).submit(case.attempt, case.digest)

    for handle in (first, second, None):
        seen = look(case, handle)
        assert seen.state is LaunchState.RUNNING
        assert f"job {first['job']}" in seen.detail
    launcher().clear([ask(case, first)])
    assert jobs_of(slurm, case) == {first["job"]: "RUNNING", second["job"]: "CANCELLED"}

    third = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: jobs_of(slurm, case)[third["job"]] == "FAILED", 60)  # superseded, with the contract's code
    code = slurm.run("squeue", "-h", "--states=all", f"--jobs={third['job']}", "-O", "exit_code").strip()
    assert os.waitstatus_to_exitcode(int(code)) == contract.EXIT_CODES[Cause.SUPERSEDED]
    assert look(case, first).state is LaunchState.RUNNING
    launcher().cancel(ask(case, first), hard=False)
    wait_until(case, first, LaunchState.ENDED)
    assert case.outcome.cause is Cause.STOPPED


def test_what_sbatch_leaves_open_is_told_as_that(slurm: Cluster, tmp_path: Path, impostor: Impostor) -> None:
    case = make(tmp_path / "run", ["deaf"])
    impostor(
        "sbatch", "$REAL \"$@\" > /dev/null; echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"
    )
    with pytest.raises(UnansweredError, match="Socket timed out"):
        launcher().submit(case.attempt, case.digest)
    handle = wait_until(case, None, LaunchState.RUNNING).handle  # it was taken
    launcher().cancel(ask(case, handle), hard=True)


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_a_job_that_waits_says_why_and_is_cancelled_without_an_agent(slurm: Cluster, tmp_path: Path) -> None:
    first, second = (make(tmp_path / name, ["deaf"], nodes=1) for name in ("first", "second"))
    mine = launcher(extra={"exclusive": ""}, exclude=["node2"])
    handles = [mine.submit(case.attempt, case.digest) for case in (first, second)]
    wait_until(first, handles[0], LaunchState.RUNNING)
    wait_for(lambda: "Resources" in look(second, handles[1]).detail, 60)
    seen = look(second, handles[1])
    assert seen.state is LaunchState.PENDING
    assert "in low: it is next, and waits for nodes to become free (Resources)" in seen.detail
    mine.cancel(ask(second, handles[1]), hard=False)
    assert look(second, handles[1]).state is LaunchState.ENDED
    mine.cancel(ask(first, handles[0]), hard=True)


def test_a_controller_that_is_away_is_unknown_and_one_that_comes_back_has_the_job(
    slurm: Cluster, tmp_path: Path
) -> None:
    case = make(tmp_path / "run", ["deaf"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 60)
    time.sleep(8)  # what a controller is told in its last seconds it may forget
    slurm.stop_controller(signal.SIGKILL)
    away = look(case, handle)
    assert away.state is LaunchState.UNKNOWN
    assert "Unable to contact slurm controller" in away.detail
    with pytest.raises(LaunchError, match="Unable to contact slurm controller"):
        launcher().cancel(ask(case, handle), hard=False)
    slurm.start_controller()
    wait_until(case, handle, LaunchState.RUNNING)
    launcher().cancel(ask(case, handle), hard=True)


def test_a_suspended_job_runs_and_says_so(slurm: Cluster, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["deaf"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 60)
    slurm.run("scontrol", "suspend", handle["job"])
    slurm_queue.forget()
    seen = look(case, handle)
    assert seen.state is LaunchState.RUNNING
    assert "suspended by the site" in seen.detail
    slurm.run("scontrol", "resume", handle["job"])
    launcher().cancel(ask(case, handle), hard=True)


def test_a_job_that_the_site_requeued_is_over(slurm: Cluster, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["deaf"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 60)
    slurm.run("scontrol", "update", f"jobid={handle['job']}", "requeue=1")
    slurm.run("scontrol", "requeue", handle["job"])
    seen = wait_until(case, handle, LaunchState.ENDED)
    assert "requeued by the site" in seen.detail
    assert seen.cause is Cause.VANISHED
    launcher().cancel(ask(case, handle), hard=True)
    assert jobs_of(slurm, case) == {handle["job"]: "CANCELLED"}


def test_a_lost_node_is_infrastructure_and_named(slurm: Cluster, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["deaf"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 60)
    slurm.kill_node("node1")
    seen = wait_until(case, handle, LaunchState.ENDED)
    assert (seen.cause, seen.bad_nodes) == (Cause.VANISHED, ("node1",))
    assert "NODE_FAIL" in seen.detail
    assert launcher().usable_nodes({}, []) == 1


def test_a_drained_node_finishes_its_job_and_takes_no_other(slurm: Cluster, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["deaf"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 60)
    seen = look(case, handle)
    (node,) = seen.nodes
    slurm.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    slurm_queue.forget()
    assert look(case, handle).state is LaunchState.RUNNING
    assert launcher().usable_nodes({}, []) == 1
    launcher().cancel(ask(case, handle), hard=True)
    seen = wait_until(case, handle, LaunchState.ENDED)
    assert seen.bad_nodes == (node,)
    after = make(tmp_path / "after", ["steps:1"])
    handle = launcher().submit(after.attempt, after.digest)
    assert node not in wait_until(after, handle, LaunchState.ENDED).nodes
    assert after.outcome.cause is Cause.DONE


def test_what_a_killed_stepd_leaves_behind_stops_once_its_attempt_is_closed(slurm: Cluster, tmp_path: Path) -> None:
    """Slurm has lost its hold on the task, which goes on; no signal of Slurm's reaches it any more."""
    case = make(tmp_path / "run", ["steps:100000"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 60)
    title = f"slurmstepd: [{handle['job']}.0]"
    (stepd,) = (p for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or []))
    stepd.kill()
    launcher().cancel(ask(case, handle), hard=True)
    assert look(case, handle).state is LaunchState.ENDED
    storage.publish(f"{case.run_dir}/{contract.closed_file(1)}", b"{}")  # as a controller does then
    wait_for(lambda: not case.processes(), 60)


FORGETFUL = '$REAL "$@" | grep -v standin- || :'  # a squeue that knows none of the tests' jobs any more


def test_what_the_queue_has_forgotten_is_in_the_accounts(slurm: Cluster, tmp_path: Path, impostor: Impostor) -> None:
    case = make(tmp_path / "run", ["bare:3"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_until(case, handle, LaunchState.ENDED)
    impostor("squeue", FORGETFUL)
    slurm_queue.forget()
    for known in (handle, None):
        seen = wait_until(case, known, LaunchState.ENDED)
        assert f"job {handle['job']} on node1 ended as FAILED, exit code" in seen.detail
    other = replace(ask(case), launch_name="standin-0")
    assert launcher().observe([other])[0].state is LaunchState.ABSENT


def test_accounts_that_lag_are_waited_for(
    slurm: Cluster, tmp_path: Path, impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(tmp_path / "run", ["steps:1"])
    handle = launcher().submit(case.attempt, case.digest)
    wait_until(case, handle, LaunchState.ENDED)
    impostor("squeue", FORGETFUL)
    impostor("sacct", "exit 0")
    slurm_queue.forget()
    monkeypatch.setattr(slurm_launcher, "LAG_SECONDS", 1000.0)
    assert look(case, handle).state is LaunchState.UNKNOWN
    monkeypatch.setattr(slurm_launcher, "LAG_SECONDS", 0.0)
    seen = look(case, handle)
    assert (seen.state, seen.cause) == (LaunchState.ENDED, Cause.VANISHED)
    assert "no accounts tell of its end" in seen.detail


def test_a_site_without_accounts(slurm: Cluster, tmp_path: Path, impostor: Impostor) -> None:
    slurm.configure(accounting="none")
    case = make(tmp_path / "run", ["steps:1"])
    handle = launcher().submit(case.attempt, case.digest)
    assert wait_until(case, handle, LaunchState.ENDED).detail.endswith("ended as COMPLETED")
    impostor("squeue", FORGETFUL)
    slurm_queue.forget()
    assert look(case).state is LaunchState.ABSENT
    handle["submitted"] -= 1000
    slurm_launcher._last_seen.clear()
    seen = look(case, handle)
    assert seen.state is LaunchState.ENDED
    assert "accounting storage is disabled" in seen.detail


def test_any_number_of_jobs_is_one_question(
    slurm: Cluster, tmp_path: Path, impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("squeue", "sacct", "sinfo"):
        impostor(program, f'echo {program} >> {tmp_path}/asked; exec $REAL "$@"')
    cases = [make(tmp_path / str(number), ["steps:1"]) for number in range(30)]
    mine = launcher(poll_seconds=1000)
    queries = [ask(case, {"job": str(10**6 + n), "user": "root", "submitted": 0.0}) for n, case in enumerate(cases)]
    for _ in range(3):
        assert {seen.state for seen in mine.observe(queries)} == {LaunchState.ENDED}
    assert mine.observe([ask(cases[0])])[0].state is LaunchState.ABSENT  # its name was among those asked for
    assert (tmp_path / "asked").read_text().split() == ["squeue", "sacct", "sacct"]


# --- whom a signal reaches --------------------------------------------------------------------------------------------


def test_where_only_the_task_is_signalled_a_cancel_works_alike(slurm: Cluster, tmp_path: Path) -> None:
    slurm.configure(proctrack="pgid")
    soft, hard = (make(tmp_path / name, ["steps:100000"]) for name in ("soft", "hard"))
    handles = [launcher().submit(case.attempt, case.digest) for case in (soft, hard)]
    for case in (soft, hard):
        wait_for(lambda case=case: trains(slurm, case), 60)
    launcher().cancel(ask(hard, handles[1]), hard=True)
    assert look(hard, handles[1]).state is LaunchState.ENDED
    wait_for(lambda: hard.processes() == [])  # what has left the task's group dies with the agent, a moment later

    launcher().cancel(ask(soft, handles[0]), hard=False)
    wait_until(soft, handles[0], LaunchState.ENDED)
    assert soft.outcome.cause is Cause.STOPPED


def test_each_node_has_its_agent_and_its_log(slurm: Cluster, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["steps:100000"], phase="pretrain", nodes=2)
    handle = launcher().submit(case.attempt, case.digest)
    wait_for(lambda: trains(slurm, case), 120)
    assert look(case, handle).nodes == ("node1", "node2")
    launcher().cancel(ask(case, handle), hard=False)
    wait_until(case, handle, LaunchState.ENDED)
    assert case.outcome.cause is Cause.STOPPED
    logs = [(case.run_dir / contract.agent_log(1, node)).read_text() for node in range(2)]
    assert "hostname=node1" in logs[0]
    assert all(case.attempt.launch_name in log for log in logs)
