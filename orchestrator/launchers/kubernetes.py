"""The launcher of Kubernetes clusters: each attempt is one Job (or JobSet, or Volcano Job), one pod a node, and the
agent is the first process of each pod.

Names are unique there: of two creates of one attempt the second finds the first one's Job and takes it for its own, by
run id and digest. Kubernetes restarts nothing: a Job is one attempt, and is deleted once its end is in the log.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from model import contract, storage
from model.contract import Attempt, Claim
from orchestrator import progress, sections
from orchestrator.asking_kubernetes import NoAnswerError, NotConfiguredError, RefusedError, answering
from orchestrator.launchers import kubernetes_nodes, kubernetes_records as records, kubernetes_seen, kubernetes_words
from orchestrator.launchers.base import LaunchError, LaunchState, Observation, Query, UnansweredError
from orchestrator.launchers.kubernetes_records import Job, Pod
from orchestrator.launchers.kubernetes_seen import Seen, Where
from orchestrator.launchers.kubernetes_words import Known

GONE_SECONDS = 60.0
"""How long the pods of a killed attempt are waited for. A kubelet does not shorten a grace that has begun."""

KILL_GRACE = 1
"""Seconds between SIGTERM and SIGKILL for them. Not 0: that takes a pod off the list without asking its node."""

POLL_SECONDS, GANG_SECONDS, LOST_SECONDS = 5.0, 180.0, 60.0
"""Where a run's profile, of an older dinoctl, does not say."""

_ended: dict[str, Observation] = {}
"""By uid: how an attempt ended, as this process saw it, for when its Job is deleted before that is in the log."""


class KubernetesLauncher:
    """Implements `orchestrator.launchers.base.Launcher`. cluster: the resolved profile."""

    def __init__(self, cluster: Mapping[str, Any]) -> None:
        self.cluster = cluster
        self.section: Mapping[str, Any] = cluster.get("kubernetes") or {}
        self.poll = float(self.section.get("poll_seconds", POLL_SECONDS))

    def render(self, attempt: Attempt, digest: str) -> str:
        from orchestrator.launchers import kubernetes_app  # here, as torchx takes a second

        return kubernetes_app.text(kubernetes_app.objects(self.cluster, attempt, digest))

    def submit(self, attempt: Attempt, digest: str) -> dict[str, Any]:
        """Create the attempt's objects, or adopt its Job: a create whose answer was lost has made it. Raises
        UnansweredError if the cluster may have taken the attempt or not."""
        from orchestrator.launchers import kubernetes_app

        where = _where(sections.merged("kubernetes", self.cluster, attempt.settings.get("resources", {})))
        try:
            with answering():
                kubernetes_app.schedule(where.api.client, self.cluster, attempt, digest)
        except RefusedError as error:
            if error.reason != "AlreadyExists":
                raise _refusal(where, error) from error
        except NoAnswerError as error:
            if isinstance(error, NotConfiguredError) or error.status == 403:
                raise _refusal(where, error) from error
            raise UnansweredError(str(error)) from error
        finally:
            kubernetes_seen.forget()
        return _adopted(where, attempt, digest)

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        """One list of jobs and one of pods, later only what changed of them, at most every `poll_seconds`, whoever asks
        in this process; and events of what is wrong."""
        places = [self._place(query) for query in queries]
        newest = max((float(query.handle.get("submitted", 0)) for query in queries if query.handle), default=0.0)
        looks: dict[Where, Seen | NoAnswerError] = {}
        for where in dict.fromkeys(places):
            try:
                looks[where] = kubernetes_seen.look(where, self.poll, newest)
            except NoAnswerError as error:
                looks[where] = error
        return [self._observation(query, looks[where]) for query, where in zip(queries, places, strict=True)]

    def cancel(self, query: Query, *, hard: bool) -> None:
        """Delete its Job: the pods get SIGTERM and their grace, and the Job is there as long as they are; `hard`: no
        grace, and wait for them. Raises LaunchError if the cluster does not answer, or the pods do not end."""
        where = self._place(query)
        try:
            jobs = _matching(
                query, [records.job(item) for item in kubernetes_seen.named(where, where.jobs, query.launch_name)]
            )
            if hard:
                _end_pods(query, where)  # first: with their job they would be deleted with all of their grace
            for job in jobs:
                if hard or not kubernetes_words.is_finishing(job):
                    _delete(where, where.jobs, job.name, job.uid, "Background" if hard else "Foreground")
            if hard:
                _wait_until_gone(query, where)
        except (NoAnswerError, RefusedError) as error:
            raise LaunchError(f"{query.launch_name} cannot be cancelled now: {error}") from error
        finally:
            kubernetes_seen.forget()

    def clear(self, queries: Sequence[Query]) -> None:
        """Delete their Jobs, with whatever pods are left of them, and what is beside them: the log has what was to be
        known of them. Raises LaunchError if the cluster does not answer."""
        closed = {(self._place(query), query.run_id, query.digest) for query in queries}
        try:
            for where, run_id in {(where, run_id) for where, run_id, _ in closed}:
                for path in where.kinds:
                    for item in kubernetes_seen.of_run(where, path, run_id):
                        if (where, run_id, records.job(item).digest) in closed:
                            _delete(where, path, item["metadata"]["name"], item["metadata"]["uid"], "Background")
        except (NoAnswerError, RefusedError) as error:
            raise LaunchError(f"jobs that are over cannot be deleted now: {error}") from error
        finally:
            kubernetes_seen.forget()

    def usable_nodes(self, resources: Mapping[str, Any], exclude: Sequence[str]) -> int | None:
        """Of the nodes that the selector names; None where we may not list nodes, or there is no answer."""
        section = sections.merged("kubernetes", self.cluster, resources)
        with suppress(NoAnswerError, RefusedError):
            nodes = _where(section).api.get("/api/v1/nodes", labelSelector=kubernetes_nodes.selector(section))["items"]
            return kubernetes_nodes.usable(nodes, section, resources, exclude)
        return None

    def _place(self, query: Query) -> Where:
        """Where to look for it: as its handle says, else as its phase and the profile do."""
        if query.handle is None:
            return _where(sections.merged("kubernetes", self.cluster, _resources(query.run_dir, query.attempt)))
        return _where({**self.section, **{name: query.handle[name] for name in HANDLED if name in query.handle}})

    def _observation(self, query: Query, seen: Seen | NoAnswerError) -> Observation:
        if isinstance(seen, NoAnswerError):
            return Observation(LaunchState.UNKNOWN, query.handle, str(seen))
        job = _chosen(query, seen)
        if job is None:
            return _of_none(query, seen)
        pods, now = seen.pods.get(job.uid, ()), time.time()
        events = kubernetes_seen.events(seen.where, kubernetes_words.wonders(job, pods, now))
        handle = query.handle or _handle(seen.where, job)
        found = kubernetes_words.observation(job, pods, events, self._known(query, handle, job, pods), now)
        if found.state is LaunchState.ENDED:
            _ended[job.uid] = found
        return found

    def _known(self, query: Query, handle: dict[str, Any], job: Job, pods: Sequence[Pod]) -> Known:
        """Nothing is read for an attempt that simply runs."""
        silent = any(pod.silent_since is not None for pod in pods)
        if not (silent or kubernetes_words.is_placing(job, pods)):
            return Known(handle, GANG_SECONDS, LOST_SECONDS)
        section = sections.merged("kubernetes", self.cluster, _resources(query.run_dir, query.attempt))
        gang, lost = section.get("gang_seconds", GANG_SECONDS), section.get("lost_seconds", LOST_SECONDS)
        return Known(handle, float(gang), float(lost), _recorded(query) if silent else 0.0)


