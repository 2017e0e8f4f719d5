"""What follows from the end of an attempt: another try, after how long, or the end of the run. Pure.

A budget counts ends of one cause without progress: an attempt that sealed a newer checkpoint makes the counts fresh.

What is nobody's fault who wrote the job (VANISHED, STORE_LOST, NOT_LAUNCHED) has budgets of its own, large enough for a
bad night of a cluster: 20 ends, with two hours of waiting between them. They are bounded all the same: a job that
brings down each node it runs on looks like this too, and would go through the whole cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.contract import Cause

LONGEST_BACKOFF = 600.0


@dataclass(frozen=True)
class Policy:
    """retries: ends without progress that are followed by another try; None: any number.
    backoff: seconds before the first retry, doubled for each further one up to LONGEST_BACKOFF.
    """

    retries: int | None
    backoff: float
    advice: str  # one line for the user, once the budget is spent


POLICIES: dict[Cause, Policy] = {
    Cause.STOPPED: Policy(None, 1.0, "it was preempted; nothing is wrong with the run"),
    Cause.UNSEALED: Policy(5, 1.0, "the notice before each kill was too short to seal: raise health.notice_seconds"),
    Cause.KILLED: Policy(
        5, 1.0, "something kills its processes, often for memory: fewer images a process, or more RAM"
    ),
    Cause.VANISHED: Policy(20, 1.0, "its machines go away without a word: ask whoever runs them"),
    Cause.NOT_LAUNCHED: Policy(8, 1.0, "the cluster does not take it: check partition, limits and account"),
    Cause.UNPLACED: Policy(None, 15.0, "the cluster has room for some of its pods only; nothing is wrong with the run"),
    Cause.STORE_LOST: Policy(
        20, 15.0, "its machines lose sight of the run directory: check that file system or bucket"
    ),
    Cause.DATA_STALLED: Policy(5, 15.0, "its images do not arrive: check the file system or bucket of data.path"),
    Cause.SUPERSEDED: Policy(5, 1.0, "another process holds its claim: look for a job of the same name on the cluster"),
    Cause.CRASHED: Policy(2, 1.0, "the trainer raises the same exception again and again: see the log"),
    Cause.HUNG: Policy(2, 5.0, "no step for health.stall_seconds: see the stacks in the log, or raise the limit"),
    Cause.USER_ERROR: Policy(0, 0.0, "correct the spec or the data and submit again"),
    Cause.DISK_FULL: Policy(0, 0.0, "make room and resume; the last sealed checkpoint is intact"),
    Cause.BAD_DATA: Policy(0, 0.0, "too many images cannot be read: repair them, or raise data.max_skip_rate"),
    Cause.BAD_CHECKPOINT: Policy(0, 0.0, "no checkpoint to go on from can be read: restore one, or fork an older one"),
    Cause.DIVERGED: Policy(0, 0.0, "the loss stayed non-finite: fork an earlier checkpoint with a lower learning rate"),
}
"""Every cause but DONE. STOPPED here means without a request in the log, that is preempted or out of time."""


def runbook(cause: Cause) -> str:
    """The page that says what to look at and what to do, in this repository."""
    return f"runbooks/{cause.value}.md"


def backoff(cause: Cause, count: int) -> float | None:
    """Seconds to wait before another try; None if there is to be none.

    count: ends of this cause since the last progress, this one included (at least 1).
    """
    policy = POLICIES[cause]
    if policy.retries is not None and count > policy.retries:
        return None
    return min(policy.backoff * 2.0 ** min(count - 1, 20), LONGEST_BACKOFF)


def verdict(cause: Cause, count: int, message: str) -> str:
    """The last word on a run that gets no other try, for the user."""
    tries = f" ({count} times without progress)" if count > 1 else ""
    return f"{message}{tries}. {POLICIES[cause].advice}. See {runbook(cause)}"
