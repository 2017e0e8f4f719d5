"""Whether a namespace's quotas have room for an attempt. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.findings import Finding, ok, warning, wrong
from orchestrator.kubernetes_quantity import number

COMPUTE = ("cpu", "memory", "ephemeral-storage")


def needs(pod: Mapping[str, Any], pods: int) -> dict[str, float]:
    """What so many of these pods take of a quota, by the names that quotas have for it. pod: its spec."""
    total = {"pods": float(pods), "count/pods": float(pods)}
    for kind in ("requests", "limits"):
        for container in pod["containers"]:
            resources = container.get("resources", {})
            # What has a limit and no request requests as much.
            stated = resources.get(kind) or {}
            stated = {**(resources.get("limits") or {}), **stated} if kind == "requests" else stated
            for name, amount in stated.items():
                total[f"{kind}.{name}"] = total.get(f"{kind}.{name}", 0.0) + number(amount) * pods
    for name in COMPUTE:
        if f"requests.{name}" in total:
            total[name] = total[f"requests.{name}"]
    return total


def attempt_needs(objects: Sequence[Mapping[str, Any]], pod: Mapping[str, Any], pods: int) -> dict[str, float]:
    """What an attempt takes: its pods, and the objects themselves."""
    counted = needs(pod, pods)
    for made in objects:
        group = str(made["apiVersion"]).rpartition("/")[0]
        kind = f"{made['kind'].lower()}s"
        counted[f"count/{kind}.{group}" if group else f"count/{kind}"] = 1.0
        counted[kind] = 1.0  # services have an older name, without count/
    return counted


def judge(quotas: Sequence[Mapping[str, Any]], needed: Mapping[str, float]) -> Iterator[Finding]:
    """quotas: as the API server lists them; needed: by their names."""
    if not quotas:
        yield ok("quota", "none in the namespace")
    for quota in quotas:
        name, spec = quota["metadata"]["name"], quota["spec"]
        hard, used = spec.get("hard", {}), quota.get("status", {}).get("used", {})
        # A quota with a scope counts some pods only: those of a priority class, or with a time limit, say.
        scoped = bool(spec.get("scopes") or spec.get("scopeSelector"))
        findings = [*_judge_one(name, hard, used, needed)]
        findings = [warning(one.check, f"{one.found}, if it counts these pods (it has a scope)", one.todo)
                    if scoped and one.level == "wrong" else one for one in findings]  # fmt: skip
        yield from findings or [ok("quota", f"{name} has room for an attempt")]


def _judge_one(
    name: str, hard: Mapping[str, str], used: Mapping[str, str], needed: Mapping[str, float]
) -> Iterator[Finding]:
    for resource, amount in hard.items():
        most, ask = number(amount), needed.get(resource, 0.0)
        if resource not in needed and resource.removeprefix("requests.").removeprefix("limits.") in COMPUTE:
            what = "memory" if "memory" in resource else "cpus" if "cpu" in resource else "extra_resources"
            yield wrong("quota", f"{name} counts {resource}, and so refuses pods that do not say theirs",
                        f"set kubernetes.{what} in the profile")  # fmt: skip
        elif ask > most:
            yield wrong("quota", f"{name} gives {amount} {resource} in all, an attempt needs {ask:g}",
                        "ask for fewer nodes, or whoever runs the cluster for more")  # fmt: skip
        elif ask and ask > most - number(used.get(resource, "0")):
            text = f"{name}: {used[resource]} of {amount} {resource} are in use, an attempt needs {ask:g}"
            yield warning("quota", text, "nothing: it waits until others end")
