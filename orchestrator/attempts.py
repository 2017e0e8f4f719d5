"""What an attempt is told: its inputs, the checkpoints to go on from, its name; all resolved and pinned."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import msgspec

from model import storage
from model.contract import (
    EVALUATE,
    FORMAT,
    PARTS,
    Attempt,
    CheckpointRef,
    checkpoint_dir,
    closed_file,
    encode,
    manifest_file,
    pin_file,
)
from orchestrator import code, handoff, retention, store
from orchestrator.handoff import HandoffError, Reference
from orchestrator.retention import Pin, is_bad
from orchestrator.state import State, fold

WATCH_SECONDS, BUCKET_WATCH_SECONDS = 1.0, 5.0
"""How often an attempt tells of its progress: a bucket is paid by the request, and lists a thousand names at a time."""

NAME_LENGTH = 45
"""Longest launch name: Kubernetes makes of it the names of pods, 63 characters with what a JobSet of up to ten thousand
nodes adds (`-node-0-9999-` and five more)."""


def build(
    state: State, run_dir: str, number: int, phase: str, *, nodes: int | None = None, dry: bool = False
) -> Attempt:
    """Attempt `number` of `phase`. The same state gives the same attempt, byte for byte, on one machine.

    nodes: those that the phase asks for, if None. dry: only to be shown: nothing is pinned, and the run's copy of the
    code need not be there.
    Raises HandoffError for an input that is not there, BadCheckpointError where all that could be read is marked as
    damaged, CodeError if the run's copy of the code is not what it was.
    """
    settings = state.told(phase)
    resources = settings["resources"]
    evaluation = phase == EVALUATE
    return Attempt(
        format=FORMAT,
        run=state.created.run,
        run_id=state.created.run_id,
        run_dir=run_dir,
        attempt=number,
        phase=phase,
        launch_name=launch_name(state.created.run, state.created.run_id, phase, number),
        seed=int(state.spec["seed"]),
        model=state.spec["model"],
        settings=settings,
        inputs=resolve_inputs(state, run_dir, phase, dry=dry),
        resume=[] if evaluation else retention.resume_points(run_dir, state, phase),
        keep_steps=[] if evaluation else handoff.keep_steps(state.spec, phase),
        keep_parts={} if evaluation else _keep_parts(state, phase),
        nodes=1 if evaluation else nodes or int(resources["nodes"]),
        processes_per_node=1 if evaluation else int(resources["processes_per_node"]),
        threads=int(resources["threads"]),
        files=handoff.files(state.spec, phase),
        code_dir=code.for_attempt(run_dir, state.cluster, state.code_digest, dry=dry),
        on_end=[sys.executable, "-P", "-m", "orchestrator.cli", "tick", run_dir] if state.ticks_itself else [],
        spec_digest=state.spec_digest,
        code_digest=state.code_digest,
        exclude=list(state.excluded(state.at)),
        watch_seconds=BUCKET_WATCH_SECONDS if storage.is_uri(run_dir) else WATCH_SECONDS,
    )


def _keep_parts(state: State, phase: str) -> dict[int, list[str]]:
    parts = handoff.keep_parts(state.spec, phase).items()
    return {step: [part for part in PARTS if part in named] for step, named in sorted(parts) if named is not None}


def to_yaml(attempt: Attempt) -> tuple[bytes, str]:
    """The bytes of attempt.yaml and their digest, under which a launched job is known again."""
    data = msgspec.yaml.encode(attempt)
    return data, hashlib.sha256(data).hexdigest()


def nodes_for(state: State, phase: str, usable: Callable[[], int | None]) -> int:
    """How many nodes an attempt of `phase` asks for: once nodes were lost, and while fewer are usable than it wants,
    as many as there are that can share its batch, down to `resources.min_nodes`.

    usable: asked only where it matters. Raises HandoffError if this version cannot read the recorded phase.
    """
    resources = state.settings(phase)["resources"]
    wanted, least = int(resources["nodes"]), resources.get("min_nodes")
    if phase == EVALUATE or least is None or not state.has_lost_nodes:
        return wanted
    there = usable()
    if there is None or there >= wanted:
        return wanted
    from orchestrator import layouts  # pydantic: other ticks do without

    fitting = layouts.fitting_nodes(layouts.recorded_phase(state.settings(phase)), int(least), wanted)
    return max((count for count in fitting if count <= there), default=min(fitting, default=wanted))


def launch_name(run: str, run_id: str, phase: str, number: int) -> str:
    """`<run>-<8 hex>-<phase>-<attempt>`; a long run name is cut, as the rest already makes it unique."""
    rest = f"-{run_id[:8]}-{phase}-{number}"
    if len(rest) >= NAME_LENGTH:
        raise HandoffError(f"the phase's name is too long for a job's name ({NAME_LENGTH} characters): {phase}")
    return run[: NAME_LENGTH - len(rest)].rstrip("-_.") + rest


# --- checkpoints ------------------------------------------------------------------------------------------------------


def sealed_steps(run_dir: str, phase: str, attempt: int) -> list[int]:
    """The steps of an attempt whose manifest is there, ascending."""
    folder = os.path.dirname(f"{run_dir}/{checkpoint_dir(phase, attempt, 0)}")
    steps = sorted(int(name) for name in storage.names(folder) if name.isdecimal())
    return [step for step in steps if storage.exists(f"{run_dir}/{manifest_file(phase, attempt, step)}")]


def resolve_inputs(state: State, run_dir: str, phase: str, *, dry: bool = False) -> dict[str, CheckpointRef]:
    """The checkpoint behind each input of `phase`; those of other runs are pinned there. Raises HandoffError."""
    names: dict[Reference, list[str]] = {}
    written_as = handoff.references(state.spec, phase)
    for name, written in written_as.items():
        names.setdefault(inherit(state, written), []).append(name)
    found = handoff.inputs(
        state.spec,
        phase,
        state.accepted(),
        run=run_dir,
        other=lambda reference: (
            find(reference, run_dir) if dry else take(state.created.run_id, run_dir, reference, names[reference])
        ),
        refer=lambda reference: inherit(state, reference),
        is_bad=is_bad,
    )
    for name, ref in found.items():
        must_have(written_as[name], ref, handoff.PARTS_TAKEN.get(name, ()))
    return found


def inherit(state: State, reference: Reference) -> Reference:
    """In a fork, a checkpoint from before the fork is the forked run's."""
    fork = state.created.forked_from
    if reference.run is not None or fork is None:
        return reference
    step = handoff.step_of(state.spec, reference)
    return replace(reference, run=fork.run, step=step) if state.is_inherited(reference.phase, step) else reference


