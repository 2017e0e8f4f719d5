"""What the launcher of Kubernetes makes of what a cluster says; the real ones: tests/kubernetes/."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest

from model.contract import EXIT_CODES, Cause
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.launchers import (
    kubernetes as launcher,
    kubernetes_nodes,
    kubernetes_records as records,
    kubernetes_words,
)
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.launchers.kubernetes_words import Event, Known

NOW = 1_800_000_000.0
HANDLE = {"job": "run-1", "namespace": "team", "uid": "job-uid"}
LABELS = {records.MANAGED_BY: "dinoctl", records.NAME: "run-1", records.RUN_ID: "a" * 32}


def at(seconds_ago: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW - seconds_ago))


def condition(
    kind: str, reason: str = "", message: str = "", *, status: str = "True", ago: float = 10
) -> dict[str, Any]:
    return {
        "type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at(ago),
    }  # fmt: skip


def job(*conditions: dict[str, Any], nodes: int = 4, ago: float = 600, **changes: Any) -> dict[str, Any]:
    meta = {
        "name": "run-1", "uid": "job-uid", "labels": LABELS, "annotations": {records.DIGEST: "d" * 64},
        "creationTimestamp": at(ago), **changes.pop("metadata", {}),
    }  # fmt: skip
    return {
        "metadata": meta,
        "spec": {"parallelism": nodes, **changes},
        "status": {"conditions": list(conditions)},
    }


def pod(
    number: int = 0, phase: str = "Running", *conditions: dict[str, Any], node: str | None = "", bound: float = 500,
    state: dict[str, Any] | None = None, ready: bool = True, deleted: float | None = None, **status: Any,
) -> dict[str, Any]:  # fmt: skip
    node = f"node-{number}" if node == "" else node
    scheduled = [condition("PodScheduled", ago=bound)] if node else []
    state = {"running": {"startedAt": at(bound)}} if state is None else state
    return {
        "metadata": {
            "name": f"run-1-{number}-abcde", "uid": f"pod-{number}", "creationTimestamp": at(bound),
            "labels": {**LABELS, "batch.kubernetes.io/job-completion-index": str(number)},
            "annotations": {records.DIGEST: "d" * 64},
            "ownerReferences": [{"uid": "job-uid", "controller": True}],
            **({} if deleted is None else {"deletionTimestamp": at(deleted)}),
        },
        "spec": {"nodeName": node} if node else {},
        "status": {
            "phase": phase, "conditions": [*scheduled, *conditions],
            "containerStatuses": [{"name": "agent", "ready": ready, "state": state}], **status,
        },
    }  # fmt: skip


def ended(code: int, reason: str = "Error", ago: float = 20) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "finishedAt": at(ago)}}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def seen(
    of: dict[str, Any], pods: Iterable[dict[str, Any]] = (), events: Iterable[Event] = (), gang: float = 180,
    recorded: float = 0.0,
) -> Observation:  # fmt: skip
    known = Known(HANDLE, gang, 60.0, recorded)
    return kubernetes_words.observation(records.job(of), [records.pod(one) for one in pods], list(events), known, NOW)


FAILED = condition("Failed", "PodFailurePolicy", "Container agent for pod team/run-1-2-abcde failed with exit code 1 "
                   "matching FailJob rule at index 0")  # fmt: skip
DELETED = {"deleted": 5.0, "ready": False}
NOT_READY = condition("Ready", status="False")


def test_what_a_profile_does_not_say_is_what_its_section_would() -> None:
    """It may be one that was written before the option was."""
    said = {name: Kubernetes.model_fields[name].default for name in ("poll_seconds", "gang_seconds", "lost_seconds")}
    assert tuple(said.values()) == (launcher.POLL_SECONDS, launcher.GANG_SECONDS, launcher.LOST_SECONDS)
    assert Kubernetes.model_fields["pod_group_api"].default == records.POD_GROUP_API


# --- on its way -------------------------------------------------------------------------------------------------------


def test_all_pods_running() -> None:
    found = seen(job(), [pod(n) for n in (2, 0, 1, 3)])
    assert found.state is LaunchState.RUNNING
    assert found.nodes == ("node-0", "node-1", "node-2", "node-3")
    assert found.detail == "job run-1 on node-0, node-1, node-2 and 1 more"


def test_no_pod_placed_waits_as_long_as_it_takes_and_says_the_schedulers_reason() -> None:
    why = condition(
        "PodScheduled", "Unschedulable", "0/34 nodes are available: 34 Insufficient\n nvidia.com/gpu.", status="False"
    )
    found = seen(job(ago=10**6), [pod(n, "Pending", why, node=None, state={}, bound=10**6) for n in range(4)])
    assert found.state is LaunchState.PENDING
    assert found.detail == (
        "job run-1 waits: none of its 4 pods has a node yet: 0/34 nodes are available: 34 Insufficient nvidia.com/gpu."
    )


def test_a_suspended_job_waits_in_its_queue() -> None:
    labels = {**LABELS, "kueue.x-k8s.io/queue-name": "gpus"}
    found = seen(job(ago=10**6, suspend=True, metadata={"labels": labels}))
    assert (found.state, found.cause) == (LaunchState.PENDING, None)
    assert "waits in queue gpus: it is suspended until the queue admits it (Kueue)" in found.detail
    assert "somebody suspended it" in seen(job(suspend=True)).detail


@pytest.mark.parametrize(("placed_for", "given_back"), [(170.0, False), (190.0, True)])
@pytest.mark.parametrize("others", ["unscheduled", "not made"])
def test_a_gang_half_placed_is_given_back_after_a_while(placed_for: float, given_back: bool, others: str) -> None:
    why = condition("PodScheduled", "Unschedulable", "0/4 nodes are available", status="False")
    pods = [pod(0, bound=placed_for), pod(1, bound=placed_for - 100)]
    events = []
    if others == "unscheduled":
        pods += [pod(n, "Pending", why, node=None, state={}) for n in (2, 3)]
    else:
        events = [Event("run-1", "FailedCreate", "0/4 nodes are available", NOW)]
    found = seen(job(), pods, events)
    assert found.state is (LaunchState.ENDED if given_back else LaunchState.PENDING)
    assert found.cause is (Cause.UNPLACED if given_back else None)
    assert "2 of 4 pods have a node, the others none: 0/4 nodes are available" in found.detail
    assert ("all were given back after 180 s" if given_back else "given back in 10 s") in found.detail


def test_a_quota_that_is_used_up_is_waited_for_and_what_will_never_do_is_not() -> None:
    quota = Event("run-1", "FailedCreate", 'pods "x" is forbidden: exceeded quota: gpus', NOW)
    found = seen(job(), [], [quota])
    assert found.state is LaunchState.PENDING
    assert "exceeded quota: gpus; a quota of the namespace is used up" in found.detail
    never = Event("run-1", "FailedCreate", 'violates PodSecurity "restricted"', NOW)
    assert seen(job(ago=100), [], [never]).state is LaunchState.PENDING
    found = seen(job(), [], [never])
    assert (found.state, found.cause) == (LaunchState.ENDED, Cause.NOT_LAUNCHED)
    assert "makes none of its pods: violates PodSecurity" in found.detail


@pytest.mark.parametrize("reason", sorted(kubernetes_words.STUCK))
def test_a_container_that_will_not_start_is_named_and_given_up(reason: str) -> None:
    for since, state, cause in ((100, LaunchState.PENDING, None), (200, LaunchState.ENDED, Cause.NOT_LAUNCHED)):
        stuck = pod(3, "Pending", state=waiting(reason, "no such\nthing"), ready=False, bound=since)
        found = seen(job(), [*(pod(n) for n in range(3)), stuck])
        assert (found.state, found.cause) == (state, cause)
        assert f"pod run-1-3-abcde on node-3 does not start: {reason}: no such thing; " in found.detail


def test_a_large_image_takes_its_time_and_a_volume_that_is_not_there_does_not() -> None:
    slow = pod(0, "Pending", state=waiting("ContainerCreating"), ready=False, bound=10**5)
    found = seen(job(nodes=1), [slow])
    assert (found.state, found.cause) == (LaunchState.PENDING, None)
    assert "0 of 1 pods have started" in found.detail
    assert kubernetes_words.wonders(records.job(job(nodes=1)), [records.pod(slow)], NOW) == ["run-1-0-abcde"]
    found = seen(job(nodes=1), [slow], [Event("run-1-0-abcde", "FailedMount", 'secret "s" not found', NOW)])
    assert (found.state, found.cause) == (LaunchState.ENDED, Cause.NOT_LAUNCHED)
    assert 'FailedMount: secret "s" not found; see kubernetes.volumes' in found.detail


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_job_whose_pods_are_still_ending_runs() -> None:
    for of in (job(FAILED), job(condition("FailureTarget")), job(metadata={"deletionTimestamp": at(3)})):
        found = seen(of, [pod(0, deleted=-100), pod(1, "Failed", state=ended(1))])
        assert found.state is LaunchState.RUNNING
        assert "1 pod has not ended yet" in found.detail


def test_a_pod_on_a_lost_node_is_not_waited_for() -> None:
    of = job(condition("FailureTarget", "PodFailurePolicy", "pod team/run-1-0-abcde has condition DisruptionTarget"))
    found = seen(of, [pod(0, "Running", NOT_READY, deleted=-100), pod(1, "Failed", state=ended(143), **DELETED)])
    assert (found.state, found.cause, found.bad_nodes) == (LaunchState.ENDED, Cause.VANISHED, ("node-0",))


@pytest.mark.parametrize("code", sorted(code for code in EXIT_CODES.values() if code))
def test_the_agents_own_word_counts(code: int) -> None:
    cause = next(cause for cause, own in EXIT_CODES.items() if own == code)
    others = [pod(n, "Failed", state=ended(80, ago=30), **DELETED) for n in (0, 1, 3)]
    found = seen(job(FAILED), [*others, pod(2, "Failed", state=ended(code), ready=False)])
    assert found.cause is cause
    assert f"pod run-1-2-abcde on node-2 ended with exit code {code} ({cause.value})" in found.detail


@pytest.mark.parametrize(
    ("the_pod", "cause", "words", "bad"),
    [
        (pod(2, "Failed", state=ended(7, "OOMKilled"), ready=False), Cause.KILLED, "(OOMKilled)", ()),
        (pod(2, "Failed", state=ended(137), ready=False), Cause.KILLED, "SIGKILL: somebody killed it", ()),
        (pod(2, "Failed", state=ended(139), ready=False), Cause.KILLED, "exit code 139 (SIGSEGV)", ()),
        (pod(2, "Failed", state=ended(128, "StartError"), ready=False), Cause.NOT_LAUNCHED, "could not be started", ()),
        (pod(2, "Failed", state=ended(3), ready=False), None, "exit code 3", ()),
        (
            pod(2, "Failed", state={}, ready=False, reason="UnexpectedAdmissionError", message="no healthy GPU"),
            Cause.VANISHED, "refused by its node: UnexpectedAdmissionError: no healthy GPU", ("node-2",),
        ),
        (
            pod(2, "Failed", state=ended(80), ready=False, reason="DeadlineExceeded", message="Pod was active"),
            Cause.STOPPED, "exit code 80 (stopped)", (),
        ),
        (
            pod(2, "Failed", state=ended(137), ready=False, reason="DeadlineExceeded", message="Pod was active"),
            Cause.UNSEALED, "time_limit", (),
        ),
        (pod(2, "Failed", state={}, ready=False, reason="NodeLost"), Cause.VANISHED, "failed: NodeLost", ()),
    ],
)  # fmt: skip
def test_how_a_pod_ended_by_itself(the_pod: dict[str, Any], cause: Cause | None, words: str, bad: tuple[str]) -> None:
    others = [pod(n, "Failed", state=ended(143, ago=25), **DELETED) for n in (0, 1, 3)]
    found = seen(job(FAILED), [*others, the_pod])
    assert (found.state, found.cause, found.bad_nodes) == (LaunchState.ENDED, cause, bad)
    assert words in found.detail
    assert "run-1-2-abcde on node-2" in found.detail


@pytest.mark.parametrize(
    ("reason", "words", "bad"),
    [
        ("PreemptionByScheduler", "was preempted", ()),
        ("EvictionByEvictionAPI", "being drained", ()),
        ("DeletionByTaintManager", "tainted or is not heard of", ("node-2",)),
        ("DeletionByPodGC", "a node that is gone", ("node-2",)),
        ("TerminationByKubelet", "ended by its node", ()),
        ("Unheard", "was disrupted", ()),
    ],
)
def test_what_disrupted_a_pod(reason: str, words: str, bad: tuple[str, ...]) -> None:
    hit = condition("DisruptionTarget", reason, "in the cluster's words")
    others = [pod(n, "Failed", state=ended(143, ago=25), **DELETED) for n in (0, 1, 3)]
    found = seen(job(FAILED), [*others, pod(2, "Failed", hit, state=ended(143), **DELETED)])
    assert (found.cause, found.bad_nodes) == (Cause.VANISHED, bad)
    assert words in found.detail
    assert f"({reason}: in the cluster's words)" in found.detail
    sealed = pod(2, "Failed", hit, state=ended(80), **DELETED)
    found = seen(job(FAILED), [*others, sealed])
    assert found.cause is Cause.STOPPED
    assert "; it was " in found.detail or "; it had " in found.detail


def test_a_pod_that_ignored_its_signal() -> None:
    hit = condition("DisruptionTarget", "PreemptionByScheduler")
    found = seen(job(FAILED), [pod(0, "Failed", hit, state=ended(137), **DELETED)])
    assert found.cause is Cause.VANISHED
    found = seen(job(metadata={"deletionTimestamp": at(3)}), [pod(0, "Failed", state=ended(137), **DELETED)])
    assert found.state is LaunchState.ENDED


@pytest.mark.parametrize(
    ("message", "events", "cause", "words"),
    [
        ("Container agent for pod team/run-1-2-x failed with exit code 84 matching FailJob rule at index 0", [],
         Cause.DIVERGED, "pod run-1-2-x ended with exit code 84 (diverged)"),
        ("Container agent for pod team/run-1-2-x failed with exit code 137 matching FailJob rule at index 2", [],
         Cause.KILLED, "exit code 137"),
        ("Pod team/run-1-2-x has condition DisruptionTarget matching FailJob rule at index 1",
         [Event("run-1-2-x", "Preempted", "Preempted by pod abc on node n7", NOW)],
         Cause.VANISHED, "pod run-1-2-x was preempted (Preempted: Preempted by pod abc on node n7)"),
        ("Pod team/run-1-2-x has condition DisruptionTarget matching FailJob rule at index 1", [],
         Cause.VANISHED, "was disrupted: preempted, evicted, or on a node that was lost"),
        ("Job has reached the specified backoff limit", [], Cause.VANISHED, "BackoffLimitExceeded: Job has reached"),
    ],
)  # fmt: skip
def test_the_jobs_condition_outlives_its_pods(message: str, events: list[Event], cause: Cause, words: str) -> None:
    reason = "BackoffLimitExceeded" if "backoff" in message else "PodFailurePolicy"
    of = job(condition("Failed", reason, message))
    wanted = ["run-1-2-x"] if "DisruptionTarget" in message else []
    assert kubernetes_words.wonders(records.job(of), [], NOW) == wanted
    found = seen(of, [], events)
    assert (found.state, found.cause) == (LaunchState.ENDED, cause)
    assert words in found.detail


def test_success_says_nothing_without_the_agents_word() -> None:
    found = seen(job(condition("Complete")), [pod(n, "Succeeded", state=ended(0), ready=False) for n in range(4)])
    assert (found.state, found.cause) == (LaunchState.ENDED, None)


def silent(ago: float) -> dict[str, Any]:
    """The kubelet's last word of the container was: ready; the controller took it back that many seconds ago."""
    return {**NOT_READY, "lastTransitionTime": at(ago)}


