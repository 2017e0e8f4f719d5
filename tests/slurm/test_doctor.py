"""dinoctl doctor on a real Slurm: all well, and what it says of a cluster that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.requires("slurm"), pytest.mark.jobs]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile of the dev cluster that trains on CPUs, as its GPUs are fake."""
    file = tmp_path / "dev.yaml"
    file.write_text("name: dev\nlauncher: slurm\ngpus_per_node: 8\nslurm: {partition: low, gpus: false}\n")
    return file


def doctor(
    capsys: pytest.CaptureFixture[str], profile: Path, *words: str, timeout: int = 500
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit code, and the findings by check."""
    runs = profile.parent / "runs"
    arguments = ["doctor", *words, "--cluster", str(profile), "--runs", str(runs), "--timeout", str(timeout), "--json"]
    code = cli.main(arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(capsys.readouterr().out)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return code, found


def levels(found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The worst of each check."""
    worst = ("ok", "warning", "wrong")
    return {check: max((one["level"] for one in of), key=worst.index) for check, of in found.items()}


def test_all_is_well_down_to_an_all_reduce_over_two_nodes(
    slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(capsys, profile)
    assert (code, set(levels(found).values())) == (0, {"ok"}), found
    assert found["on nodes"][0]["found"] == "node1, node2 reported"
    assert found["all-reduce"][0]["found"].startswith("2 ranks (gloo): right")
    assert found["shared folder"][0]["found"].startswith("of each of 20 names exactly one node won")
    assert {"write speed", "clock", "torch", "sbatch there", "dinoctl there", "accounting", "account"} <= set(found)
    assert [file.name for file in (profile.parent / "runs").iterdir()] == []
    assert set(slurm.run("squeue", "-h", "-o", "%T").split()) <= {"COMPLETING"}


def test_gpus_that_slurm_counts_out_and_torch_does_not_see(
    slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile.write_text(profile.read_text().replace("gpus: false", "gpus: true"))
    code, found = doctor(capsys, profile)
    assert (code, levels(found)["torch"], levels(found)["gpus"]) == (0, "warning", "ok")
    assert "0 GPUs, and gpus_per_node is 8" in found["torch"][0]["found"]


@pytest.mark.parametrize(
    ("section", "check", "words"),
    [
        ("partition: gpu", "partition", "no partition gpu; there are low, high"),
        ("partition: low, account: nobody", "account", "not nobody"),
        ("partition: low, qos: fast", "qos", "may use normal, not fast"),
        ("partition: low, constraint: h100", "sbatch", "Invalid feature specification"),
    ],
)
def test_a_profile_that_the_site_does_not_take(
    slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str], section: str, check: str, words: str
) -> None:
    profile.write_text(profile.read_text().replace("partition: low", section))
    code, found = doctor(capsys, profile, "--no-jobs")
    assert (code, levels(found)[check]) == (1, "wrong"), found
    assert words in " ".join(one["found"] for one in found[check])


def test_fewer_gpus_than_the_profile_says(slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile.write_text("name: dev\nlauncher: slurm\ngpus_per_node: 16\nslurm: {partition: low}\n")
    code, found = doctor(capsys, profile, "--no-jobs")
    assert (code, levels(found)["gpus"]) == (1, "wrong")
    assert "nodes in service have 8 (gres)" in found["gpus"][0]["found"]


def test_a_node_that_is_down_is_named(slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.kill_node("node2")
    slurm.wait(lambda: slurm.node_states()["node2"] == "down", "node2 to be down")
    _, found = doctor(capsys, profile, "--no-jobs")
    assert levels(found)["nodes"] == "warning"
    assert "node2 (down" in found["nodes"][0]["found"]
    assert "1 of 2 nodes in service" in found["partition"][0]["found"]


def test_nodes_that_no_job_gets_are_waited_for_no_longer_than_said(
    slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.run("sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    slurm.wait(lambda: "RUNNING" in slurm.run("squeue", "-h", "-o", "%T"), "the other job to run")
    code, found = doctor(capsys, profile, timeout=8)
    assert (code, levels(found)["on nodes"]) == (1, "wrong")
    assert "2 of 2 did not report, 8 s are over (PENDING" in found["on nodes"][0]["found"]
    assert "dinoctl-doctor" not in slurm.run("squeue", "-h", "-t", "PENDING,RUNNING", "-o", "%j")


def test_without_accounting(slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.configure(accounting="none")
    code, found = doctor(capsys, profile, "--no-jobs")
    assert (code, levels(found)["accounting"]) == (0, "warning")
    assert "is known for MinJobAge (300 sec) only" in found["accounting"][0]["found"]


@pytest.mark.parametrize(
    ("settings", "level", "words"),
    [
        ({"grace": 40}, "ok", "(REQUEUE) gets USR2, and 40 s to seal (GraceTime 40 s, KillWait 5 s; partition low)"),
        ({"send_user_signal": False}, "ok", "(REQUEUE) gets TERM, and 30 s to seal"),
        ({"grace": 0, "preempt_mode": "CANCEL"}, "warning", "(CANCEL) gets USR2 and TERM together, and 5 s to seal"),
    ],
)
def test_the_notice_is_the_cluster_s_own(
    slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], level: str, words: str
) -> None:
    slurm.configure(**settings)
    _, found = doctor(capsys, profile, "--no-jobs")
    assert levels(found)["preemption"] == level
    assert words in found["preemption"][0]["found"]


def test_what_a_preemption_costs_a_job(slurm: Cluster, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The 7B's 112 GB fit into the notice of this cluster at one speed, and not at another; plan says the same."""
    job = str(Path(__file__).parents[2] / "jobs" / "v3_7b.yaml")
    lines = "name: dev\nlauncher: slurm\ngpus_per_node: 8\nsustained_tflops: 563\nslurm: {partition: low}\n"
    for speed, level in ((1000, "ok"), (50, "warning")):
        profile.write_text(f"{lines}write_mb_s: {speed}\n")
        _, found = doctor(capsys, profile, job, "tracking.enabled=false", "runs=here", "--no-jobs")
        assert found["save"][0]["level"] == level, found["save"]
    assert "each preemption costs 500 steps on average, at most 1,000" in found["save"][0]["found"]
    assert "GPU-minutes" in found["save"][0]["found"]
    assert "health.notice_seconds (120 s) is longer than GraceTime (30 s)" in found["notice"][0]["found"]
    assert cli.main(["plan", job, "--cluster", str(profile), "tracking.enabled=false", "runs=here"]) == 0
    assert found["save"][0]["found"] in capsys.readouterr().out
