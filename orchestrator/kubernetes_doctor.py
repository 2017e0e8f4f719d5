"""What `dinoctl doctor` asks a Kubernetes before it starts pods there, and how it judges the answers.

Nothing is changed there: what would be sent is sent with `dryRun`, which the API server checks and forgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from model import storage
from orchestrator import kubernetes_checks, kubernetes_quota, kubernetes_rights
from orchestrator.asking_kubernetes import Api, NoAnswerError, RefusedError, connect
from orchestrator.findings import Finding, Patient, about_saves, ok, preemption, warning, wrong
from orchestrator.kubernetes_doctor_job import sent
from orchestrator.kubernetes_quantity import number
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.launchers import kubernetes_nodes
from orchestrator.problems import listed

Json = Mapping[str, Any]

OLDEST, NEWEST = 29, 37
"""Minor versions of 1 that dinoctl's objects are checked against."""

PROFILE = "set it in the profile's kubernetes section"


@dataclass(frozen=True)
class Site:
    """The part of a cluster that one profile talks to."""

    api: Api
    patient: Patient

    @property
    def told(self) -> Kubernetes:
        return self.patient.kubernetes

    def look(self, path: str, **params: Any) -> Any | None:
        """None if it is not there. Raises NoAnswerError, also where it may not be looked at, and RefusedError."""
        try:
            return self.api.get(path, **params)
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def named(self, resource: str, name: str) -> Any | None:
        """One of the namespace's; the resource by its path, as api/v1 and persistentvolumeclaims."""
        group, _, kind = resource.rpartition("/")
        return self.look(f"/{group}/namespaces/{self.told.namespace}/{kind}/{name}")


def examine(patient: Patient) -> Iterator[Finding]:
    """Every check that starts no pod. Stops where the rest would only say the same again."""
    try:
        site = Site(connect(patient.kubernetes.context), patient)
        yield _version(site.api.get("/version"))
    except (NoAnswerError, RefusedError) as error:
        todo = "`kubectl version` says the same: KUBECONFIG, kubernetes.context, your login, the network"
        yield wrong("api server", str(error), todo)
        return
    for check, look in CHECKS.items():
        try:
            yield from look(site)
        except (NoAnswerError, RefusedError) as error:
            yield warning(check, f"not found out: {error}", "nothing, if you are not to see it: the pods tell, below")


def _version(told: Json) -> Finding:
    version, digits = told["gitVersion"], "".join(filter(str.isdigit, told["minor"]))
    if told["major"] == "1" and digits and OLDEST <= int(digits) <= NEWEST:
        return ok("api server", f"answers, {version}")
    todo = "nothing, if the checks below are well: what newer releases refuse the dry run shows"
    return warning("api server", f"answers, {version}; dinoctl knows 1.{OLDEST} to 1.{NEWEST}", todo)


def _namespace(site: Site) -> Iterator[Finding]:
    name = site.told.namespace
    found = site.look(f"/api/v1/namespaces/{name}")
    if found is None:
        yield wrong("namespace", f"there is no {name}", f"`kubectl create namespace {name}`, or {PROFILE}")
    elif found["status"]["phase"] != "Active":
        yield wrong("namespace", f"{name} is {found['status']['phase']}", PROFILE)
    else:
        yield ok("namespace", name)


def _rights(site: Site) -> Iterator[Finding]:
    every = kubernetes_rights.rights(site.told.scheduler)
    gone = kubernetes_rights.missing(site.api, site.told.namespace, site.told.scheduler)
    if not gone:
        yield ok("rights", f"all {len(every)} that dinoctl uses in {site.told.namespace}")
    for right in gone:
        text = f"you may not {right.words}; without it no {right.feature}"
        todo = "the Role that grants it is in clusters/kubernetes; whoever runs the cluster creates it"
        yield wrong("rights", text, todo) if right.vital else warning("rights", text, todo)


def _scheduler(site: Site) -> Iterator[Finding]:
    """Is what an attempt is to be, and what queues it, there?"""
    told = site.told
    group, resource = kubernetes_rights.WHAT_AN_ATTEMPT_IS[told.scheduler]
    if told.scheduler == "pod-group":
        group, resource = f"scheduling.k8s.io/{told.pod_group_api}", "podgroups"
    if told.scheduler != "indexed-job":
        if site.look(f"/apis/{group}") is None:
            todo = f"have {told.scheduler} installed, or kubernetes.scheduler: indexed-job, which needs nothing"
            yield wrong("scheduler", f"no {resource}.{group} on this cluster", todo)
            return
        yield ok("scheduler", f"{resource}.{group} is there")
    if told.queue is None:
        return
    if told.scheduler == "volcano":
        kind, queue = "Queue", _newest(site, "scheduling.volcano.sh", f"queues/{told.queue}")
    else:
        where = f"namespaces/{told.namespace}/localqueues/{told.queue}"
        kind, queue = "LocalQueue", _newest(site, "kueue.x-k8s.io", where)
    if queue is None:
        yield wrong("queue", f"no {kind} {told.queue}, or nothing that has such queues", f"kubernetes.queue: {PROFILE}")
    else:
        yield ok("queue", f"{kind} {told.queue}")