def test_a_node_that_is_not_heard_of_ends_the_attempt_before_kubernetes_does() -> None:
    found = seen(job(), [pod(0), pod(1, "Running", silent(61)), pod(2), pod(3)])
    assert (found.state, found.cause, found.bad_nodes) == (LaunchState.ENDED, Cause.VANISHED, ("node-1",))
    assert "node node-1 of it not heard of" in found.detail
    starting = pod(1, "Running", silent(61), ready=False)  # the kubelet's own: it has just started, or is ending
    assert seen(job(), [pod(0), starting, pod(2), pod(3)]).detail == "job run-1 on node-0, node-1, node-2 and 1 more"


def test_an_attempt_that_records_steps_has_lost_no_node() -> None:
    """As after an hour without an API server, which has then heard of nobody."""
    pods = [pod(n, "Running", silent(3600)) for n in range(4)]
    found = seen(job(), pods, recorded=NOW - 20)
    assert (found.state, found.bad_nodes) == (LaunchState.RUNNING, ())
    assert "not heard of: node-0, node-1, node-2 and 1 more; given up in 40 s unless it records a step" in found.detail
    found = seen(job(), pods, recorded=NOW - 61)
    assert (found.state, len(found.bad_nodes)) == (LaunchState.ENDED, 4)
    just_now = [pod(n, "Running", silent(59)) for n in range(4)]
    assert seen(job(), just_now, recorded=NOW - 3600).state is LaunchState.RUNNING