def take(run_id: str, run_dir: str, reference: Reference, names: Sequence[str]) -> CheckpointRef:
    """The checkpoint of another run, pinned there first and looked at afterwards, so that no pruning comes between.

    names: the inputs that take it; none if it is forked, which takes all of its parts.
    """
    found = find(reference, run_dir)
    parts = {part for name in names for part in handoff.PARTS_TAKEN.get(name, PARTS)} if names else set(PARTS)
    pin = Pin(run=run_dir, run_id=run_id, parts=tuple(part for part in PARTS if part in parts))
    by = "-".join([run_id, *(names or ["fork"])])
    storage.publish(f"{found.run}/{pin_file(found.phase, found.attempt, found.step, by)}", encode(pin))
    must_be_there(reference, found)
    must_have(reference, found, parts)
    return found


def must_have(reference: Reference, found: CheckpointRef, parts: Collection[str]) -> None:
    """Raises HandoffError if retention has removed any of these parts, as only others were kept."""
    if gone := sorted(retention.dropped(found) & set(parts)):
        raise HandoffError(
            f"{reference}: {', '.join(gone)} of that checkpoint went, as nothing kept them; name another one, of which "
            f"all is there: `dinoctl ckpt ls {found.run}` shows what each still has"
        )


def must_be_there(reference: Reference, found: CheckpointRef) -> None:
    """Raises HandoffError if retention, or somebody, has removed what the log tells of."""
    if not storage.exists(f"{found.run}/{manifest_file(found.phase, found.attempt, found.step)}"):
        raise HandoffError(f"{reference}: that checkpoint is no longer there: {found.path}")


def find(reference: Reference, beside: str, is_bad: Callable[[CheckpointRef], bool] = is_bad) -> CheckpointRef:
    """The checkpoint that a reference to another run means. beside: our run directory, next to which names are looked
    up. is_bad: which checkpoints to pass over. Raises HandoffError."""
    run_dir = locate(reference.run or beside, beside)
    if reference.attempt is not None and reference.step is not None:
        found = handoff.newest_whole(reference, run_dir, [reference.attempt], reference.step, is_bad)
        must_be_there(reference, found)
        return found
    other = fold(store.read(run_dir))
    if other is None:
        raise HandoffError(f"{reference}: there is no run at {run_dir}")
    if reference.phase not in other.spec["phases"]:
        raise HandoffError(f"{reference}: run {other.created.run} has the phases {', '.join(other.spec['phases'])}")
    step = handoff.step_of(other.spec, reference)
    inherited = inherit(other, replace(reference, run=None, step=step))
    if inherited.run is not None:
        return find(inherited, run_dir, is_bad)
    sealed = other.accepted().get(reference.phase, [])
    live = other.live
    if live and live.phase == reference.phase and not storage.exists(f"{run_dir}/{closed_file(live.number)}"):
        sealed = [*sealed, *((live.number, at) for at in sealed_steps(run_dir, live.phase, live.number))]
    if step not in {at for _, at in sealed}:
        steps = ", ".join(str(at) for at in sorted({at for _, at in sealed})) or "none"
        raise HandoffError(f"{reference}: no such checkpoint; {run_dir} has sealed steps of {reference.phase}: {steps}")
    found = handoff.newest_whole(reference, run_dir, [attempt for attempt, at in sealed if at == step], step, is_bad)
    must_be_there(reference, found)
    return found


def locate(run: str, beside: str) -> str:
    """A run by URI, by path, or by its name beside our own run's directory."""
    if storage.is_uri(run):
        return run
    return os.path.abspath(run) if os.sep in run else os.path.join(os.path.dirname(beside), run)
