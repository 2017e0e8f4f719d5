"""What Slurm says of jobs: at most one squeue and one sacct for everybody, with named fields, at a bounded rate.

squeue is asked for all jobs of the users concerned, ended ones too, which the controller remembers for its MinJobAge
(300 s by default); one answer then does for all runs of this process. sacct is asked for what squeue does not know any
more, sinfo for the nodes of what ended badly. Formats are spelt out, as `--json` changes with every release.
"""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator import slurm_cluster
from orchestrator.asking_slurm import NoAnswerError, ask

T = TypeVar("T")

MOST_NAMES = 100_000
"""Characters of one argument; the kernel takes 131,072 (MAX_ARG_STRLEN)."""

QUEUE = {
    "JobID": 20, "RestartCnt": 10, "State": 20, "Reason": 64, "exit_code": 12, "SubmitTime": 20, "StartTime": 20,
    "Partition": 64, "NodeList": 2048, "Name": 64, "Comment": 128,
}  # fmt: skip
"""Fields of squeue and how wide each is printed, which cuts what is longer. No name of ours has a `|`."""

ACCOUNTS = ("JobIDRaw", "State", "ExitCode", "Submit", "Partition", "NodeList", "JobName", "Comment")


@dataclass(frozen=True)
class Job:
    """One job as squeue or sacct tells of it. Times are seconds since the epoch."""

    id: str
    name: str
    comment: str  # empty in accounts that keep none, as most do
    state: str  # Slurm's word: PENDING, RUNNING, TIMEOUT ...
    reason: str = ""
    restarts: int = 0
    exit_code: int | None = None
    submitted: float | None = None
    starts_at: float | None = None
    partition: str = ""
    nodes: str = ""  # as Slurm writes them: node[1-3,7]


def label(run_id: str, digest: str) -> str:
    """The comment by which a job is known to be that attempt's."""
    return f"{run_id}:{digest}"


def handle(job_id: str, submitted: float) -> dict[str, Any]:
    """What is remembered of a job of this user, to look it up. submitted: seconds since the epoch."""
    return {"job": job_id, "user": user(os.getuid()), "submitted": submitted}


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- answers that are kept for a while --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """asked_at: wall clock. asked: the monotonic clock."""

    asked_at: float
    asked: float
    value: Any


_answers: dict[tuple[str, ...], _Answer] = {}


def forget() -> None:
    """What was answered is out of date: something was just submitted or cancelled from here."""
    _answers.clear()


def _asked(key: tuple[str, ...], poll: float, newer_than: float, question: Callable[[], list[T]]) -> list[T]:
    """The answer that this process has had within `poll` seconds, if it was asked later than `newer_than` (wall clock);
    else `question()`. No answer is an answer too: Slurm is left alone as long."""
    key = (os.environ.get("SLURM_CONF", ""), *key)
    kept = _answers.get(key)
    if kept is None or time.monotonic() - kept.asked >= poll or kept.asked_at < min(newer_than, time.time()):
        at, now = time.time(), time.monotonic()
        try:
            kept = _Answer(at, now, question())
        except NoAnswerError as error:
            kept = _Answer(at, now, error)
        for old in [old for old, answer in _answers.items() if now - answer.asked > poll]:
            del _answers[old]
        _answers[key] = kept
    if isinstance(kept.value, NoAnswerError):
        raise NoAnswerError(str(kept.value))
    value: list[T] = kept.value
    return value


# --- squeue -----------------------------------------------------------------------------------------------------------


def queue(users: Sequence[str], poll: float = 0.0, newer_than: float = 0.0) -> list[Job]:
    """The jobs of these users that the controller knows, ended ones too.

    poll: an answer that is no older is good enough, unless it is older than `newer_than` (wall clock).
    Raises NoAnswerError.
    """
    named = ",".join(sorted(users))
    return _asked(("squeue", named), poll, newer_than, lambda: _ask_queue(named))


def _ask_queue(users: str) -> list[Job]:
    fields = ",".join(f"{name}:{width}|" for name, width in QUEUE.items())
    text = ask("squeue", "--noheader", "--states=all", f"--user={users}", f"--Format={fields}")
    return [_queued(row) for row in _rows(text, list(QUEUE))]


