"""What the controller in the cluster may do there, asked of a real API server: with all of its rights everything works,
without any one of them the feature that the table names for it does not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import asking_kubernetes, kubernetes_rights as rights
from orchestrator.asking_kubernetes import Api, connect
from orchestrator.kubernetes_rights import Right
from orchestrator.launchers import kubernetes_app, kubernetes_seen
from orchestrator.launchers.base import LaunchError, LaunchState, Query
from orchestrator.launchers.kubernetes import KubernetesLauncher
from orchestrator.launchers.kubernetes_seen import Where
from tests.kubernetes.cluster import Place
from tests.kubernetes.manifests import NAME, documents, post
from tests.orchestrator.kubernetes_attempts import DIGEST, attempt, profile

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]

RBAC = "/apis/rbac.authorization.k8s.io/v1"

SCHEDULER = "pod-group"
"""It needs all that a plain Job does, and its group."""

EVERY = [*rights.of_controller(SCHEDULER), *rights.OF_NODES]


def until(is_so: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Site:
    """A namespace, as its owner (`admin`) and as the controller (`kubeconfig`) see it."""

    namespace: str
    admin: Api
    kubeconfig: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def launcher(self) -> KubernetesLauncher:
        return KubernetesLauncher(profile(namespace=self.namespace, scheduler=SCHEDULER, poll_seconds=0.001))

    @property
    def where(self) -> Where:
        return Where(None, self.namespace, SCHEDULER)

    def grant(self, granted: Sequence[Right]) -> None:
        """Replace what the controller may do by that, and wait until the server goes by it."""
        roles = f"{RBAC}/namespaces/{self.namespace}/roles"
        own = [one for one in granted if not (one.everywhere or one in rights.WITH_GROUP)]
        for role, chosen in (
            (f"{roles}/{NAME}", own),
            (f"{roles}/{NAME}-{SCHEDULER}", [one for one in granted if one in rights.WITH_GROUP]),
            (f"{RBAC}/clusterroles/{NAME}-{self.namespace}", [one for one in granted if one.everywhere]),
        ):
            self.admin.patch(role, {"rules": rights.rules(chosen)})
        gone = [right for right in EVERY if right not in granted]
        until(lambda: self.missing() == gone, f"the server to refuse {[right.words for right in gone]} alone")

    def missing(self) -> list[Right]:
        return [right for right in rights.missing(self.as_controller(), self.namespace, SCHEDULER) if right in EVERY]

    def as_controller(self) -> Api:
        self.monkeypatch.setenv("KUBECONFIG", str(self.kubeconfig))
        return connect()

    def sent_by_admin(self, number: int) -> Query:
        """An attempt that is there already."""
        told = attempt(number=number)
        for made in kubernetes_app.objects(self.launcher.cluster, told, DIGEST):
            post(self.admin, made)
        jobs = f"{self.path('Job')}/{told.launch_name}"
        uid = self.admin.get(jobs)["metadata"]["uid"]
        until(lambda: self.admin.get(jobs)["status"].get("active"), "its pods to be made")
        handle = {"job": told.launch_name, "namespace": self.namespace, "uid": uid, "scheduler": SCHEDULER}
        return Query("/nowhere", told.run_id, told.attempt, told.launch_name, DIGEST, handle)

    def path(self, kind: str) -> str:
        group = "/apis/batch/v1" if kind == "Job" else "/api/v1"
        return f"{group}/namespaces/{self.namespace}/{kind.lower()}s"


@pytest.fixture
def site(kubernetes: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The manifests of clusters/kubernetes in the test's namespace, and a kubeconfig of their service account."""
    admin, namespace = connect(), kubernetes.namespace
    for file in ("controller.yaml", f"{SCHEDULER}.yaml", "nodes.yaml"):
        for document in documents(file, namespace):
            if document["kind"] != "Deployment":
                post(admin, document)
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = admin.post(f"/api/v1/namespaces/{namespace}/serviceaccounts/{NAME}/token", asked)["status"]["token"]
    file = tmp_path / "controller.kubeconfig"
    file.write_text(json.dumps(as_user(yaml.safe_load(Path(kubernetes.kubeconfig).read_text()), {"token": token})))
    return Site(namespace, admin, file, monkeypatch)


def as_user(config: dict[str, Any], user: dict[str, str]) -> dict[str, Any]:
    return {**config, "users": [{**one, "user": user} for one in config["users"]]}


# --- the features -----------------------------------------------------------------------------------------------------


def submit(site: Site, number: int) -> bool:
    site.as_controller()
    try:
        return site.launcher.submit(attempt(number=number), DIGEST)["namespace"] == site.namespace
    except LaunchError:
        return False


