"""Attempts with the stand-in trainer on the dev cluster, and programs of Slurm that fail in a chosen way."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model import contract
from orchestrator.launchers.base import LaunchState, Observation, Query
from orchestrator.launchers.slurm import SlurmLauncher
from tests.model.standin.attempts import Case, wait_for
from tests.slurm.cluster import Cluster

PROFILE: dict[str, Any] = {"launcher": "slurm", "slurm": {"gpus": False, "poll_seconds": 0.2}}


def launcher(**section: Any) -> SlurmLauncher:
    return SlurmLauncher({**PROFILE, "slurm": {**PROFILE["slurm"], **section}})


def ask(case: Case, handle: dict[str, Any] | None = None) -> Query:
    attempt = case.attempt
    return Query(attempt.run_dir, attempt.run_id, attempt.attempt, attempt.launch_name, case.digest, handle)


def look(case: Case, handle: dict[str, Any] | None = None) -> Observation:
    return launcher().observe([ask(case, handle)])[0]


def wait_until(case: Case, handle: dict[str, Any] | None, *wanted: LaunchState) -> Observation:
    def there() -> Observation | None:
        seen = look(case, handle)
        return seen if seen.state in wanted else None

    found = wait_for(there, 60)
    assert found is not None
    return found


def trains(slurm: Cluster, case: Case) -> bool:
    """Whether rank 0 is at work, on whichever node."""
    file = contract.pulse_file(case.attempt.launch_name, 0).relative_to(tempfile.gettempdir())
    return any((slurm.node_tmp(node) / file).exists() for node in slurm.settings.node_names)


def jobs_of(slurm: Cluster, case: Case) -> dict[str, str]:
    """The attempt's jobs, ended ones too, and their states."""
    rows = slurm.run("squeue", "-h", "--states=all", f"--name={case.attempt.launch_name}", "-o", "%A %T").splitlines()
    return dict(row.split() for row in rows)


@pytest.fixture
def impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script in the place of a program of Slurm's; `$REAL` is the program itself."""
    folder = tmp_path / "impostors"

    def put(name: str, script: str) -> Path:
        real = shutil.which(name)
        folder.mkdir(exist_ok=True)
        if not (folder / name).exists():
            monkeypatch.setenv("PATH", str(folder), prepend=":")
        (folder / name).write_text(f"#!/bin/bash\nREAL={real}\n{script}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return put