HANDLED = ("namespace", "scheduler", "pod_group_api")
"""What a handle says of the section, as the job may have said otherwise than the profile."""


def _where(section: Mapping[str, Any]) -> Where:
    return Where(
        section.get("context"), section.get("namespace") or "default", section.get("scheduler") or "indexed-job",
        section.get("pod_group_api") or records.POD_GROUP_API,
    )  # fmt: skip


@functools.lru_cache(maxsize=10_000)
def _resources(run_dir: str, attempt: int) -> Mapping[str, Any]:
    """What the phase of an attempt says of resources, from its immutable YAML; nothing if that was never written."""
    path = f"{run_dir}/{contract.attempt_yaml(attempt)}"
    with suppress(FileNotFoundError):
        found: Mapping[str, Any] = contract.read_attempt(storage.read(path), path).settings.get("resources", {})
        return found
    return {}


def _recorded(query: Query) -> float:
    """When the attempt recorded its last step, seconds since the epoch; 0 if it did not."""
    step = progress.latest(query.run_dir, query.attempt)
    return step.time if step else 0.0


def _handle(where: Where, job: Job) -> dict[str, Any]:
    """What is remembered of a job, to look it up. submitted: what was seen before that, seconds since the epoch by the
    cluster's clock, cannot have it; its time of creation is cut to whole seconds."""
    return {
        "job": job.name, "namespace": where.namespace, "uid": job.uid, "scheduler": where.scheduler,
        **({"pod_group_api": where.pod_group_api} if where.scheduler == "pod-group" else {}),
        "submitted": job.created + 1,
    }  # fmt: skip


# --- whose job it is --------------------------------------------------------------------------------------------------


def _is_its(query: Query, thing: Job | Pod) -> bool:
    return (thing.run_id, thing.digest) == (query.run_id, query.digest)


def _matching(query: Query, jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.name == query.launch_name and _is_its(query, job)]


def _chosen(query: Query, seen: Seen) -> Job | None:
    """The handle's, and no other of its name; without a handle the one that bears its name, run id and digest."""
    if query.handle is not None:
        return seen.jobs.get(str(query.handle["uid"]))
    return next(iter(_matching(query, list(seen.jobs.values()))), None)


