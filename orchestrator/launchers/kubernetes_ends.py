"""How an attempt on Kubernetes ended, where its agent left no word: read from the pod that ended by itself. Pure.

The others say nothing: the controller of a Job that has failed deletes them, and they end with 143 or 137 for that.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.contract import CAUSES, Cause
from orchestrator.launchers.kubernetes_records import Ended, Job, Pod

if TYPE_CHECKING:
    from orchestrator.launchers.kubernetes_words import Event

DISRUPTIONS = {
    "PreemptionByScheduler": "was preempted",
    "EvictionByEvictionAPI": "was evicted: its node is being drained",
    "DeletionByTaintManager": "had to leave its node, which was tainted or is not heard of",
    "DeletionByPodGC": "was on a node that is gone",
    "TerminationByKubelet": "was ended by its node",
}
"""Reasons of the condition DisruptionTarget."""

OF_THE_NODE = ("DeletionByTaintManager", "DeletionByPodGC")
"""Those after which the node is left out for a while."""

REFUSED_BY_NODE = re.compile("UnexpectedAdmissionError|OutOf.*|NodeAffinity|NodePorts|Topology.*|AppArmor|.*Sysctl")
"""Reasons of pods that a kubelet would not take although the scheduler had placed them there."""

NOT_STARTED = ("StartError", "ContainerCannotRun", "RunContainerError")

BY_CODE = re.compile(r"for pod (?:[^ ]*/)?([^ ]+) failed with exit code (\d+)")
BY_DISRUPTION = re.compile(r"[Pp]od (?:[^ ]*/)?([^ ]+) has condition DisruptionTarget")
"""Of a Job's condition PodFailurePolicy, which outlives the pod that it tells of."""


@dataclass(frozen=True)
class End:
    cause: Cause | None
    detail: str
    bad_nodes: tuple[str, ...] = ()


def wonders(job: Job, pods: Sequence[Pod]) -> list[str]:
    """The pod of which only events are left to say how it ended."""
    if _first(pods) is not None:
        return []
    found = BY_DISRUPTION.search(_message(job))
    return [found[1]] if found else []


def end(job: Job, pods: Sequence[Pod], events: Sequence[Event]) -> End:
    """Of a job whose pods have all ended, or are on nodes that are not heard of."""
    if job.condition("Complete", "Completed") or job.state == "Completed":
        return End(None, f"job {job.name} ended, all its pods with exit code 0")
    first = _first(pods)
    if first is not None and (first.ended or first.disruption or first.reason):
        return of_pod(first)
    if gone := [pod for pod in pods if pod.silent_since is not None]:
        return lost(gone)
    return _of_condition(job, events)


def lost(pods: Sequence[Pod]) -> End:
    """Of pods whose nodes are not heard of; they may run, and find the attempt closed when they can look again."""
    nodes = tuple(sorted({pod.node for pod in pods}))
    detail = f"{'nodes' if len(nodes) > 1 else 'node'} {', '.join(nodes)} of it not heard of: lost, or cut off"
    return End(Cause.VANISHED, detail, nodes)


def _first(pods: Sequence[Pod]) -> Pod | None:
    """The pod that ended by itself. A code of the contract is the agent's own word and comes before what disrupted it;
    one of a pod that was deleted for another's end comes last."""
    spoken = [pod for pod in pods if pod.ended and _told(pod.ended)]
    candidates = (
        [pod for pod in spoken if pod.deleted_by is None or pod.disruption],
        [pod for pod in pods if pod.disruption],
        [pod for pod in pods if pod.phase == "Failed" and pod.deleted_by is None],
        spoken,
    )
    found = next((some for some in candidates if some), [])
    return min(found, key=lambda pod: (pod.ended.at if pod.ended else 0.0, pod.name), default=None)


def _told(ended: Ended) -> bool:
    return ended.reason != "OOMKilled" and ended.code != 0 and ended.code in CAUSES


