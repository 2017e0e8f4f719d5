"""What the Slurm launcher says and reads, without a Slurm; on a real one: tests/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from model import contract
from model.contract import Cause
from orchestrator import asking_slurm, cli, sections
from orchestrator.cluster import read_cluster
from orchestrator.launchers import launcher_for, slurm_words
from orchestrator.launchers.base import LaunchError, LaunchState, Query
from orchestrator.launchers.slurm import SlurmLauncher
from orchestrator.launchers.slurm_queue import Job
from orchestrator.problems import Problem, SpecError
from orchestrator.remarks import remarks
from orchestrator.spec import read_job
from tests.model.standin.attempts import make
from tests.orchestrator.pretend import tiny_code

JOBS = Path(__file__).parents[2] / "jobs"
GOLDEN = Path(__file__).parent / "golden" / "v3_7b_on_slurm.txt"
SETTINGS: dict[str, Any] = {"data": {"workers": 10}, "resources": {"time_limit_minutes": 60}}


def render(folder: Path, section: dict[str, Any], own: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """The lines of the script for a cluster with that section and a job with `own` in resources.slurm."""
    case = make(folder, ["steps:1"] * 8, **changes)
    case.attempt.settings.update(SETTINGS, resources={**SETTINGS["resources"], "slurm": own or {}})
    return SlurmLauncher({"launcher": "slurm", "slurm": section}).render(case.attempt, case.digest).splitlines()


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_golden_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where dinoctl's Python lies and what is in model/ are made the same everywhere; all else is as it is sent.

    After a change that is meant: DINOCTL_GOLDEN=write, and look at the difference.
    """
    tiny_code(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/opt/dinoctl/bin/python")
    command = ["submit", str(JOBS / "v3_7b.yaml"), "--dry-run", "--cluster", "h100_slurm", "--runs", "/shared/runs"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    if os.environ.get("DINOCTL_GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(printed)
    assert printed == GOLDEN.read_text()


def test_all_that_a_profile_says_is_in_the_script(tmp_path: Path) -> None:
    section: dict[str, Any] = {
        "partition": "gpu", "account": "vision", "qos": "high", "constraint": "h100&ib", "reservation": "dino",
        "exclude": ["n1", "n2"], "signal": "USR1", "notice_seconds": 300, "setup": ["module load cuda", "ulimit -l"],
        "python": "apptainer exec --nv /images/dino.sif python3", "srun": ["--container-image=/images/dino.sqsh"],
        "extra": {"mem": "0", "exclusive": "", "mail-user": "me@example.org"},
    }  # fmt: skip
    lines = render(tmp_path / "run", section, nodes=4, exclude=["n2", "n7"], threads=2)
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options >= {
        "partition=gpu", "account=vision", "qos=high", "constraint='h100&ib'", "reservation=dino", "exclude=n1,n2,n7",
        "signal=USR1@300", "mem=0", "exclusive", "mail-user=me@example.org", "nodes=4", "ntasks-per-node=1", "time=60",
        "gpus-per-node=8", "cpus-per-task=96", "no-requeue",
    }  # fmt: skip
    assert "module load cuda" in lines
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=96 " in srun
    assert " --container-image=/images/dino.sqsh apptainer exec --nv /images/dino.sif python3 -P -u -m submitit" in srun


def test_a_job_overrides_its_cluster_option_by_option(tmp_path: Path) -> None:
    section = {"partition": "gpu", "qos": "high", "gpus": True, "extra": {"mem": "0", "nice": "5"}}
    own = {"partition": "cpu", "qos": None, "gpus": False, "cpus_per_task": 3, "extra": {"mem": "8G"}}
    script = "\n".join(render(tmp_path / "run", section, own))
    assert "--partition=cpu" in script
    assert "--mem=8G" in script
    assert "--nice=5" in script
    assert "#SBATCH --cpus-per-task=3" in script
    assert "gpus" not in script
    assert "qos" not in script


@pytest.mark.parametrize("name", ["100%", "a\nb", "back\\slash"])
def test_a_folder_that_slurm_cannot_write_to_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LaunchError, match="choose another folder of runs"):
        render(tmp_path / name, {})


def test_a_run_in_a_bucket_keeps_script_and_pickle_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.cache")
    script = "\n".join(render(tmp_path / "run", {}, run_dir="s3://bucket/runs/x"))
    assert "--chdir=/home/me/.cache/dinoctl/slurm/standin-" in script
    assert "model.agent s3://bucket/runs/x/attempts/1/attempt.yaml" in script
    assert "--output=/home/me/.cache/dinoctl/slurm/standin-" in script


def test_without_slurm_here_the_refusal_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    case = make(tmp_path / "run", ["steps:1"])
    with pytest.raises(LaunchError, match="login node"):
        SlurmLauncher({"launcher": "slurm", "slurm": {}}).submit(case.attempt, case.digest)


def test_only_what_launches_takes_submitit_to_import() -> None:
    script = (
        "import sys; from orchestrator.launchers import launcher_for; launcher_for({'launcher': 'slurm'}).observe([])\n"
        "print([name for name in ('submitit', 'pydantic', 'torch') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_the_surroundings_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if asking_slurm.SAID_TO_SLURM.match(name)]:
        monkeypatch.delenv(name)
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_FORMAT", "SLURM_CONF", "SLURM_JWT"):
        monkeypatch.setenv(name, "x")
    command = asking_slurm.without_surroundings()
    assert [word for word in command if word.isupper()] == ["SBATCH_PARTITION", "SLURM_JOB_ID", "SQUEUE_FORMAT"]
    seen = subprocess.run([*command, "env"], capture_output=True, text=True, check=True).stdout
    assert "SLURM_CONF=x" in seen
    assert "SLURM_JWT=x" in seen
    assert "SLURM_JOB_ID" not in seen


def test_a_job_replaces_options_and_adds_to_extra_wherever_the_section_is_asked_for() -> None:
    cluster = {"slurm": {"partition": "a", "exclude": ["n1"], "extra": {"nice": "5", "licenses": "x"}}}
    resources = {"slurm": {"partition": "b", "exclude": [], "extra": {"nice": "0"}}}
    merged = sections.merged("slurm", cluster, resources)
    assert merged == {"partition": "b", "exclude": [], "extra": {"nice": "0", "licenses": "x"}}
    assert sections.merged("slurm", {"slurm": None}, {}) == {}


# --- what a user may say ----------------------------------------------------------------------------------------------


def problems(*overrides: str) -> list[Problem]:
    with pytest.raises(SpecError) as refused:
        read_job(str(JOBS / "demo.yaml"), ["cluster=h100_slurm", *overrides], check_data=False)
    return refused.value.problems


def test_an_unknown_key_is_told_with_its_path_and_what_was_meant() -> None:
    (problem,) = problems("phases.gram.resources.slurm={partitoin: gpu}")
    assert problem.path == "phases.gram.resources.slurm.partitoin"
    assert "did you mean partition" in problem.hint
    (problem,) = problems("resources.slurm={notice_seconds: soon}")
    assert problem.path == "resources.slurm.notice_seconds"
    (problem,) = problems("evaluate.resources.slurm={gpu: false}")
    assert problem.path == "evaluate.resources.slurm.gpu"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("{output: x}", "output cannot be set: the logs lie in the run directory"),
        ("{requeue: ''}", "requeue cannot be set: dinoctl alone restarts"),
        ("{job-name: x}", "job-name cannot be set"),
        ("{nodes: '3'}", "nodes is said by resources.nodes"),
        ("{time: '3'}", "time is said by resources.time_limit_minutes"),
        ("{--mem: '0'}", "write its long name, without the dashes"),
        ("{cpus_per_gpu: '3'}", "is no option of sbatch"),
    ],
)
def test_extra_may_not_contradict_what_dinoctl_sets(extra: str, words: str) -> None:
    (problem,) = problems(f"resources.slurm={{extra: {extra}}}")
    assert words in problem.message
    assert problem.path == "resources.slurm.extra"


def test_a_profile_is_checked_alike(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nlauncher: slurm\nslurm: {extra: {comment: x}, qoss: high}\n")
    with pytest.raises(SpecError) as refused:
        read_cluster(str(file))
    assert {problem.path for problem in refused.value.problems} == {"slurm.extra", "slurm.qoss"}


def test_a_time_limit_that_is_over_before_it_is_announced() -> None:
    (problem,) = problems("resources.time_limit_minutes=2")
    assert problem.path == "resources.time_limit_minutes"
    assert "announced 120 s before" in problem.found
    assert problem.allowed == "3 or more"
    read_job(
        str(JOBS / "demo.yaml"), ["cluster=h100_slurm", "resources.time_limit_minutes=2",
        "resources.slurm={notice_seconds: 30}"], check_data=False,
    )  # fmt: skip


def test_elsewhere_it_says_nothing_and_that_is_said() -> None:
    job = read_job(str(JOBS / "demo.yaml"), ["resources.slurm={qos: high}"], check_data=False)
    (line,) = [line for line in remarks(job, read_cluster("local")) if "slurm" in line]
    assert "phases.pretrain.resources.slurm" in line
    assert "says nothing to cluster local, whose launcher is local" in line
    assert not [line for line in remarks(job, read_cluster("h100_slurm")) if "slurm" in line]


# --- what Slurm says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7],login", ["node1", "node2", "node3", "node7", "login"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("gpu[001-002]-ib", ["gpu001-ib", "gpu002-ib"]),
        ("", []),
        ("None assigned", []),
        ("(null)", []),
    ],
)
def test_lists_of_nodes(written: str, meant: list[str]) -> None:
    assert contract.hosts(written) == meant


