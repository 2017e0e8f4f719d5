"""The events of a run, frozen. The state of a run is their fold (`orchestrator.state`).

An event is only what `decide` needs; what grows (metrics, logs, progress) lies beside the log. Each file carries a
nonce, so that whoever publishes knows its own event again after a lost answer.
"""

from __future__ import annotations

from typing import Any

import msgspec

from model.contract import Cause, CheckpointRef, ContractError


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="event", tag=True):
    """`at` is the publisher's clock, for people; nothing is decided by comparing two machines' clocks."""

    at: float
    nonce: str


class RunCreated(Base, frozen=True):
    """The first event: what is to be done, by which code, under which identity."""

    format: int
    run: str
    run_id: str  # 32 hex digits
    spec: dict[str, Any]  # the resolved job spec
    cluster: dict[str, Any]  # the resolved cluster profile
    spec_digest: str
    code_digest: str
    version: str
    forked_from: CheckpointRef | None = None


class SpecAmended(Base, frozen=True):
    """`submit --amend`: the spec from now on."""

    spec: dict[str, Any]
    cluster: dict[str, Any]
    spec_digest: str
    changed: list[str]  # YAML paths


class AttemptIntended(Base, frozen=True):
    """Somebody is about to launch this attempt. Only `owner` submits it, and only until `lease_until`."""

    attempt: int
    phase: str
    launch_name: str
    digest: str  # sha256 of attempt.yaml
    owner: str
    lease_until: float
    nodes: int | None = None  # fewer than the phase asks for where nodes were lost; None: not recorded


class AttemptLaunched(Base, frozen=True):
    """The launcher took it. `handle` is the launcher's own way to find it again."""

    attempt: int
    handle: dict[str, Any]


class AttemptStopping(Base, frozen=True):
    """The attempt is about to be asked to stop. In the log, since a second request to its agent would be a kill."""

    attempt: int
    hard: bool


class AttemptEnded(Base, frozen=True):
    """An attempt is over. `steps` are the sealed checkpoints that count, ascending."""

    attempt: int
    cause: Cause
    message: str
    steps: list[int]
    reached: int | None  # updates done, sealed or not, where known
    bad_nodes: list[str] = []  # not to be placed on for a while


class StopRequested(Base, frozen=True):
    """Somebody asked for a stop: seal, and start nothing more until resumed. `by` says who, for people."""

    by: str
    hard: bool = False


class Cancelled(Base, frozen=True):
    """Somebody gave the run up."""

    by: str


class Resumed(Base, frozen=True):
    """Go on: a stop, a cancel or a failure is lifted and the failure budgets are fresh."""

    by: str
    code_digest: str | None = None  # `resume --code new`: the code from now on
    skip_data: int | None = None  # `resume --skip-data`: steps of data to jump over, from the last checkpoint on


class RunFailed(Base, frozen=True):
    """A budget is spent or the cause allows no other try."""

    cause: Cause
    message: str


Event = (
    RunCreated
    | SpecAmended
    | AttemptIntended
    | AttemptLaunched
    | AttemptStopping
    | AttemptEnded
    | StopRequested
    | Cancelled
    | Resumed
    | RunFailed
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode(event: Event) -> bytes:
    return _encoder.encode(event)


def decode(data: bytes, where: str) -> Event:
    """Raises ContractError naming `where` if the event is torn or was written by a newer dinoctl."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ContractError(f"{where}: not an event that this version of dinoctl knows: {error}") from error
