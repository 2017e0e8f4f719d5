"""`dinoctl ckpt`: look at a run's checkpoints, verify, keep, remove, export and copy them. One function an action."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from model import storage
from model.contract import PARTS, CheckpointRef, encode, hostname, now, pin_file
from orchestrator import attempts, checkpoints, handoff, overview, retention, status
from orchestrator.checkpoints import Row, Verified
from orchestrator.handoff import HandoffError
from orchestrator.perform import ControlError
from orchestrator.retention import Pin

Options = argparse.Namespace

BAD = 1
"""Exit code of `verify` where a checkpoint is not whole."""

USER = "user"
"""What stands for the taker in the name of a person's pin."""


def run(options: Options, runs: str) -> int:
    """The action that `options` name; its exit code."""
    return ACTIONS[options.action](options, runs)


# --- which run, which checkpoint --------------------------------------------------------------------------------------


def find(text: str, runs: str) -> CheckpointRef:
    """The checkpoint that RUN#<phase>@<step>, or a folder, means; marked ones too. Raises HandoffError,
    RunNotFoundError."""
    reference = handoff.parse(text)
    if reference.attempt is not None:
        return attempts.find(reference, "", lambda ref: False)
    if reference.run is None:
        raise HandoffError(f"{text}: name the run too, as RUN#{text}")
    run_dir = status.find(reference.run, runs)
    return attempts.find(replace(reference, run=run_dir), run_dir, lambda ref: False)


def _me() -> str:
    return f"{os.environ.get('USER', 'somebody')} on {hostname()}"


def _print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


# --- looking ----------------------------------------------------------------------------------------------------------


def ls(options: Options, runs: str) -> int:
    run_dir = status.find(options.run, runs)
    rows = checkpoints.rows(run_dir, status.load(run_dir))
    if options.json:
        _print_json(rows)
    elif not rows:
        print(f"{run_dir} has no checkpoints yet")
    else:
        print(_table(rows, now()))
    return 0


HEAD = ("phase", "step", "attempt", "size", "age", "parts", "why it stays")


