"""What sbatch is told of a phase: the `slurm` section of the cluster's profile, and what the job has other than it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(cluster: Mapping[str, Any], resources: Mapping[str, Any]) -> dict[str, Any]:
    """cluster: a profile; resources: of a phase; both plain mappings, and free of pydantic, as ticks are.

    An option of the job's takes the place of the profile's. Only `extra`, which holds options of its own, is put
    together name by name.
    """
    profile, own = cluster.get("slurm") or {}, resources.get("slurm") or {}
    return {**profile, **own, "extra": {**profile.get("extra", {}), **own.get("extra", {})}}