def of_pod(pod: Pod) -> End:
    """What that pod says of its own end."""
    ended, where = pod.ended, f"pod {pod.name}" + (f" on {pod.node}" if pod.node else "")
    if ended is not None and ended.reason == "OOMKilled":
        why = "used up its memory (OOMKilled); see kubernetes.memory, data.workers and the images a process"
        return End(Cause.KILLED, f"{where} {why}")
    if ended is not None and _told(ended):
        cause = CAUSES[ended.code]
        return End(cause, f"{where} ended with exit code {ended.code} ({cause.value}){_disrupted(pod)}")
    if pod.disruption is not None:
        bad = (pod.node,) if pod.disruption.reason in OF_THE_NODE and pod.node else ()
        return End(Cause.VANISHED, f"{where} {disruption(pod)}", bad)
    if pod.reason == "DeadlineExceeded":
        return End(
            Cause.UNSEALED, f"{where} reached resources.time_limit_minutes, and its grace was over before it ended"
        )
    if ended is None and pod.reason and REFUSED_BY_NODE.fullmatch(pod.reason):
        said = f"{where} was refused by its node: {pod.reason}: {pod.message}"
        return End(Cause.VANISHED, said, (pod.node,) if pod.node else ())
    if ended is None:
        return End(Cause.VANISHED, f"{where} failed: {pod.reason}{f': {pod.message}' if pod.message else ''}")
    return _of_code(pod, ended, where)


def _of_code(pod: Pod, ended: Ended, where: str) -> End:
    if ended.reason in NOT_STARTED:
        return End(Cause.NOT_LAUNCHED, f"{where} could not be started: {ended.message or ended.reason}")
    words = f"{where} ended with exit code {ended.code}"
    if ended.code <= 128:
        return End(CAUSES.get(ended.code) if ended.code else None, words)
    name = _signal(ended.code - 128)
    if ended.code - 128 == signal.SIGKILL:
        late = pod.deleted_by is not None
        why = "it did not end within its grace" if late else "somebody killed it"
        return End(Cause.UNSEALED if late else Cause.KILLED, f"{words} ({name}: {why})")
    return End(Cause.VANISHED if ended.code - 128 == signal.SIGTERM else Cause.KILLED, f"{words} ({name})")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _disrupted(pod: Pod) -> str:
    return f"; it {disruption(pod)}" if pod.disruption else ""


def disruption(pod: Pod) -> str:
    """What disrupted it, and the cluster's own words."""
    assert pod.disruption is not None
    reason, message = pod.disruption.reason, pod.disruption.message
    words = DISRUPTIONS.get(reason, "was disrupted")
    return f"{words} ({reason}{f': {message}' if message else ''})"


# --- where no pod is left -------------------------------------------------------------------------------------------


def _message(job: Job) -> str:
    found = job.condition("FailureTarget") or job.condition("Failed")
    return found.message if found else ""


def _of_condition(job: Job, events: Sequence[Event]) -> End:
    message = _message(job)
    if by_code := BY_CODE.search(message):
        code = int(by_code[2])
        pod = Pod(by_code[1], "", "", job.name, "", "", "", 0.0, "Failed")
        return _of_code(pod, Ended(code), f"pod {pod.name}") if code not in CAUSES else _coded(pod.name, code)
    if by_disruption := BY_DISRUPTION.search(message):
        return _of_events(by_disruption[1], events)
    found = job.condition("Failed", "FailureTarget")
    said = f"{found.reason}: {found.message}" if found else job.state or "it was deleted"
    return End(Cause.VANISHED, f"job {job.name} ended: {said}")


def _coded(pod: str, code: int) -> End:
    return End(CAUSES[code], f"pod {pod} ended with exit code {code} ({CAUSES[code].value})")


EVENTS = {
    "Preempted": "was preempted",
    "TaintManagerEviction": "had to leave its node, which was tainted or is not heard of",
    "NodeNotReady": "was on a node that was not heard of",
    "Evicted": "was evicted by its node",
}


def _of_events(pod: str, events: Sequence[Event]) -> End:
    for event in events:
        if event.of == pod and event.reason in EVENTS:
            return End(Cause.VANISHED, f"pod {pod} {EVENTS[event.reason]} ({event.reason}: {event.message})")
    return End(Cause.VANISHED, f"pod {pod} was disrupted: preempted, evicted, or on a node that was lost")
