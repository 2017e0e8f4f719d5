"""The agent in real pods: they find each other by name, stop together, and what they said outlives them. The ranks are
a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from model import contract
from model.contract import Cause
from orchestrator.launchers import kubernetes_app
from tests.kubernetes.cluster import Place
from tests.model.standin.attempts import make

pytestmark = [pytest.mark.jobs, pytest.mark.requires("kubernetes")]


def test_one_pod_is_asked_and_both_stop_and_their_logs_stay(real_nodes: Place, tmp_path: Path) -> None:
    from kubernetes.config import new_client_from_config

    case = make(tmp_path / "run", ["steps:100000"] * 2, phase="pretrain", nodes=2, processes_per_node=1, code_dir="")
    code = str(tmp_path / "run" / "code" / "standin")
    section = real_nodes.pod_section(tmp_path, gpus=False)
    section["env"] = {**section["env"], "PYTHONPATH": code}
    with new_client_from_config(config_file=str(real_nodes.kubeconfig)) as client:
        kubernetes_app.schedule(client, {"kubernetes": section}, case.attempt, case.digest)
    name = case.attempt.launch_name
    pods = ("pods", "--selector", f"dinoctl/name={name}")
    facts = [case.run_dir / f"facts-{rank}.json" for rank in (0, 1)]
    real_nodes.wait(lambda: all(fact.exists() for fact in facts), "both ranks", 300)
    assert [case.facts(rank)["MASTER_ADDR"] for rank in (0, 1)] == [f"{name}-0.{name}"] * 2
    (second,) = [pod["metadata"] for pod in real_nodes.get(*pods)["items"] if f"{name}-1" in pod["metadata"]["name"]]
    real_nodes.kubectl("delete", "pod", second["name"], "--wait=false")
    real_nodes.wait((case.run_dir / contract.outcome_file(1)).exists, "the outcome", 120)
    assert case.outcome.cause is Cause.STOPPED
    assert (case.claim.pid, case.claim.host) == (1, f"{name}-0")

    def job_failed() -> str:
        (job,) = real_nodes.get("jobs.batch", "--selector", f"dinoctl/name={name}")["items"]
        conditions = job.get("status", {}).get("conditions", [])
        return str([one["message"] for one in conditions if one["type"] in ("Failed", "FailureTarget")])

    real_nodes.wait(lambda: "exit code 80" in job_failed(), "the Job to say why it ended", 60)
    for node in (0, 1):
        said = (case.run_dir / contract.agent_log(1, node)).read_text()
        assert "asked to stop: the ranks seal a checkpoint and end" in said
        assert "stopped: " in said
