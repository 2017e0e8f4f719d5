"""The launcher of Slurm clusters: each attempt is one job, one task a node, and each task becomes that node's agent.

A job is known again by its name, the launch name, with the run id and the attempt's digest in its comment; Slurm knows
no unique names, so of two the one that holds the attempt's claim counts. Nothing is left to Slurm or to submitit but to
carry the job: they never requeue, and how an attempt ended is the agent's to say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import contract, storage
from model.contract import Attempt, Claim
from orchestrator import sections
from orchestrator.asking_slurm import NoAnswerError, ask
from orchestrator.launchers import slurm_queue, slurm_words
from orchestrator.launchers.base import LaunchError, LaunchState, Observation, Query
from orchestrator.launchers.slurm_queue import Job, label

LAG_SECONDS = 30.0
"""How long accounts may lag: a job that neither squeue nor sacct knows is over once it was not seen for so long."""

GONE_SECONDS = 90.0
"""How long a killed job may take to leave its nodes: Slurm gives a step that does not end 60 s (UnkillableStepTimeout),
and then ends it without."""

LOOK_BACK_SECONDS = 7 * 86400.0
"""How far back the accounts are searched for a job of which only the name is known."""

POLL_SECONDS = 10.0
"""Where a run's profile, of an older dinoctl, does not say."""

_last_seen: dict[str, float] = {}
"""By job: when this process last saw it in the queue, wall clock."""


