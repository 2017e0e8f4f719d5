"""Attempts as Jobs of a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.contract import Attempt
from orchestrator.launchers.base import LaunchError, Observation, Query


class KubernetesLauncher:
    """cluster: a resolved profile."""

    def __init__(self, cluster: Mapping[str, Any]) -> None:
        self._cluster = cluster

    def render(self, attempt: Attempt, digest: str) -> str:
        from orchestrator.launchers import kubernetes_app  # torchx: commands that only read do without it

        return kubernetes_app.text(kubernetes_app.objects(self._cluster, attempt, digest))

    def submit(self, attempt: Attempt, digest: str) -> dict[str, Any]:
        raise LaunchError("not there yet")

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        raise NotImplementedError

    def cancel(self, query: Query, *, hard: bool) -> None:
        raise NotImplementedError

    def clear(self, query: Query) -> None:
        raise NotImplementedError

    def usable_nodes(self, resources: Mapping[str, Any], exclude: Sequence[str]) -> int | None:
        return None