def _of_none(query: Query, seen: Seen) -> Observation:
    """Of an attempt without a Job: it is over, or was never there."""
    if query.handle is not None:
        uid = str(query.handle["uid"])
        if uid in _ended:
            return _ended[uid]
        return kubernetes_words.gone(query.launch_name, seen.pods.get(uid, ()), query.handle, time.time())
    path = f"{query.run_dir}/{contract.claim_file(query.attempt)}"
    with suppress(FileNotFoundError):
        claim = contract.decode(storage.read(path), Claim, path)
        if claim.launch_name == query.launch_name:
            return Observation(LaunchState.ENDED, None, "it was claimed, and its job is gone")
    return Observation(LaunchState.ABSENT)


def _adopted(where: Where, attempt: Attempt, digest: str) -> dict[str, Any]:
    """The handle of the Job that is there under the attempt's name, created just now or before."""
    query = Query(attempt.run_dir, attempt.run_id, attempt.attempt, attempt.launch_name, digest, None)
    try:
        found = [records.job(item) for item in kubernetes_seen.named(where, where.jobs, attempt.launch_name)]
    except (NoAnswerError, RefusedError) as error:
        raise UnansweredError(f"{attempt.launch_name} was created and cannot be looked up: {error}") from error
    for job in _matching(query, found):
        if not job.deleting:
            return _handle(where, job)
    raise LaunchError(
        f"{attempt.launch_name} is there already in namespace {where.namespace}, and is not this attempt's: delete it "
        f"(kubectl -n {where.namespace} delete {where.jobs.rsplit('/', 1)[-1]} {attempt.launch_name}), or submit under "
        "another --run"
    )


# --- deleting ---------------------------------------------------------------------------------------------------------


def _delete(where: Where, path: str, name: str, uid: str, propagation: str) -> None:
    body = {"propagationPolicy": propagation, "preconditions": {"uid": uid}}
    try:
        where.api.delete(f"{path}/{name}", body)
    except RefusedError as error:
        if error.status != 404:
            raise
    except NoAnswerError as error:
        if error.status != 409:  # another object has its name by now
            raise


def _end_pods(query: Query, where: Where) -> None:
    """SIGTERM and a moment later SIGKILL to all of the attempt's pods."""
    if _living(query, where):
        selector = f"{records.OURS},{records.NAME}={query.launch_name},{records.RUN_ID}={query.run_id}"
        where.api.delete(where.pods, {"gracePeriodSeconds": KILL_GRACE}, labelSelector=selector)


def _wait_until_gone(query: Query, where: Where) -> None:
    """Until their nodes say that they are. Those on nodes that are not heard of cannot be waited for: what may come
    back there finds its attempt closed."""
    deadline = time.monotonic() + GONE_SECONDS
    known = {pod.uid for pod in _living(query, where)}
    while left := _living(query, where):
        if new := {pod.uid for pod in left} - known:  # its job made them in the last moment
            known |= new
            _end_pods(query, where)
        if time.monotonic() > deadline:
            pods = ", ".join(f"{pod.name} on {pod.node}" for pod in left)
            raise LaunchError(
                f"pods were killed and have not ended: {pods}; one that was asked to stop before may keep the grace "
                "that it had (kubernetes.grace_seconds), or their nodes are gone"
            )
        time.sleep(0.3)


def _living(query: Query, where: Where) -> list[Pod]:
    pods = [records.pod(item) for item in kubernetes_seen.named(where, where.pods, query.launch_name)]
    return [pod for pod in pods if _is_its(query, pod) and not pod.is_over and (pod.lives(time.time()) or not pod.node)]


# --- refusals ---------------------------------------------------------------------------------------------------------

ADVICE = {
    "exceeded quota": "a quota of the namespace is used up: fewer nodes, or ask for more; `kubectl describe quota`",
    "no PriorityClass": "kubernetes.priority_class is not on this cluster; `kubectl get priorityclass` lists them",
    "namespaces": "kubernetes.namespace is not on this cluster; `kubectl get namespaces` lists them",
    "page not found": "kubernetes.scheduler (or pod_group_api) needs something that is not installed on this "
    "cluster; indexed-job needs nothing",
    "violates PodSecurity": "the namespace does not allow such pods: see kubernetes.run_as_user, read_only_root and "
    "volumes",
    "cannot create resource": "the service account or user may not; `dinoctl doctor` lists the rights that are needed",
    "unknown field": "this cluster's Kubernetes is older or newer than dinoctl knows",
}
"""What to do about a refusal, by a word of the server's."""


def _refusal(where: Where, error: NoAnswerError | RefusedError) -> LaunchError:
    words = str(error)
    advice = next((what for sign, what in ADVICE.items() if sign in words), "")
    return LaunchError(f"namespace {where.namespace}: {words}" + (f"; {advice}" if advice else ""))