class SlurmLauncher:
    """Implements `orchestrator.launchers.base.Launcher`. cluster: the resolved profile."""

    def __init__(self, cluster: Mapping[str, Any]) -> None:
        self.cluster = cluster
        self.poll = float((cluster.get("slurm") or {}).get("poll_seconds", POLL_SECONDS))

    def render(self, attempt: Attempt, digest: str) -> str:
        from orchestrator.launchers import slurm_script  # here, as submitit takes half a second

        return slurm_script.script(self.cluster, attempt, digest)

    def submit(self, attempt: Attempt, digest: str) -> dict[str, Any]:
        """sbatch, through submitit, and once more for the small job that takes in the end, whatever it is. Raises
        UnansweredError if the cluster may have taken the attempt's job or not."""
        from orchestrator.launchers import slurm_control, slurm_script, slurm_submit

        executor = slurm_script.executor(self.cluster, attempt, digest)
        try:
            handle = slurm_submit.submit(executor, attempt)
            options = slurm_script.options(self.cluster, attempt).model_dump()
            return handle | slurm_control.cover_end(attempt, options, handle["job"])
        finally:
            slurm_queue.forget()

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        """One squeue, one sacct if some are not in it any more, and one sinfo if some ended; each at most every
        `poll_seconds`, whoever asks in this process."""
        if not queries:
            return []
        try:
            jobs = _queue(queries, self.poll)
        except NoAnswerError as error:
            return [Observation(LaunchState.UNKNOWN, query.handle, str(error)) for query in queries]
        by_name: dict[str, list[Job]] = {}
        for job in jobs:
            by_name.setdefault(job.name, []).append(job)
        found = [_chosen(query, _matching(query, by_name.get(query.launch_name, []))) for query in queries]
        _last_seen.update((job.id, time.time()) for job in found if job)
        missing = [query for query, job in zip(queries, found, strict=True) if job is None]
        accounts = self._accounts(missing, {job.id for job in jobs})
        seen = [
            _of_queue(query, job) if job else _of_accounts(query, accounts)
            for query, job in zip(queries, found, strict=True)
        ]
        return self._with_bad_nodes(seen)

    def cancel(self, query: Query, *, hard: bool) -> None:
        """SIGTERM to the agents; `hard`, or where no agent is yet: the end of the job. Of two jobs of the attempt that
        without the claim is ended. Raises LaunchError if Slurm does not answer, refuses, or the job does not end."""
        try:
            alive = _alive(_matching(query, _queue([query])))
            claimed = _claimed(query)
            for job in alive:
                holds = claimed in (None, f"{job.id}.{job.restarts}")
                _cancel(job, hard=hard or not holds)
            if hard:
                _wait_until_gone(query)
        except NoAnswerError as error:
            raise LaunchError(f"{query.launch_name} cannot be cancelled now: {error}") from error
        finally:
            slurm_queue.forget()

    def clear(self, queries: Sequence[Query]) -> None:
        """Raises LaunchError if Slurm does not answer. Of a run that moved here from elsewhere some attempts were never
        Slurm's: their handles say other things."""
        ours = [query for query in queries if query.handle is None or "user" in query.handle]
        if not ours:
            return
        try:
            queue = _queue(ours)
            for job in (job for query in ours for job in _matching(query, queue)):
                if slurm_words.state(job.state) is LaunchState.PENDING:
                    _scancel(job.id)
        except NoAnswerError as error:
            raise LaunchError(f"the queue cannot be cleared now: {error}") from error
        finally:
            slurm_queue.forget()

    def usable_nodes(self, resources: Mapping[str, Any], exclude: Sequence[str]) -> int | None:
        """Of the partition that the phase or else the profile names, or the default one."""
        slurm = sections.merged("slurm", self.cluster, resources)
        try:
            nodes = slurm_queue.usable_nodes(slurm.get("partition"), self.poll)
        except NoAnswerError:
            return None
        return len(set(nodes) - {*slurm.get("exclude", []), *exclude})

    def _accounts(self, missing: Sequence[Query], queued: set[str]) -> list[Job] | NoAnswerError:
        """The accounts of the missing ones; a job that is in the queue is another's, or they would not be missing."""
        if not missing:
            return []
        submitted = [float(query.handle["submitted"]) - 3600 for query in missing if query.handle]
        since = min([*submitted, *([time.time() - LOOK_BACK_SECONDS] if len(submitted) < len(missing) else [])])
        try:
            names = [query.launch_name for query in missing]
            jobs = slurm_queue.accounts(_users(missing), names, since, self.poll)
        except NoAnswerError as error:
            return error
        return [job for job in jobs if job.id not in queued]

    def _with_bad_nodes(self, seen: list[Observation]) -> list[Observation]:
        """Whatever Slurm says of the end: of a node that dies under it a job may say FAILED like any other."""
        nodes = {node for one in seen if one.state is LaunchState.ENDED for node in one.nodes}
        bad = set(slurm_queue.bad_nodes(sorted(nodes), self.poll))
        return [
            replace(one, bad_nodes=tuple(n for n in one.nodes if n in bad)) if one.state is LaunchState.ENDED else one
            for one in seen
        ]


# --- whose job it is --------------------------------------------------------------------------------------------------


def _users(queries: Sequence[Query]) -> list[str]:
    """Whose jobs are to be listed: the submitter's, as the handle says, and who else may have submitted it."""
    users = {slurm_queue.user(os.getuid())}
    for query in queries:
        if query.handle:
            users.add(str(query.handle["user"]))
        elif not storage.is_uri(query.run_dir):
            with suppress(OSError):
                users.add(slurm_queue.user(Path(query.run_dir).stat().st_uid))
    return sorted(users)


def _queue(queries: Sequence[Query], poll: float = 0.0) -> list[Job]:
    newest = max((float(query.handle["submitted"]) for query in queries if query.handle), default=0.0)
    return slurm_queue.queue(_users(queries), poll, newest)