def test_a_job_that_is_gone() -> None:
    found = kubernetes_words.gone("run-1", [records.pod(pod(0, deleted=-100))], HANDLE, NOW)
    assert found.state is LaunchState.RUNNING
    assert "job run-1 was deleted, and 1 pod has not ended yet on node-0" in found.detail
    overdue = records.pod(pod(0, deleted=100))
    found = kubernetes_words.gone("run-1", [overdue], HANDLE, NOW)
    assert (found.state, found.cause) == (LaunchState.ENDED, Cause.VANISHED)
    assert "its job run-1 was deleted" in found.detail


def test_a_jobset_and_a_volcano_job_are_read_alike() -> None:
    spec = {"replicatedJobs": [{"name": "node", "template": {"spec": {"parallelism": 8}}}], "suspend": True}
    assert (records.job({**job(), "spec": spec}).nodes, records.job({**job(), "spec": spec}).suspended) == (8, True)
    volcano = {
        **job(),
        "spec": {"minAvailable": 4, "queue": "q"},
        "status": {"state": {"phase": "Aborted"}, "conditions": [{"status": "Aborted"}]},
    }
    read = records.job(volcano)
    assert (read.nodes, read.queue, kubernetes_words.is_finishing(read)) == (4, "q", True)
    assert seen(volcano).detail == "job run-1 ended: Aborted"
    of_jobset = pod(0)
    of_jobset["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-uid"] = "set-uid"
    assert records.pod(of_jobset).owner == "set-uid"


