"""What doctor makes of a cluster's words. Outputs named `recorded` are those of a real Slurm 22.05.8, as it printed
them; what a dev cluster can be made to say is asked of a real one instead, in tests/slurm/test_doctor.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.contract import node_report
from model.node_report import NodeReport, ReduceReport, Try
from orchestrator import cli, doctor_on_nodes, notice, slurm_cluster, stakes
from orchestrator.cluster import ClusterProfile, Slurm
from orchestrator.doctor_on_nodes import Seen
from orchestrator.findings import Finding, Patient
from orchestrator.notice import Notice, Work
from orchestrator.spec import read_job

ROOT = Path(__file__).parents[2]

RECORDED_PARTITIONS = """\
PartitionName=low AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE \
DisableRootJobs=NO ExclusiveUser=NO GraceTime=30 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO \
MaxCPUsPerNode=UNLIMITED Nodes=node[1-2] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO \
OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=32 TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) \
DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=32,mem=8G,node=2,billing=32
PartitionName=high AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A DefaultTime=NONE \
DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO \
MaxCPUsPerNode=UNLIMITED Nodes=node[1-2] PriorityJobFactor=1 PriorityTier=10 RootOnly=NO ReqResv=NO OverSubscribe=NO \
OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=32 TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) \
DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=32,mem=8G,node=2,billing=32
"""

RECORDED_SETTINGS = """\
Configuration data as of 2026-11-29T11:54:37
AccountingStorageType   = accounting_storage/slurmdbd
KillWait                = 5 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 22.05.8
SlurmctldParameters     = preempt_send_user_signal

