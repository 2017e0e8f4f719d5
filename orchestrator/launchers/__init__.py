"""One file a launcher; `base.py` says what each of them has to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.launchers.base import Launcher, LaunchError


def launcher_for(cluster: Mapping[str, Any]) -> Launcher:
    """The launcher of a resolved cluster profile. Raises LaunchError if it is not there yet."""
    match cluster["launcher"]:
        case "local":
            from orchestrator.launchers.local import LocalLauncher  # here, as commands that only read do without it

            return LocalLauncher()
        case "slurm":
            from orchestrator.launchers.slurm import SlurmLauncher

            return SlurmLauncher(cluster)
        case "kubernetes":
            from orchestrator.launchers.kubernetes import KubernetesLauncher

            return KubernetesLauncher(cluster)
        case other:
            raise LaunchError(f"the {other} launcher is not there yet; to run on this machine: --cluster local")
