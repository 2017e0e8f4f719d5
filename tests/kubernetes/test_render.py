"""What the Kubernetes launcher sends, said to a real API server with the real JobSet webhooks. Volcano's is not: no
server here knows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import yaml

from model.contract import EXIT_CODES, Attempt, Cause
from orchestrator import attempts
from orchestrator.launchers import kubernetes_app
from tests.model.standin.attempts import make
from tests.orchestrator.test_kubernetes_render import BARE, FULL, templates

if TYPE_CHECKING:
    from tests.kubernetes.cluster import Place

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]

SECTIONS: dict[str, dict[str, Any]] = {
    "bare": BARE,
    "full": FULL,
    "the image's user": {**BARE, "run_as_user": None},
    "CPUs alone": {**BARE, "gpus": False, "memory": "4Gi", "cpus": "2"},
    "every taint": {**BARE, "tolerations": [{}, {"effect": "NoExecute"}, {"key": "a", "effect": "PreferNoSchedule"}]},
    "own /tmp": {**BARE, "volumes": {"scratch": {"path": "/tmp", "host_path": "/nvme"}}},
}
NODES = 4


def attempt(folder: Path, **changes: Any) -> tuple[Attempt, str]:
    """One that has all it can have: nodes to leave out, a time limit, a name as long as any."""
    case = make(folder, ["steps:1"] * 8, **{"nodes": NODES, "exclude": ["n7", "n8"], **changes})
    case.attempt.settings.update({"resources": {"time_limit_minutes": 60}})
    name = attempts.launch_name("a" * 30, case.attempt.run_id, "b" * 16, 1)
    assert len(name) == attempts.NAME_LENGTH
    return msgspec.structs.replace(case.attempt, launch_name=name), case.digest


def cluster(place: Place, section: Mapping[str, Any], scheduler: str) -> dict[str, Any]:
    return {"kubernetes": {**section, "namespace": place.namespace, "scheduler": scheduler}}


def kept(said: Any, answered: Any, at: str = "") -> list[str]:
    """Where the answer is not what was said; what the server adds is left out."""
    if isinstance(said, Mapping) and isinstance(answered, Mapping):
        return [lost for key, value in said.items() for lost in kept(value, answered.get(key), f"{at}.{key}")]
    if isinstance(said, list) and isinstance(answered, list) and len(said) == len(answered):
        return [lost for one, other in zip(said, answered, strict=True) for lost in kept(one, other, f"{at}[]")]
    return [] if said == answered or (said == {} and answered is None) else [f"{at}: {said} became {answered}"]


def dry_run(place: Place, made: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the server would make of it, after every webhook, with nothing unknown in it. Raises what it refuses."""
    file = folder / "object.yaml"
    file.write_text(yaml.safe_dump(dict(made)))
    options = ("--dry-run=server", "--validate=strict", "--output=yaml")
    answer: dict[str, Any] = yaml.safe_load(place.kubectl("create", f"--filename={file}", *options))
    return answer


@pytest.mark.parametrize("scheduler", ["indexed-job", "jobset"])
def test_the_server_takes_all_that_a_profile_can_say_and_changes_nothing(
    scheduler: str, kubernetes: Place, tmp_path: Path
) -> None:
    for number, (name, section) in enumerate(SECTIONS.items()):
        told, digest = attempt(tmp_path / f"run-{number}")
        for one in kubernetes_app.objects(cluster(kubernetes, section, scheduler), told, digest):
            assert kept(one, dry_run(kubernetes, one, tmp_path)) == [], name


def test_the_longest_name_is_left_room_for_by_ten_thousand_pods(kubernetes: Place, tmp_path: Path) -> None:
    told, digest = attempt(tmp_path / "run", nodes=10_000)
    (made,) = kubernetes_app.objects(cluster(kubernetes, BARE, "jobset"), told, digest)
    assert dry_run(kubernetes, made, tmp_path)
    made["metadata"]["name"] += "x"
    with pytest.raises(Exception, match="JobSet name is too long"):
        dry_run(kubernetes, made, tmp_path)


