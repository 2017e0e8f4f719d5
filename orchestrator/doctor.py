"""`dinoctl doctor`: what goes wrong first on a new cluster, found before a job is. One line a check.

settings of the cluster       orchestrator.slurm_doctor, orchestrator.kubernetes_doctor: ask, and judge the answers
small jobs on two nodes       orchestrator.doctor_on_nodes, and on the nodes model.doctor
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from model import storage
from orchestrator import doctor_on_nodes
from orchestrator.cluster import ClusterProfile
from orchestrator.findings import Finding, Patient, ok, warning, wrong

# --- this side --------------------------------------------------------------------------------------------------------


def runs_folder(patient: Patient) -> Iterator[Finding]:
    """The folder of runs, as it is seen from here."""
    runs = patient.runs
    if storage.is_uri(runs):
        try:
            storage.names(f"{runs}/.here")
        except storage.StoreError as error:
            yield wrong("runs", f"{runs} is out of reach: {error.strerror or error}", "look at its name and your keys")
        else:
            yield ok("runs", f"{runs}, a bucket that answers")
        return
    storage_folder = storage.local_file(f"{runs}/.here").parent
    free = shutil.disk_usage(storage_folder).free
    yield ok("runs", f"{runs}, {free / 1e9:,.0f} GB free")


# --- all of it --------------------------------------------------------------------------------------------------------


STOPS = {
    "slurm": ("commands", "controller", "partition", "sbatch"),
    "kubernetes": ("api server", "namespace", "rights", "dry run"),
}
"""Checks after which no job would start, if they found something wrong."""


def asked(patient: Patient) -> Iterator[Finding]:
    """What the cluster itself answers."""
    match patient.cluster.launcher:
        case "slurm":
            from orchestrator import slurm_doctor

            yield from slurm_doctor.examine(patient)
        case "kubernetes":
            from orchestrator import kubernetes_doctor

            yield from kubernetes_doctor.examine(patient)
        case _:
            pass


def examine(patient: Patient, *, jobs: bool, seconds: float) -> Iterator[Finding]:
    """Every check that the cluster's launcher has. jobs: also those that start jobs, which may take `seconds` together,
    the time in the queue included."""
    yield from runs_folder(patient)
    stopped, stops = False, STOPS.get(patient.cluster.launcher, ())
    for finding in asked(patient):
        stopped = stopped or (finding.level == "wrong" and finding.check in stops)
        yield finding
    if stopped and jobs:
        yield warning("on nodes", "not looked at: no job would start", "put right what is wrong above first")
    elif jobs:
        yield from doctor_on_nodes.examine(patient, seconds)


def as_mapping(cluster: ClusterProfile, findings: Sequence[Finding]) -> dict[str, Any]:
    """For `--json`."""
    count = sum(1 for finding in findings if finding.level == "wrong")
    return {"cluster": cluster.name, "wrong": count, "findings": [asdict(finding) for finding in findings]}
