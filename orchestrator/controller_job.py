"""`controller: {on: cluster}`: a run is kept going by a one-core job of its own on the cluster, and by the next one.

`start` is what submit and resume do; `run` is what the job does (`python -P -m orchestrator.controller_job RUN_DIR`):
see to it that one more waits behind it, tick until the run is over, then end the one that waits. A signal (time limit,
preemption, scancel) makes it leave; the run and its attempt go on, and so does the job behind it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

from model import contract, storage
from model.contract import ControllerJob
from orchestrator import control, launchers, sections, tracking
from orchestrator.asking_slurm import NoAnswerError
from orchestrator.control import Controller
from orchestrator.launchers import slurm_control
from orchestrator.launchers.base import LaunchError
from orchestrator.state import State

TICK_SECONDS = 5.0
"""Between two looks: the scheduler is asked no more often."""

RETRY_SECONDS = 30.0
"""After a store or a scheduler that did not do what it was asked."""

ASK_SECONDS = 15.0
"""How long one look asks a bucket again."""

SHIPPER_SECONDS = 120.0
"""How long a run that is over waits for MLflow: with this job the shipper ends too."""


def wanted(state: State) -> bool:
    return bool(state.spec.get("controller", {}).get("on") == "cluster")


def start(run_dir: str) -> str | None:
    """Have a controller's job on the cluster if the run's spec wants one; what there is to say of it, or None.

    The attempt that is due is launched first, so that it does not wait for the controller's turn in the queue. One that
    is there already is left as it is. Raises LaunchError if there is none and the cluster takes none.
    """
    state = control.load(run_dir)
    if not wanted(state) or state.status != "running":
        return None
    control.tick(control.controller(run_dir, launchers.launcher_for, command="submit", every=0.0), contract.now())
    try:
        job, new = _have_one(run_dir, state)
    except NoAnswerError as error:
        again = f"the run is there, and dinoctl resume {run_dir} tries again"
        raise LaunchError(f"no controller could be had on the cluster: {error}; {again}") from error
    return f"{'to be watched' if new else 'watched'} by job {job.job} ({job.name}, {job.state.lower()})"


def run(run_dir: str) -> int:
    """Keep the run going until it is over or this job has to go; 0 also then, as another one follows."""
    run_dir = control.absolute(run_dir)
    asked = _told_to_go()
    state = control.load(run_dir)
    job = os.environ.get("SLURM_JOB_ID", "none")
    this = control.controller(run_dir, launchers.launcher_for, command=f"job {job}", every=TICK_SECONDS)
    try:
        _have_next(run_dir, state)
        state = _watch(this, asked)
        if state.status != "running":
            _end(run_dir, state)
    except Exception:  # a fault of ours: the next one would run into it too, again and again
        slurm_control.cancel_controllers(state.created.run_id)
        raise
    _say(f"run {state.created.run} is {state.status}" if state.status != "running" else "told to go; the run goes on")
    return 0


def _watch(this: Controller, asked: threading.Event) -> State:
    state = control.load(this.run_dir)
    shipper = tracking.start(this.run_dir) if state.spec["tracking"]["enabled"] else None
    while not asked.is_set():
        try:
            result = control.tick(this, contract.now())
        except (storage.StoreError, LaunchError) as error:
            _say(f"{error}; trying again")
            asked.wait(RETRY_SECONDS)
            continue
        state = result.state
        if state.status != "running":
            _wait_for(shipper, asked)
            break
        asked.wait(TICK_SECONDS if result.settled else min(result.pause, TICK_SECONDS))
    return state


def _told_to_go() -> threading.Event:
    """Set by any of the signals that Slurm ends a job with."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, handle)
    return asked


def _have_one(run_dir: str, state: State) -> tuple[slurm_control.Queued, bool]:
    created = state.created
    job, new = slurm_control.start_controller(
        run_dir, created.run, created.run_id, section(state), state.spec["controller"]["time_limit_minutes"]
    )
    if new:
        record = ControllerJob(job=job.job, name=job.name, submitted_at=contract.now())
        storage.replace(f"{run_dir}/{contract.CONTROLLER_FILE}", contract.encode(record))
    return job, new


def _have_next(run_dir: str, state: State) -> None:
    """Without one behind it this one still does its work, and says so."""
    try:
        job, _ = _have_one(run_dir, state)
        _say(f"job {job.job} waits behind this one")
    except NoAnswerError as error:
        _say(f"no job could be put behind this one: {error}; dinoctl resume {run_dir} does it")


def _end(run_dir: str, state: State) -> None:
    try:
        slurm_control.cancel_controllers(state.created.run_id)
    except NoAnswerError as error:  # it finds the run over and leaves by itself
        _say(str(error))
    storage.remove(f"{run_dir}/{contract.CONTROLLER_FILE}")


def _wait_for(shipper: subprocess.Popen[bytes] | None, asked: threading.Event) -> None:
    deadline = time.monotonic() + SHIPPER_SECONDS
    while shipper is not None and shipper.poll() is None and time.monotonic() < deadline and not asked.wait(0.5):
        pass
    if shipper is not None and shipper.returncode is None:
        shipper.returncode = 0  # it is nobody's child to wait for
        _say("MLflow has not got everything; dinoctl watch RUN sends the rest")


def section(state: State) -> dict[str, Any]:
    """The `slurm` section for jobs that are none of a phase's: the profile's, with what the job's first phase says."""
    phase = next(iter(state.spec["phases"].values()))
    return sections.merged("slurm", state.cluster, phase["resources"])


def _say(text: str) -> None:
    print(f"controller: {text}", flush=True)


def main(run_dir: str) -> int:
    """`run`, with a message instead of a traceback for what is no fault of ours."""
    from orchestrator.mistakes import explain

    storage.be_patient(ASK_SECONDS)
    try:
        return run(run_dir)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        _say(explained.message)
        return explained.exit_code


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -P -m orchestrator.controller_job RUN_DIR")
    sys.exit(main(sys.argv[1]))
