"""Staying with a run: tick and show until it is over. What `submit` and `resume` do in the foreground, and `dinoctl
watch` (started by `--detach`) without a screen to look at.

Ctrl-C stops a run of this machine; from a cluster's it only detaches, as its jobs are not this terminal's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from rich.console import Console

from model import contract, storage
from orchestrator import control, launchers, render, report, status, store, tracking
from orchestrator.control import Controller, TickResult
from orchestrator.screen import Follower, Screen, screen
from orchestrator.state import State

TICK_SECONDS, BUCKET_TICK_SECONDS = 1.0, 3.0
CLUSTER_TICK_SECONDS = 10.0  # between two questions to a cluster that others use too
OUT_OF_REACH_SECONDS = 600.0  # a store that does not answer for this long ends the watch, not the run
DISK_FULL_SECONDS = 30.0
SHIPPER_SECONDS = 20.0  # how long a finished run waits for MLflow before it says where it stands
CLEAR_SECONDS = 60.0  # and for a cluster to take away what is over


@dataclass
class Signals:
    """How often this process was asked to stop, and by what. `asked` wakes whoever waits."""

    names: list[str] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)
        self.asked.set()


STOPS = (signal.SIGINT, signal.SIGTERM)
DETACHES = (*STOPS, signal.SIGHUP)


@contextmanager
def _signals(numbers: Sequence[signal.Signals]) -> Iterator[Signals]:
    """These signals are requests while this lasts."""
    signals = Signals()
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Detached(Exception):  # noqa: N818 - not an error: somebody left
    """The user left a cluster's run; the message says who keeps it going."""


def stay(run_dir: str, console: Console, command: str) -> State:
    """Keep the run going and show it until it is over; the state it ends in, or is in when the user detaches.

    On this machine the first SIGINT or SIGTERM asks for a stop with a sealed checkpoint, the second for one at once,
    the third leaves. On a cluster any of them, and SIGHUP, detaches.
    Raises storage.StoreError if the run directory stays out of reach, KeyboardInterrupt on the third signal.
    """
    run = control.load(run_dir)
    every = BUCKET_TICK_SECONDS if storage.is_uri(run_dir) else TICK_SECONDS
    beat = every if is_local(run) else max(every, CLUSTER_TICK_SECONDS)
    this = control.controller(run_dir, launchers.launcher_for, command=command, every=beat)
    follower = Follower(run_dir)
    follower.begin(run)
    shipper = tracking.start(run_dir) if run.spec["tracking"]["enabled"] else None
    try:
        with _signals(STOPS if is_local(run) else DETACHES) as signals, _shown(console) as shown:
            end = _loop(this, follower, shown, signals, every, detaches=not is_local(run))
    except Detached as left:
        if shipper is not None:
            shipper.returncode = 0  # it goes on by itself, and is nobody's child to wait for
        with suppress(OSError):  # the terminal may be gone
            _say(console, str(left))
        return control.load(run_dir)
    if shipper is not None:
        _wait_for_mlflow(run_dir, end, shipper, console)
    if this.uncleared:
        _wait_for_the_cluster(this, end, console)
    return end


@contextmanager
def _shown(console: Console) -> Iterator[Screen]:
    """A screen that lets go of a terminal that is gone: who hangs up cannot be shown anything more."""
    left = None
    try:
        with screen(console) as shown:
            try:
                yield shown
            except Detached as detached:
                left = detached
                raise
    except OSError as error:
        if left is None:
            raise
        raise left from error


def is_local(run: State) -> bool:
    return bool(run.cluster["launcher"] == "local")


def pause(result: TickResult) -> float:
    """Seconds until the next tick: at once where something was done, and a cluster is not asked every second."""
    return result.pause if is_local(result.state) or not result.pause else CLUSTER_TICK_SECONDS


def _loop(
    this: Controller, follower: Follower, shown: Screen, signals: Signals, every: float, *, detaches: bool
) -> State:
    """Show what is new every so many seconds; tick when that is due."""
    said, failing_since, heeded, result, due = "", None, 0, None, 0.0
    while True:
        signals.asked.clear()  # before the look at them: one that comes after it ends the wait below
        if detaches and signals.names:
            raise Detached(_how_it_goes_on(this, result))
        try:
            asked, heeded = heeded, _heed(this.run_dir, signals, heeded, shown)
            if result is None or heeded > asked or time.monotonic() >= due or _has_said_its_end(this, result):
                result = control.tick(this, contract.now())
                due = time.monotonic() + min(pause(result), this.me.every)
            for note in follower.look(result.state, result.launch):
                shown.note(note)
        except storage.StoreError as error:
            failing_since = failing_since or time.monotonic()
            said = _out_of_reach(error, failing_since, shown, said)
            signals.asked.wait(2 * every)
            continue
        failing_since, said = None, ""
        if follower.view is not None:
            shown.show(follower.view, time.monotonic())
        if result.state.status != "running":
            return result.state
        signals.asked.wait(min(max(due - time.monotonic(), 0.0), every))


def _has_said_its_end(this: Controller, result: TickResult) -> bool:
    live = result.state.live
    return live is not None and storage.exists(f"{this.run_dir}/{contract.outcome_file(live.number)}")


