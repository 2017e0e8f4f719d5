"""dinoctl doctor on a real Kubernetes: all well, and what it says of a cluster that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import cli
from orchestrator.asking_kubernetes import connect
from tests.kubernetes.cluster import Place

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]

Found = dict[str, list[dict[str, Any]]]
Doctor = Callable[..., tuple[int, Found]]

IMAGE = f"registry.invalid/worker@sha256:{'0' * 64}"


@pytest.fixture
def doctor(kubernetes: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """`dinoctl doctor --json` with a profile that has this section: the exit code, and the findings by check."""

    def run(section: dict[str, Any], *words: str, gpus_per_node: int = 1) -> tuple[int, Found]:
        told = {"namespace": kubernetes.namespace, "image": IMAGE, "gpus": False, **section}
        profile = {"name": "dev", "launcher": "kubernetes", "gpus_per_node": gpus_per_node, "kubernetes": told}
        file, runs = tmp_path / "dev.yaml", tmp_path / "runs"
        file.write_text(yaml.safe_dump(profile))
        code = cli.main(["doctor", "--cluster", str(file), "--runs", str(runs), "--json", *words])
        found: Found = {}
        for finding in json.loads(capsys.readouterr().out)["findings"]:
            found.setdefault(finding["check"], []).append(finding)
        return code, found

    return run


def levels(found: Found) -> dict[str, str]:
    """The worst of each check."""
    worst = ("ok", "warning", "wrong")
    return {check: max((one["level"] for one in of), key=worst.index) for check, of in found.items()}


def left(kubernetes: Place) -> list[str]:
    where = (
        f"/apis/batch/v1/namespaces/{kubernetes.namespace}/jobs",
        f"/api/v1/namespaces/{kubernetes.namespace}/services",
    )
    return [item["metadata"]["name"] for path in where for item in connect().get(path)["items"]]


def test_all_is_well_down_to_an_all_reduce_over_two_pods(real_nodes: Place, doctor: Doctor, tmp_path: Path) -> None:
    code, found = doctor(real_nodes.pod_section(tmp_path, gpus=False), "--timeout", "500")
    well = {check: level for check, level in levels(found).items() if check != "nodes"}
    assert (code, set(well.values())) == (0, {"ok"}), found
    assert found["on nodes"][0]["found"] == "real-0, real-1 reported"
    assert found["all-reduce"][0]["found"].startswith("2 ranks (gloo): right")
    assert "-0.dinoctl-doctor-" in found["reach"][0]["found"]
    assert {"api server", "namespace", "rights", "dry run", "shared folder", "write speed", "clock", "torch"} <= set(
        found
    )
    assert [file.name for file in (tmp_path / "runs").iterdir()] == []
    assert left(real_nodes) == []


def test_pods_whose_user_cannot_write(real_nodes: Place, doctor: Doctor, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    code, found = doctor(real_nodes.pod_section(tmp_path, gpus=False, run_as_user=12345), "--timeout", "500")
    assert (code, levels(found)["on nodes"]) == (1, "wrong")
    assert "as user 12345" in found["on nodes"][0]["found"]
    assert left(real_nodes) == []


def test_an_image_that_is_not_there(real_nodes: Place, doctor: Doctor, tmp_path: Path) -> None:
    """It is not waited for until the time is over."""
    section = real_nodes.pod_section(tmp_path, gpus=False, image="localhost/dev/nothing:1", pull_policy="Never")
    code, found = doctor(section, "--timeout", "500")
    assert (code, levels(found)["on nodes"]) == (1, "wrong")
    assert "2 of 2 did not report, the job is FAILED: ErrImageNeverPull" in found["on nodes"][0]["found"]
    assert left(real_nodes) == []


def test_pods_that_get_no_node_are_waited_for_no_longer_than_said(kubernetes: Place, doctor: Doctor) -> None:
    code, found = doctor({"node_selector": {"no": "such"}}, "--timeout", "8")
    assert (code, levels(found)["nodes"], levels(found)["on nodes"]) == (1, "wrong", "wrong")
    assert "2 of 2 did not report, 8 s are over (PENDING: " in found["on nodes"][0]["found"]
    assert left(kubernetes) == []


@pytest.mark.parametrize(
    ("section", "check", "words"),
    [
        ({"namespace": "nowhere"}, "namespace", "there is no nowhere"),
        ({"priority_class": "highest"}, "priority", "no PriorityClass highest"),
        ({"queue": "team"}, "queue", "no LocalQueue team"),
        ({"scheduler": "volcano"}, "scheduler", "no jobs.batch.volcano.sh on this cluster"),
        ({"node_selector": {"no": "such"}}, "nodes", "0 of 0 nodes with no=such can be used, 1 needed"),
        ({"volumes": {"runs": {"path": "/runs", "claim": "all"}}}, "volumes", "runs: no PersistentVolumeClaim all"),
        ({"secret_env": {"KEY": "bucket/key"}}, "secrets", "no Secret bucket"),
        ({"service_account": "trainer"}, "serviceaccounts", "no ServiceAccount trainer"),
        ({"extra_resources": {"rdma": "1"}}, "dry run", "Job: "),
    ],
)
def test_a_profile_that_the_site_does_not_take(
    kubernetes: Place, doctor: Doctor, section: dict[str, Any], check: str, words: str
) -> None:
    code, found = doctor(section, "--no-jobs")
    assert (code, levels(found)[check]) == (1, "wrong"), found
    assert words in " ".join(one["found"] for one in found[check])


def test_a_claim_that_one_node_alone_can_use_and_a_secret_without_its_key(kubernetes: Place, doctor: Doctor) -> None:
    core = f"/api/v1/namespaces/{kubernetes.namespace}"
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
    connect().post(f"{core}/persistentvolumeclaims", {"metadata": {"name": "one"}, "spec": claim})
    connect().post(f"{core}/secrets", {"metadata": {"name": "bucket"}, "stringData": {"id": "me"}})
    section = {
        "volumes": {"runs": {"path": "/runs", "claim": "one"}},
        "secret_env": {"ID": "bucket/id", "KEY": "bucket/key"},
    }
    _, found = doctor(section, "--no-jobs")
    assert found["volumes"][0]["found"] == "runs: claim one is Pending, ReadWriteOnce: one node alone can use it"
    assert found["secrets"][0]["found"] == "Secret bucket has no key key"


def test_a_quota_that_is_too_small(kubernetes: Place, doctor: Doctor) -> None:
    path = f"/api/v1/namespaces/{kubernetes.namespace}/resourcequotas"
    connect().post(path, {"metadata": {"name": "team"}, "spec": {"hard": {"requests.nvidia.com/gpu": "4"}}})
    code, found = doctor({"gpus": True}, "--no-jobs", gpus_per_node=8)
    assert (code, levels(found)["quota"]) == (1, "wrong")
    assert found["quota"][0]["found"] == "team gives 4 requests.nvidia.com/gpu in all, an attempt needs 8"


def test_nodes_and_what_they_have(kubernetes: Place, doctor: Doctor) -> None:
    section, name = kubernetes.fake_section(gpus=True), "gpu-000"
    _, found = doctor(section, "--no-jobs", gpus_per_node=16)
    assert levels(found)["gpus"] == "wrong"
    assert "have 8 nvidia.com/gpu, a pod asks for 16: too few nodes have so many" in found["gpus"][0]["found"]
    _, found = doctor({**section, "gpu_resource": "amd.com/gpu"}, "--no-jobs", gpus_per_node=8)
    assert "is called nvidia.com/gpu: kubernetes.gpu_resource" in found["gpus"][0]["todo"]
    connect().patch(f"/api/v1/nodes/{name}", {"spec": {"unschedulable": True}})
    try:
        _, found = doctor(section, "--no-jobs", gpus_per_node=8)
    finally:
        connect().patch(f"/api/v1/nodes/{name}", {"spec": {"unschedulable": False}})
    assert (levels(found)["gpus"], levels(found)["nodes"]) == ("ok", "warning")
    assert f"left out: {name} (cordoned)" in found["nodes"][1]["found"]


def test_an_api_server_that_is_not_there(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, found = doctor({})
    assert (code, levels(found)["api server"]) == (1, "wrong")
    assert "set KUBECONFIG to a kubeconfig" in found["api server"][0]["found"]
    assert found["on nodes"][0]["found"] == "not looked at: no job would start"