@pytest.mark.parametrize(
    ("state", "code", "cause"),
    [
        ("NODE_FAIL", 0, Cause.VANISHED),
        ("BOOT_FAIL", 0, Cause.VANISHED),
        ("CANCELLED", 15, Cause.VANISHED),
        ("PREEMPTED", 0, Cause.VANISHED),
        ("TIMEOUT", 0, Cause.UNSEALED),
        ("OUT_OF_MEMORY", 137, Cause.KILLED),
        ("FAILED", 80, Cause.STOPPED),
        ("FAILED", 88, Cause.STORE_LOST),
        ("FAILED", 137, None),
        ("COMPLETED", 0, None),
    ],
)
def test_what_an_end_means_that_left_no_outcome(state: str, code: int, cause: Cause | None) -> None:
    seen = slurm_words.observation(Job("7", "x", "", state, exit_code=code, nodes="node[1-2]"), {})
    assert (seen.state, seen.cause, seen.nodes) == (LaunchState.ENDED, cause, ("node1", "node2"))
    assert f"job 7 on node[1-2] ended as {state}" in seen.detail


@pytest.mark.parametrize(
    ("state", "seen", "words"),
    [
        ("CONFIGURING", LaunchState.PENDING, "waits for its nodes to boot"),
        ("COMPLETING", LaunchState.RUNNING, "is being ended"),
        ("STOPPED", LaunchState.RUNNING, "is stopped by the site"),
        ("ENTANGLED", LaunchState.UNKNOWN, "a state new to dinoctl: ENTANGLED"),
    ],
)
def test_states_that_are_neither_waiting_nor_running(state: str, seen: LaunchState, words: str) -> None:
    found = slurm_words.observation(Job("7", "x", "", state, nodes="node1"), {})
    assert found.state is seen
    assert words in found.detail


