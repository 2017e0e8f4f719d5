"""`dinoctl logs`: which log, and following it until its attempt ends."""

from __future__ import annotations

import argparse
import codecs
import sys
import time

from model import contract, storage
from orchestrator import logs, status as statuses

FOLLOW_SECONDS, BUCKET_FOLLOW_SECONDS = 0.5, 3.0
LATE_SECONDS = 3.0
"""How long what another machine wrote last may take to be seen here (a network file system's caches)."""

Options = argparse.Namespace


def run(options: Options, run_dir: str) -> int:
    """Print the log that is asked for. Raises RunNotFoundError where there is none, saying which there are."""
    state = statuses.load(run_dir)
    numbers = [attempt.number for attempt in state.attempts]
    if not numbers:
        raise statuses.RunNotFoundError(f"run {state.created.run} has no attempts yet")
    attempt = numbers[-1] if options.attempt is None else options.attempt
    if attempt not in numbers:
        raise statuses.RunNotFoundError(
            f"no attempt {attempt}; run {state.created.run} has {numbers[0]} to {numbers[-1]}"
        )
    path = f"{run_dir}/{_log_file(options, attempt)}"
    if not logs.exists(path) and (not options.follow or _is_over(run_dir, attempt)):
        there = ", ".join(storage.names(f"{run_dir}/{contract.log_dir(attempt)}")) or "none"
        raise statuses.RunNotFoundError(f"no such log: {path}; there are: {there}")
    late = LATE_SECONDS if options.follow and state.cluster["launcher"] != "local" else 0.0
    _print_log(run_dir, logs.Reader(path), attempt, follow=options.follow, late=late)
    return 0


def _log_file(options: Options, attempt: int) -> str:
    if options.rank is not None:
        return contract.rank_log(attempt, options.rank)
    return contract.agent_log(attempt, options.node or 0)


def _print_log(run_dir: str, log: logs.Reader, attempt: int, *, follow: bool, late: float) -> None:
    """Print the log and, to follow it, what is added until the attempt ends, and for `late` seconds from then on: what
    another machine has written is seen here only some time later."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = None
    while True:
        over = _is_over(run_dir, attempt) if follow else True  # before the read: what it wrote last is not missed
        last = time.monotonic() + late if over and last is None else last
        ended = last is not None and time.monotonic() >= last
        sys.stdout.write(decoder.decode(log.new(), final=ended))
        sys.stdout.flush()
        if ended:
            return
        time.sleep(BUCKET_FOLLOW_SECONDS if storage.is_uri(run_dir) else FOLLOW_SECONDS)


def _is_over(run_dir: str, attempt: int) -> bool:
    return storage.exists(f"{run_dir}/{contract.outcome_file(attempt)}") or any(
        one.number == attempt and one.end for one in statuses.load(run_dir).attempts
    )
