"""How two specs differ, and which differences a run may still take up. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.contract import EVALUATE
from orchestrator.state import State

OPERATIONAL = ("cluster", "tracking", "runs", "controller")
"""Top-level sections that say how a run is carried out, not what it computes."""

OPERATIONAL_IN_A_PHASE = (
    ("resources",), ("health",), ("checkpoints",), ("debug",),
    ("data", "workers"), ("data", "read_ahead_mib"), ("data", "max_skip_rate"),
)  # fmt: skip

ABSENT = "(not there)"


@dataclass(frozen=True)
class Change:
    """`path`: keys from the top of the spec; a cluster profile's are below `cluster`."""

    path: tuple[str, ...]
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {_shown(self.before)} -> {_shown(self.after)}"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every difference between two resolved specs, by path; a changed order of the phases is one at `phases`."""
    found = list(_compare((), before, after))
    old, new = list(before.get("phases", {})), list(after.get("phases", {}))
    if [name for name in old if name in new] != [name for name in new if name in old]:
        found.append(Change(("phases",), ", ".join(old), ", ".join(new)))
    return found


def _compare(path: tuple[str, ...], before: Any, after: Any) -> Iterator[Change]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys((*before, *after)):
            yield from _compare((*path, str(key)), before.get(key, ABSENT), after.get(key, ABSENT))
    elif before != after:
        yield Change(path, before, after)


def taken_up(recorded: Any, reread: Any, wanted: Any) -> Any:
    """`wanted`, without the defaults that have come since and that nobody changed: the code that is pinned to the run
    may not know them. reread: `recorded` with those defaults filled in."""
    if not all(isinstance(value, Mapping) for value in (recorded, reread, wanted)):
        return recorded if wanted == reread else wanted
    return {
        key: taken_up(recorded[key], reread[key], value) if key in recorded else value
        for key, value in wanted.items()
        if key in recorded or key not in reread or value != reread[key]
    }


def digest(spec: Mapping[str, Any]) -> str:
    """sha256 of a resolved spec. The order of the keys counts, as phases are in order."""
    return hashlib.sha256(json.dumps(spec, separators=(",", ":")).encode()).hexdigest()


def refused(state: State, found: Sequence[Change]) -> list[Change]:
    """Those that an amendment cannot take up: scientific ones of what has begun."""
    return [change for change in found if not _may_change(state, change.path)]


def _may_change(state: State, path: tuple[str, ...]) -> bool:
    if path[0] in OPERATIONAL or path == ("phases",):  # the order of phases is checked by the fold
        return True
    if path[0] == "phases":
        return not state.has_begun(path[1]) or _is_operational(path[2:])
    if path[0] == "evaluate":
        return not state.has_begun(EVALUATE) or _is_operational(path[1:])
    return path[0] != "name" and not any(state.has_begun(stage.name) for stage in state.stages)


def _is_operational(path: tuple[str, ...]) -> bool:
    return any(path[: len(allowed)] == allowed for allowed in OPERATIONAL_IN_A_PHASE)