def test_a_waiting_job_says_why_and_until_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    job = Job("7", "x", "", "PENDING", reason="Priority", partition="gpu", starts_at=1_000_000_000.0)
    seen = slurm_words.observation(job, {})
    assert seen.detail == "job 7 waits in gpu: others are before it (Priority); expected to start 09 Sep 01:46"
    assert seen.starts_at == 1_000_000_000.0
    other = slurm_words.observation(Job("7", "x", "", "PENDING", reason="QOSMaxNodePerUserLimit"), {})
    assert other.detail == "job 7 waits: QOSMaxNodePerUserLimit"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("Batch job submission failed: Invalid account or account/partition combination specified", "slurm.account"),
        ("Batch job submission failed: Invalid qos specification", "slurm.qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "resources.time_limit_minutes"),
        ("Requested node configuration is not available", "slurm.cpus_per_task"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "a limit of your"),
        ("Node count specification invalid", "resources.nodes"),
        ("Unable to contact slurm controller (connect failure)", "controller is down"),
        ("something else", ""),
    ],
)
def test_advice(words: str, advice: str) -> None:
    assert advice in slurm_words.advice(words)
    assert bool(advice) == bool(slurm_words.advice(words))


def test_the_launcher_of_a_profile() -> None:
    assert isinstance(launcher_for({"launcher": "slurm", "slurm": None}), SlurmLauncher)


@pytest.mark.parametrize("handle", [{"pid": 7, "started": 1.0}, {"job": "demo-pretrain-1", "submitted": 1.0}])
def test_attempts_from_before_a_run_moved_here_are_not_looked_for(
    handle: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue: whoever asked would hear that
    launcher = SlurmLauncher({"launcher": "slurm", "slurm": {}})
    launcher.clear([Query("/runs/demo", "run id", 1, "demo-pretrain-1", "digest", handle)])
    with pytest.raises(LaunchError, match="cannot be cleared now"):
        launcher.clear([Query("/runs/demo", "run id", 1, "demo-pretrain-1", "digest", None)])
