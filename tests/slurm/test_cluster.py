"""The dev cluster itself: it is a Slurm, its nodes are like machines of their own, and nothing of it stays."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusters.dev import processes
from tests.slurm.cluster import Cluster, ClusterError, Settings, lacking, running

pytestmark = [pytest.mark.requires("slurm"), pytest.mark.jobs]

SCRIPTS = Path(__file__).parents[2] / "clusters" / "dev" / "slurm"
SLEEP = "--wrap=exec sleep 300"


def submit(slurm: Cluster, *options: str) -> str:
    """The id of a job of both nodes."""
    return slurm.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", *options).strip()


def state(slurm: Cluster, job: str) -> str:
    """What squeue calls a job, "" once it knows it no more."""
    return slurm.run("squeue", "-h", "--states=all", f"--jobs={job}", "-o", "%T").strip()


def wait_for(slurm: Cluster, job: str, *states: str) -> None:
    slurm.wait(lambda: state(slurm, job) in states, f"job {job} to be {' or '.join(states)}")


def test_nodes_are_like_machines_of_their_own(slurm: Cluster) -> None:
    show = 'echo "$(hostname) $SLURM_NODEID $TMPDIR $CUDA_VISIBLE_DEVICES"; touch "$TMPDIR/of-$(hostname)"'
    said = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=3", "sh", "-c", show)
    assert sorted(said.splitlines()) == [f"node{i + 1} {i} {slurm.node_tmp(f'node{i + 1}')} 0,1,2" for i in range(2)]
    assert [file.name for file in slurm.node_tmp("node2").glob("of-*")] == ["of-node2"]

    resolve = "import socket, os; print(socket.gethostbyname(os.environ['OTHER']))"
    assert slurm.run("srun", "--nodelist=node2", "env", "OTHER=node1", "python3", "-c", resolve) == "127.0.0.11\n"
    too_many = subprocess.run(["srun", "--gpus-per-node=9", "true"], capture_output=True, text=True, check=False)
    assert "not available" in too_many.stderr


def test_accounting_knows_what_became_of_a_job(slurm: Cluster) -> None:
    job = submit(slurm, "--wrap=exit 7")
    wait_for(slurm, job, "FAILED")
    slurm.wait(
        lambda: slurm.run("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode") == "FAILED|7:0\n", "sacct"
    )


def test_a_killed_node_is_down_and_comes_back(slurm: Cluster) -> None:
    job = submit(slurm, "--no-requeue", "--wrap=srun sleep 300")
    wait_for(slurm, job, "RUNNING")
    slurm.wait(lambda: len(processes.find(slurm.folder, "node2")) > 2, "slurmd, slurmstepd and the task")
    slurm.kill_node("node2")
    assert processes.find(slurm.folder, "node2") == []
    slurm.wait(lambda: slurm.node_states()["node2"] == "down", "node2 to be down")
    wait_for(slurm, job, "NODE_FAIL")
    slurm.start_node("node2")
    slurm.wait_idle()


def test_a_restarted_controller_knows_its_jobs(slurm: Cluster) -> None:
    runs, waits = submit(slurm, SLEEP), submit(slurm, SLEEP)
    wait_for(slurm, runs, "RUNNING")
    slurm.stop_controller()
    assert not slurm.answers()
    slurm.start_controller()
    assert (state(slurm, runs), state(slurm, waits)) == ("RUNNING", "PENDING")


@pytest.mark.parametrize(("mode", "becomes"), [("REQUEUE", "PENDING"), ("CANCEL", "PREEMPTED")])
def test_a_job_of_high_preempts_one_of_low(slurm: Cluster, mode: str, becomes: str) -> None:
    slurm.configure(preempt_mode=mode, grace=0)
    low = submit(slurm, SLEEP)
    wait_for(slurm, low, "RUNNING")
    high = submit(slurm, SLEEP, "--partition=high")
    wait_for(slurm, high, "RUNNING")
    assert state(slurm, low) == becomes


def test_of_the_scripts_nothing_is_left_and_another_cluster_is_left_alone(slurm: Cluster, short_path: Path) -> None:
    folder = short_path / "other"
    other = ["--folder", str(folder)]
    up = subprocess.run(
        [SCRIPTS / "up", *other, "--nodes=1", "--accounting=none"], capture_output=True, text=True, check=False
    )
    assert up.returncode == 0, up.stderr
    assert f"export SLURM_CONF={folder}/slurm.conf" in up.stdout
    cluster = Cluster.found(folder)
    assert cluster.node_states() == {"node1": "idle"}
    assert not set(cluster.settings.ports()) & set(slurm.settings.ports())
    leave = "setsid env --unset=TMPDIR sleep 300 & exec srun sleep 300"  # one that has left its job's session
    job = cluster.run("sbatch", "--parsable", "--output=/dev/null", f"--wrap={leave}").strip()
    wait_for(cluster, job, "RUNNING")
    cluster.wait(lambda: len(processes.find(folder, "node1")) > 5, "the job's processes")

    again = subprocess.run([SCRIPTS / "up", *other], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (2, f"{folder}: a cluster is up there; take it down first\n")
    subprocess.run([SCRIPTS / "down", *other], check=True)
    assert processes.find(folder) == []
    assert not folder.exists()
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    slurm.wait_idle()


HEARS = """
import os, signal, subprocess, sys, time
name = sys.argv[1]
if name == "task":
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], "child"], start_new_session=True)
def hear(*_): open(name + ".heard", "w").close(); sys.exit()
signal.signal(signal.SIGUSR1, hear)
open(name + ".listens", "w").close()
time.sleep(100)
"""


@pytest.mark.parametrize(("proctrack", "who"), [("linuxproc", {"task", "child"}), ("pgid", {"task"})])
def test_whom_a_signal_reaches(slurm: Cluster, tmp_path: Path, proctrack: str, who: set[str]) -> None:
    """child: what the task starts in a session of its own, as an agent starts its ranks."""
    slurm.configure(proctrack=proctrack)
    (tmp_path / "hears").write_text(HEARS)
    script = 'exec srun --nodes=1 python3 -c "$(cat hears)" task "$(cat hears)"'
    job = submit(slurm, f"--chdir={tmp_path}", f"--wrap={script}")
    slurm.wait(lambda: len(list(tmp_path.glob("*.listens"))) == 2, "both to listen")
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait(lambda: (tmp_path / "task.heard").exists(), "the task to hear it")
    time.sleep(1)
    assert {file.stem for file in tmp_path.glob("*.heard")} == who


ABANDONED = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import running
with running(Path(sys.argv[1]), nodes=1, accounting="none"):
    print("up", flush=True)
    time.sleep(1000)
"""