def _newest(site: Site, group: str, path: str) -> Any | None:
    """Something of an API group in the version that the cluster likes best."""
    known = site.look(f"/apis/{group}")
    return known and site.look(f"/apis/{known['preferredVersion']['groupVersion']}/{path}")


def _priority(site: Site) -> Iterator[Finding]:
    name = site.told.priority_class
    if name is None:
        return
    found = site.look(f"/apis/scheduling.k8s.io/v1/priorityclasses/{name}")
    if found is None:
        yield wrong("priority", f"no PriorityClass {name}: no pod would be made", PROFILE)
    else:
        yield ok("priority", f"{name}, {found['value']:,}")


def _nodes(site: Site) -> Iterator[Finding]:
    """Nodes that the pods could be placed on, and what is wrong with the others that the selector takes."""
    told, section = site.told, site.told.model_dump(mode="json")
    selector, needed = kubernetes_nodes.selector(section), site.patient.needed
    nodes = site.api.get("/api/v1/nodes", labelSelector=selector)["items"]
    usable = [node for node in nodes if not why_not(node, section)]
    text = f"{len(usable)} of {len(nodes)} nodes{f' with {selector}' if selector else ''} can be used"
    if not nodes or len(usable) < needed:
        todo = "wait for nodes, tolerate their taints, or ask for fewer (resources.nodes)"
        yield wrong("nodes", f"{text}, {needed} needed", todo if nodes else f"kubernetes.node_selector: {PROFILE}")
    else:
        yield ok("nodes", text)
    if out := [f"{node['metadata']['name']} ({why_not(node, section)})" for node in nodes if node not in usable]:
        yield warning("nodes", f"left out: {listed(out, 8)}", "`kubectl describe node NAME` says since when")
    resources = {"processes_per_node": site.patient.processes}
    fitting = kubernetes_nodes.usable(nodes, section, resources, [])
    if told.together and fitting < needed <= len(usable):
        text = f"{fitting} nodes at most have the same {told.together}, {needed} needed"
        yield wrong("together", text, "fewer nodes, or kubernetes.together: a label that more of them share")
    if usable:
        yield from _gpus(site, usable)


def why_not(node: Json, section: Json) -> str:
    """Why none of our pods would be placed on a node, whatever runs there now; empty if one could."""
    spec, conditions = node.get("spec", {}), node.get("status", {}).get("conditions", [])
    if node["metadata"]["name"] in section["exclude"]:
        return "excluded by the profile"
    if kubernetes_nodes.is_usable(node, section["tolerations"]):
        return ""
    if spec.get("unschedulable"):
        return "cordoned"
    ready = [one["status"] for one in conditions if one["type"] == "Ready"]
    if ready != ["True"]:
        return "not ready" if ready == ["False"] else "not heard of"
    return "taints: " + ", ".join(_taint(one) for one in spec.get("taints", []))


def _taint(taint: Json) -> str:
    value = f"={taint['value']}" if taint.get("value") else ""
    return f"{taint['key']}{value}:{taint.get('effect', '')}"


def _gpus(site: Site, usable: Sequence[Json]) -> Iterator[Finding]:
    told, asked = site.told, site.patient.processes
    if not told.gpus:
        yield ok("gpus", "none asked for (kubernetes.gpus: false)")
        return
    given = [node.get("status", {}).get("allocatable", {}) for node in usable]
    counts = [number(amounts.get(told.gpu_resource, "0")) for amounts in given]
    text = f"nodes that can be used have {listed([f'{count:g}' for count in sorted({*counts})])} {told.gpu_resource}"
    if len([count for count in counts if count >= asked]) >= site.patient.needed:
        yield ok("gpus", f"{text}, a pod asks for {asked}")
        return
    others = sorted({name for amounts in given for name, amount in amounts.items() if "gpu" in name and number(amount)})
    todo = "set gpus_per_node to what they have, or kubernetes.gpus: false to train on CPUs"
    hint = f"; what they have is called {listed(others)}: kubernetes.gpu_resource" if others else ""
    yield wrong("gpus", f"{text}, a pod asks for {asked}: too few nodes have so many", f"{todo}{hint}")


def _quota(site: Site) -> Iterator[Finding]:
    quotas = site.api.get(f"/api/v1/namespaces/{site.told.namespace}/resourcequotas")["items"]
    made = sent(site.patient, site.patient.needed)
    pod = next(one.pod for one in made if one.pod is not None)
    yield from kubernetes_quota.judge(
        quotas, kubernetes_quota.attempt_needs([one.body for one in made], pod, site.patient.needed)
    )


