"""The pods of `dinoctl doctor`: those of an attempt, in which model.doctor runs instead of the agent.

Made from the same objects, so that volumes, environment, user, network and placement are what an attempt would have.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from model import contract
from model.config import Resources
from model.contract import Attempt
from orchestrator.asking_kubernetes import Api, NoAnswerError, RefusedError, connect
from orchestrator.findings import Patient
from orchestrator.launchers.kubernetes_records import CONTAINER, NAME

RUN_ID = "d0c" * 10 + "d0"
"""Of no run: a launcher that lists our pods knows no run of it."""

HOPELESS = ("ErrImageNeverPull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError",
            "CreateContainerError", "RunContainerError", "CrashLoopBackOff")  # fmt: skip
"""What a container waits for that does not come by waiting."""


@dataclass(frozen=True)
class Sent:
    """An object as it goes to the API server."""

    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    def path(self, name: str = "") -> str:
        """Of its kind in its namespace, or of itself."""
        version = str(self.body["apiVersion"])
        root = "/apis" if "/" in version else "/api"
        namespace = self.body["metadata"]["namespace"]
        return f"{root}/{version}/namespaces/{namespace}/{self.kind.lower()}s{f'/{name}' if name else ''}"

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def pod(self) -> dict[str, Any] | None:
        """The spec of its pods, wherever in it that is; None: it makes none."""
        return _pod(self.body)


def _pod(body: Any) -> dict[str, Any] | None:
    if isinstance(body, dict):
        containers = body.get("containers", [])
        if any(container["name"] == CONTAINER for container in containers):
            return body
        inner = list(body.values())
    else:
        inner = body if isinstance(body, list) else []
    return next((found for value in inner if (found := _pod(value)) is not None), None)


def sent(patient: Patient, nodes: int, name: str = "dinoctl-doctor", folder: str | None = None) -> list[Sent]:
    """What would be sent for an attempt of so many nodes of the job's first phase; folder: with model.doctor in its
    pods, which finds what it is asked there. Pure."""
    from orchestrator.launchers import kubernetes_app

    attempt = _attempt(patient, nodes, name)
    bodies = kubernetes_app.objects(patient.cluster.model_dump(mode="json"), attempt, "0" * 64)
    found = [Sent(copy.deepcopy(dict(body))) for body in bodies]
    for one in found:
        pod = one.pod
        if pod is not None and folder is not None:
            (agent,) = (container for container in pod["containers"] if container["name"] == CONTAINER)
            agent["command"] = [patient.kubernetes.python, "-P", "-m", "model.doctor", folder]
            pod["terminationGracePeriodSeconds"] = 5  # there is nothing to seal
    return found


def _attempt(patient: Patient, nodes: int, name: str) -> Attempt:
    if patient.job is None:
        settings: dict[str, Any] = {
            "resources": Resources(processes_per_node=patient.processes).model_dump(mode="json")
        }
        phase = "doctor"
    else:
        phase = next(iter(patient.job.phases))
        settings = patient.job.phases[phase].model_dump(mode="json")
    return Attempt(
        format=contract.FORMAT, run="dinoctl-doctor", run_id=RUN_ID, run_dir=patient.runs, attempt=1, phase=phase,
        launch_name=name, seed=0, model={}, settings=settings, inputs={}, resume=[], keep_steps=[], nodes=nodes,
        processes_per_node=patient.processes, threads=int(settings["resources"]["threads"]),
        code_dir="", on_end=[], spec_digest="0" * 64, code_digest="0" * 64,
    )  # fmt: skip


# --- on the cluster ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pods:
    """Of one doctor's job, while it is there."""

    api: Api
    namespace: str
    name: str

    def _list(self) -> list[dict[str, Any]]:
        selector = f"{NAME}={self.name}"
        found = self.api.get(f"/api/v1/namespaces/{self.namespace}/pods", labelSelector=selector)["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    def standing(self) -> str:
        """GONE in its first word if there is nothing left to wait for. Raises NoAnswerError."""
        pods = self._list()
        states = [" ".join(state_of(pod).split()) for pod in pods]
        if not pods:
            return f"PENDING: no pod yet; {self._why()}"
        ended = [state for state in states if state.startswith("FAILED")]
        if ended:
            return ended[0]
        if all(state == "COMPLETED" for state in states):
            return "COMPLETED"
        return next((state for state in states if state != "RUNNING"), "RUNNING")

    def _why(self) -> str:
        """What the cluster's events say of pods that it does not make: a quota, a rule of the site."""
        with suppress(NoAnswerError, RefusedError):
            where = f"/api/v1/namespaces/{self.namespace}/events"
            events = self.api.get(where, fieldSelector=f"involvedObject.name={self.name},type=Warning")["items"]
            if events:
                return str(events[-1].get("message", ""))
        return "its events say nothing"

    def log(self) -> str:
        """The ends of what the pods printed."""
        said = []
        with suppress(NoAnswerError, RefusedError):
            for pod in self._list():
                name = pod["metadata"]["name"]
                with suppress(NoAnswerError, RefusedError):
                    path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/log"
                    said.append(self.api.text(path, container=CONTAINER, tailLines=20))
        return " ".join(" ".join(said).split())[-600:]


@contextmanager
def running(patient: Patient, folder: str) -> Iterator[Pods]:
    """Has the job on the cluster for so long. Raises NoAnswerError, also for a job that is refused."""
    api = connect(patient.kubernetes.context)
    name = f"dinoctl-doctor-{contract.new_nonce()[:8]}"
    objects = sent(patient, patient.nodes, name, folder)
    made: list[Sent] = []
    try:
        for one in objects:
            made.append(one)  # first: a lost answer may be to what was made
            api.post(one.path(), one.body)
        yield Pods(api, patient.kubernetes.namespace, name)
    except RefusedError as error:
        raise NoAnswerError(f"{made[-1].kind} {name} is refused: {error}") from error
    finally:
        for one in reversed(made):
            with suppress(NoAnswerError, RefusedError):
                api.delete(one.path(one.name), propagationPolicy="Background", gracePeriodSeconds=0)


def state_of(pod: Mapping[str, Any]) -> str:
    """In words, the first of which is FAILED, COMPLETED, RUNNING or PENDING."""
    status = pod.get("status", {})
    match status.get("phase"):
        case "Succeeded":
            return "COMPLETED"
        case "Failed":
            return f"FAILED: {status.get('message') or _ended(status) or status.get('reason') or 'no reason is given'}"
    for container in status.get("containerStatuses", []):
        waits = container.get("state", {}).get("waiting", {})
        if waits.get("reason") in HOPELESS:
            return f"FAILED: {waits['reason']}: {waits.get('message', '')}"
        if waits.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"PENDING: {waits['reason']}: {waits.get('message', '')}"
    unbound = [one for one in status.get("conditions", []) if one["type"] == "PodScheduled" and one["status"] != "True"]
    if unbound:
        return f"PENDING: {unbound[0].get('message') or unbound[0].get('reason') or 'not scheduled yet'}"
    return "RUNNING" if status.get("phase") == "Running" else "PENDING: its container is being made"


def _ended(status: Mapping[str, Any]) -> str:
    for container in status.get("containerStatuses", []):
        if ended := container.get("state", {}).get("terminated"):
            why = ended.get("message") or ended.get("reason", "")
            return f"exit code {ended['exitCode']} ({why})"
    return ""
