"""What the Kubernetes launcher sends, without a Kubernetes; to a real one: tests/kubernetes/test_render.py."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st
from torchx.schedulers import get_scheduler_factories

from model import contract
from orchestrator import attempts, cli, spec
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.launchers import kubernetes_app, launcher_for
from tests.model.standin.attempts import make
from tests.orchestrator.pretend import tiny_code

JOBS = Path(__file__).parents[2] / "jobs"
GOLDEN = Path(__file__).parent / "golden"
SCHEDULERS = ("indexed-job", "pod-group", "jobset", "volcano")
BARE: dict[str, Any] = {"image": "registry.example.org/worker@sha256:" + "0" * 64}
FULL: dict[str, Any] = {
    "context": "prod",
    "namespace": "training",
    "queue": "vision",
    "priority_class": "high",
    "image": "registry.example.org/other@sha256:" + "1" * 64,
    "pull_policy": "Always",
    "pull_secrets": ["registry"],
    "python": "/opt/venv/bin/python",
    "gpu_resource": "amd.com/gpu",
    "cpus": "7500m",
    "memory": "200Gi",
    "extra_resources": {"rdma/hca": "1"},
    "shm_size": "32Gi",
    "node_selector": {"pool": "a", "example.org/gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Equal", "value": "true", "effect": "NoSchedule"}, {}],
    "together": "example.org/rack",
    "exclude": ["n1", "n2"],
    "service_account": "trainer",
    "host_network": True,
    "run_as_user": 0,
    "capabilities": ["IPC_LOCK"],
    "read_only_root": False,
    "volumes": {
        "runs": {"path": "/shared", "claim": "shared", "here": True},
        "data": {"path": "/data", "host_path": "/mnt/data", "read_only": True},
        "old": {"path": "/old", "nfs": "filer:/export/old"},
        "keys": {"path": "/keys", "secret": "keys"},
        "conf": {"path": "/conf", "config_map": "conf"},
    },
    "env": {"NCCL_DEBUG": "INFO", "TMPDIR": "/data/tmp"},
    "secret_env": {"AWS_SECRET_ACCESS_KEY": "bucket/secret"},
    "env_from_secrets": ["mlflow"],
    "labels": {"team": "vision"},
    "annotations": {"example.org/why": "a reason, with words"},
    "grace_seconds": 300,
}
NOT_OF_PODS = {
    "context", "exclude_hours", "gang_seconds", "lost_seconds", "poll_seconds",  # the controller's
    "scheduler", "pod_group_api", "gpus",  # by themselves, below
}  # fmt: skip


def objects(
    folder: Path, section: dict[str, Any], scheduler: str = "indexed-job", own: dict[str, Any] | None = None,
    minutes: int | None = None, **changes: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """What is sent to a cluster with that section for a job with `own` in resources.kubernetes."""
    case = make(folder, ["steps:1"] * 8, **changes)
    resources = {"kubernetes": own or {}, "time_limit_minutes": minutes}
    case.attempt.settings.update({"data": {"workers": 10}, "resources": resources})
    return kubernetes_app.objects({"kubernetes": {**section, "scheduler": scheduler}}, case.attempt, case.digest)


def pod(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The template of the pods (of node 0's, on Volcano)."""
    found: dict[str, Any] = templates(made[-1])[0]
    return found


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = job["spec"]
    match job["kind"], job["apiVersion"]:
        case "JobSet", _:
            return [spec["replicatedJobs"][0]["template"]["spec"]["template"]]
        case _, "batch/v1":
            return [spec["template"]]
    return [task["template"] for task in spec["tasks"]]


