"""The MLflow shipper: `python -P -m orchestrator.tracking RUN_DIR [--once]`, a process of its own beside a run.

Training writes to the run directory and knows nothing of MLflow; this reads there and sends (`orchestrator.shipper`). A
server may be down for hours: this tries again, waits longer each time, and catches up. It ends when the run is over and
everything has arrived. Its log and its ledger lie in the run directory, under tracking/.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from model import storage
from orchestrator import shipper, state, store
from orchestrator.shipper import Facts, Ledger, Phase
from orchestrator.state import Stage, State

LOOK_SECONDS = 5.0
BACK_OFF_SECONDS = (2.0, 5.0, 10.0, 30.0, 60.0)  # the last one again and again
IDLE_SECONDS = 3600.0  # nothing new for this long: whoever takes the run up again starts another shipper
GIVE_UP_SECONDS = 7 * 24 * 3600.0  # no answer for this long

log = logging.getLogger("dinoctl.tracking")


@dataclass(frozen=True)
class Target:
    """Where to. `artifacts` is set for a database without a server: then they lie beside it."""

    uri: str
    experiment: str
    artifacts: str | None


def log_file(run_dir: str) -> Path:
    return storage.local(f"{run_dir}/tracking/shipper.log")


def target(run_dir: str, spec: dict[str, Any]) -> Target:
    """What the spec names, or a SQLite file beside the runs; of a run in a bucket it always names something."""
    tracking = spec["tracking"]
    runs = Path(run_dir).absolute().parent
    uri = tracking["uri"] or f"sqlite:///{runs}/mlflow.db"
    artifacts = None if uri.startswith(("http://", "https://")) else f"{runs}/mlflow-artifacts"
    return Target(uri, tracking["experiment"], artifacts)


# --- beside a run -----------------------------------------------------------------------------------------------------


def start(run_dir: str) -> subprocess.Popen[bytes]:
    """Start the shipper in a session of its own, so that a Ctrl-C for dinoctl is none for it. A second one on the same
    run ends at once."""
    with storage.local_file(f"{run_dir}/tracking/shipper.log").open("ab") as out:
        command = [sys.executable, "-P", "-m", "orchestrator.tracking", run_dir]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=environment()
        )


def environment() -> dict[str, str]:
    """MLflow's own telemetry off; its retries off too, as the ones here are the ones that count."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    return {**os.environ, **quiet}


# --- what the log says ------------------------------------------------------------------------------------------------

STATUSES = {
    "running": "RUNNING",
    "stopped": "SCHEDULED",  # it can go on
    "cancelled": "KILLED",
    "failed": "FAILED",
    "done": "FINISHED",
}
"""A run's status in MLflow's words."""


def read_facts(run_dir: str) -> Facts:
    """What a pass needs to know, from the run's log. Raises FileNotFoundError if there is no run."""
    run = state.fold(store.read(run_dir))
    if run is None:
        raise FileNotFoundError(f"no run in {run_dir}")
    begun = [stage for stage in run.stages if any(attempt.phase == stage.name for attempt in run.attempts)]
    return Facts(
        run_dir=run_dir,
        run=run.created.run,
        run_id=run.created.run_id,
        spec=run.spec,
        spec_digest=run.spec_digest,
        code_digest=run.code_digest,
        phases=[_facts_of(run, stage) for stage in begun],
        status=STATUSES[run.status],
        over=run.status != "running",
    )


def _facts_of(run: State, stage: Stage) -> Phase:
    attempts = [attempt.number for attempt in run.attempts if attempt.phase == stage.name]
    return Phase(stage.name, attempts, "FINISHED" if run.is_over(stage) else STATUSES[run.status])


# --- the process ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """0 when everything has arrived, 1 when it gave up; with `--once`, one pass without waiting."""
    parser = argparse.ArgumentParser(prog="python -P -m orchestrator.tracking", description="Bring a run to MLflow.")
    parser.add_argument("run_dir")
    parser.add_argument("--once", action="store_true", help="one pass, then end: to catch up by hand")
    options = parser.parse_args(arguments)
    os.environ.update(environment())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run_dir = options.run_dir if storage.is_uri(options.run_dir) else os.path.abspath(options.run_dir)
    with _alone(run_dir) as alone:
        if not alone:
            log.info("another shipper is at work on this run")
            return 0
        return _once(run_dir) if options.once else _keep_going(run_dir)


@contextmanager
def _alone(run_dir: str) -> Iterator[bool]:
    """Whether this is the only shipper of the run on this machine; the kernel drops the lock with the process."""
    with storage.local_file(f"{run_dir}/tracking/lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@dataclass(frozen=True)
class Pass:
    """How one pass went. `error` is for a person; `over`: the run has nothing more to send."""

    sent: int = 0
    over: bool = False
    error: str = ""


def _once(run_dir: str) -> int:
    result = ship(run_dir)
    log.log(logging.ERROR if result.error else logging.INFO, "%s", result.error or f"{result.sent} steps sent")
    return 1 if result.error else 0


def _keep_going(run_dir: str) -> int:
    failures, quiet_since = 0, time.monotonic()
    while True:
        result = ship(run_dir)
        if result.over and not result.error:
            log.info("everything has arrived")
            return 0
        if result.sent:
            quiet_since = time.monotonic()
        if result.error:
            pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
            log.warning("%s. Nothing is lost; trying again in %.0f s", result.error, pause)
            failures += 1
        else:
            if failures:
                log.info("MLflow answers again, and has caught up")
            failures, pause = 0, LOOK_SECONDS
        if time.monotonic() - quiet_since > (GIVE_UP_SECONDS if result.error else IDLE_SECONDS):
            log.info("ending here; to catch up later: python -P -m orchestrator.tracking %s --once", run_dir)
            return 1 if result.error else 0
        time.sleep(pause)


def ship(run_dir: str) -> Pass:
    """One pass. Whatever a server, its database, the network or a full disk does is an answer, not an exception."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        facts = read_facts(run_dir)
        to = target(run_dir, facts.spec)
        client = MlflowClient(tracking_uri=to.uri)
        experiment = shipper.open_experiment(client, to.experiment, to.artifacts)
        sent = shipper.ship(client, facts, _read_ledger(run_dir, to.uri), experiment, lambda it: _write(run_dir, it))
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        return Pass(error=" ".join(str(error).split())[:400])
    return Pass(sent=sent, over=facts.over)


def _read_ledger(run_dir: str, uri: str) -> Ledger:
    """A ledger that is torn or of another store is worth nothing: begin afresh, nothing is doubled."""
    try:
        ledger = msgspec.json.decode(storage.read(f"{run_dir}/tracking/ledger.json"), type=Ledger)
    except (FileNotFoundError, msgspec.DecodeError):
        return Ledger(uri=uri)
    return ledger if ledger.uri == uri else Ledger(uri=uri)


def _write(run_dir: str, ledger: Ledger) -> None:
    storage.replace(f"{run_dir}/tracking/ledger.json", msgspec.json.encode(ledger))


if __name__ == "__main__":
    sys.exit(main())
