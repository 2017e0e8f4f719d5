"""How long it takes to keep a thousand live runs going: `.venv/bin/python -P -m tests.benchmarks.controller`.

1,000 run directories with 100 events each, of the 7B's own spec, all with a job under way on one cluster. Whole
processes do what `dinoctl tick` without RUN does: with no folded states on disk, then with them (seven times; median
and slowest are printed), the first after the page cache is filled. The cluster is a stand-in command that costs what
the start of a process costs; the time of that one question is shown apart, beside one such command a job.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.contract import FORMAT, Cause, event_file
from orchestrator import events, many
from orchestrator.launchers.base import LaunchState, Observation, Query
from tests.benchmarks import options as ask

RUNS, EVENTS, TIMES = 1000, 100, 7
SPEC = "jobs/v3_7b.yaml"
CLUSTER = {"name": "pretend", "launcher": "slurm", "slurm": {"partition": "gpu"}}


# --- a thousand runs --------------------------------------------------------------------------------------------------


def log(run: str, spec: dict[str, Any]) -> list[events.Event]:
    """Preempted 32 times, amended once, and under way."""
    nonces = iter(range(EVENTS))
    of = {"at": 1e9}

    def base() -> dict[str, Any]:
        return {**of, "nonce": f"{run}-{next(nonces):08d}"}

    phase = next(iter(spec["phases"]))
    found: list[events.Event] = [
        events.RunCreated(
            **base(), format=FORMAT, run=run, run_id="ab" * 16, spec=spec, cluster=CLUSTER, spec_digest="d" * 64,
            code_digest="c" * 64, version="0",
        )
    ]  # fmt: skip
    for number in range(1, 34):
        name = f"{run}-abababab-{phase}-{number}"
        intent = {"phase": phase, "launch_name": name, "digest": "d" * 64, "owner": "h/b/1/1.0/n", "lease_until": 1e9}
        found.append(events.AttemptIntended(**base(), attempt=number, nodes=32, **intent))
        found.append(events.AttemptLaunched(**base(), attempt=number, handle={"job": str(number), "name": name}))
        if number < 33:
            end = {"cause": Cause.STOPPED, "message": "sealed and stopped", "reached": 1000 * number}
            found.append(events.AttemptEnded(**base(), attempt=number, steps=[1000 * number], **end))
        if number == 1:
            amended = {"spec": spec, "cluster": CLUSTER, "spec_digest": "d" * 64, "changed": ["tracking.enabled"]}
            found.append(events.SpecAmended(**base(), **amended))
    assert len(found) == EVENTS
    return found


def make(runs: Path) -> None:
    words = [sys.executable, "-P", "-m", "orchestrator.cli", "validate", "--json", SPEC]
    answer = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    spec = json.loads(answer.stdout)["job"]
    for number in range(RUNS):
        run = runs / f"run-{number:04d}"
        (run / "events").mkdir(parents=True)
        for count, event in enumerate(log(run.name, spec), 1):
            (run / event_file(count)).write_bytes(events.encode(event))


# --- one process ------------------------------------------------------------------------------------------------------


@dataclass
class StandIn:
    """A cluster on which every job runs. `command` is asked once for all of them."""

    command: str
    seconds: float = 0.0
    questions: int = 0

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        began = time.perf_counter()
        subprocess.run([self.command], check=True, stdout=subprocess.PIPE)
        self.seconds, self.questions = time.perf_counter() - began, self.questions + 1
        return [Observation(LaunchState.RUNNING, query.handle) for query in queries]


def once(runs: str, command: str) -> None:
    """What the process under measure does; prints seconds of the question, and how many runs were ticked."""
    cluster = StandIn(command)
    done = many.follow(many.keeper(runs, lambda profile: cluster, command="tick", every=0.0))  # type: ignore[arg-type,return-value]
    assert (len(done.results), done.errors, cluster.questions) == (RUNS, {}, 1)
    print(cluster.seconds)


def measured(runs: str, command: str) -> tuple[float, float, float]:
    """Seconds of the process without the question, those that it computed, and those of the question."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-P", "-m", "tests.benchmarks.controller", "--once", runs, command]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    took, asking = time.perf_counter() - began, float(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took - asking, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, asking


def main() -> None:
    parser = ask.parser(__doc__)
    parser.add_argument("--once", nargs=2, metavar=("RUNS", "COMMAND"), help="what each process under measure does")
    if one := parser.parse_args().once:
        return once(*one)
    os.chdir(Path(__file__).parents[2])
    return measure()


def measure() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sacct = Path(folder) / "sacct"
        answers = "".join(f"{number}|run-{number:04d}|RUNNING|node{number}\n" for number in range(RUNS))
        (Path(folder) / "answers").write_text(answers)
        sacct.write_text(f"#!/bin/sh\nexec cat {folder}/answers\n")
        sacct.chmod(0o755)
        runs = Path(folder) / "runs"
        make(runs)
        print(f"{RUNS} runs of {EVENTS} events, each in a process of its own")
        print("                      seconds  of CPU  and for one question")
        print("nothing folded yet    {:7.2f} {:7.2f} {:7.3f}".format(*measured(str(runs), str(sacct))))
        taken = [measured(str(runs), str(sacct)) for _ in range(TIMES)]
        for name, of in (("median", statistics.median), ("slowest", max)):
            values = [of(column) for column in zip(*taken, strict=True)]
            print("with folded, {:8s} {:7.2f} {:7.2f} {:7.3f}".format(name, *values))
        began = time.perf_counter()
        for number in range(RUNS):
            subprocess.run([str(sacct), "-j", str(number)], check=True, stdout=subprocess.PIPE)
        print(f"one sacct a job, their start alone: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