def observe(site: Site, number: int) -> bool:
    """Twice: first all is listed, then what changed is told."""
    query = site.sent_by_admin(number)
    site.as_controller()
    kubernetes_seen.forget_all()  # as a controller that has just begun
    seen = [site.launcher.observe([query])[0].state for _ in range(2)]
    return LaunchState.UNKNOWN not in seen


def end(site: Site, number: int) -> bool:
    query = site.sent_by_admin(number)
    site.as_controller()
    try:
        site.launcher.cancel(query, hard=False)
        site.launcher.clear([query])
    except LaunchError:
        return False
    group = f"/apis/scheduling.k8s.io/v1alpha2/namespaces/{site.namespace}/podgroups"
    left = [*site.admin.get(site.path("Service"))["items"], *site.admin.get(group)["items"]]
    return query.launch_name not in {
        one["metadata"]["name"] for one in left if "deletionTimestamp" not in one["metadata"]
    }


def kill(site: Site, number: int) -> bool:
    """Pods that outlive their Job."""
    query = site.sent_by_admin(number)
    job = f"{site.path('Job')}/{query.launch_name}"
    site.admin.delete(job, {"propagationPolicy": "Orphan"})
    jobs = site.path("Job")
    until(lambda: query.launch_name not in {one["metadata"]["name"] for one in site.admin.get(jobs)["items"]}, job)
    site.as_controller()
    try:
        site.launcher.cancel(query, hard=True)
    except LaunchError:
        return False
    selector = f"dinoctl/name={query.launch_name}"
    return not site.admin.get(site.path("Pod"), labelSelector=selector)["items"]


def why(site: Site, number: int) -> bool:
    query = site.sent_by_admin(number)
    selector = f"involvedObject.name={query.launch_name}"
    until(lambda: site.admin.get(site.path("Event"), fieldSelector=selector)["items"], "an event of its job")
    site.as_controller()
    return bool(kubernetes_seen.events(site.where, [query.launch_name]))


def nodes(site: Site, number: int) -> bool:
    site.as_controller()
    return site.launcher.usable_nodes({}, []) is not None


FEATURES = {
    rights.SUBMIT: submit,
    rights.OBSERVE: observe,
    rights.END: end,
    rights.KILL: kill,
    rights.WHY: why,
    rights.NODES: nodes,
}


def test_with_all_rights_every_feature_works_and_without_any_one_its_own_does_not(site: Site) -> None:
    site.grant(EVERY)
    works = {name: feature(site, number) for number, (name, feature) in enumerate(FEATURES.items(), start=1)}
    assert works == dict.fromkeys(FEATURES, True)
    for number, right in enumerate(EVERY, start=len(FEATURES) + 1):
        site.grant(rights.without(EVERY, right))
        assert not FEATURES[right.feature](site, number), f"{right.words} is to spare"


def test_the_whole_manifest_is_taken_and_grants_what_the_table_says(site: Site) -> None:
    until(lambda: site.missing() == [], "the server to go by the manifest")
    (deployment,) = (one for one in documents("controller.yaml", site.namespace) if one["kind"] == "Deployment")
    post(site.admin, deployment, dryRun="All")
    beyond = [Right("get", "", "secrets", ""), Right("create", "", "pods", ""), Right("list", "", "secrets", "")]
    assert not any(rights.allowed(site.as_controller(), site.namespace, right) for right in beyond)
    assert not any(
        rights.allowed(site.as_controller(), "kube-system", right) for right in EVERY if not right.everywhere
    )


def test_in_a_pod_the_cluster_around_it_is_asked(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod: no kubeconfig, two variables, and the service account's files."""
    from kubernetes.config import incluster_config

    config = yaml.safe_load(site.kubeconfig.read_text())
    server, cluster = config["clusters"][0]["cluster"]["server"], config["clusters"][0]["cluster"]
    host, _, port = server.removeprefix("https://").rpartition(":")
    authority = tmp_path / "ca.crt"
    authority.write_bytes(ca_of(cluster))
    token = tmp_path / "token"
    token.write_text(config["users"][0]["user"]["token"])
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))
    for name, value in (("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port), ("HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KUBECONFIG")
    asking_kubernetes.forget()
    until(lambda: rights.missing(connect(), site.namespace, "indexed-job") == [*rights.OF_DOCTOR], "its rights")


def ca_of(cluster: dict[str, str]) -> bytes:
    import base64

    if "certificate-authority" in cluster:
        return Path(cluster["certificate-authority"]).read_bytes()
    return base64.b64decode(cluster["certificate-authority-data"])
