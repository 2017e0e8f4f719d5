"""What Volcano is sent: from its documentation, as no Volcano was had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.launchers import kubernetes_app
from tests.model.standin.attempts import make
from tests.orchestrator.test_kubernetes_render import BARE, FULL, objects


def test_volcano_ends_a_job_as_a_whole_as_documented_and_not_validated_by_a_server(tmp_path: Path) -> None:
    (job,) = objects(tmp_path / "run", FULL, "volcano", nodes=3)
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    spec = job["spec"]
    assert (spec["minAvailable"], spec["queue"], spec["schedulerName"]) == (3, "vision", "volcano")
    assert spec["priorityClassName"] == "high"
    assert spec["policies"] == [
        {"event": "PodFailed", "action": "TerminateJob"}, {"event": "PodEvicted", "action": "TerminateJob"},
    ]  # fmt: skip
    assert "--publish-not-ready-addresses" in spec["plugins"]["svc"]
    assert [(task["name"], task["replicas"]) for task in spec["tasks"]] == [(f"node-{n}", 1) for n in range(3)]
    assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
    (job,) = objects(tmp_path / "bare", BARE, "volcano")
    assert job["spec"]["queue"] == "default"


def test_volcano_is_sent_what_was_shown_within_a_bound_by_a_pretended_client(tmp_path: Path) -> None:
    from kubernetes.client import ApiClient, ApiException

    sent: list[dict[str, Any]] = []

    class Pretended(ApiClient):  # type: ignore[misc]
        def call_api(self, path: str, method: str, *_: Any, **options: Any) -> Any:
            sent.append({"path": path, "method": method, **options})
            if len(sent) > 1:
                error = ApiException(status=409, reason="Conflict")
                error.body = '{"reason": "AlreadyExists", "details": {"name": "x"}}'
                raise error
            return options["body"]

    case = make(tmp_path / "run", ["steps:1"] * 2)
    cluster = {"kubernetes": {**BARE, "scheduler": "volcano"}}
    named = kubernetes_app.schedule(Pretended(), cluster, case.attempt, case.digest)
    assert named == f"default:{case.attempt.launch_name}"
    (create,) = sent
    assert (create["method"], create["_request_timeout"]) == ("POST", kubernetes_app.CREATE_SECONDS)
    assert [create["body"]] == kubernetes_app.objects(cluster, case.attempt, case.digest)
    with pytest.raises(ApiException) as again:
        kubernetes_app.schedule(Pretended(), cluster, case.attempt, case.digest)
    assert again.value.status == 409
