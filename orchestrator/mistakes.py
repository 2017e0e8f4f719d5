"""The one place that knows which exceptions are a user's or the world's doing, and what dinoctl exits with for them.

    SpecError          2   a job file, a profile, an override
    RunNotFoundError   2   no run of that name
    ControlError       2   what was asked of a run cannot be done
    HandoffError       2   a reference to a checkpoint that cannot be met
    ContractError      2   a run directory that another version wrote, or a torn file in it
    LogError           2   a log that cannot be read, a store that is not fit for one
    IllegalEvent       2   a log whose events contradict each other
    CodeError          2   the run's copy of the code is not what it was
    NoAccessError      2   a bucket that is not there, or not for these credentials
    UnknownStoreError  2   a URI of a kind that nothing installed can read
    DiskFullError      3   no space left
    StoreError         1   a file system that does not do what it is asked
    LaunchError        1   the launcher refused

Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.contract import ContractError
from model.storage import DiskFullError, NoAccessError, StoreError, UnknownStoreError
from orchestrator.code import CodeError
from orchestrator.handoff import HandoffError
from orchestrator.launchers.base import LaunchError
from orchestrator.perform import ControlError
from orchestrator.problems import SpecError
from orchestrator.state import IllegalEvent
from orchestrator.status import RunNotFoundError
from orchestrator.store import LogError

EXIT_CODES: dict[type[Exception], int] = {
    SpecError: 2,
    RunNotFoundError: 2,
    ControlError: 2,
    HandoffError: 2,
    ContractError: 2,
    LogError: 2,
    IllegalEvent: 2,
    CodeError: 2,
    NoAccessError: 2,
    UnknownStoreError: 2,
    DiskFullError: 3,
    StoreError: 1,
    LaunchError: 1,
}
"""The first that fits counts: no access, an unknown store and a full disk are StoreErrors too."""


@dataclass(frozen=True)
class Explained:
    message: str
    exit_code: int
    problems: list[dict[str, Any]] | None = None  # of a spec, one by one, for --json


def explain(error: Exception) -> Explained | None:
    """What to say and to exit with; None for what nobody but us can have caused."""
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            problems = [problem.as_mapping() for problem in error.problems] if isinstance(error, SpecError) else None
            return Explained(_message(error), code, problems)
    return None


def _message(error: Exception) -> str:
    if isinstance(error, SpecError):
        count = len(error.problems)
        return f"{count} mistake{'s' if count > 1 else ''}\n{error}"
    if isinstance(error, IllegalEvent):
        return f"the log of the run contradicts itself: {error}. Restore events/ from a backup, or begin a new run"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
