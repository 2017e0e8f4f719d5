"""What `status` says of runs, gathered from their directories: records that render.py draws and `--json` prints.

On the path of `dinoctl status` with many runs: reads a run's log, its heartbeats and its newest progress chunk, and
imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import msgspec

from model import contract, storage
from model.contract import Cause, Outcome
from orchestrator import failures, logs, progress, report, state, store
from orchestrator.report import Report
from orchestrator.state import AttemptState, Stage, State

TAIL_LINES = 30
RUNS_AT_ONCE = 16
"""In a bucket."""


class RunNotFoundError(LookupError):
    """There is no run of that name; the message says which there are."""


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """Who keeps a run going. Nobody: `host` and `pid` are None and `since` is when somebody last looked, if ever.
    `unreadable`: heartbeats that cannot be read, and why; `job`: what a job on the cluster does for it, if one does."""

    host: str | None
    pid: int | None
    since: float | None
    unreadable: list[str] = []
    job: str = ""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in one row. `number` of `stages`: where it is; `advice`: the command that goes on, if one is needed.

    status `unreadable`: its log cannot be read, `message` says why, and nothing else of it is known.
    """

    run: str
    path: str
    status: str
    stage: str
    number: int
    stages: int
    attempt: int
    step: int | None
    steps: int | None
    watch: Watch | None  # None: the run is over, nobody needs to watch
    cause: Cause | None
    message: str
    advice: str


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """A phase or the evaluation: waiting, running, done or inherited. `sealed`: steps of the checkpoints that count;
    `there`: of these, those that retention has not removed."""

    name: str
    status: str
    step: int | None
    steps: int | None
    attempts: list[int]
    sealed: list[int]
    there: list[int]


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    attempt: int
    phase: str
    status: str
    begun: float
    ended: float | None
    cause: Cause | None
    message: str
    reached: int | None
    sealed: list[int]
    nodes: int | None  # that it asked for, where that was recorded
    of_nodes: int  # that its phase asks for