def variables(template: dict[str, Any]) -> dict[str, Any]:
    (container,) = template["spec"]["containers"]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_golden_dry_run(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a change that is meant: DINOCTL_GOLDEN=write, and look at the difference. On Volcano a template a pod is
    written out, so that of 32 nodes two are left."""
    golden = GOLDEN / f"v3_7b_on_kubernetes_{scheduler.replace('-', '_')}.txt"
    tiny_code(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/opt/dinoctl/bin/python")
    command = [
        "submit",
        str(JOBS / "v3_7b.yaml"),
        "--dry-run",
        "--cluster",
        "h100_kubernetes",
        "--runs",
        "/shared/runs",
    ]
    fewer = ["phases.pretrain.resources.nodes=2"] if scheduler == "volcano" else []
    assert cli.main([*command, f"resources.kubernetes={{scheduler: {scheduler}}}", *fewer]) == 0
    printed = capsys.readouterr().out
    if os.environ.get("DINOCTL_GOLDEN") == "write":
        golden.write_text(printed)
    assert printed == golden.read_text()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_printed_is_what_is_sent(scheduler: str, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["steps:1"] * 8, nodes=2)
    cluster = {"launcher": "kubernetes", "kubernetes": {**FULL, "scheduler": scheduler}}
    printed = launcher_for(cluster).render(case.attempt, case.digest)
    made = kubernetes_app.objects(cluster, case.attempt, case.digest)
    assert list(yaml.safe_load_all(printed)) == made
    assert printed == launcher_for(cluster).render(case.attempt, case.digest)
    assert "&id" not in printed  # no references from one place to another
    assert ("Service" in {one["kind"] for one in made}) == (scheduler in ("indexed-job", "pod-group"))


def test_the_schedulers_are_registered_with_torchx() -> None:
    assert set(get_scheduler_factories()) == {"indexed-job", "pod-group", "jobset", "kubernetes"}


# --- every field ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", sorted(set(Kubernetes.model_fields) - NOT_OF_PODS))
def test_each_field_of_the_section_comes_out_in_the_pods_or_their_job(field: str, tmp_path: Path) -> None:
    without = {name: value for name, value in FULL.items() if name != field or name == "image"}
    changed = {"image": BARE["image"]} if field == "image" else {}
    if field == "run_as_user":  # other users have none of what is added for root
        del without["capabilities"]
    case = make(tmp_path / "run", ["steps:1"] * 8, nodes=2)
    rendered = [
        kubernetes_app.text(kubernetes_app.objects({"kubernetes": section}, case.attempt, case.digest))
        for section in ({**without, **changed}, {**without, field: FULL[field]})
    ]
    assert rendered[0] != rendered[1]


def test_all_that_a_profile_says_is_in_the_pods(tmp_path: Path) -> None:
    service, job = objects(tmp_path / "run", FULL, nodes=4, exclude=["n2", "n7"], threads=2)
    template = pod([job])
    (container,) = template["spec"]["containers"]
    assert {one["metadata"]["namespace"] for one in (service, job)} == {"training"}
    for one in (service, job, template):
        assert one["metadata"]["labels"]["team"] == "vision"
        assert one["metadata"]["annotations"]["example.org/why"] == "a reason, with words"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "vision"
    assert "suspend" not in job["spec"]  # Kueue's webhook does it; where there is no Kueue nobody would undo it
    spec = template["spec"]
    assert spec["priorityClassName"] == "high"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["nodeSelector"] == {"pool": "a", "example.org/gpu": "h100"}
    assert spec["tolerations"] == [
        {"key": "gpu", "operator": "Equal", "value": "true", "effect": "NoSchedule"}, {"operator": "Exists"},
    ]  # fmt: skip
    assert spec["serviceAccountName"] == "trainer"
    assert spec["automountServiceAccountToken"] is False
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert spec["terminationGracePeriodSeconds"] == 300
    assert (container["image"], container["imagePullPolicy"]) == (FULL["image"], "Always")
    path = f"{tmp_path}/run/{contract.attempt_yaml(1)}"
    assert container["command"] == ["/opt/venv/bin/python", "-P", "-m", "model.agent", path]
    assert container["resources"] == {
        "requests": {"cpu": "7500m", "memory": "200Gi", "rdma/hca": "1", "amd.com/gpu": "8"},
        "limits": {"memory": "200Gi", "rdma/hca": "1", "amd.com/gpu": "8"},
    }
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}]


def test_where_the_pods_may_be(tmp_path: Path) -> None:
    made = objects(tmp_path / "run", FULL, nodes=4, exclude=["n2", "n7"])
    affinity = {kind: one["requiredDuringSchedulingIgnoredDuringExecution"]
                for kind, one in pod(made)["spec"]["affinity"].items()}  # fmt: skip
    (term,) = affinity["nodeAffinity"]["nodeSelectorTerms"]
    assert term["matchFields"] == [
        {"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("n1", "n2", "n7")
    ]
    mine = {"matchLabels": {"dinoctl/name": made[-1]["metadata"]["name"]}}
    assert affinity["podAffinity"] == [{"labelSelector": mine, "topologyKey": "example.org/rack"}]
    assert affinity["podAntiAffinity"] == [{"labelSelector": mine, "topologyKey": "kubernetes.io/hostname"}]
    assert "affinity" not in pod(objects(tmp_path / "one", {**FULL, "exclude": []}))["spec"]


def test_files(tmp_path: Path) -> None:
    spec = pod(objects(tmp_path / "run", FULL))["spec"]
    assert spec["volumes"] == [
        {"name": "dinoctl-shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}},
        {"name": "dinoctl-tmp", "emptyDir": {}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "data", "hostPath": {"path": "/mnt/data", "type": "Directory"}},
        {"name": "old", "nfs": {"server": "filer", "path": "/export/old"}},
        {"name": "keys", "secret": {"secretName": "keys"}},
        {"name": "conf", "configMap": {"name": "conf"}},
    ]
    mounts = {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["data"] == {"name": "data", "mountPath": "/data", "readOnly": True}
    assert mounts["runs"] == {"name": "runs", "mountPath": "/shared"}
    own = {"scratch": {"path": "/tmp/", "host_path": "/nvme"}}
    spec = pod(objects(tmp_path / "own", {**BARE, "volumes": own}))["spec"]
    assert [volume["name"] for volume in spec["volumes"]] == ["dinoctl-shm", "scratch"]


def test_variables(tmp_path: Path) -> None:
    said = variables(pod(objects(tmp_path / "run", FULL)))
    assert said["NCCL_DEBUG"] == "INFO"
    assert (said["HOME"], said["TMPDIR"]) == ("/tmp", "/data/tmp")
    assert said["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "bucket", "key": "secret"}}


def test_as_whom_the_pods_run(tmp_path: Path) -> None:
    def contexts(folder: str, **own: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        spec = pod(objects(tmp_path / folder, {**BARE, **own}))["spec"]
        return spec["securityContext"], spec["containers"][0]["securityContext"]

    user, rights = contexts("default")
    assert user == {
        "seccompProfile": {"type": "RuntimeDefault"}, "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000,
        "fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch",
    }  # fmt: skip
    assert rights == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    user, rights = contexts("root", run_as_user=0, capabilities=["IPC_LOCK"])
    assert (user["runAsNonRoot"], user["runAsUser"]) == (False, 0)
    assert rights["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert contexts("image", run_as_user=None)[0] == {"seccompProfile": {"type": "RuntimeDefault"}}


def test_what_is_asked_for_where_the_profile_does_not_say(tmp_path: Path) -> None:
    (container,) = pod(objects(tmp_path / "run", BARE, threads=2))["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "96", "nvidia.com/gpu": "8"}, "limits": {"nvidia.com/gpu": "8"}
    }  # fmt: skip
    (container,) = pod(objects(tmp_path / "none", {**BARE, "gpus": False}))["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "88"}}


def test_a_job_overrides_the_profile_name_by_name(tmp_path: Path) -> None:
    own = {"namespace": "mine", "node_selector": {"pool": "b"}, "env": {"A": "1"}, "gpus": False}
    made = objects(tmp_path / "run", FULL, own=own)
    assert made[-1]["metadata"]["namespace"] == "mine"
    assert pod(made)["spec"]["nodeSelector"] == {"pool": "b", "example.org/gpu": "h100"}
    assert {"A", "NCCL_DEBUG"} <= set(variables(pod(made)))


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "host"),
    [("indexed-job", "{}-3"), ("pod-group", "{}-3"), ("jobset", "{}-node-0-3"), ("volcano", "{}-node-3-0")],
)
def test_a_pod_knows_which_one_it_is(scheduler: str, host: str, tmp_path: Path) -> None:
    """Volcano's from its documentation: its svc plugin calls a pod <job>-<task>-<index>."""
    made = objects(tmp_path / "run", BARE, scheduler, nodes=4)
    name = made[-1]["metadata"]["name"]
    said = variables(templates(made[-1])[-1])
    number = said["DINOCTL_NODE"] if scheduler == "volcano" else "3"  # one template for all, but on Volcano
    assert number == "3"
    assert said["DINOCTL_NODES"] == "4"
    assert said["DINOCTL_ADDRESS"].replace("$(DINOCTL_NODE)", number) == f"{host.format(name)}.{name}"
    assert said["DINOCTL_HOST"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    if scheduler == "volcano":
        assert said["DINOCTL_JOB"] == name
    else:
        assert "job-completion-index" in said["DINOCTL_NODE"]["fieldRef"]["fieldPath"]
        assert "controller-uid" in said["DINOCTL_JOB"]["fieldRef"]["fieldPath"]
    on_host = variables(pod(objects(tmp_path / "host", {**BARE, "host_network": True}, scheduler)))
    assert on_host["DINOCTL_ADDRESS"] == {"fieldRef": {"fieldPath": "status.podIP"}}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_everything_is_found_again_by_its_labels(scheduler: str, tmp_path: Path) -> None:
    case = make(tmp_path / "run", ["steps:1"] * 2, nodes=2)
    made = kubernetes_app.objects({"kubernetes": {**BARE, "scheduler": scheduler}}, case.attempt, case.digest)
    labels = {
        "app.kubernetes.io/managed-by": "dinoctl", "dinoctl/run-id": case.attempt.run_id, "dinoctl/attempt": "1",
        "dinoctl/name": case.attempt.launch_name, "dinoctl/phase": case.attempt.phase,
    }  # fmt: skip
    for one in [*made, *templates(made[-1])]:
        assert one["metadata"]["labels"] == labels
        assert one["metadata"]["annotations"] == {"dinoctl/digest": case.digest}
    assert {one["metadata"]["name"] for one in made} == {case.attempt.launch_name}
    if scheduler == "indexed-job":
        assert made[0]["spec"]["selector"] == {"dinoctl/name": case.attempt.launch_name}
        assert pod(made)["spec"]["subdomain"] == case.attempt.launch_name


def test_a_pod_group_is_of_all_pods(tmp_path: Path) -> None:
    group, service, job = objects(tmp_path / "run", {**BARE, "pod_group_api": "v1beta1"}, "pod-group", nodes=3)
    assert (group["apiVersion"], group["kind"]) == ("scheduling.k8s.io/v1beta1", "PodGroup")
    assert group["spec"] == {"schedulingPolicy": {"gang": {"minCount": 3}}}
    plain = objects(tmp_path / "plain", BARE, nodes=3)
    assert pod([job])["spec"].pop("schedulingGroup") == {"podGroupName": group["metadata"]["name"]}
    assert service["spec"].keys() == plain[0]["spec"].keys()
    assert pod([job])["spec"].keys() == pod(plain)["spec"].keys()


@pytest.mark.parametrize("scheduler", ["indexed-job", "jobset"])
def test_the_rules_by_which_a_job_fails(scheduler: str, tmp_path: Path) -> None:
    job = objects(tmp_path / "run", BARE, scheduler, nodes=3)[-1]["spec"]
    if scheduler == "jobset":
        assert job["failurePolicy"] == {"maxRestarts": 0}
        job = job["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (3, 3, 0)
    assert "ttlSecondsAfterFinished" not in job
    agent, disrupted, other = job["podFailurePolicy"]["rules"]
    assert set(agent["onExitCodes"]["values"]) == set(contract.EXIT_CODES.values()) - {0}
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert other["onExitCodes"]["operator"] == "NotIn"
    assert {rule["action"] for rule in (agent, disrupted, other)} == {"FailJob"}


def test_the_time_limit_is_the_pods_and_leaves_room_for_the_grace(tmp_path: Path) -> None:
    made = objects(tmp_path / "run", BARE, minutes=60)
    assert pod(made)["spec"]["activeDeadlineSeconds"] == 3600 - 120
    assert "activeDeadlineSeconds" not in made[-1]["spec"]  # its clock runs while the pods wait for nodes
    assert "activeDeadlineSeconds" not in pod(objects(tmp_path / "none", BARE))["spec"]


def test_a_dollar_in_a_path_stays_one(tmp_path: Path) -> None:
    folder = tmp_path / "$(HOME)$$x"
    (container,) = pod(objects(folder, BARE))["spec"]["containers"]
    assert container["command"][-1].replace("$$", "$") == f"{folder}/{contract.attempt_yaml(1)}"


@given(
    run=st.from_regex(spec.NAME_PATTERN, fullmatch=True),
    phase=st.from_regex(spec.PHASE_PATTERN, fullmatch=True),
    run_id=st.from_regex("[0-9a-f]{32}", fullmatch=True),
    number=st.integers(1, 9999),
)
def test_every_launch_name_is_one_for_a_service_and_leaves_room_for_its_pods(
    run: str, phase: str, run_id: str, number: int
) -> None:
    name = attempts.launch_name(run, run_id, phase, number)
    assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-9999-abcde") <= 63
