"""Attempts whose code is the real `model/` with a stand-in for the trainer: for tests of agent and launchers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from model import contract
from model.contract import Attempt, Claim, Outcome

MODEL = Path(contract.__file__).parent
STANDIN = Path(__file__).with_name("trainer.py")
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One attempt on disk, ready to run."""

    attempt: Attempt
    digest: str

    @property
    def run_dir(self) -> Path:
        return Path(self.attempt.run_dir)

    @property
    def yaml(self) -> str:
        return f"{self.attempt.run_dir}/{contract.attempt_yaml(self.attempt.attempt)}"

    @property
    def outcome(self) -> Outcome:
        data = (self.run_dir / contract.outcome_file(self.attempt.attempt)).read_bytes()
        return contract.decode(data, Outcome, "outcome.json")

    @property
    def claim(self) -> Claim:
        data = (self.run_dir / contract.claim_file(self.attempt.attempt)).read_bytes()
        return contract.decode(data, Claim, "claim.json")

    def facts(self, rank: int = 0) -> dict[str, Any]:
        """What rank `rank` of the stand-in found; waits until it has started."""
        path = self.run_dir / f"facts-{rank}.json"
        wait_for(path.exists)
        facts: dict[str, Any] = json.loads(path.read_bytes())
        return facts

    def log(self, rank: int) -> str:
        return (self.run_dir / contract.rank_log(self.attempt.attempt, rank)).read_text()

    def pulsing(self) -> bool:
        return contract.pulse_file(self.attempt.launch_name, 0).exists()

    def processes(self) -> list[psutil.Process]:
        """Every living process that runs this attempt's YAML."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if self.yaml in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


def make(
    folder: Path,
    standin: Sequence[str],
    *,
    number: int = 1,
    phase: str = contract.EVALUATE,
    stall: float = 60.0,
    notice: float = 60.0,
    **changes: Any,
) -> Case:
    """An attempt in `folder`; an evaluation unless `phase` says otherwise, as one process starts without torchrun."""
    run_id = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
    values: dict[str, Any] = {
        "format": contract.FORMAT,
        "run": "standin",
        "run_id": run_id,
        "run_dir": str(folder),
        "attempt": number,
        "phase": phase,
        "launch_name": f"standin-{run_id[:8]}-{phase}-{number}",
        "seed": 0,
        "model": {},
        "settings": {
            "health": {"stall_seconds": stall, "notice_seconds": notice, "non_finite_steps": 3},
            "standin": list(standin),
        },
        "inputs": {},
        "resume": [],
        "keep_steps": [],
        "nodes": 1,
        "processes_per_node": len(standin),
        "threads": 1,
        "code_dir": str(copy_code(folder)),
        "on_end": [],
        "spec_digest": "0" * 64,
        "code_digest": "0" * 64,
        "watch_seconds": 0.1,
        **changes,
    }
    attempt = Attempt(**values)
    data = msgspec.yaml.encode(attempt)
    path = folder / contract.attempt_yaml(number)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return Case(attempt, hashlib.sha256(data).hexdigest())


def copy_code(folder: Path) -> Path:
    """The pinned code of a run: `model/` as it is, with the stand-in for train.py and evaluate/run.py."""
    code = folder / "code" / "standin"
    if not code.exists():
        (code / "model" / "evaluate").mkdir(parents=True)
        for path in MODEL.glob("*.py"):
            shutil.copy(path, code / "model")
        (code / "model" / "evaluate" / "__init__.py").touch()
        shutil.copy(STANDIN, code / "model" / "train.py")
        shutil.copy(STANDIN, code / "model" / "evaluate" / "run.py")
    return code


def agent(case: Case, **environment: str) -> subprocess.Popen[bytes]:
    """The agent of that attempt, as a child of the test, its output in agent.log."""
    log = case.run_dir / contract.agent_log(case.attempt.attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "model.agent", case.yaml],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def wait_for(value: Callable[[], T], seconds: float = 90.0, what: Callable[[], object] = lambda: "") -> T:
    """`value()` once it is true; fails if that takes longer than `seconds`, with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not (result := value()):
        assert time.monotonic() < deadline, f"waited in vain: {what()}"
        time.sleep(0.02)
    return result
