"""What a submit makes of a job: the first event of a run or of a fork, or an amendment of the run that is there.

Everything that can be known is checked before the event is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import msgspec

from model.contract import EVALUATE, FORMAT, CheckpointRef, new_nonce, now
from orchestrator import amend, attempts, code, handoff, retention, store
from orchestrator.events import RunCreated, SpecAmended
from orchestrator.handoff import HandoffError
from orchestrator.perform import ControlError, append, load
from orchestrator.problems import SpecError
from orchestrator.state import IllegalEvent, State, apply

Reread = Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
"""A recorded spec and cluster profile -> the same as this dinoctl resolves them (`orchestrator.spec.reread`): given to
us, as it needs pydantic and ticks do without. Raises SpecError."""


@dataclass(frozen=True)
class Request:
    """A job to submit: resolved spec and cluster profile as plain mappings, under the name of the run."""

    run: str
    spec: dict[str, Any]
    cluster: dict[str, Any]
    reread: Reread


class SpecChangedError(ControlError):
    """The run has another spec; `changes` are the differences, `refused` those that no amendment takes up."""

    def __init__(self, run: str, changes: list[amend.Change], refused: list[amend.Change]) -> None:
        self.changes, self.refused = changes, refused
        if refused:
            advice = (
                "these are fixed once their phase has begun; begin a new run: submit --run NEW [--fork RUN#PHASE@STEP]"
            )
        else:
            advice = "submit with --amend to take them up, or begin a new run with --run NEW"
        lines = "\n".join(f"  {change}" for change in refused or changes)
        super().__init__(f"run {run} is there already with another spec:\n{lines}\n{advice}")


def plain(request: Request) -> Request:
    """As the log will give it back, so that equal specs compare equal."""
    return replace(request, spec=_plain(request.spec), cluster=_plain(request.cluster))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
    return plain


def create(run_dir: str, request: Request, fork: str | None) -> State:
    """The first event, once all that can be checked is; only then the code is copied. Raises Conflict."""
    run_id = os.urandom(16).hex()
    event = RunCreated(
        at=now(), nonce=new_nonce(), format=FORMAT, run=request.run, run_id=run_id, spec=request.spec,
        cluster=request.cluster, spec_digest=amend.digest(request.spec), code_digest="", version=version("dinoctl"),
        forked_from=_fork(run_dir, request, fork, run_id) if fork else None,
    )  # fmt: skip
    try:
        _check_references(apply(None, event), run_dir)
    except IllegalEvent as error:
        raise ControlError(f"run {request.run}: {error}") from error
    store.prove(run_dir)
    event = msgspec.structs.replace(event, code_digest=code.settle(run_dir, request.cluster))
    store.append(run_dir, 1, event)
    return apply(None, event)


def _fork(run_dir: str, request: Request, fork: str, run_id: str) -> CheckpointRef:
    """The checkpoint that a fork begins with, pinned. Its networks and kind of phase must be those of the new spec."""
    reference = handoff.parse(fork)
    if reference.run is None:
        raise HandoffError(f"--fork {fork}: name the run too, as RUN#{fork}")
    found = attempts.find(reference, run_dir)
    if found.phase not in request.spec["phases"]:
        raise ControlError(
            f"--fork {fork}: the new spec has no phase {found.phase}; it needs that phase to go on from it"
        )
    other, _ = _reread(load(found.run), request)
    kinds = [spec["phases"][found.phase]["kind"] for spec in (other, request.spec)]
    networks = amend.changes({"model": other["model"]}, {"model": request.spec["model"]})
    if kinds[0] != kinds[1] or networks:
        what = (
            "\n".join(f"  {change}" for change in networks) or f"  phases.{found.phase}.kind: {kinds[0]} -> {kinds[1]}"
        )
        raise ControlError(f"--fork {fork}: a fork goes on with the same networks and kind of phase:\n{what}")
    return attempts.take(run_id, run_dir, reference, [])


def is_fork_of(state: State, found: CheckpointRef) -> bool:
    fork = state.created.forked_from
    return fork is not None and (fork.run, fork.phase, fork.step) == (found.run, found.phase, found.step)


def differences(state: State, request: Request) -> list[amend.Change]:
    """What the request changes of the run: defaults that have come with a newer dinoctl are no change of the user's."""
    spec, cluster = _reread(state, request)
    profile = amend.changes({"cluster": cluster}, {"cluster": request.cluster})
    return [*amend.changes(spec, request.spec), *profile]


def _reread(state: State, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's spec and profile as this dinoctl resolves them. Raises ControlError where it cannot."""
    try:
        spec, cluster = request.reread(state.spec, state.cluster)
    except SpecError as error:
        was, run, now_it_is = state.created.version, state.created.run, version("dinoctl")
        lines = "\n".join(f"  {problem.line_of_it}" for problem in error.problems)
        raise ControlError(
            f"run {run} was submitted with dinoctl {was}, and dinoctl {now_it_is} does not know all of its spec:\n"
            f"{lines}\n`dinoctl resume {run}` goes on with it as it is; to change it use dinoctl {was}, or begin a new "
            "run: submit --run NEW"
        ) from error
    return _plain(spec), _plain(cluster)


def take_up(run_dir: str, state: State, request: Request, changes: list[amend.Change], amending: bool) -> State:
    refused = amend.refused(state, changes)
    if refused or not amending:
        raise SpecChangedError(request.run, changes, refused)
    reread_spec, reread_cluster = _reread(state, request)
    spec = amend.taken_up(state.spec, reread_spec, request.spec)
    event = SpecAmended(
        at=now(), nonce=new_nonce(), spec=spec, spec_digest=amend.digest(spec),
        cluster=amend.taken_up(state.cluster, reread_cluster, request.cluster),
        changed=[".".join(change.path) for change in changes],
    )  # fmt: skip
    try:
        _check_references(apply(state, event), run_dir)
        return append(run_dir, state, event)
    except IllegalEvent as error:
        raise ControlError(f"run {request.run} cannot be amended so: {error}") from error


def _check_references(state: State, run_dir: str) -> None:
    """Every input that can be known now is there: checkpoints of other runs, pinned, and of phases that are over."""
    over = {stage.name for stage in state.stages if state.is_over(stage)}
    for stage in state.stages:
        if stage.name in over:
            continue
        for name, written in handoff.references(state.spec, stage.name).items():
            reference = attempts.inherit(state, written)
            if reference.run is not None and stage.name != EVALUATE:
                attempts.take(state.created.run_id, run_dir, reference, [name])
            elif reference.phase in over and reference.run is None:
                own = handoff.own(state.spec, reference, state.accepted(), run_dir, retention.is_bad)
                attempts.must_be_there(reference, own)
                attempts.must_have(reference, own, handoff.PARTS_TAKEN.get(name, ()))
