"""How the launcher of Kubernetes asks: lists, watches, refusals; against a stand-in server, and without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator import asking_kubernetes
from orchestrator.asking_kubernetes import Api, NoAnswerError, NotConfiguredError, RefusedError
from orchestrator.launchers import kubernetes_seen
from orchestrator.launchers.kubernetes_seen import Where
from tests.orchestrator.test_kubernetes import DELETED, condition, ended, job, pod


@dataclass
class PretendServer:
    """A stand-in for an API server: pages of lists, and watches that it may have forgotten."""

    items: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"jobs": [], "pods": []})
    changes: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"jobs": [], "pods": []})
    asked: list[str] = field(default_factory=list)
    fail: list[Exception] = field(default_factory=list)

    name = "pretend"

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        kind = path.rsplit("/", 1)[-1]
        self.asked.append(f"list {kind}")
        if self.fail:
            raise self.fail.pop(0)
        start = int(params["continue"] or 0)
        following = {"continue": str(start + 2)} if start + 2 < len(self.items[kind]) else {}
        return {"metadata": {"resourceVersion": "7", **following}, "items": self.items[kind][start : start + 2]}

    def watch(self, path: str, seconds: int, **params: Any) -> Iterator[dict[str, Any]]:
        kind = path.rsplit("/", 1)[-1]
        self.asked.append(f"watch {kind} {params['resourceVersion']}")
        if self.fail:
            raise self.fail.pop(0)
        changes, self.changes[kind] = self.changes[kind], []
        yield from changes

    def change(self, kind: str, what: str, item: dict[str, Any], version: str) -> None:
        meta = {**item["metadata"], "resourceVersion": version}
        self.changes[kind].append({"type": what, "object": {**item, "metadata": meta}})


WHERE = Where(None, "team", "indexed-job")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> PretendServer:
    kubernetes_seen.forget_all()
    pretend = PretendServer()
    monkeypatch.setattr(kubernetes_seen, "connect", lambda context: pretend)
    return pretend


def named(number: int) -> dict[str, Any]:
    return job(metadata={"name": f"run-{number}", "uid": f"uid-{number}"})


def test_all_pages_are_listed_once_and_then_only_changes_are_taken_in(server: PretendServer) -> None:
    server.items = {"jobs": [named(n) for n in range(5)], "pods": [pod(n) for n in range(3)]}
    look = kubernetes_seen.look(WHERE)
    assert (len(look.jobs), len(look.pods["job-uid"])) == (5, 3)
    assert server.asked == ["list jobs"] * 3 + ["list pods"] * 2
    server.asked.clear()
    server.change("jobs", "DELETED", named(0), "8")
    server.change("jobs", "ADDED", named(9), "9")
    server.change("pods", "MODIFIED", pod(0, "Failed", state=ended(1)), "11")
    server.change("pods", "BOOKMARK", {"metadata": {}}, "20")
    look = kubernetes_seen.look(WHERE)
    assert sorted(look.jobs) == ["uid-1", "uid-2", "uid-3", "uid-4", "uid-9"]
    assert [one.phase for one in look.pods["job-uid"]] == ["Failed", "Running", "Running"]
    kubernetes_seen.look(WHERE)
    assert sorted(server.asked) == ["watch jobs 7", "watch jobs 9", "watch pods 20", "watch pods 7"]


def test_a_pod_that_is_gone_is_remembered_as_long_as_its_job_is_there(server: PretendServer) -> None:
    hit = condition("DisruptionTarget", "PreemptionByScheduler")
    server.items = {"jobs": [job()], "pods": [pod(0)]}
    kubernetes_seen.look(WHERE)
    server.change("pods", "DELETED", pod(0, "Running", hit, **DELETED), "8")
    (left,) = kubernetes_seen.look(WHERE).pods["job-uid"]
    assert (left.is_over, left.disruption is not None) == (True, True)
    server.change("jobs", "DELETED", job(), "9")
    assert kubernetes_seen.look(WHERE).pods == {}


@pytest.mark.parametrize("how", ["status", "in the stream"])
def test_a_watch_that_the_server_has_forgotten_becomes_a_list(server: PretendServer, how: str) -> None:
    server.items["jobs"] = [named(0)]
    kubernetes_seen.look(WHERE)
    server.items["jobs"] = [named(1)]
    if how == "status":
        server.fail = [RefusedError(410, "Expired", "too old resource version")] * 2
    else:
        gone = {"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}}
        server.changes = {"jobs": [gone], "pods": []}
    assert list(kubernetes_seen.look(WHERE).jobs) == ["uid-1"]
    assert "list jobs" in server.asked[2:]


def test_a_list_that_expires_between_its_pages_is_begun_again(server: PretendServer) -> None:
    server.items["jobs"] = [named(n) for n in range(5)]
    server.fail = [RefusedError(410, "Expired", "the provided continue parameter is too old")]
    assert len(kubernetes_seen.look(WHERE).jobs) == 5
    server.fail = [RefusedError(410, "Expired", "")] * 4
    kubernetes_seen.forget_all()
    with pytest.raises(NoAnswerError, match="faster than it can be read"):
        kubernetes_seen.look(WHERE)


def test_no_answer_is_kept_as_long_as_an_answer_and_loses_nothing(server: PretendServer) -> None:
    server.items["jobs"] = [named(0)]
    kubernetes_seen.look(WHERE)
    server.fail = [NoAnswerError("away"), NoAnswerError("away")]
    for _ in range(3):
        with pytest.raises(NoAnswerError, match="away"):
            kubernetes_seen.look(WHERE, poll=0 if server.fail else 1000)
    kubernetes_seen.forget()
    assert list(kubernetes_seen.look(WHERE, poll=1000).jobs) == ["uid-0"]
    assert server.asked[-2:] in (["watch jobs 7", "watch pods 7"], ["watch pods 7", "watch jobs 7"])


def test_what_is_not_installed_is_said(server: PretendServer) -> None:
    server.fail = [RefusedError(404, "NotFound", "the server could not find the requested resource")]
    with pytest.raises(NoAnswerError, match="scheduler is jobset, which is not installed on this cluster"):
        kubernetes_seen.look(Where(None, "team", "jobset"))


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b'{"reason": "Unauthorized", "message": "Unauthorized"}', NoAnswerError),
        (403, b'{"reason": "Forbidden", "message": "may not"}', NoAnswerError),
        (404, b'{"reason": "NotFound", "message": "no"}', RefusedError),
        (409, b'{"reason": "AlreadyExists", "message": "there"}', RefusedError),
        (409, b'{"reason": "Conflict", "message": "changed"}', NoAnswerError),
        (410, b'{"reason": "Expired", "message": "old"}', RefusedError),
        (422, b'{"reason": "Invalid", "message": "no"}', RefusedError),
        (429, b'{"reason": "TooManyRequests", "message": "later"}', NoAnswerError),
        (500, b"<html>a proxy", NoAnswerError),
        (503, b"", NoAnswerError),
        (0, b"", NoAnswerError),
    ],
)
def test_which_answers_leave_the_state_unknown(status: int, body: bytes, kind: type[Exception]) -> None:
    error = asking_kubernetes._refusal("server", status, "reason", body)
    assert type(error) is kind
    assert error.status == status


def test_without_a_kubeconfig_it_says_what_to_set(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv(asking_kubernetes.IN_CLUSTER, raising=False)
    with pytest.raises(NotConfiguredError, match=r"none does not say how to reach a cluster.*set KUBECONFIG"):
        asking_kubernetes.connect()


def test_a_pod_without_a_token_says_what_it_lacks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv(asking_kubernetes.IN_CLUSTER, "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(NotConfiguredError, match=r"this pod cannot .*token file does not exist.*automountService"):
        asking_kubernetes.connect()


def test_a_server_that_is_not_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: 'https://127.0.0.1:9'}}]\n"
        "contexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {token: t}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    api = asking_kubernetes.connect()
    assert isinstance(api, Api)
    with pytest.raises(NoAnswerError, match=r"https://127.0.0.1:9 does not answer: .*refused"):
        api.get("/version")
    with pytest.raises(NotConfiguredError, match="named other"):
        asking_kubernetes.connect("other")