# --- nodes ------------------------------------------------------------------------------------------------------------


def node(
    name: str, *, ready: str = "True", gpus: str = "8", taints: Any = (), rack: str = "a", cordoned: bool = False
) -> Any:
    return {
        "metadata": {"name": name, "labels": {"rack": rack}},
        "spec": {"taints": list(taints), "unschedulable": cordoned},
        "status": {"conditions": [{"type": "Ready", "status": ready}], "allocatable": {"nvidia.com/gpu": gpus}},
    }


def test_which_nodes_count() -> None:
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    nodes = [
        node("good"), node("other rack", rack="b"), node("cordoned", cordoned=True), node("away", ready="Unknown"),
        node("small", gpus="4"), node("tainted", taints=[taint]), node("out"),
        node("soft", taints=[{"key": "x", "effect": "PreferNoSchedule"}]),
    ]  # fmt: skip
    resources = {"processes_per_node": 8}

    def usable(**section: Any) -> int:
        return kubernetes_nodes.usable(nodes, section, resources, ["out"])

    assert usable() == 3
    assert usable(exclude=["good"]) == 2
    assert usable(gpus=False) == 4
    assert usable(together="rack") == 2
    assert usable(tolerations=[{"key": "nvidia.com/gpu"}]) == 4
    assert usable(tolerations=[{"key": "nvidia.com/gpu", "operator": "Equal", "value": "present"}]) == 4
    assert usable(tolerations=[{"key": "nvidia.com/gpu", "operator": "Equal", "value": "no"}]) == 3
    assert usable(tolerations=[{"operator": "Exists"}]) == 4
    assert kubernetes_nodes.selector({"node_selector": {"a": "b", "c": "d"}}) == "a=b,c=d"