def _matching(query: Query, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are this attempt's: by name with run id and digest; the handle's is believed."""
    handle = str(query.handle["job"]) if query.handle else None
    mine = label(query.run_id, query.digest)
    named = [job for job in jobs if job.name == query.launch_name]
    return [job for job in named if job.comment == mine or job.id == handle]


def _chosen(query: Query, jobs: Sequence[Job]) -> Job | None:
    """The one that counts: who holds the claim; without a claim the handle's, or one that is alive."""
    if len(jobs) > 1 and (claimed := _claimed(query)) is not None:
        return next((job for job in jobs if claimed == f"{job.id}.{job.restarts}"), None)
    handle = str(query.handle["job"]) if query.handle else None
    order = sorted(jobs, key=lambda job: (slurm_words.state(job.state) is LaunchState.ENDED, job.id != handle, job.id))
    return next(iter(order), None)


def _claimed(query: Query) -> str | None:
    """The job that trains the attempt, as `<job id>.<restarts>`; None: none has begun, or none says."""
    path = f"{query.run_dir}/{contract.claim_file(query.attempt)}"
    try:
        claim = contract.decode(storage.read(path), Claim, path)
    except FileNotFoundError:
        return None
    return claim.job if claim.job and claim.launch_name == query.launch_name else None


def _alive(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if slurm_words.state(job.state) is not LaunchState.ENDED]


# --- what was seen ----------------------------------------------------------------------------------------------------


def _handle(job: Job) -> dict[str, Any]:
    return slurm_queue.handle(job.id, job.submitted or time.time())


def _of_queue(query: Query, job: Job) -> Observation:
    handle = query.handle or _handle(job)
    if job.restarts and _claimed(query) != f"{job.id}.{job.restarts}":
        detail = f"job {job.id} was requeued by the site: its first run is over, and the new one may not train"
        return Observation(LaunchState.ENDED, handle, detail, cause=contract.Cause.VANISHED)
    return slurm_words.observation(job, handle)


def _of_accounts(query: Query, accounts: list[Job] | NoAnswerError) -> Observation:
    """Of a job that the queue does not know: it is over, or was never there. What it was is in the accounts, if they
    are kept and have caught up."""
    if not isinstance(accounts, NoAnswerError):
        jobs = [job for job in accounts if job.comment in ("", label(query.run_id, query.digest))]
        job = _chosen(query, [job for job in jobs if job.name == query.launch_name])
        if job is not None and slurm_words.state(job.state) is LaunchState.ENDED:
            return slurm_words.observation(job, query.handle or _handle(job))
    if query.handle is None:
        return Observation(LaunchState.ABSENT)
    job_id, words = str(query.handle["job"]), f": {accounts}" if isinstance(accounts, NoAnswerError) else ""
    age = time.time() - max(float(query.handle["submitted"]), _last_seen.get(job_id, 0.0))
    if 0 <= age < LAG_SECONDS:
        return Observation(
            LaunchState.UNKNOWN, query.handle, f"job {job_id} is not in the queue, nor in the accounts yet"
        )
    detail = f"job {job_id} is in the queue no more, and no accounts tell of its end{words}"
    return Observation(LaunchState.ENDED, query.handle, detail, cause=contract.Cause.VANISHED)


# --- cancelling -------------------------------------------------------------------------------------------------------


def _cancel(job: Job, *, hard: bool) -> None:
    """A signal goes to the tasks alone, the agents; the script waits for them. A job that has no tasks yet is ended."""
    if hard or slurm_words.state(job.state) is LaunchState.PENDING or not slurm_queue.has_step(job.id):
        if slurm_words.state(job.state) is LaunchState.RUNNING:
            _scancel("--signal=KILL", f"{job.id}.0")  # at once; scancel alone gives them the site's KillWait
        _scancel(job.id)
    else:
        _scancel("--signal=TERM", job.id)


def _scancel(*arguments: str) -> None:
    try:
        ask("scancel", *arguments)
    except NoAnswerError as error:
        if not slurm_words.is_over(str(error)):
            raise


def _wait_until_gone(query: Query) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while left := _alive(_matching(query, _queue([query]))):
        if time.monotonic() > deadline:
            states = ", ".join(f"{job.id} is {job.state} on {job.nodes}" for job in left)
            raise LaunchError(f"jobs were cancelled and do not end: {states}; the nodes' slurmd may be gone")
        time.sleep(0.5)