def _volumes(site: Site) -> Iterator[Finding]:
    """Claims that are there, bound, and of a kind that pods on several nodes can use."""
    for name, volume in site.told.volumes.items():
        if volume.claim is None:
            continue
        claim = site.named("api/v1/persistentvolumeclaims", volume.claim)
        if claim is None:
            yield wrong("volumes", f"{name}: no PersistentVolumeClaim {volume.claim}", PROFILE)
            continue
        modes, phase = claim["spec"].get("accessModes", []), claim["status"].get("phase", "unknown")
        shared = "ReadWriteMany" in modes or (volume.read_only and "ReadOnlyMany" in modes)
        text = f"{name}: claim {volume.claim} is {phase}, {listed(modes)}"
        if not shared and max(site.patient.needed, site.patient.nodes) > 1:
            yield wrong("volumes", f"{text}: one node alone can use it", "a claim that is ReadWriteMany, or a bucket")
        elif phase != "Bound":
            todo = "nothing, if its StorageClass waits for the first pod; else `kubectl describe pvc` says why"
            yield warning("volumes", text, todo)
        else:
            yield ok("volumes", text)


def _references(site: Site) -> Iterator[Finding]:
    """That Secrets, ConfigMaps and the service account are there; what is in them is not looked at."""
    told = site.told
    secrets = [reference.split("/")[0] for reference in told.secret_env.values()]
    secrets += [volume.secret for volume in told.volumes.values() if volume.secret]
    secrets += [*told.env_from_secrets, *told.pull_secrets]
    names = [("secrets", "Secret", name) for name in dict.fromkeys(secrets)]
    names += [("configmaps", "ConfigMap", volume.config_map) for volume in told.volumes.values() if volume.config_map]
    names += [("serviceaccounts", "ServiceAccount", told.service_account)] if told.service_account else []
    for resource, kind, name in names:
        try:
            found = site.named(f"api/v1/{resource}", name)
        except NoAnswerError as error:
            todo = "nothing: it is well if you may not read Secrets, and a pod that lacks one says so, below"
            yield warning(resource, f"{kind} {name}: not looked at: {error}", todo)
            continue
        if found is None:
            yield wrong(resource, f"no {kind} {name}", f"have it made in {told.namespace}, or {PROFILE}")
        else:
            yield from _keys(told, kind, name, found)


def _keys(told: Kubernetes, kind: str, name: str, found: Json) -> Iterator[Finding]:
    wanted = [reference.split("/")[1] for reference in told.secret_env.values() if reference.split("/")[0] == name]
    gone = [key for key in wanted if key not in found.get("data", {})] if kind == "Secret" else []
    check = f"{kind.lower()}s"
    if gone:
        yield wrong(check, f"Secret {name} has no key {listed(gone)}", "kubernetes.secret_env: SECRET/KEY")
    else:
        yield ok(check, f"{kind} {name} is there")


def _dry_run(site: Site) -> Iterator[Finding]:
    """The API server itself on objects like ours, which it does not keep: fields, admission, what the site forbids."""
    for made in sent(site.patient, site.patient.needed):
        try:
            site.api.post(made.path(), made.body, dryRun="All", fieldValidation="Strict")
        except (RefusedError, NoAnswerError) as error:
            if isinstance(error, NoAnswerError) and error.status != 403:  # as a quota and a site's own rules answer
                raise
            todo = "what it says is about the profile's kubernetes section, or a rule of the site"
            yield wrong("dry run", f"{made.kind}: {error}", todo)
            return
    yield ok("dry run", f"would take an attempt of {site.patient.needed} pod{'s' * (site.patient.needed > 1)}")


def _submit(site: Site) -> Iterator[Finding]:
    """What `submit` would refuse, without asking anybody; what is remarked on is in `validate` and `plan`."""
    patient, told = site.patient, site.told
    here = [volume.path for volume in told.volumes.values() if volume.here and not volume.read_only]
    if patient.job is not None:
        for problem in kubernetes_checks.refusals(patient.job, patient.cluster, patient.runs):
            yield wrong("submit", f"{problem.message}: {problem.found}", f"allowed: {problem.allowed}")
        for path, text in kubernetes_checks.remarks(patient.job, patient.cluster):
            if path[-1] == "notice_seconds":
                yield warning("notice", f"{'.'.join(map(str, path))}: {text}", "see runbooks/notice-too-short.md")
        return
    if not storage.is_uri(patient.runs) and not any(PurePath(patient.runs).is_relative_to(path) for path in here):
        todo = "--runs s3://BUCKET/PREFIX, or below a volume of the profile with `here: true` that is not read-only"
        yield wrong("submit", f"pods cannot write to {patient.runs}, which is this machine's", todo)
    if "@sha256:" not in told.image and told.pull_policy != "Never":
        yield wrong("submit", f"{told.image} may be another one tomorrow", "kubernetes.image: NAME@sha256:DIGEST")


def _notice(site: Site) -> Iterator[Finding]:
    """How long the grace period is, and whether a save fits."""
    found = preemption(site.patient)
    assert found is not None
    yield ok("preemption", str(found))
    yield from about_saves(site.patient, found, None)


CHECKS: dict[str, Callable[[Site], Iterator[Finding]]] = {
    "namespace": _namespace,
    "rights": _rights,
    "scheduler": _scheduler,
    "priority": _priority,
    "nodes": _nodes,
    "quota": _quota,
    "volumes": _volumes,
    "secrets": _references,
    "submit": _submit,
    "dry run": _dry_run,
    "preemption": _notice,
}
