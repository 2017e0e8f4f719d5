"""What the API server refuses and the published schemas let through: forms of names, amounts, words of a fixed set,
references inside an object. `mistakes` reads any of what is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

DNS_LABEL = re.compile("[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
KEY = re.compile("(([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
VALUE = re.compile("([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[MGTPE]|[KMGTPE]i)?")
VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
WORDS = {
    "restartPolicy": {"Never"},
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "terminationMessagePolicy": {"File", "FallbackToLogsOnError"},
    "completionMode": {"Indexed"},
    "action": {"FailJob", "TerminateJob"},
    "operator": {"In", "NotIn", "Exists", "DoesNotExist", "Equal"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"Memory", ""},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "clusterIP": {"None"},
}
FIELDS = ("spec.nodeName", "status.podIP")
"""Those that a variable may be read from, beside labels and annotations."""


def mistakes(made: Mapping[str, Any]) -> list[str]:
    found = [*_walk(made, "")]
    for pod in _pods(made):
        found += [*_files(pod), *_variables(pod), *_amounts(pod)]
        if bool(pod.get("hostNetwork")) != (pod.get("dnsPolicy") == "ClusterFirstWithHostNet"):
            found.append("a host's network and its names go together")
    if "kind" in made:
        found += _named(made)
    return found


def _named(made: Mapping[str, Any]) -> Iterator[str]:
    name = made["metadata"]["name"]
    if not DNS_LABEL.fullmatch(name):
        yield f"name {name}"
    if made["apiVersion"] == "batch/v1":
        spec = made["spec"]
        if len(f"{name}-{spec['completions'] - 1}-abcde") > 63:
            yield f"a pod's name is too long: {name}"
        if spec["backoffLimit"] != 0 or spec["completions"] != spec["parallelism"]:
            yield "one attempt, all of its pods at once"
        yield from _rules(spec)


def _rules(spec: Mapping[str, Any]) -> Iterator[str]:
    containers = {container["name"] for container in spec["template"]["spec"]["containers"]}
    for rule in spec["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            values = codes["values"]
            if (
                values != sorted(set(values))
                or not 1 <= len(values) <= 255
                or (codes["operator"] == "In" and 0 in values)
            ):
                yield f"codes {values}"
            if codes["containerName"] not in containers:
                yield f"no container {codes['containerName']}"


def _pods(made: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(made, Mapping):
        if "containers" in made:
            yield made
        for inner in made.values():
            yield from _pods(inner)
    elif isinstance(made, list):
        for inner in made:
            yield from _pods(inner)


def _walk(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, list):
        for inner in value:
            yield from _walk(inner, at)
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        here = f"{at}.{name}"
        if name in ("labels", "matchLabels", "nodeSelector", "annotations") or here.endswith("spec.selector"):
            yield from _map(inner, here)
        elif name == "matchFields":
            yield from (f"{here} {one}" for one in inner if len(one["values"]) != 1)
        else:
            if name in WORDS and inner not in WORDS[name]:
                yield f"{here} {inner}"
            yield from _walk(inner, here)
        if name == "topologyKey" and not (inner and KEY.fullmatch(inner)):
            yield f"{here} {inner}"


def _map(names: Mapping[str, Any], at: str) -> Iterator[str]:
    for key, value in names.items():
        if not KEY.fullmatch(key) or not isinstance(value, str):
            yield f"{at} {key}"
        elif not at.endswith("annotations") and not VALUE.fullmatch(value):
            yield f"{at} {key}: {value}"


def _files(pod: Mapping[str, Any]) -> Iterator[str]:
    names = [volume["name"] for volume in pod.get("volumes", [])]
    for container in pod["containers"]:
        mounts = container["volumeMounts"]
        if sorted(names) != sorted(mount["name"] for mount in mounts) or len(set(names)) != len(names):
            yield f"volumes {names}, mounted {mounts}"
        paths = [mount["mountPath"] for mount in mounts]
        if len(set(paths)) != len(paths) or not all(path.startswith("/") and ":" not in path for path in paths):
            yield f"mounted at {paths}"
    for volume in pod.get("volumes", []):
        if not re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", volume["name"]) or len(volume) != 2:
            yield f"volume {volume}"


def _variables(pod: Mapping[str, Any]) -> Iterator[str]:
    for container in pod["containers"]:
        before: set[str] = set()
        for one in container["env"]:
            name, source = one["name"], one.get("valueFrom", {})
            if not VARIABLE.fullmatch(name) or name in before or ("value" in one) == ("valueFrom" in one):
                yield f"variable {one}"
            for used in re.findall(r"\$\((\w+)\)", one.get("value", "")):
                if used not in before:
                    yield f"variable {name} before {used}"
            path = source.get("fieldRef", {}).get("fieldPath", FIELDS[0])
            if path not in FIELDS and not re.fullmatch(r"metadata\.(labels|annotations)\['[^']+'\]", path):
                yield f"variable {name} from {path}"
            before.add(name)


def _amounts(pod: Mapping[str, Any]) -> Iterator[str]:
    for container in pod["containers"]:
        asked, bound = container["resources"].get("requests", {}), container["resources"].get("limits", {})
        for name, amount in [*asked.items(), *bound.items()]:
            if not isinstance(amount, str) or not QUANTITY.fullmatch(amount) or not KEY.fullmatch(name):
                yield f"{name}: {amount}"
        for name in {*asked, *bound}:
            if "/" in name and asked.get(name) != bound.get(name):
                yield f"{name} is asked for and bound alike, or not at all"
    for volume in pod.get("volumes", []):
        if not QUANTITY.fullmatch(volume.get("emptyDir", {}).get("sizeLimit", "1")):
            yield f"volume {volume}"