def test_tests_that_are_killed_leave_no_cluster(slurm: Cluster, short_path: Path) -> None:
    folder = short_path / "left"
    command = [sys.executable, "-c", ABANDONED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=SCRIPTS.parents[2]) as tests:
        assert tests.stdout is not None
        assert tests.stdout.readline() == b"up\n"
        tests.kill()
    slurm.wait(lambda: not folder.exists(), "the cluster to be taken down")
    assert processes.find(folder) == []


def test_what_is_kept_is_gone_on_with(short_path: Path) -> None:
    with running(short_path / "kept", nodes=1, accounting="none") as cluster:
        first = int(cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", SLEEP))
        cluster.down(keep=True)
        assert processes.find(cluster.folder) == []
        cluster.up()
        assert state(cluster, str(first)) == "PENDING"
        assert int(cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", SLEEP)) == first + 1


def test_what_cannot_be_is_said(slurm: Cluster, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"node3: no such node; there are node1, node2"):
        slurm.kill_node("node3")
    with pytest.raises(ClusterError, match="no cluster was brought up there"):
        Cluster.found(short_path)
    taken = "or one of the 3 after it is taken"
    with pytest.raises(OSError, match=taken), running(short_path, port=slurm.settings.port):
        pass
    with pytest.raises(ClusterError, match="paths of sockets must be short"):
        Cluster(short_path / ("x" * 80), Settings(port=1)).up()
    monkeypatch.setattr(processes, "PATH", str(short_path))
    assert lacking().startswith("not installed: slurmctld, slurmd, sbatch")
