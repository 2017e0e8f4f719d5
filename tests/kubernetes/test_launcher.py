"""The Kubernetes launcher on a real control plane with fake nodes: what its contract tests don't ask, as it is of
Kubernetes alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from model.contract import Cause
from orchestrator import asking_kubernetes
from orchestrator.asking_kubernetes import connect
from orchestrator.launchers import kubernetes_seen
from orchestrator.launchers.base import LaunchError, LaunchState, UnansweredError
from tests.jobs.harness import PATIENCE
from tests.kubernetes.cluster import GPU
from tests.kubernetes.fake import (
    as_a_new_process,
    ask,
    case,
    launcher,
    look,
    names,
    play,
    pods,
    run,
    wait_until,
)
from tests.model.standin.attempts import wait_for

if TYPE_CHECKING:
    from tests.kubernetes.cluster import Place

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]


# --- submitting -------------------------------------------------------------------------------------------------------


def test_what_is_there_already_is_adopted_if_it_is_this_attempts(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    assert look(mine, one).state is LaunchState.ABSENT
    first, second = (mine.submit(one.attempt, one.digest) for _ in range(2))
    assert first == second
    assert wait_until(mine, one, None, LaunchState.RUNNING).nodes
    with pytest.raises(LaunchError, match=f"is not this attempt's: delete it .*delete jobs {one.attempt.launch_name}"):
        mine.submit(one.attempt, "0" * 64)
    mine.cancel(ask(one), hard=True)


def test_a_create_whose_answer_is_lost_is_looked_up(
    kubernetes: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib3

    from orchestrator.launchers import kubernetes_app

    schedule = kubernetes_app.schedule

    def lose(*told: Any) -> str:
        schedule(*told)
        raise urllib3.exceptions.ProtocolError("Connection aborted.")

    mine, one = launcher(kubernetes), case(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(kubernetes_app, "schedule", lose)
        with pytest.raises(UnansweredError, match="does not answer: Connection aborted"):
            mine.submit(one.attempt, one.digest)
    handle = wait_until(mine, one, None, LaunchState.PENDING, LaunchState.RUNNING).handle
    assert handle is not None
    assert mine.submit(one.attempt, one.digest)["uid"] == handle["uid"]
    mine.cancel(ask(one, handle), hard=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"namespace": "nowhere"}, ['namespaces "nowhere" not found', "kubernetes.namespace"]),
        (
            {"scheduler": "volcano", "queue": "q"},
            ["page not found", "indexed-job needs nothing"],
        ),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(
    kubernetes: Place, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    mine, one = launcher(kubernetes, **changes), case(tmp_path / "run")
    with pytest.raises(LaunchError) as refused:
        mine.submit(one.attempt, one.digest)
    assert not isinstance(refused.value, UnansweredError)
    assert all(word in str(refused.value) for word in words)
    mine = launcher(kubernetes)
    mine.clear([ask(one)])  # as the controller does: the Service came first
    assert (names(kubernetes, "jobs"), names(kubernetes, "services")) == ([], [])


def quota(name: str, hard: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name}, "spec": {"hard": hard}}


def test_a_quota(kubernetes: Place, tmp_path: Path) -> None:
    none, few = ({"requests.nvidia.com/gpu": str(gpus)} for gpus in (0, 16))
    kubernetes.create(quota("gpus", none))
    mine, one = launcher(kubernetes, gang_seconds=6), case(tmp_path / "run", nodes=4)
    handle = mine.submit(one.attempt, one.digest)
    seen = wait_until(mine, one, handle, LaunchState.PENDING, words="exceeded quota: gpus")
    assert "none of its 4 pods has a node yet" in seen.detail
    mine.cancel(ask(one, handle), hard=True)
    mine.clear([ask(one, handle)])

    connect().patch(f"/api/v1/namespaces/{kubernetes.namespace}/resourcequotas/gpus", quota("gpus", few))
    two = case(tmp_path / "two", nodes=4)
    handle = mine.submit(two.attempt, two.digest)
    seen = wait_until(mine, two, handle, LaunchState.ENDED)
    assert seen.cause is Cause.UNPLACED
    assert "2 of 4 pods have a node, the others none" in seen.detail
    assert "exceeded quota: gpus" in seen.detail
    mine.cancel(ask(two, handle), hard=True)

    mine.clear([ask(two, handle)])
    kubernetes.create(quota("jobs", {"count/jobs.batch": "0"}))
    three = case(tmp_path / "three")

    def refused() -> bool:  # a new quota counts a moment later
        try:
            mine.submit(three.attempt, three.digest)
        except LaunchError as error:
            return "exceeded quota: jobs" in str(error) and "kubectl describe quota" in str(error)
        mine.cancel(ask(three), hard=True)
        return False

    wait_for(refused, 60)


def test_without_rights_nothing_is_decided(kubernetes: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, one, other = launcher(kubernetes), case(tmp_path / "run"), case(tmp_path / "other")
    handle = run(mine, one)
    kubernetes.kubectl("create", "serviceaccount", "nobody")
    token = kubernetes.kubectl("create", "token", "nobody").strip()
    config = json.loads(kubernetes.kubectl("config", "view", "--raw", "--flatten", "-o", "json"))
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "nobody").write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        patch.setenv("KUBECONFIG", str(tmp_path / "nobody"))
        seen = look(mine, one, handle)
        assert seen.state is LaunchState.UNKNOWN
        assert 'answers 403: jobs.batch is forbidden: User "system:serviceaccount' in seen.detail
        with pytest.raises(LaunchError, match=r"cannot be cancelled now: .*403"):
            mine.cancel(ask(one, handle), hard=True)
        with pytest.raises(LaunchError, match=r"cannot create resource.*dinoctl doctor") as refused:
            mine.submit(other.attempt, other.digest)
        assert not isinstance(refused.value, UnansweredError)
        assert mine.usable_nodes({"processes_per_node": 8}, []) is None
        config["users"][0]["user"] = {"token": "no such"}
        (tmp_path / "nobody").write_text(json.dumps(config))
        asking_kubernetes.forget()
        assert "answers 401" in wait_until(mine, one, handle, LaunchState.UNKNOWN).detail
        with pytest.raises(UnansweredError, match="401"):
            mine.submit(other.attempt, other.digest)
    assert look(mine, one, handle).state is LaunchState.RUNNING
    mine.cancel(ask(one, handle), hard=True)


def test_pods_that_cannot_be_made(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes, priority_class="nope", gang_seconds=6), case(tmp_path / "run")
    handle = mine.submit(one.attempt, one.digest)
    wait_until(mine, one, handle, LaunchState.PENDING, words="no PriorityClass with name nope was found")
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert seen.cause is Cause.NOT_LAUNCHED
    assert "the cluster makes none of its pods: " in seen.detail
    mine.clear([ask(one, handle)])


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_a_job_preempted_whole(kubernetes: Place, tmp_path: Path) -> None:
    low, high = launcher(kubernetes, priority_class="low"), launcher(kubernetes, priority_class="high")
    victim, bully = (case(tmp_path / name, nodes=32) for name in ("victim", "bully"))
    handle = run(low, victim)
    assert len(look(low, victim, handle).nodes) == 32
    run(high, bully)
    seen = wait_until(low, victim, handle, LaunchState.ENDED)
    assert seen.cause is Cause.VANISHED
    assert "was preempted (PreemptionByScheduler: " in seen.detail
    as_a_new_process()  # the pods are gone by now, and with them their conditions
    seen = look(low, victim, handle)
    assert (seen.state, seen.cause, seen.bad_nodes) == (LaunchState.ENDED, Cause.VANISHED, ())
    assert "was preempted (Preempted" in seen.detail
    for mine, one in ((low, victim), (high, bully)):
        mine.cancel(ask(one), hard=True)


def test_the_exit_code_outlives_the_pods(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run", nodes=4)
    handle = run(mine, one)
    pod = pods(kubernetes, one)["2"]
    play(kubernetes, pod, exit="84")
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert seen.cause is Cause.DIVERGED
    assert (
        f"pod {pod['metadata']['name']} on {pod['spec']['nodeName']} ended with exit code 84 (diverged)" in seen.detail
    )
    kubernetes.kubectl("delete", "pods", "--all")
    as_a_new_process()
    seen = look(mine, one, handle)
    assert seen.cause is Cause.DIVERGED
    assert f"pod {pod['metadata']['name']} ended with exit code 84 (diverged)" in seen.detail
    mine.clear([ask(one, handle)])


def test_a_drained_node(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    handle = run(mine, one)
    pod = pods(kubernetes, one)["1"]["metadata"]["name"]
    path = f"/api/v1/namespaces/{kubernetes.namespace}/pods/{pod}/eviction"
    connect().post(path, {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}})
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert (seen.cause, seen.bad_nodes) == (Cause.VANISHED, ())
    assert f"pod {pod}" in seen.detail
    assert "its node is being drained (EvictionByEvictionAPI" in seen.detail
    mine.clear([ask(one, handle)])


def test_a_lost_node_is_named_before_kubernetes_acts(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run", nodes=4)
    handle = run(mine, one)
    node = str(pods(kubernetes, one)["3"]["spec"]["nodeName"])
    usable = mine.usable_nodes({"processes_per_node": 8}, [])
    kubernetes.kill_node(node)
    try:
        seen = wait_until(mine, one, handle, LaunchState.ENDED)
        assert (seen.cause, seen.bad_nodes) == (Cause.VANISHED, (node,))
        assert f"node {node} of it not heard of" in seen.detail
        assert mine.usable_nodes({"processes_per_node": 8}, []) == (usable or 0) - 1
        mine.cancel(ask(one, handle), hard=True)  # does not wait for a pod of which nobody can tell
        mine.clear([ask(one, handle)])
        assert set(pods(kubernetes, one)) <= {"3"}
        assert look(mine, one, handle).state is LaunchState.ENDED
    finally:
        kubernetes.start_node(node)


def test_a_job_that_waits_says_the_schedulers_reason(kubernetes: Place, tmp_path: Path) -> None:
    mine = launcher(kubernetes, node_selector={"rack": "none-has-it"}, gang_seconds=0.1)
    one = case(tmp_path / "run")
    handle = mine.submit(one.attempt, one.digest)
    seen = wait_until(mine, one, handle, LaunchState.PENDING, words="didn't match Pod's node affinity/selector")
    assert "none of its 2 pods has a node yet: 0/" in seen.detail
    mine.cancel(ask(one, handle), hard=False)
    wait_until(mine, one, handle, LaunchState.ENDED)
    mine.clear([ask(one, handle)])


def suspend(place: Place, handle: dict[str, Any], yes: bool = True) -> None:
    connect().patch(f"/apis/batch/v1/namespaces/{place.namespace}/jobs/{handle['job']}", {"spec": {"suspend": yes}})


def test_a_suspended_job_waits(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    handle = run(mine, one)
    for pod in pods(kubernetes, one).values():
        play(kubernetes, pod, drain="20s")
    suspend(kubernetes, handle)
    wait_for(lambda: all("deletionTimestamp" in pod["metadata"] for pod in pods(kubernetes, one).values()))
    kubernetes.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")  # so that none tells how it ended
    assert "somebody suspended it" in wait_until(mine, one, handle, LaunchState.PENDING, words="suspended").detail
    suspend(kubernetes, handle, False)
    wait_until(mine, one, handle, LaunchState.RUNNING)
    mine.cancel(ask(one, handle), hard=True)


def test_a_job_of_which_a_pod_tells_that_it_was_suspended_is_over(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    handle = run(mine, one)
    made = [pod["metadata"] for pod in pods(kubernetes, one).values()]
    paths = [f"/api/v1/namespaces/{kubernetes.namespace}/pods/{pod['name']}" for pod in made]
    for path, pod in zip(paths, made, strict=True):  # a kubelet keeps it a while after it told: fake nodes don't
        connect().patch(path, {"metadata": {"finalizers": [*pod["finalizers"], "test/held"]}})
    suspend(kubernetes, handle)
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert seen.cause is Cause.VANISHED
    assert "ended with exit code 143 (SIGTERM); somebody suspended it while it ran" in seen.detail
    for path in paths:
        connect().patch(path, {"metadata": {"finalizers": None}})
    mine.clear([ask(one, handle)])


def test_deleted_by_hand(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    handle = run(mine, one)
    for pod in pods(kubernetes, one).values():
        play(kubernetes, pod, drain="4s")
    kubernetes.kubectl("delete", "job", handle["job"], "--wait=false")
    seen = wait_until(mine, one, handle, LaunchState.RUNNING, words="was deleted, and 2 pods have not ended yet")
    assert len(seen.nodes) == 2
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert seen.cause is Cause.VANISHED
    assert "was deleted: by hand, by a time to live, or with its namespace" in seen.detail
    assert look(mine, one).state is LaunchState.ABSENT
    again = mine.submit(one.attempt, one.digest)  # a job of that name, and not the one that was
    assert look(mine, one, handle).state is LaunchState.ENDED
    assert names(kubernetes, "services") == [handle["job"]]
    mine.clear([ask(one, again)])
    assert names(kubernetes, "services") == []


def test_an_end_that_was_seen_is_known_after_the_cluster_has_cleared_it_away(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    handle = run(mine, one)
    play(kubernetes, pods(kubernetes, one)["0"], exit="82")
    assert wait_until(mine, one, handle, LaunchState.ENDED).cause is Cause.KILLED
    path = f"/apis/batch/v1/namespaces/{kubernetes.namespace}/jobs/{handle['job']}"
    connect().patch(path, {"spec": {"ttlSecondsAfterFinished": 1}})
    wait_for(lambda: names(kubernetes, "jobs") == [], 60)
    assert look(mine, one, handle).cause is Cause.KILLED
    as_a_new_process()
    assert look(mine, one, handle).cause is Cause.VANISHED
    mine.clear([ask(one, handle)])


def test_a_watch_from_a_time_that_the_server_has_forgotten(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    handle = run(mine, one)
    (view,) = kubernetes_seen._views.values()
    view.jobs.version = view.pods.version = "1"
    assert look(mine, one, handle).state is LaunchState.RUNNING
    assert view.jobs.version != "1"
    mine.cancel(ask(one, handle), hard=True)


def test_an_api_server_that_is_away_for_two_minutes_leaves_the_state_unknown(kubernetes: Place, tmp_path: Path) -> None:
    """And once it is back, none of its nodes has been heard of: that is no loss either. The pods stay for longer than
    the dev cluster lets them, as on any other."""
    stay = [{"key": GPU}, *({"key": f"node.kubernetes.io/{why}"} for why in ("unreachable", "not-ready"))]
    mine = launcher(kubernetes, tolerations=stay, lost_seconds=180)
    one, other = case(tmp_path / "run"), case(tmp_path / "other")
    handle, usable = run(mine, one), mine.usable_nodes({}, [])
    kubernetes.stop_apiserver()
    try:
        back = time.monotonic() + 120
        seen = wait_until(mine, one, handle, LaunchState.UNKNOWN)
        assert "does not answer: " in seen.detail
        assert seen.handle == handle
        assert look(mine, other).state is LaunchState.UNKNOWN
        with pytest.raises(LaunchError, match="cannot be cancelled now"):
            mine.cancel(ask(one, handle), hard=True)
        with pytest.raises(UnansweredError):
            mine.submit(other.attempt, other.digest)
        assert mine.usable_nodes({}, []) is None
        while time.monotonic() < back:
            assert look(mine, one, handle).state is LaunchState.UNKNOWN
            time.sleep(5)
    finally:
        kubernetes.start_apiserver()
    seen = wait_until(mine, one, handle, LaunchState.RUNNING, words="not heard of: gpu-")
    assert "given up in 1" in seen.detail
    wait_for(lambda: mine.usable_nodes({}, []) == usable, PATIENCE, lambda: (usable, mine.usable_nodes({}, [])))
    mine.cancel(ask(one, handle), hard=True)