Slurmctld(primary) at vm is UP
"""

RECORDED_NODES = "node1|idle|gpu:8|16|none\nnode2|down*|gpu:8|16|Not responding\n"


# --- Slurm's words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5 sec", 5), ("30", 30), ("00:00:30", 30), ("10:00", 600), ("1-12:00:00", 129600), ("5 min", 300),
     ("UNLIMITED", None), ("INFINITE", None), ("", None)],
)  # fmt: skip
def test_durations(text: str, seconds: float | None) -> None:
    assert slurm_cluster.duration(text) == seconds


def test_what_is_no_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="not a duration as Slurm writes it: soon"):
        slurm_cluster.duration("soon")


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu:8", 8), ("gpu:h100:8(S:0-1)", 8), ("gpu:a100:4(S:0),gpu:v100:2(S:1)", 6), ("(null)", 0), ("mps:gpu:3", 0)],
)
def test_gpus_of_a_node(gres: str, count: int) -> None:
    assert slurm_cluster.gpus(gres) == count


def test_partitions_and_nodes_as_recorded() -> None:
    partitions = slurm_cluster.read_partitions(RECORDED_PARTITIONS)
    assert list(partitions) == ["low", "high"]
    assert slurm_cluster.default_partition(partitions) == "low"
    assert partitions["low"]["TRES"] == "cpu=32,mem=8G,node=2,billing=32"
    first, second = slurm_cluster.read_nodes(RECORDED_NODES)
    assert (first.gpus, first.usable, second.usable, second.reason) == (8, True, False, "Not responding")


# --- the notice -------------------------------------------------------------------------------------------------------


def read(partition: str = "low", qos: dict[str, str] | None = None, **settings: str) -> Notice:
    config = {**slurm_cluster.read_settings(RECORDED_SETTINGS), **settings}
    partitions = slurm_cluster.read_partitions(RECORDED_PARTITIONS)
    return notice.read(config, partitions, partition, qos, "USR2")


def test_the_partition_s_grace_time_begun_by_the_job_s_own_signal() -> None:
    found = read()
    assert (found.mode, found.seconds, found.told) == ("REQUEUE", 30.0, "USR2")
    assert str(found) == (
        "a preempted job (REQUEUE) gets USR2, and 30 s to seal (GraceTime 30 s, KillWait 5 s; partition low)"
    )
    assert read(SlurmctldParameters="(null)").told == "TERM"
    assert read(PreemptType="preempt/qos").told == "USR2 and TERM together"  # no GraceTime


def test_a_partition_that_none_outranks_is_safe() -> None:
    found = read("high")
    assert not found.kills
    assert str(found) == "jobs are not preempted (no partition has a higher PriorityTier than high)"
    assert read(PreemptType="preempt/none").mode == "OFF"


@pytest.mark.parametrize(
    ("qos", "mode", "seconds"),
    [
        ({"Name": "spot", "PreemptMode": "requeue", "GraceTime": "00:02:00"}, "REQUEUE", 120.0),
        ({"Name": "spot", "PreemptMode": "cluster", "GraceTime": "00:00:00"}, "CANCEL", 5.0),
        ({"Name": "spot", "PreemptMode": "gang,suspend", "GraceTime": "00:00:00"}, "SUSPEND", 5.0),
        (None, "CANCEL", 5.0),
    ],
)
def test_a_qos_s_own(qos: dict[str, str] | None, mode: str, seconds: float) -> None:
    found = read(qos=qos, PreemptType="preempt/qos", PreemptMode="GANG,CANCEL")
    assert (found.mode, found.seconds) == (mode, seconds)
    assert found.kills is (mode != "SUSPEND")


def work(**changes: Any) -> Work:
    given = {
        "phase": "pretrain", "processes": 16, "gpus": True, "save_seconds": 20.0, "save_from": "as measured",
        "step_seconds": 1.5, "every": 500, "patience": 120.0,
    }  # fmt: skip
    return Work(**{**given, **changes})


def test_a_save_that_fits_costs_nothing() -> None:
    cost = notice.cost(work(), 30.0)  # 1.25 * 20 + 3 * 1.5 = 29.5
    assert (cost.fits, cost.steps) == (True, (0.0, 0.0))
    assert cost.text.endswith("fits in 30 s, nothing trained is lost")


def test_one_that_does_not_costs_half_an_interval_up_to_a_whole_one() -> None:
    cost = notice.cost(work(), 29.0)
    assert (cost.fits, cost.steps, cost.gpu_minutes) == (False, (250.0, 500.0), (100.0, 200.0))
    assert "each preemption costs 250 steps on average, at most 500, 100 to 200 GPU-minutes" in cost.text
    assert "process-minutes" in notice.cost(work(gpus=False), 29.0).text


def test_the_agent_s_own_patience_counts_where_it_is_shorter() -> None:
    cost = notice.cost(work(patience=10.0), 120.0)
    assert cost.fits is False
    assert "may not fit in 10 s (health.notice_seconds; the cluster gives 120 s)" in cost.text


def test_what_nobody_knows_is_said() -> None:
    assert notice.cost(work(save_seconds=None, save_from="no speed"), 30.0).fits is None
    assert "half of what `every: auto` chose" in notice.cost(work(every=None), 1.0).text
    unknown = notice.cost(work(step_seconds=None), 10.0)
    assert unknown.gpu_minutes is None
    assert "some steps (not known)" in unknown.text


def test_notices_that_contradict_each_other() -> None:
    slurm = Slurm(notice_seconds=120)
    assert notice.contradictions(slurm, 30.0, read()) == []
    limit, grace = notice.contradictions(slurm, 150.0, read())
    assert limit.startswith("health.notice_seconds (150 s) is longer than slurm.notice_seconds (120 s)")
    assert "longer than GraceTime (30 s): a preempted save that takes longer is cut short (unsealed)" in grace
    (kill,) = notice.contradictions(slurm, 30.0, Notice("CANCEL", 0.0, 5.0, "TERM", "partition low"))
    assert "KillWait (5 s), and there is no GraceTime" in kill


# --- what is at stake -------------------------------------------------------------------------------------------------


def profile(**changes: Any) -> ClusterProfile:
    return ClusterProfile.model_validate(
        {"name": "site", "launcher": "slurm", "gpus_per_node": 8, "slurm": {"partition": "low"}, **changes}
    )


def test_a_save_s_time_is_derived_from_what_a_node_writes() -> None:
    job = read_job(str(ROOT / "jobs/v3_7b.yaml"), check_data=False)
    unknown = stakes.works(job, profile())[0]
    assert unknown.save_seconds is None
    assert "the profile has no write_mb_s" in unknown.save_from
    known = stakes.works(job, profile(write_mb_s=500, sustained_tflops=563))[0]
    assert known.save_seconds == pytest.approx(112.4e9 / (32 * 500e6), rel=1e-3)  # 32 nodes
    assert known.step_seconds == pytest.approx(61_440 * 3600 / 256 / 1e6, rel=1e-2)  # the published hours
    assert stakes.works(job, profile(write_mb_s=500), write_mb_s=1000)[0].save_seconds == known.save_seconds / 2


def test_plan_says_that_it_did_not_ask_where_slurm_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["plan", str(ROOT / "jobs/v3_7b.yaml")]) == 0
    assert "h100_slurm was not asked how long a preemption's notice is: sbatch, srun," in capsys.readouterr().out


# --- the nodes' reports -----------------------------------------------------------------------------------------------

RACES = list(range(20))


def report(node: int, **changes: Any) -> NodeReport:
    given = {
        "node": node, "host": f"node{node + 1}", "python": "3.11.2", "winners": [0] * 20,
        "wins": RACES if node == 0 else [],
        "write_mb_s": 400.0, "clock": (-0.1, 0.1), "torch": doctor_on_nodes._own_torch(), "gpus": ["H100"] * 8,
        "tries": {"sbatch": Try(code=0, said=""), "dinoctl": Try(code=0, said="")},
    }  # fmt: skip
    return NodeReport(**{**given, **changes})


REDUCED = ReduceReport(ranks=16, backend="nccl", right=True, bytes=1 << 27, seconds=0.01)


def judge(*reports: NodeReport, reduced: ReduceReport | None = REDUCED, **changes: Any) -> list[Finding]:
    patient = Patient(profile(**changes), None, "/runs", 2)
    seen = Seen([*reports], reduced, "", "300 s are over (PENDING Resources)")
    return list(doctor_on_nodes.judge(patient, seen))


def not_ok(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.check) for finding in findings if finding.level != "ok"]


def test_two_nodes_that_are_as_they_should_be() -> None:
    found = judge(report(0), report(1))
    assert not_ok(found) == []
    assert {"shared folder", "write speed", "clock", "torch", "sbatch there", "all-reduce"} <= {f.check for f in found}


@pytest.mark.parametrize(
    ("changes", "level", "check", "words"),
    [
        ({"wins": [0]}, "wrong", "shared folder", "1 of 20 names were won by none or by two"),
        ({"winners": [1] * 20}, "wrong", "shared folder", "see other winners"),
        ({"clock": (58.0, 61.0)}, "wrong", "clock", "node2: between +58.00 and +61.00 s"),
        ({"torch": "1.0.0"}, "wrong", "torch", "torch 1.0.0, 8 GPUs; here it is"),
        ({"gpus": []}, "warning", "torch", "0 GPUs, and gpus_per_node is 8"),
        ({"tries": {"sbatch": Try(code=None, said="sbatch is not here")}}, "warning", "sbatch there", "is not here"),
        ({"errors": ["clock: no answer"], "clock": None}, "wrong", "node node2", "clock: no answer"),
    ],
)
def test_a_node_that_is_not(changes: dict[str, Any], level: str, check: str, words: str) -> None:
    found = judge(report(0), report(1, **changes))
    assert not_ok(found) == [(level, check)]
    assert any(words in finding.found for finding in found if finding.level != "ok")


def test_clocks_that_may_be_right_are_not_called_wrong() -> None:
    assert not_ok(judge(report(0), report(1, clock=(-0.1, 40.0)))) == []  # a slow answer says nothing


def test_a_node_that_does_not_report_and_a_sum_that_is_wrong() -> None:
    found = judge(report(0))
    assert not_ok(found) == [("wrong", "on nodes")]
    assert "1 of 2 did not report, 300 s are over (PENDING Resources)" in found[0].found
    wrong_sum = ReduceReport(ranks=16, backend="nccl", right=False, bytes=4, seconds=0.01)
    assert not_ok(judge(report(0), report(1), reduced=wrong_sum)) == [("wrong", "all-reduce")]
    assert not_ok(judge(report(0), report(1), reduced=None)) == [("wrong", "all-reduce")]


def test_a_store_slower_than_the_profile_says() -> None:
    assert not_ok(judge(report(0), report(1), write_mb_s=2000)) == [("warning", "write speed")]


# --- this machine -----------------------------------------------------------------------------------------------------


def test_without_jobs_this_machine_has_little_to_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no-jobs", "--runs", str(tmp_path)]) == 0
    assert f"ok       runs           {tmp_path}, " in capsys.readouterr().out


@pytest.mark.jobs
def test_two_processes_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--cluster", "local", "--runs", str(tmp_path), "--timeout", "500"])
    said = capsys.readouterr().out
    assert code == 0, said
    for check in ("shared folder", "write speed", "clock", "torch", "all-reduce"):
        assert f"ok       {check}" in said
    assert list(tmp_path.iterdir()) == []  # nothing is left
    assert node_report.ASK_FILE not in said
