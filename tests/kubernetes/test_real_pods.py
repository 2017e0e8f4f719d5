"""How real pods end and why they do not begin, on the real nodes: what the fake ones cannot show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from model.contract import Cause
from orchestrator.launchers.base import LaunchState
from orchestrator.launchers.kubernetes import KubernetesLauncher
from tests.kubernetes.fake import ask, wait_until
from tests.model.standin.attempts import Case, make

if TYPE_CHECKING:
    from tests.kubernetes.cluster import Place

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]

HUNGRY = f"""#!{sys.executable}
import os, sys
if os.fork() == 0:
    held = b"x" * (1 << 30)
os.wait()
sys.exit(7)
"""
"""In the place of Python: its child takes a GiB, and it ends with a code of its own once that was killed."""


def launcher(place: Place, folder: Path, **changes: Any) -> KubernetesLauncher:
    section = {**place.pod_section(folder), "gpus": False, "poll_seconds": 0.2, "gang_seconds": 5, **changes}
    return KubernetesLauncher({"launcher": "kubernetes", "kubernetes": section})


def attempt(folder: Path) -> Case:
    return make(folder / "run", ["steps:100000"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"image": "localhost/none:1", "pull_policy": "IfNotPresent"},
            "the image cannot be pulled: see",
        ),
        ({"image": "localhost/none:1"}, "ErrImageNeverPull"),
        ({"secret_env": {"KEY": "nowhere/key"}}, 'secret "nowhere" not found'),
        ({"volumes": {"keys": {"path": "/keys", "secret": "nowhere"}}}, 'secret "nowhere" not found'),
    ],
)
def test_a_pod_that_does_not_start(real_nodes: Place, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    mine, one = launcher(real_nodes, tmp_path, **changes), attempt(tmp_path)
    handle = mine.submit(one.attempt, one.digest)
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert seen.cause is Cause.NOT_LAUNCHED
    assert "does not start: " in seen.detail
    assert words in seen.detail
    mine.cancel(ask(one, handle), hard=True)


def test_no_such_program(real_nodes: Place, tmp_path: Path) -> None:
    mine, one = launcher(real_nodes, tmp_path, python="/no/such/python"), attempt(tmp_path)
    handle = mine.submit(one.attempt, one.digest)
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert seen.cause is Cause.NOT_LAUNCHED
    assert "could not be started: " in seen.detail
    assert "/no/such/python" in seen.detail


def test_memory_that_runs_out_is_told_although_the_process_ends_with_a_code_of_its_own(
    real_nodes: Place, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(HUNGRY)
    python.chmod(0o755)
    mine, one = launcher(real_nodes, tmp_path, python=str(python), memory="320Mi", shm_size="16Mi"), attempt(tmp_path)
    handle = mine.submit(one.attempt, one.digest)
    seen = wait_until(mine, one, handle, LaunchState.ENDED)
    assert seen.cause is Cause.KILLED
    assert "used up its memory (OOMKilled)" in seen.detail
