"""What a scheduler is told of a phase: its section of the cluster's profile, and what the job has other than it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Scheduler = Literal["slurm", "kubernetes"]


def merged(name: Scheduler, cluster: Mapping[str, Any], resources: Mapping[str, Any]) -> dict[str, Any]:
    """The section `name`. cluster: a profile; resources: of a phase; both plain mappings, and free of pydantic, as
    ticks are.

    An option of the job's takes the place of the profile's. One that holds options of its own (`extra`,
    `node_selector`) is put together name by name.
    """
    profile, own = cluster.get(name) or {}, resources.get(name) or {}
    return {**profile, **{option: _over(profile.get(option), value) for option, value in own.items()}}


def _over(below: Any, value: Any) -> Any:
    return {**below, **value} if isinstance(below, Mapping) and isinstance(value, Mapping) else value
