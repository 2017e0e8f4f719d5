"""The state of a run without folding its log again: a file beside the log that may be removed at any time.

It is taken only if the log has as many events as it was folded from, begins and ends with the same ones, and if it was
folded by exactly this code; anything else (torn, stale, of another run or version) is the same as none. Nothing is
decided from it that the log would refuse: an event is appended under a number, which is taken or not.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from model import contract, storage
from orchestrator import events, state, store
from orchestrator.state import State

FILE = "folded.msgpack"
PAUSES = (0.05,)
"""For a gap in a log to close: one damaged run must not keep the others waiting."""


class Folded(msgspec.Struct, frozen=True):
    """`first`, `last`: the nonces of those events of the log. A state's spec and cluster are left empty where they are
    those of its first event: most of the bytes."""

    code: str
    events: int
    first: str
    last: str
    state: State


class _Nonce(msgspec.Struct, frozen=True):
    nonce: str


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Folded)
_nonce = msgspec.json.Decoder(_Nonce)


def load(run_dir: str) -> State | None:
    """The state of the run, as `fold(store.read(run_dir))` gives it. Raises what that raises."""
    count = store.count(run_dir, PAUSES)
    if count == 0:
        return None
    found = _read(run_dir)
    if found is not None and found.events == count and _ends(run_dir, count) == (found.first, found.last):
        return _whole(found.state)
    folded = state.fold(store.read(run_dir, PAUSES))
    if folded is not None:
        _write(run_dir, folded)
    return folded


def _ends(run_dir: str, count: int) -> tuple[str, str] | None:
    paths = [f"{run_dir}/{contract.event_file(number)}" for number in (1, count)]
    try:
        first, last = (_nonce.decode(data).nonce for data in storage.read_many(paths))
    except (msgspec.DecodeError, FileNotFoundError):  # reading the whole log says what is wrong
        return None
    return first, last


def _read(run_dir: str) -> Folded | None:
    try:
        data = storage.read(f"{run_dir}/{FILE}")
        if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "big"):
            return None
        found = _decoder.decode(memoryview(data)[4:])
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
    return found if found.code == _code() else None


def _write(run_dir: str, folded: State) -> None:
    ends = _ends(run_dir, folded.events)
    if ends is None:
        return
    # What does not fit in msgpack (an integer of a handle beyond 64 bits) is folded each time; so is what the store
    # has no room for.
    with suppress(OverflowError, OSError):
        data = _encoder.encode(Folded(_code(), folded.events, *ends, _short(folded)))
        storage.replace(f"{run_dir}/{FILE}", zlib.crc32(data).to_bytes(4, "big") + data)


def _short(whole: State) -> State:
    first = whole.created
    same: dict[str, Any] = {name: {} for name in ("spec", "cluster") if getattr(whole, name) == getattr(first, name)}
    return replace(whole, **same)


def _whole(short: State) -> State:
    return replace(short, spec=short.spec or short.created.spec, cluster=short.cluster or short.created.cluster)


@functools.cache
def _code() -> str:
    """Which code folds, and writes the result: another version may make another state of the same log."""
    files = [__file__, *(str(module.__file__) for module in (contract, events, state))]
    sources = [Path(file).read_bytes() for file in files]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()
