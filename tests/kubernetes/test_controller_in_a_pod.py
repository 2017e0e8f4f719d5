"""The Deployment of clusters/kubernetes/controller.yaml in the cluster itself: a user without powers, the token that
the kubelet gave its pod, and nobody outside who would do what is due. The ranks are a stand-in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.contract import Cause
from orchestrator import control, store
from orchestrator.asking_kubernetes import connect
from orchestrator.cluster import ClusterProfile
from tests.kubernetes.cluster import Place
from tests.kubernetes.fake import names
from tests.kubernetes.manifests import NAME, documents, post
from tests.model.standin.attempts import copy_code
from tests.orchestrator.pretend import job_spec

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]

USER = 1000
"""Of the manifest's pod and of the attempts' pods."""

PODS = ("pods", "--selector", f"app.kubernetes.io/name={NAME}")

TRAINER = """
import sys, time
from pathlib import Path
from model import contract, storage
from model.contract import EVALUATE, Cause, RankEnd

attempt = contract.read_attempt(storage.read(sys.argv[1]), sys.argv[1])
run = Path(attempt.run_dir)
(run.parents[1] / f"begun-{attempt.attempt}").touch()
while not (run.parents[1] / "go").exists():
    contract.pulse_file(attempt.launch_name, 0).touch()
    time.sleep(0.1)
steps = 0 if attempt.phase == EVALUATE else attempt.settings["steps"]
if steps:
    storage.publish(f"{run}/{contract.manifest_file(attempt.phase, attempt.attempt, steps)}", b"{}")
end = RankEnd(cause=Cause.DONE, message="the test let it go", step=steps)
storage.publish(f"{run}/{contract.rank_file(attempt.attempt, 0)}", contract.encode(end))
sys.exit(contract.EXIT_CODES[Cause.DONE])
"""
"""In the place of model.train and model.evaluate.run: it waits for a file of the test's, and is done."""


def section_of(place: Place, folder: Path) -> dict[str, Any]:
    """Of a profile whose attempts find TRAINER in the place of the real one."""
    code = copy_code(folder)
    for file in ("train.py", "evaluate/run.py"):
        (code / "model" / file).write_text(TRAINER)
    section = place.pod_section(folder, gpus=False, run_as_user=USER, poll_seconds=0.5)
    return section | {"env": {**section["env"], "PYTHONPATH": str(code)}}


def submitted(runs: Path, section: dict[str, Any]) -> str:
    """A run of one phase and an evaluation, which nobody watches; its folder."""
    spec = job_spec()
    spec["phases"] = {"pretrain": spec["phases"]["pretrain"]}
    for told in (spec["phases"]["pretrain"], spec["evaluate"]):
        told["resources"]["processes_per_node"] = 1
    values = {"name": "there", "launcher": "kubernetes", "gpus_per_node": 1, "kubernetes": section}
    profile = ClusterProfile.model_validate(values).model_dump(mode="json")
    run = str(runs / "demo")
    control.submit(run, control.Request("demo", spec, profile, lambda *recorded: recorded), by="test")
    return run


def as_it_is_here(deployment: dict[str, Any], place: Place, runs: Path, section: dict[str, Any]) -> None:
    """What the manifest leaves to the site (image, folder of runs), and what the dev cluster's pods lack: Python, and
    somebody who answers at the address of the Service `kubernetes`, which the kubelet tells them (no kube-proxy)."""
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["command"][0], container["command"][-1]) == ("python3", "s3://BUCKET/runs")
    container["command"][0], container["command"][-1] = section["python"], str(runs)
    container |= {"image": section["image"], "imagePullPolicy": section["pull_policy"]}
    server = place.ours.settings
    container["env"] += [
        {"name": "KUBERNETES_SERVICE_HOST", "value": server.gateway},
        {"name": "KUBERNETES_SERVICE_PORT", "value": str(server.port)},
    ]
    for name, volume in section["volumes"].items():
        mount = {"name": name, "mountPath": volume["path"], "readOnly": volume["read_only"]}
        container["volumeMounts"].append(mount)
        pod["volumes"].append({"name": name, "hostPath": {"path": volume["host_path"]}})
    pod["nodeSelector"] = section["node_selector"]


def install(place: Place, runs: Path, section: dict[str, Any]) -> None:
    """As the manifest's own words have it: the Secret, then the manifest."""
    place.kubectl("create", "secret", "generic", "dinoctl-bucket", "--from-literal=AWS_ACCESS_KEY_ID=none")
    for document in documents("controller.yaml", place.namespace):
        if document["kind"] == "Deployment":
            as_it_is_here(document, place, runs, section)
        post(connect(), document)


def new_controller(place: Place, runs: Path, *, after: str = "") -> str:
    """The name of the Deployment's pod, once it has looked at the runs. after: that of one which was there before."""
    found = ""

    def looks() -> bool:
        nonlocal found
        there = {pod["metadata"]["name"] for pod in place.get(*PODS)["items"]} - {after}
        watching = {watcher.host for watcher in store.watchers(f"{runs}/{store.FOLDER}")}
        found = next(iter(there & watching), "")
        return bool(found)

    place.wait(looks, "a controller's pod to look at the runs")
    return found


def processes(runs: Path) -> set[psutil.Process]:
    """The controllers' own: the real nodes are this machine."""
    listed = psutil.process_iter(["cmdline"])
    return {one for one in listed if {"watch", str(runs)} <= set(one.info["cmdline"] or [])}


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """A failure comes with what the controller's pods say."""
    try:
        yield
    except Exception as error:
        error.add_note(place.kubectl("describe", *PODS))
        error.add_note(place.kubectl("logs", "--prefix", "--ignore-errors", *PODS[1:]))
        raise


def test_the_run_goes_on_in_the_deployment_s_next_pod_when_one_is_killed(real_nodes: Place, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    runs = folder / "runs"
    runs.mkdir(parents=True)
    section = section_of(real_nodes, folder)
    run = submitted(runs, section)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    install(real_nodes, runs, section)
    with explained(real_nodes):
        first = new_controller(real_nodes, runs)
        real_nodes.wait((folder / "begun-1").exists, "the first attempt's pod to train")
        old = processes(runs)
        assert {process.uids().effective for process in old} == {USER}
        real_nodes.kubectl("delete", "pod", first, "--grace-period=0", "--force")
        second = new_controller(real_nodes, runs, after=first)
        real_nodes.wait(lambda: not any(process.is_running() for process in old), f"the processes of {first} to end")
        (folder / "go").touch()
        real_nodes.wait(lambda: control.load(run).status != "running", "the run to be over")
        cleared = lambda: names(real_nodes, "jobs") == names(real_nodes, "services") == []  # noqa: E731
        real_nodes.wait(cleared, "all to be cleared away")
    end = control.load(run)
    assert end.status == "done", end.failed
    assert [attempt.end and attempt.end.cause for attempt in end.attempts] == [Cause.DONE] * 2
    launched_by = {attempt.phase: attempt.intent.owner.partition("/")[0] for attempt in end.attempts}
    assert launched_by == {"pretrain": first, "evaluate": second}
    (pod,) = real_nodes.get(*PODS)["items"]
    assert (pod["metadata"]["name"], pod["status"]["containerStatuses"][0]["restartCount"]) == (second, 0)
