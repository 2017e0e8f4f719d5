"""What doctor makes of a Kubernetes' words, what its pods are, and what the controller's manifests grant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from model.node_report import NodeReport, ReduceReport
from orchestrator import cli, doctor_on_nodes, kubernetes_doctor, kubernetes_quota, kubernetes_rights, notice
from orchestrator.cluster import ClusterProfile
from orchestrator.doctor_on_nodes import Seen
from orchestrator.findings import Finding, Patient
from orchestrator.kubernetes_doctor_job import RUN_ID, sent, state_of
from orchestrator.kubernetes_quantity import number
from orchestrator.kubernetes_section import Kubernetes
from tests.orchestrator import kubernetes_attempts

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "clusters" / "kubernetes"


def patient(nodes: int = 2, **section: Any) -> Patient:
    cluster = ClusterProfile.model_validate(kubernetes_attempts.profile(**section))
    return Patient(cluster, None, "/shared/runs", nodes)


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.check) for finding in findings]


# --- the cluster's words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount"),
    [("8", 8), ("500m", 0.5), ("1.5", 1.5), ("64Gi", 64 * 2**30), ("1k", 1000), ("2e3", 2000), ("1E", 1e18), ("0", 0)],
)
def test_amounts(text: str, amount: float) -> None:
    assert number(text) == amount


def test_what_is_no_amount_is_refused() -> None:
    with pytest.raises(ValueError, match="not an amount as Kubernetes writes it: a lot"):
        number("a lot")


def node(name: str = "n1", ready: str = "True", **spec: Any) -> dict[str, Any]:
    status = {"conditions": [{"type": "Ready", "status": ready}], "allocatable": {"nvidia.com/gpu": "8"}}
    return {"metadata": {"name": name}, "spec": spec, "status": status}


TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("made", "section", "why"),
    [
        (node(), {}, ""),
        (node(), {"exclude": ["n1"]}, "excluded by the profile"),
        (node(unschedulable=True), {}, "cordoned"),
        (node(ready="False"), {}, "not ready"),
        (node(ready="Unknown"), {}, "not heard of"),
        (node(taints=[TAINT]), {}, "taints: nvidia.com/gpu=present:NoSchedule"),
        (node(taints=[TAINT]), {"tolerations": [{"key": "nvidia.com/gpu"}]}, ""),
    ],
)
def test_why_a_node_is_left_out(made: dict[str, Any], section: dict[str, Any], why: str) -> None:
    assert kubernetes_doctor.why_not(made, patient(**section).kubernetes.model_dump(mode="json")) == why


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"phase": "Pending"}, "PENDING: its container is being made"),
        (
            {
                "phase": "Pending",
                "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}],
            },
            "PENDING: 0/3 nodes are available",
        ),
        (
            {
                "phase": "Pending",
                "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}],
            },
            "FAILED: ImagePullBackOff: not found",
        ),
        ({"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}, "PENDING: E"),
        ({"phase": "Running"}, "RUNNING"),
        ({"phase": "Succeeded"}, "COMPLETED"),
        (
            {
                "phase": "Failed",
                "containerStatuses": [{"state": {"terminated": {"exitCode": 1, "message": "cannot be written"}}}],
            },
            "FAILED: exit code 1 (cannot be written)",
        ),
    ],
)
def test_where_a_pod_stands(status: dict[str, Any], words: str) -> None:
    assert state_of({"status": status}).startswith(words)
    assert doctor_on_nodes.is_over(state_of({"status": status})) is words.startswith(("FAILED", "COMPLETED"))


# --- quotas -----------------------------------------------------------------------------------------------------------


def quota(used: dict[str, str] | None = None, spec: dict[str, Any] | None = None, **hard: str) -> list[dict[str, Any]]:
    amounts = {name.replace("__", "/").replace("_", "."): amount for name, amount in hard.items()}
    return [{"metadata": {"name": "q"}, "spec": {"hard": amounts, **(spec or {})}, "status": {"used": used or {}}}]


def judged(quotas: list[dict[str, Any]], **section: Any) -> list[Finding]:
    made = sent(patient(gpus=True, **section), 4)
    pod = next(one.pod for one in made if one.pod is not None)
    return list(kubernetes_quota.judge(quotas, kubernetes_quota.attempt_needs([one.body for one in made], pod, 4)))


@pytest.mark.parametrize(
    ("quotas", "level", "words"),
    [
        ([], "ok", "none in the namespace"),
        (quota(requests_nvidia_com__gpu="4", pods="10"), "ok", "q has room for an attempt"),
        (quota(pods="3"), "wrong", "q gives 3 pods in all, an attempt needs 4"),
        (quota(pods="5", used={"pods": "2"}), "warning", "q: 2 of 5 pods are in use, an attempt needs 4"),
        (quota(limits_memory="1Ti"), "wrong", "q counts limits.memory, and so refuses pods that do not say theirs"),
        (quota(pods="3", spec={"scopes": ["Terminating"]}), "warning", "if it counts these pods (it has a scope)"),
        (quota(count__jobs_batch="0"), "wrong", "q gives 0 count/jobs.batch in all, an attempt needs 1"),
    ],
)
def test_what_a_quota_has_room_for(quotas: list[dict[str, Any]], level: str, words: str) -> None:
    (found,) = judged(quotas)
    assert (found.level, found.check) == (level, "quota")
    assert words in found.found


def test_a_dot_in_a_resource_s_name_is_no_other_resource() -> None:
    (found,) = judged([{"metadata": {"name": "q"}, "spec": {"hard": {"requests.nvidia.com/gpu": "2"}}, "status": {}}])
    assert "q gives 2 requests.nvidia.com/gpu in all, an attempt needs 4" in found.found


# --- its pods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "paths"),
    [
        ("indexed-job", ["/api/v1/namespaces/lab/services/d", "/apis/batch/v1/namespaces/lab/jobs/d"]),
        (
            "pod-group",
            [
                "/apis/scheduling.k8s.io/v1alpha2/namespaces/lab/podgroups/d",
                "/api/v1/namespaces/lab/services/d",
                "/apis/batch/v1/namespaces/lab/jobs/d",
            ],
        ),
        ("jobset", ["/apis/jobset.x-k8s.io/v1alpha2/namespaces/lab/jobsets/d"]),
        ("volcano", ["/apis/batch.volcano.sh/v1alpha1/namespaces/lab/jobs/d"]),
    ],
)
def test_its_pods_are_an_attempt_s_with_another_command(scheduler: str, paths: list[str]) -> None:
    section = {"namespace": "lab", "scheduler": scheduler, "volumes": {"runs": {"path": "/shared", "claim": "c"}}}
    plain, made = sent(patient(**section), 2, "d"), sent(patient(**section), 2, "d", "/shared/runs/.doctor-1")
    assert [one.path(one.name) for one in made] == paths
    before, after = plain[-1].pod, made[-1].pod
    assert before is not None
    assert after is not None
    assert after["containers"][0]["command"] == ["python3", "-P", "-m", "model.doctor", "/shared/runs/.doctor-1"]
    after["containers"][0]["command"] = before["containers"][0]["command"]
    after["terminationGracePeriodSeconds"] = before["terminationGracePeriodSeconds"]
    assert after == before
    assert len(RUN_ID) == 32


def report(number: int, **changes: Any) -> NodeReport:
    given = {
        "node": number, "host": f"real-{number}", "python": "3.11.2", "user": 1000, "winners": [0] * 20,
        "wins": list(range(20)) if number == 0 else [], "write_mb_s": 400.0, "clock": (-0.1, 0.1),
        "torch": doctor_on_nodes._own_torch(), "reached": [f"d-{1 - number}.d"],
    }  # fmt: skip
    return NodeReport(**{**given, **changes})


def test_two_pods_that_are_as_they_should_be() -> None:
    reduced = ReduceReport(ranks=2, backend="gloo", right=True, bytes=1 << 22, seconds=0.01)
    found = list(doctor_on_nodes.judge(patient(), Seen([report(0), report(1)], reduced, "", "")))
    assert {finding.level for finding in found} == {"ok"}
    told = {finding.check: finding.found for finding in found}
    assert told["reach"] == "every node reaches the others, as d-0.d, d-1.d"
    assert told["shared folder"].endswith("(user 1000)")


def test_pods_that_say_nothing_are_explained_by_what_they_printed() -> None:
    said = "node 0, real-0: /shared/runs/.doctor-1 cannot be written, as user 1000: Permission denied"
    (found,) = doctor_on_nodes.judge(patient(), Seen([], None, said, "the job is FAILED: exit code 1"))
    assert "2 of 2 did not report, the job is FAILED: exit code 1: node 0, real-0" in found.found
    assert "their user can write" in found.todo
    assert found.level == "wrong"


def test_an_image_of_another_release() -> None:
    reduced = ReduceReport(ranks=2, backend="gloo", right=True, bytes=1 << 22, seconds=0.01)
    found = list(doctor_on_nodes.judge(patient(), Seen([report(0, torch="1.0.0"), report(1)], reduced, "", "")))
    (wrong,) = (finding for finding in found if finding.level != "ok")
    assert "make the worker image of the same release" in wrong.todo


# --- the notice -------------------------------------------------------------------------------------------------------


def test_the_notice_is_the_grace_that_goes_out_with_each_pod() -> None:
    told = Kubernetes(image="worker", grace_seconds=90)
    found = notice.of_pods(told)
    assert (found.kills, found.seconds) == (True, 90.0)
    assert str(found) == "a preempted or evicted pod gets TERM, and 90 s to seal (kubernetes.grace_seconds)"


def test_plan_says_what_a_preemption_costs_without_asking_anybody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "site.yaml"
    job, lines = str(ROOT / "jobs/v3_7b.yaml"), "name: site\nlauncher: kubernetes\nsustained_tflops: 563\n"
    image = f"registry.example.org/worker@sha256:{'0' * 64}"
    for speed, words in ((1000, "fits in 120 s, nothing trained is lost"), (20, "each preemption costs 500 steps")):
        volumes = "volumes: {all: {path: /all, here: true, claim: all}}"
        section = f"kubernetes: {{image: '{image}', grace_seconds: 120, {volumes}}}\n"
        profile.write_text(f"{lines}write_mb_s: {speed}\n{section}")
        assert cli.main(["plan", job, "--cluster", str(profile), "tracking.enabled=false"]) == 0
        said = capsys.readouterr().out
        assert "On site a preempted or evicted pod gets TERM, and 120 s to seal (kubernetes.grace_seconds)." in said
        assert words in said


# --- the controller in the cluster ------------------------------------------------------------------------------------


def documents(file: str) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all((MANIFESTS / file).read_text())]


def granted(*files: str) -> set[tuple[str, str, str]]:
    """Verb, group and resource."""
    rules = [rule for file in files for one in documents(file) if "rules" in one for rule in one["rules"]]
    return {
        (verb, group, resource)
        for rule in rules for verb in rule["verbs"] for group in rule["apiGroups"] for resource in rule["resources"]
    }  # fmt: skip


def needed(rights: list[kubernetes_rights.Right]) -> set[tuple[str, str, str]]:
    return {(right.verb, right.group, right.resource) for right in rights}


def test_the_manifests_grant_what_the_table_says_and_no_more() -> None:
    plain = needed(kubernetes_rights.of_controller("indexed-job"))
    assert granted("controller.yaml") == plain
    assert granted("nodes.yaml") == needed([*kubernetes_rights.OF_NODES])
    for scheduler in ("pod-group", "jobset", "volcano"):
        assert granted(f"{scheduler}.yaml") == needed(kubernetes_rights.of_controller(scheduler)) - plain


@pytest.mark.parametrize("version", [f"1.{minor}" for minor in range(29, 38)])
def test_the_manifests_are_valid_in_every_release(version: str) -> None:
    for file in ("controller.yaml", "pod-group.yaml", "jobset.yaml", "volcano.yaml", "nodes.yaml"):
        for document in documents(file):
            kubernetes_validate.validate(document, version, strict=True)


def test_the_controller_s_pod_may_be_no_more_than_it_must() -> None:
    (made,) = (one for one in documents("controller.yaml") if one["kind"] == "Deployment")
    (account,) = (one for one in documents("controller.yaml") if one["kind"] == "ServiceAccount")
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (made["spec"]["replicas"], made["spec"]["strategy"]) == (1, {"type": "Recreate"})
    assert (pod["securityContext"]["runAsNonRoot"], account["automountServiceAccountToken"]) == (True, False)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert "@sha256:" in container["image"]
    assert container["command"][:4] == ["python3", "-P", "-m", "orchestrator.cli"]
    options = cli.parse(container["command"][4:])
    assert (options.run, options.runs) == (None, "s3://BUCKET/runs")