def _how_it_goes_on(this: Controller, result: TickResult | None) -> str:
    """Who keeps the run going once we leave, for the user. A process in the background, if something is due now."""
    known = store.watchers(this.run_dir, of_folder=True)
    others = [watcher for watcher in known if (watcher.host, watcher.pid) != (this.me.host, this.me.pid)]
    alive = [watcher for watcher in others if store.is_alive(watcher, contract.now())]
    if alive:
        keeper = f"process {alive[0].pid} on {alive[0].host} ({alive[0].command}) keeps it going"
    elif result is not None and result.settled:
        keeper = "its jobs keep it going: each looks what is due when it ends"
    elif this.me.command == "watch":  # it was there for just that, and is told to go
        keeper = "but something is due, now or when its attempt ends, and nobody is there to do it until somebody ticks"
    else:
        keeper = f"process {detach(this.run_dir)} in the background keeps it going (log: {log_file(this.run_dir)})"
    run = this.run_dir
    return f"detached, and the run goes on: {keeper}\n" + "\n".join(
        f"  dinoctl {command} {run}{' ' * (8 - len(command))}{what}"
        for command, what in (("watch", "comes back to it"), ("status", "says where it is"), ("stop", "stops it"))
    )


def keep_all(runs: str) -> None:
    """Keep all live runs of a folder going until SIGINT, SIGTERM or SIGHUP, and say what happens to them."""
    from orchestrator import many

    this = many.keeper(runs, launchers.launcher_for, command="watch", every=CLUSTER_TICK_SECONDS)
    with _signals(DETACHES) as signals:
        many.keep(this, signals.asked, lambda line: print(line, flush=True), CLUSTER_TICK_SECONDS)


def _out_of_reach(error: storage.StoreError, since: float, shown: Screen, said: str) -> str:
    """Say it once, and give up after a while: the attempt goes on without this process."""
    patience = DISK_FULL_SECONDS if isinstance(error, storage.DiskFullError) else OUT_OF_REACH_SECONDS
    if time.monotonic() - since > patience:
        raise error
    if str(error) != said:
        shown.note(f"{error}; trying again", "yellow")
    return str(error)


def _heed(run_dir: str, signals: Signals, heeded: int, shown: Screen) -> int:
    """Turn the signals that came into requests; returns how many have been heeded."""
    for number, name in enumerate(signals.names[heeded:], start=heeded + 1):
        by = f"{name} on {contract.hostname()}/{os.getpid()}"
        if number == 1:
            shown.note(f"{name}: sealing a checkpoint and stopping; once more to stop at once", "yellow")
            control.request_stop(run_dir, by=by)
        elif number == 2:
            shown.note(f"{name} again: stopping at once; steps since the last seal are lost", "yellow")
            control.request_stop(run_dir, by=by, hard=True)
        else:
            raise KeyboardInterrupt
        heeded = number
    return heeded


def _wait_for_mlflow(run_dir: str, end: State, shipper: subprocess.Popen[bytes], console: Console) -> None:
    """A bounded wait: MLflow must not hold up whoever waits for the run."""
    try:
        shipper.wait(timeout=SHIPPER_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        shipper.returncode = 0  # it goes on by itself, and is nobody's child to wait for
        arrived = False
    else:
        arrived = shipper.returncode == 0
    if not arrived:
        uri = tracking.target(run_dir, end.spec).uri
        console.print(
            f"MLflow ({uri}) has not got everything yet; {tracking.log_file(run_dir)} says why", style="yellow"
        )


def _wait_for_the_cluster(this: Controller, end: State, console: Console) -> None:
    """Bounded too: what is over takes no node, and anybody's tick takes it away."""
    deadline = time.monotonic() + CLEAR_SECONDS
    with suppress(KeyboardInterrupt):
        while this.uncleared and time.monotonic() < deadline:
            time.sleep(this.me.every)
            control.clear(this, end, launchers.launcher_for(end.cluster))
    for said in this.uncleared:
        console.print(f"{said}; `dinoctl tick {this.run_dir}` asks again", style="yellow", soft_wrap=True)


# --- the end ----------------------------------------------------------------------------------------------------------


def conclude(run_dir: str, end: State, console: Console) -> int:
    """Say how it ended, where everything is and how to go on; the exit code. One that still runs was left."""
    if end.status == "running":
        return 130
    view = status.detail(run_dir, contract.now())
    if end.status == "done":
        _done(view, end, console)
        return 0
    console.print(render.detail(view, contract.now()))
    if end.status in ("stopped", "cancelled"):
        return 130
    full = end.failed is not None and end.failed.cause is contract.Cause.DISK_FULL
    return 3 if full else 1


def _done(view: status.Detail, end: State, console: Console) -> None:
    if view.report:
        console.print(report.render(view.report))
        for picture in view.report.pictures:
            _say(console, f"picture: {view.summary.path}/{picture}")
    if end.spec["tracking"]["enabled"]:
        uri = tracking.target(view.summary.path, end.spec).uri
        _say(console, f"MLflow: {uri} (mlflow ui --backend-store-uri {uri})" if "://" in uri else f"MLflow: {uri}")
    _say(console, f"run {view.summary.run} is done: {view.summary.path}")


def _say(console: Console, text: str) -> None:
    """Paths stay whole: no folding, no colours."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


# --- in the background ------------------------------------------------------------------------------------------------


def log_file(run_dir: str) -> str:
    return str(storage.local(f"{run_dir}/watch.log"))


def detach(run_dir: str) -> int:
    """Start `dinoctl watch` on the run in a session of its own; its pid."""
    with storage.local_file(f"{run_dir}/watch.log").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "orchestrator.cli", "watch", run_dir],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    pid = process.pid
    process.returncode = 0  # it outlives this process, which will not wait for it
    return pid