def _queued(row: Mapping[str, str]) -> Job:
    return Job(
        id=row["JobID"], name=row["Name"], comment=row["Comment"], state=row["State"], reason=row["Reason"],
        restarts=_number(row["RestartCnt"]) or 0, exit_code=_exit_code(_number(row["exit_code"])),
        submitted=_number(row["SubmitTime"]), starts_at=_number(row["StartTime"]), partition=row["Partition"],
        nodes=row["NodeList"],
    )  # fmt: skip


def has_step(job_id: str) -> bool:
    """Whether its first step is there, which holds the agents: before that a signal reaches nobody."""
    return f"{job_id}.0" in ask("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i").split()


# --- sacct ------------------------------------------------------------------------------------------------------------


def accounts(users: Sequence[str], names: Sequence[str], since: float, poll: float = 0.0) -> list[Job]:
    """What the accounts tell of jobs of these names submitted or alive after `since`; of a requeued job its last run,
    with how often it was requeued. Raises NoAnswerError, also where the site keeps no accounts."""
    key = ("sacct", ",".join(sorted(users)), ",".join(sorted(set(names))))
    return _asked(key, poll, 0.0, lambda: _ask_accounts(key[1], key[2], since))


def _ask_accounts(users: str, names: str, since: float) -> list[Job]:
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    named = [f"--name={names}"] if len(names) < MOST_NAMES else []
    command = ["sacct", "--noheader", "--allocations", "--duplicates", "--parsable2", f"--user={users}", *named]
    text = ask(*command, f"--starttime={start}", f"--format={','.join(ACCOUNTS)}")
    jobs: dict[str, Job] = {}
    for row in _rows(text, ACCOUNTS):
        job = _accounted(row, jobs.get(row["JobIDRaw"]))
        jobs[job.id] = job
    return list(jobs.values())


def _accounted(row: Mapping[str, str], before: Job | None) -> Job:
    return Job(
        id=row["JobIDRaw"], name=row["JobName"], comment=row["Comment"], state=row["State"].split(" ")[0],
        restarts=before.restarts + 1 if before else 0, exit_code=_number(row["ExitCode"].partition(":")[0]),
        submitted=_number(row["Submit"]), partition=row["Partition"], nodes=row["NodeList"],
    )  # fmt: skip


# --- sinfo ------------------------------------------------------------------------------------------------------------

OUT_OF_SERVICE = re.compile(r"(down|drained|draining|drain|fail|failing|error|no_respond|unknown)|.*\*", re.IGNORECASE)
"""States of a node that a job should not be given to; a `*` says that it does not respond."""


def bad_nodes(nodes: Sequence[str], poll: float = 0.0) -> list[str]:
    """Those of the nodes that are down, drained or do not respond now; none where sinfo does not answer."""
    if not nodes:
        return []
    named = ",".join(sorted(nodes))
    try:
        return _asked(("sinfo", named), poll, 0.0, lambda: _ask_nodes(named))
    except NoAnswerError:
        return []


def usable_nodes(partition: str | None, poll: float = 0.0) -> list[str]:
    """The nodes of a partition (None: the default one) that jobs can be placed on, busy or idle. Raises
    NoAnswerError."""
    return _asked(("sinfo", "of", partition or ""), poll, 0.0, lambda: _ask_usable(partition))


def _ask_usable(partition: str | None) -> list[str]:
    of = [f"--partition={partition}"] if partition else []
    rows = _rows(ask("sinfo", "--noheader", "--Node", *of, "--format=%N|%T|%P"), ("node", "state", "partition"))
    return [
        row["node"]
        for row in rows
        if (partition or row["partition"].endswith("*")) and slurm_cluster.is_usable(row["state"])
    ]


def _ask_nodes(nodes: str) -> list[str]:
    text = ask("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N|%T")
    states = {row["node"]: row["state"] for row in _rows(text, ("node", "state"))}
    return [node for node, state in states.items() if OUT_OF_SERVICE.fullmatch(state)]


# --- reading ----------------------------------------------------------------------------------------------------------


def _rows(text: str, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Lines as mappings. One with another number of fields is a job with a `|` in its name: none of ours."""
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if parts[len(names) :] == [""]:  # squeue ends each field with the sign, the last one too
            parts.pop()
        if len(parts) == len(names):
            yield dict(zip(names, parts, strict=True))


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _exit_code(status: int | None) -> int | None:
    """From the status that wait(2) gives, as squeue prints it: an exit code, or 128 and the signal, as a shell says."""
    if status is None:
        return None
    return 128 + (status & 0x7F) if status & 0x7F else status >> 8
