"""Attempts on the fake nodes of the dev cluster: their pods are real to all of Kubernetes, and run nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.asking_kubernetes import connect
from orchestrator.launchers import kubernetes as kubernetes_launcher, kubernetes_seen
from orchestrator.launchers.base import LaunchState, Observation, Query
from orchestrator.launchers.kubernetes import KubernetesLauncher
from tests.model.standin.attempts import Case, make, wait_for

if TYPE_CHECKING:
    from tests.kubernetes.cluster import Place


def launcher(place: Place, **changes: Any) -> KubernetesLauncher:
    """With a profile whose pods go to the fake nodes."""
    section = {**place.fake_section(poll_seconds=0.1), **changes}
    return KubernetesLauncher({"launcher": "kubernetes", "kubernetes": section})


def case(folder: Path, nodes: int = 2, **changes: Any) -> Case:
    """An attempt of so many nodes, 8 GPUs each."""
    return make(folder, ["never"] * 8, nodes=nodes, phase="pretrain", **changes)


def ask(of: Case, handle: dict[str, Any] | None = None) -> Query:
    attempt = of.attempt
    return Query(attempt.run_dir, attempt.run_id, attempt.attempt, attempt.launch_name, of.digest, handle)


def look(mine: KubernetesLauncher, of: Case, handle: dict[str, Any] | None = None) -> Observation:
    return mine.observe([ask(of, handle)])[0]


def wait_until(
    mine: KubernetesLauncher, of: Case, handle: dict[str, Any] | None, *wanted: LaunchState, words: str = ""
) -> Observation:
    """The first look of such a state, with these words in its detail."""

    seen = look(mine, of, handle)

    def there() -> bool:
        nonlocal seen
        seen = look(mine, of, handle)
        return seen.state in wanted and words in seen.detail

    wait_for(there, 90, lambda: f"{[*wanted]} with {words!r}; the last seen is {seen}")
    return seen


def run(mine: KubernetesLauncher, of: Case) -> dict[str, Any]:
    """The handle of the attempt, submitted, once all its pods run."""
    handle = mine.submit(of.attempt, of.digest)
    wait_until(mine, of, handle, LaunchState.RUNNING)
    return handle


def as_a_new_process() -> None:
    """Nothing is remembered of what was seen."""
    kubernetes_seen.forget_all()
    kubernetes_launcher._ended.clear()


def pods(place: Place, of: Case) -> dict[str, dict[str, Any]]:
    """The attempt's pods as they are, by index."""
    path = f"/api/v1/namespaces/{place.namespace}/pods"
    found = connect().get(path, labelSelector=f"dinoctl/name={of.attempt.launch_name}")["items"]
    return {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: pod for pod in found}


def play(place: Place, pod: dict[str, Any], **annotations: str) -> None:
    """Tell a fake pod what becomes of it: exit="3", drain="5s" (how long it takes to end once it is deleted)."""
    named = {f"fake/{name}": value for name, value in annotations.items()}
    path = f"/api/v1/namespaces/{place.namespace}/pods/{pod['metadata']['name']}"
    connect().patch(path, {"metadata": {"annotations": named}})


def names(place: Place, kind: str) -> list[str]:
    """Of what is there of dinoctl's."""
    return [item["metadata"]["name"] for item in place.get(kind, "-l", "dinoctl/run-id")["items"]]
