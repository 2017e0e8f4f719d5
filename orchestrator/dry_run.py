"""`submit --dry-run`: the next attempt and exactly what its launcher would send; nothing is written anywhere."""

from __future__ import annotations

from model.contract import FORMAT
from orchestrator import amend, attempts, code, handoff, launchers, store
from orchestrator.events import RunCreated
from orchestrator.state import State, fold
from orchestrator.submission import Request, differences

RUN_ID = "0" * 32
"""Stands for the id that a new run draws."""


def show(run_dir: str, request: Request, *, fork: str | None) -> str:
    """What would be sent first. Of a run that is there its own spec counts, and differences are named.

    Raises HandoffError for a reference that cannot be met.
    """
    state = fold(store.read(run_dir))
    lines = []
    if state is None:
        state = _created(run_dir, request, fork)
        lines.append(f"# a new run; its id, {RUN_ID[:8]}..., is drawn when it is submitted")
    else:
        lines += [f"# differs from the run that is there: {change}" for change in differences(state, request)]
    if state.live:
        return "\n".join([*lines, f"# attempt {state.live.number} of {state.live.phase} is under way"])
    if state.next_stage is None:
        return "\n".join([*lines, "# the run is done: nothing would be sent"])
    number = state.attempts[-1].number + 1 if state.attempts else 1
    attempt = attempts.build(state, run_dir, number, state.next_stage.name, dry=True)
    data, digest = attempts.to_yaml(attempt)
    sent = launchers.launcher_for(state.cluster).render(attempt, digest)
    return "\n".join([*lines, f"# {run_dir}/attempts/{number}/attempt.yaml", data.decode(), "# sent", sent])


def _created(run_dir: str, request: Request, fork: str | None) -> State:
    event = RunCreated(
        at=0.0, nonce="", format=FORMAT, run=request.run, run_id=RUN_ID, spec=request.spec, cluster=request.cluster,
        spec_digest=amend.digest(request.spec), code_digest=code.there_now(request.cluster), version="",
        forked_from=attempts.find(handoff.parse(fork), run_dir) if fork else None,
    )  # fmt: skip
    created = fold([event])
    assert created is not None
    return created