def test_a_namespace_that_restricts_its_pods_lets_ours_in(kubernetes: Place, tmp_path: Path) -> None:
    """By Kubernetes' own strictest standard for pods; a profile that asks for more is refused there, and says so."""
    restricted = "pod-security.kubernetes.io/enforce=restricted"
    kubernetes.kubectl("label", "namespace", kubernetes.namespace, restricted)
    told, digest = attempt(tmp_path / "run")

    def pod(section: Mapping[str, Any]) -> dict[str, Any]:
        job = kubernetes_app.objects(cluster(kubernetes, section, "indexed-job"), told, digest)[-1]
        meta = {"name": "one", "namespace": kubernetes.namespace}
        return {"apiVersion": "v1", "kind": "Pod", "spec": templates(job)[0]["spec"], "metadata": meta}

    assert dry_run(kubernetes, pod(BARE), tmp_path)
    with pytest.raises(Exception, match="runAsNonRoot != true"):
        dry_run(kubernetes, pod({**BARE, "run_as_user": 0}), tmp_path)


@pytest.mark.parametrize("scheduler", ["indexed-job", "jobset"])
def test_what_is_created_is_what_was_shown_and_is_created_once(
    scheduler: str, kubernetes: Place, tmp_path: Path
) -> None:
    from kubernetes.client import ApiException
    from kubernetes.config import new_client_from_config

    told, digest = attempt(tmp_path / "run")
    profile = cluster(kubernetes, {**BARE, "node_selector": {"no": "such"}}, scheduler)
    shown = kubernetes_app.objects(profile, told, digest)
    with new_client_from_config(config_file=str(kubernetes.kubeconfig)) as client:
        named = kubernetes_app.schedule(client, profile, told, digest)
        assert named == f"{kubernetes.namespace}:{told.launch_name}"
        with pytest.raises(ApiException) as again:  # though the Service that is there is no hindrance
            kubernetes_app.schedule(client, profile, told, digest)
    assert (again.value.status, "AlreadyExists" in str(again.value.body)) == (409, True)
    for one in shown:
        there = kubernetes.get(one["kind"].lower(), told.launch_name)
        assert kept(one, there) == []
        assert there["metadata"]["labels"]["dinoctl/run-id"] == told.run_id
        kubernetes.kubectl("delete", one["kind"].lower(), told.launch_name)


def test_pods_are_apart_in_one_rack_and_not_on_nodes_that_are_left_out(kubernetes: Place, tmp_path: Path) -> None:
    """Of four fake nodes one is left out, and of the three others two share a rack: they are all that is left."""
    from kubernetes.config import new_client_from_config

    here = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    nodes = kubernetes.get("nodes", "--selector", ",".join("=".join(pair) for pair in here.items()))["items"]
    four = [node["metadata"]["name"] for node in nodes][:4]
    rack, pool = f"{kubernetes.namespace}.example.org/rack", f"{kubernetes.namespace}.example.org/pool"
    for name, where in zip(four, "abba", strict=True):
        kubernetes.kubectl("label", "node", name, f"{rack}={where}", f"{pool}=mine")
    section = {
        **BARE, "node_selector": {pool: "mine"}, "together": rack, "exclude": [four[0]], "cpus": "1",
        "tolerations": [{"key": "nvidia.com/gpu"}], "gpus": False,
    }  # fmt: skip
    told, digest = attempt(tmp_path / "run", nodes=2)
    with new_client_from_config(config_file=str(kubernetes.kubeconfig)) as client:
        kubernetes_app.schedule(client, cluster(kubernetes, section, "indexed-job"), told, digest)

    def placed() -> list[str]:
        pods = kubernetes.get("pods", "--selector", f"dinoctl/name={told.launch_name}")["items"]
        return sorted(pod["spec"].get("nodeName", "") for pod in pods)

    try:
        kubernetes.wait(lambda: len(placed()) == 2 and all(placed()), "both pods to be bound")
        assert placed() == sorted(four[1:3])
    finally:
        kubernetes.kubectl("label", "nodes", *four, f"{rack}-", f"{pool}-")


