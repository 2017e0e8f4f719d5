"""A job while it is being checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import AnyPhase, Evaluate, Model
from orchestrator.cluster import ClusterProfile


@dataclass(frozen=True)
class Draft:
    """A job as far as it could be read. `names` and `raw` hold every phase, `phases` those valid by themselves."""

    raw: Mapping[str, Any]
    names: Sequence[str]
    phases: Mapping[str, AnyPhase]
    model: Model | None
    evaluate: Evaluate | None
    cluster: ClusterProfile | None
    runs: str | None = None  # the folder of runs in which checkpoints of other runs are looked for; None: nowhere
