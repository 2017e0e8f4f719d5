"""The cluster's profile: pods that run this checkout's Python and code, which they see at the paths they have here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from clusters.dev.kubernetes import image
from clusters.dev.kubernetes.cluster import REAL, WHOLE_NODE, Cluster
from clusters.dev.kubernetes.node import GPU

CHECKOUT = Path(__file__).parents[3]
PYTHON = CHECKOUT / ".venv" / "bin" / "python"
NAME = "dev_kubernetes"


def section(*folders: Path, namespace: str = "default", python: Path = PYTHON, owner: int = 0) -> dict[str, Any]:
    """The `kubernetes` section of a profile. folders: what pods may write to, at the path that it has here: runs, and
    where images lie. owner: whose processes the pods are, as these folders are somebody's: root's, mostly."""
    seen = {Path("/usr"), CHECKOUT, *_of_python(python)}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoctl"
    if cache.is_dir():
        seen.add(cache)
    inner = {path for path in seen if seen.isdisjoint(path.parents)}  # a folder in one of the others needs no mount
    volumes = {f"here-{number}": _volume(path, read_only=True) for number, path in enumerate(sorted(inner))}
    volumes |= {f"mine-{number}": _volume(path, read_only=False) for number, path in enumerate(folders)}
    return {
        "namespace": namespace, "image": image.HOST, "pull_policy": "Never", "python": str(python),
        "node_selector": {REAL: "true"}, "tolerations": [{"key": GPU}],
        "extra_resources": {WHOLE_NODE: "1"},  # both nodes are one machine: a pod gets one for itself all the same
        "cpus": "500m", "shm_size": "256Mi", "run_as_user": owner, "volumes": volumes,
        "env": {"XDG_CACHE_HOME": str(cache.parent)}, "grace_seconds": 30, "gang_seconds": 60, "lost_seconds": 10,
        "poll_seconds": 1,
    }  # fmt: skip


def _volume(path: Path, *, read_only: bool) -> dict[str, Any]:
    return {"path": str(path), "host_path": str(path), "here": True, "read_only": read_only}


def _of_python(python: Path) -> set[Path]:
    """The folders that an interpreter lives in: its virtual environment, and those that its links lead to."""
    found = set()
    while True:
        found.add(python.parents[1])
        if not python.is_symlink():
            return found
        python = python.parent / python.readlink()
        python = python.parent.resolve() / python.name


PATIENT = {"grace_seconds": 90, "lost_seconds": 30}
"""For jobs that are not a test's: longer than health.notice_seconds is by itself, and than their longest step here."""


def write(cluster: Cluster) -> Path:
    """Write it to the cluster's folder: runs lie in `runs` of this checkout or of the working directory."""
    runs = {CHECKOUT / "runs", Path.cwd() / "runs"}
    for folder in runs:
        folder.mkdir(exist_ok=True)
    profile = {
        "name": NAME, "launcher": "kubernetes", "gpus_per_node": cluster.settings.gpus,
        "kubernetes": section(*sorted(runs)) | PATIENT,
    }  # fmt: skip
    file = cluster.folder / f"{NAME}.yaml"
    file.write_text(f"# The cluster in this folder, found by KUBECONFIG.\n{json.dumps(profile, indent=1)}\n")
    return file