def _table(rows: Sequence[Row], clock: float) -> str:
    """One line a checkpoint, and a last one with the sum; nothing is cut or folded."""
    lines = [HEAD, *(_line(row, clock) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    own, may_go = sum(row.bytes - row.shared for row in rows), sum(sum(row.may_go.values()) for row in rows)
    total = f"{len(rows)} checkpoints, {overview.size(own)}"
    return "\n".join([*padded, total + (f"; {overview.size(may_go)} of them may go" if may_go else "")])


def _line(row: Row, clock: float) -> tuple[str, ...]:
    rest = f"; its {', '.join(row.may_go)} may go" if row.may_go else ""
    why = (
        ", ".join(row.kept) + rest
        if row.kept
        else "may go"
        if row.counts
        else "does not count: sealed after the attempt ended"
    )
    bad = f"BAD: {row.bad}; " if row.bad else ""
    age = overview.duration(clock - row.sealed_at)
    return (row.phase, str(row.step), str(row.attempt), overview.size(row.bytes), age, ", ".join(row.parts), bad + why)


def inspect(options: Options, runs: str) -> int:
    view = checkpoints.view(find(options.checkpoint, runs))
    if options.json:
        _print_json(view)
        return 0
    manifest = view.manifest
    age = overview.duration(now() - manifest.sealed_at)
    print(f"{view.path}\nstate after {manifest.step} updates of {manifest.phase}, sealed {age} ago")
    print(f"run id {manifest.run_id}, spec {manifest.spec_digest[:12]}, code {manifest.code_digest[:12]}")
    print("written by " + ", ".join(f"{name} {text}" for name, text in {**manifest.versions, **manifest.world}.items()))
    print("loop: " + ", ".join(f"{name} {value}" for name, value in manifest.loop.items()))
    for said in view.pins:
        print(said)
    if view.dropped:
        print(f"its {', '.join(view.dropped)} went, as nothing kept them")
    if view.bad:
        print(f"marked as bad: {view.bad}")
    for part, files in view.parts.items():
        print(f"\n{part}: {overview.size(sum(file.bytes for file in files))}")
        for file in files:
            print(f"  {file.path}  {file.bytes:,} bytes  sha256 {file.sha256}")
            for tensor in file.tensors:
                print(f"    {tensor.name:<52} {' x '.join(map(str, tensor.shape)) or 'scalar':<18} {tensor.dtype}")
    return 0


def verify(options: Options, runs: str) -> int:
    """Every byte, of a run or of one checkpoint. With --mark bad ones are marked, and marks of whole ones lifted."""
    if "#" in options.what or handoff.is_folder(options.what):
        one = checkpoints.verify_one(find(options.what, runs))
        found = iter([one] if one else [])
    else:
        run_dir = status.find(options.what, runs)
        found = checkpoints.verify(run_dir, status.load(run_dir))
    said: list[Verified] = []
    for one in found:
        said.append(one)
        if options.mark:
            checkpoints.mark(one, _me())
        if not options.json:
            print(_verdict(one, options.mark), flush=True)
    if options.json:
        _print_json(said)
    elif not said:
        print("there are no checkpoints yet")
    return BAD if any(one.wrong for one in said) else 0


def _verdict(one: Verified, marking: bool) -> str:
    if one.wrong:
        marked = "; marked" if marking else "; marked already" if one.was_marked else ""
        return f"{one.ref}: BAD{marked}\n" + "\n".join(f"  {wrong}" for wrong in one.wrong)
    lifted = (
        ""
        if not one.was_marked
        else "; its mark is lifted"
        if marking
        else "; it is marked as bad: lift that with --mark"
    )
    return f"{one.ref}: whole, {overview.size(one.bytes)} in {one.files} files{lifted}"


# --- keeping and removing ---------------------------------------------------------------------------------------------


def prune(options: Options, runs: str) -> int:
    """Of ended attempts; a live one removes its own."""
    run_dir = status.find(options.run, runs)
    state = status.load(run_dir)
    act = retention.doomed if options.dry_run else retention.prune
    gone = [one for phase in state.spec["phases"] for one in act(run_dir, state, phase)]
    for one in gone:
        print(f"{'would remove' if options.dry_run else 'removed'} {one.what}: {one.why}, {overview.size(one.bytes)}")
    if not gone:
        print("nothing to remove: all that lies there is kept (`dinoctl ckpt ls` says why)")
    return 0


def pin(options: Options, runs: str) -> int:
    """Pinned first and looked at afterwards, so that no pruning comes between. A pin that keeps nothing is removed."""
    ref, parts = find(options.checkpoint, runs), tuple(options.parts or PARTS)
    if unknown := set(parts) - set(PARTS):
        raise ControlError(f"no such part: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    path = f"{ref.run}/{pin_file(ref.phase, ref.attempt, ref.step, USER)}"
    try:
        storage.publish(path, encode(Pin(run="", run_id="", parts=parts, by=_me(), why=options.why)))
    except storage.AlreadyPublished as error:
        said = checkpoints.pin_said(checkpoints.pins(ref)[path])
        raise ControlError(f"{ref} is {said} already; `dinoctl ckpt unpin` first to say why anew") from error
    try:
        attempts.must_be_there(handoff.parse(options.checkpoint), ref)
        attempts.must_have(handoff.parse(options.checkpoint), ref, parts)
    except HandoffError:
        storage.remove(path)
        raise
    what = f"{', '.join(options.parts)} of {ref}" if options.parts else str(ref)
    print(f"pinned {what}: it stays until `dinoctl ckpt unpin {options.checkpoint}`")
    return 0


def unpin(options: Options, runs: str) -> int:
    """A person's pin; those of other runs only when asked for."""
    ref = find(options.checkpoint, runs)
    there = checkpoints.pins(ref)
    removed = {path: one for path, one in there.items() if options.force or not one.run}
    if not removed:
        why = "; ".join(checkpoints.pin_said(one) for one in there.values())
        raise ControlError(f"{ref} is {why}: --force removes that pin too, and that run may fail" if there else
                           f"{ref} is not pinned")  # fmt: skip
    for path, one in removed.items():
        storage.remove(path)
        print(f"{ref} was {checkpoints.pin_said(one)}: no longer")
    return 0


# --- taking out -------------------------------------------------------------------------------------------------------


def export(options: Options, runs: str) -> int:
    """Torch is needed for that, so another process does it."""
    ref = find(options.checkpoint, runs)
    words = ["part", ref.path, options.file, options.part]
    return subprocess.run([sys.executable, "-P", "-m", "model.weights", *words], check=False).returncode


def copy(options: Options, runs: str) -> int:
    ref = find(options.checkpoint, runs)
    target = options.target.rstrip("/") if storage.is_uri(options.target) else os.path.abspath(options.target)
    made = checkpoints.copy(ref, target, options.parts or ())
    print(f"{made.path}\na phase takes it as that path: weights, or init, gram_teacher or vision_tower")
    return 0


ACTIONS: dict[str, Callable[[Options, str], int]] = {
    "ls": ls, "inspect": inspect, "verify": verify, "prune": prune, "pin": pin, "unpin": unpin, "export": export,
    "copy": copy,
}  # fmt: skip
