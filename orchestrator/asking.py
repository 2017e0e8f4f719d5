"""One question to a launcher on behalf of a person, who waits for the answer: bounded, and no answer is an answer."""

from __future__ import annotations

import threading

from orchestrator import launchers
from orchestrator.launchers.base import LaunchError, LaunchState, Observation
from orchestrator.perform import query
from orchestrator.state import State
from orchestrator.status import LaunchView

ANSWER_SECONDS = 5.0


def launch_view(run_dir: str, run: State) -> LaunchView | None:
    """What a cluster says of the live attempt. None on this machine, of which the log and the agent tell all."""
    if run.live is None or run.cluster["launcher"] == "local":
        return None
    found = _answer(run_dir, run)
    return LaunchView(
        state=found.state.value, detail=found.detail, nodes=list(found.nodes), starts_at=found.starts_at
    )  # fmt: skip


def _answer(run_dir: str, run: State) -> Observation:
    """A command of a cluster may hang for minutes: its thread is then left behind, and ends with this process."""
    assert run.live is not None
    asked = query(run_dir, run, run.live)
    answers: list[Observation] = []

    def ask() -> None:
        try:
            answers.extend(launchers.launcher_for(run.cluster).observe([asked]))
        except LaunchError as error:
            answers.append(Observation(LaunchState.UNKNOWN, detail=str(error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else Observation(LaunchState.UNKNOWN, detail=f"not within {ANSWER_SECONDS:.0f} s")