# --- real pods --------------------------------------------------------------------------------------------------------

POD = """#!{python}
import json, os, pathlib, signal, socket, sys, time

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
here, number, count = pathlib.Path(__file__).parent, int(os.environ["DINOCTL_NODE"]), int(os.environ["DINOCTL_NODES"])
said = {{name: value for name, value in os.environ.items() if name.startswith("DINOCTL_")}}
said |= {{"pid": os.getpid(), "words": sys.argv[1:], "user": os.getuid(), "home": os.environ["HOME"]}}
pathlib.Path("/tmp/mine").write_text("")
said["root"] = os.access("/", os.W_OK) and not os.statvfs("/").f_flag & os.ST_RDONLY
(here / f"{{number}}.tmp").write_text(json.dumps(said))
(here / f"{{number}}.tmp").rename(here / f"{{number}}.json")
for other in range(count):
    file = here / f"{{other}}.json"
    while not file.exists():
        time.sleep(0.1)
    address = json.loads(file.read_text())["DINOCTL_ADDRESS"]
    while True:
        try:
            found = socket.gethostbyname(address)
            break
        except OSError:
            time.sleep(0.2)
    (here / f"{{number}}-found-{{other}}").write_text(found)
while not asked:
    time.sleep(0.1)
sys.exit({code})
"""


@pytest.mark.parametrize(("scheduler", "on_host"), [("indexed-job", False), ("jobset", False), ("indexed-job", True)])
def test_real_pods_know_who_they_are_find_each_other_and_are_asked_to_stop_in_time(
    scheduler: str, on_host: bool, real_nodes: Place, tmp_path: Path
) -> None:
    """Each of two pods runs a script in Python's place, until the time limit: SIGTERM comes so long before it as the
    grace is, and its exit code is in the Job's condition."""
    from kubernetes.config import new_client_from_config

    case = make(tmp_path / "run", ["steps:1"] * 2, nodes=2)
    shared = tmp_path / "shared"
    shared.mkdir()
    script = shared / "python"
    script.write_text(POD.format(python=Path(sys.executable).resolve(), code=EXIT_CODES[Cause.STOPPED]))
    script.chmod(0o755)
    own = {"scheduler": scheduler, "host_network": on_host, "python": str(script), "grace_seconds": 55, "gpus": False}
    section = real_nodes.pod_section(shared, **own)
    case.attempt.settings.update({"resources": {"time_limit_minutes": 1}})
    with new_client_from_config(config_file=str(real_nodes.kubeconfig)) as client:
        kubernetes_app.schedule(client, {"kubernetes": section}, case.attempt, case.digest)
    name = case.attempt.launch_name
    job = name if scheduler == "indexed-job" else f"{name}-node-0"

    def failed() -> list[dict[str, Any]]:
        found = real_nodes.get("jobs.batch", "--selector", f"dinoctl/name={name}")["items"]
        conditions = [condition for one in found for condition in one.get("status", {}).get("conditions", [])]
        return [condition for condition in conditions if condition["type"] == "Failed"]

    real_nodes.wait(lambda: bool(failed()), "the Job to fail at its time limit", 120)
    assert failed()[0]["reason"] == "PodFailurePolicy"
    assert f"exit code {EXIT_CODES[Cause.STOPPED]}" in failed()[0]["message"]
    uid = real_nodes.get("job.batch", job)["metadata"]["uid"]
    hosts = set()
    for number in range(2):
        said = json.loads((shared / f"{number}.json").read_text())
        assert (said["DINOCTL_NODE"], said["DINOCTL_NODES"]) == (str(number), "2")
        assert said["DINOCTL_JOB"] == uid
        found = (shared / f"{1 - number}-found-{number}").read_text()
        assert said["DINOCTL_ADDRESS"] == (found if on_host else f"{job}-{number}.{name}")
        assert (said["pid"], said["home"], said["root"]) == (1, "/tmp", False)
        assert said["words"][:3] == ["-P", "-m", "model.agent"]
        hosts.add(said["DINOCTL_HOST"])
    assert len(hosts) == 2
