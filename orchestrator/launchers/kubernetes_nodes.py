"""Which nodes of a cluster pods of an attempt could be placed on. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def selector(section: Mapping[str, Any]) -> str | None:
    """The profile's `node_selector` as the API takes it."""
    return ",".join(f"{name}={value}" for name, value in (section.get("node_selector") or {}).items()) or None


def usable(
    nodes: Sequence[Mapping[str, Any]], section: Mapping[str, Any], resources: Mapping[str, Any], exclude: Sequence[str]
) -> int:
    """How many pods of an attempt, one a node, these nodes could hold, busy or not: of one value of the label
    `together`, if it is set, those of the value that has most. nodes: as JSON; section: `kubernetes`, merged."""
    out = {*section.get("exclude", []), *exclude}
    wanted = dict(section.get("extra_resources") or {})
    if section.get("gpus", True):
        wanted[section.get("gpu_resource") or "nvidia.com/gpu"] = str(resources.get("processes_per_node", 1))
    found = [
        node
        for node in nodes
        if node["metadata"]["name"] not in out
        and is_usable(node, section.get("tolerations") or [])
        and _has(node, wanted)
    ]
    together = section.get("together")
    if not together:
        return len(found)
    values = Counter((node["metadata"].get("labels") or {}).get(together) for node in found)
    return max((count for value, count in values.items() if value is not None), default=0)


def is_usable(node: Mapping[str, Any], tolerations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is ready, open for pods, and has no taint that these do not put up with."""
    spec, conditions = node.get("spec") or {}, (node.get("status") or {}).get("conditions") or ()
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    hard = [taint for taint in spec.get("taints") or () if taint.get("effect") in ("NoSchedule", "NoExecute")]
    tolerated = all(any(_tolerates(one, taint) for one in tolerations) for taint in hard)
    return ready and not spec.get("unschedulable") and tolerated


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    key, value, effect = (toleration.get(name) for name in ("key", "value", "effect"))
    equal = toleration.get("operator", "Exists") == "Exists" or (value or "") == (taint.get("value") or "")
    return key in (None, taint["key"]) and effect in (None, taint.get("effect")) and equal


def _has(node: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Counts of whole things, as devices are; other amounts are left to the scheduler."""
    given = (node.get("status") or {}).get("allocatable") or {}
    return all(int(given.get(name, "0")) >= int(amount) for name, amount in wanted.items() if amount.isdecimal())