class LaunchView(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher says of the live attempt now, asked once. state `unknown`: no answer, or none in time.
    `detail`: the queue's reason, or why there is no answer. `starts_at`: when it is expected to start."""

    state: str
    detail: str
    nodes: list[str]
    starts_at: float | None


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """A run in full. `tail`: of the log of the attempt that failed last, if the run did not go on from there. `launch`:
    only of a live attempt, where it was asked for. `looked`: how far that is with its look at the images, before its
    first step. `excluded`: nodes that are left out, and until when."""

    summary: Summary
    run_id: str
    spec_digest: str
    code_digest: str
    forked_from: str | None
    stages: list[StageView]
    attempts: list[AttemptView]
    tail: list[str]
    runbook: str | None
    report: Report | None
    launch: LaunchView | None
    looked: str
    excluded: dict[str, float]


# --- finding runs -----------------------------------------------------------------------------------------------------


def names(runs: str) -> list[str]:
    """The runs in a folder."""
    there = storage.names(runs)
    if not storage.is_uri(runs):
        return [name for name in there if store.has_events(f"{runs}/{name}")]
    with ThreadPoolExecutor(RUNS_AT_ONCE) as readers:
        are_runs = readers.map(store.has_events, [f"{runs}/{name}" for name in there])
        return [name for name, is_run in zip(there, are_runs, strict=True) if is_run]


def find(run: str, runs: str) -> str:
    """The directory of a run, given by name or by path, absolute. Raises RunNotFoundError saying which runs exist."""
    for path in (run,) if storage.is_uri(run) else (f"{runs}/{run}", run):
        if store.has_events(path):
            return absolute(path)
    known = names(runs)
    there = f"runs in {runs}: {', '.join(known)}" if known else f"there are no runs in {runs}"
    raise RunNotFoundError(f"no run {run!r}; {there} (another folder: --runs or DINOCTL_RUNS)")


def absolute(path: str) -> str:
    return path.rstrip("/") if storage.is_uri(path) else str(Path(path).absolute())


def load(run_dir: str, pauses: Sequence[float] | None = None) -> State:
    """The state of a run that is there. Raises RunNotFoundError if somebody has removed it since it was found."""
    run = state.fold(store.read(run_dir, pauses))
    if run is None:
        raise RunNotFoundError(f"{run_dir} holds no run any more: its events were removed")
    return run


# --- gathering --------------------------------------------------------------------------------------------------------


def summaries(runs: str, now: float) -> list[Summary]:
    """All runs in a folder. One that is damaged does not hide the others, nor keep them waiting for it."""
    paths = [absolute(f"{runs}/{name}") for name in names(runs)]
    if not storage.is_uri(runs):
        return [_summary_or_why_not(path, now) for path in paths]
    with ThreadPoolExecutor(RUNS_AT_ONCE) as readers:  # each waits for a bucket most of the time
        return list(readers.map(_summary_or_why_not, paths, repeat(now)))


def _summary_or_why_not(run_dir: str, now: float) -> Summary:
    try:
        return summary(run_dir, now, pauses=(0.05,))
    except (contract.ContractError, store.LogError, state.IllegalEvent, storage.StoreError) as error:
        return Summary(
            run=Path(run_dir).name, path=run_dir, status="unreadable", stage="", number=0, stages=0, attempt=0,
            step=None, steps=None, watch=None, cause=None, message=str(error), advice=f"dinoctl status {run_dir}",
        )  # fmt: skip


def summary(run_dir: str, now: float, pauses: Sequence[float] | None = None) -> Summary:
    return _summary(run_dir, load(run_dir, pauses), now)


def _summary(run_dir: str, run: State, now: float) -> Summary:
    stages = run.stages
    current = run.next_stage or stages[-1]
    last = run.attempts[-1] if run.attempts else None
    watch = _watch(run_dir, run, now) if run.status == "running" else None
    cause, message = _why(run)
    return Summary(
        run=run.created.run,
        path=run_dir,
        status=run.status,
        stage=current.name,
        number=stages.index(current) + 1,
        stages=len(stages),
        attempt=last.number if last else 0,
        step=reached(run_dir, run, current),
        steps=current.last,
        watch=watch,
        cause=cause,
        message=message,
        advice=_advice(run, watch, run_dir),
    )


def _watch(run_dir: str, run: State, now: float) -> Watch:
    watchers = store.watchers(run_dir, of_folder=run.cluster["launcher"] != "local")
    unreadable = store.unreadable_watchers(run_dir)
    for watcher in watchers:
        if store.is_alive(watcher, now):
            job = watcher.command if watcher.command.startswith("job ") else ""
            return Watch(host=watcher.host, pid=watcher.pid, since=watcher.started, unreadable=unreadable, job=job)
    since = watchers[0].seen_at if watchers else None
    return Watch(host=None, pid=None, since=since, unreadable=unreadable, job=_controller(run_dir) or _end_job(run))


def _controller(run_dir: str) -> str:
    """The job that is to watch, where the run has one: it may wait in the queue."""
    path = f"{run_dir}/{contract.CONTROLLER_FILE}"
    try:
        job = contract.decode(storage.read(path), contract.ControllerJob, path)
    except (FileNotFoundError, contract.ContractError):
        return ""
    return f"job {job.job} ({job.name}) is to, once the cluster starts it"


def _end_job(run: State) -> str:
    """The job on the cluster that depends on the live attempt's."""
    job = (run.live.handle or {}).get("end_job") if run.live else None
    return f"job {job} looks what is due when the attempt ends" if job else ""


def _why(run: State) -> tuple[Cause | None, str]:
    """Why the run is not going on, or why its last attempt ended while the next one is due."""
    if run.failed:
        return run.failed.cause, run.failed.message
    last = run.attempts[-1].end if run.attempts else None
    if last is None or last.cause is Cause.DONE:
        return None, ""
    return last.cause, last.message


def _advice(run: State, watch: Watch | None, run_dir: str) -> str:
    nobody = watch is not None and watch.pid is None and not watch.job
    if nobody or run.status in ("stopped", "failed", "cancelled"):
        return f"dinoctl resume {run_dir}"
    return ""


def reached(run_dir: str, run: State, stage: Stage) -> int | None:
    """Updates of the stage so far: what the newest attempt recorded, or what it resumed from while it is starting. The
    evaluation has no updates: None."""
    if stage.last is None:
        return None
    if run.is_over(stage):
        return stage.last
    sealed = max((ref.step for ref in run.resume_points(stage.name, run_dir)), default=0)
    mine = [attempt.number for attempt in run.attempts if attempt.phase == stage.name]
    newest = progress.latest(run_dir, mine[-1]) if mine and run.attempts[-1].phase == stage.name else None
    return newest.step if newest else sealed


def detail(run_dir: str, now: float, ask: Callable[[str, State], LaunchView | None] | None = None) -> Detail:
    """ask: of the launcher, what it knows of the live attempt; None: it is not asked."""
    run = load(run_dir)
    failed = _last_failure(run)
    fork = run.created.forked_from
    return Detail(
        summary=_summary(run_dir, run, now),
        run_id=run.created.run_id,
        spec_digest=run.spec_digest,
        code_digest=run.code_digest,
        forked_from=f"{fork.run}#{fork.phase}@{fork.step}" if fork else None,
        stages=[_stage(run_dir, run, stage) for stage in run.stages],
        attempts=[_attempt(run_dir, run, attempt) for attempt in run.attempts],
        tail=_tail(run_dir, failed) if failed else [],
        runbook=failures.runbook(failed.end.cause) if failed and failed.end else None,
        report=report.read(run_dir),
        launch=ask(run_dir, run) if ask and run.live else None,
        looked=_looked(run_dir, run.live) if run.live else "",
        excluded=run.excluded(now) if run.status != "done" else {},
    )


def _looked(run_dir: str, live: AttemptState) -> str:
    """Its words are asked for first: one request to a bucket, and most attempts have none."""
    words = progress.looked(run_dir, live.number)
    return "" if words and progress.latest(run_dir, live.number) else words


def _stage(run_dir: str, run: State, stage: Stage) -> StageView:
    attempts = [attempt.number for attempt in run.attempts if attempt.phase == stage.name]
    if run.is_inherited(stage.name):
        status = "inherited"
    elif run.is_over(stage):
        status = "done"
    elif run.live and run.live.phase == stage.name:
        status = "running"
    else:
        status = "begun" if attempts else "waiting"
    counts = set(run.accepted().get(stage.name, []))
    if run.live and run.live.phase == stage.name:
        counts |= {(run.live.number, step) for step in _sealed(run_dir, run.live)}
    step = reached(run_dir, run, stage) if attempts or status == "inherited" else None
    return StageView(
        name=stage.name, status=status, step=step, steps=stage.last, attempts=attempts,
        sealed=sorted({step for _, step in counts}), there=_there(run_dir, stage.name, counts),
    )  # fmt: skip


def _sealed(run_dir: str, attempt: AttemptState) -> list[int]:
    """The checkpoints of an attempt that count: the event of its end says which; until then those that are there do."""
    if attempt.end:
        return attempt.end.steps
    from orchestrator import attempts  # here, as the table of many runs does without

    return attempts.sealed_steps(run_dir, attempt.phase, attempt.number)


def _there(run_dir: str, phase: str, counts: set[tuple[int, int]]) -> list[int]:
    """The steps of those checkpoints (attempt, step) that are there."""
    from orchestrator import attempts

    numbers = {number for number, _ in counts}
    there = {(number, step) for number in numbers for step in attempts.sealed_steps(run_dir, phase, number)}
    return sorted({step for _, step in counts & there})


def _attempt(run_dir: str, run: State, attempt: AttemptState) -> AttemptView:
    end = attempt.end
    asked_for = run.settings(attempt.phase).get("resources", {}).get("nodes", 1)
    return AttemptView(
        attempt=attempt.number,
        phase=attempt.phase,
        status=attempt.status,
        begun=attempt.intent.at,
        ended=end.at if end else None,
        cause=end.cause if end else None,
        message=end.message if end else "",
        reached=end.reached if end else None,
        sealed=_sealed(run_dir, attempt),
        nodes=attempt.intent.nodes,
        of_nodes=1 if attempt.phase == contract.EVALUATE else int(asked_for),
    )


def _last_failure(run: State) -> AttemptState | None:
    """The newest attempt, if it ended in another way than done or a stop."""
    last = run.attempts[-1] if run.attempts else None
    quiet = (Cause.DONE, Cause.STOPPED)
    return last if last and last.end and last.end.cause not in quiet else None


TOLD = {Cause.USER_ERROR, Cause.DISK_FULL, Cause.BAD_CHECKPOINT}
"""Ends whose message says it all; where in our code they were noticed helps nobody (`logs` has it)."""


def _tail(run_dir: str, failed: AttemptState) -> list[str]:
    """What the agent kept of the failure (a traceback, stacks, more names), or the end of its log."""
    if failed.end is not None and failed.end.cause in TOLD:
        return []
    attempt = failed.number
    path = f"{run_dir}/{contract.outcome_file(attempt)}"
    try:
        text = contract.decode(storage.read(path), Outcome, path).detail
    except FileNotFoundError:
        text = ""
    return (text.splitlines() or _log_lines(run_dir, attempt))[-TAIL_LINES:]


def _log_lines(run_dir: str, attempt: int) -> list[str]:
    try:
        return logs.read(f"{run_dir}/{contract.agent_log(attempt)}").decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
