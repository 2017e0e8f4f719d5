"""What each command does, one function a command, by its name; the exit code is what it returns.

Everything that is slow to import (pydantic, rich, psutil) is imported where it is needed: `status` with many runs needs
none of pydantic.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from model import contract, storage
from orchestrator import status as statuses

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.cluster import ClusterProfile
    from orchestrator.spec import Job
    from orchestrator.state import State

DEFAULT_RUNS = "runs"
Options = argparse.Namespace

_WHAT = {
    "created": "is new",
    "attached": "is there already",
    "resumed": "goes on",
    "amended": "is amended, and goes on",
}


ASK_SECONDS = 15.0


def be_patient(command: str) -> None:
    """A person waits for an answer, and who watches asks again by himself; a tick is the last act of an agent."""
    if command != "tick":
        storage.be_patient(ASK_SECONDS)


# --- on a job file ----------------------------------------------------------------------------------------------------


def validate(options: Options) -> int:
    from orchestrator import remarks, spec
    from orchestrator.yaml_reader import dump

    job, cluster = _read(options, check_runs=True)
    resolved = spec.resolved(job)
    if options.json:
        told = [*remarks.remarks(job, cluster), *remarks.refused(job, cluster)]
        print_json({"valid": True, "problems": [], "remarks": told, "job": resolved})
    elif options.resolved:
        print(dump(resolved), end="")
    else:
        phases = ", ".join(f"{name} ({phase.steps} steps)" for name, phase in job.phases.items())
        print(f"{options.file}: valid. Phases: {phases}")
    return 0


def schema(options: Options) -> int:
    from orchestrator.schema import job_schema

    print_json(job_schema())
    return 0


def plan(options: Options) -> int:
    from orchestrator import plan as plans, stakes

    job, cluster = _read(options, check_runs=True)
    planned = plans.make_plan(job, cluster)
    planned = replace(planned, preemption=tuple(stakes.lines(job, cluster, f"{job.runs}/{job.name}")))
    if options.json:
        print_json(planned.as_mapping())
    else:
        print(plans.as_text(planned))
    return 0


def submit(options: Options) -> int:
    from orchestrator import control, kubernetes_checks, spec, weights_command
    from orchestrator.problems import SpecError

    job, cluster = _read(options)
    name = job.name if options.run is None else options.run
    problems = [*spec.name_problems(name), *spec.not_there_yet(job, cluster)]
    if problems:
        raise SpecError(problems)
    resolved = spec.resolved(job)
    if wrong := spec.runs_problems(_runs(options, job.runs), resolved["tracking"]):
        raise SpecError(wrong)
    if wrong := weights_command.problems(resolved):
        raise SpecError(wrong)
    request = control.Request(name, resolved, cluster.model_dump(mode="json"), spec.reread)
    run_dir = control.absolute(f"{_runs(options, job.runs)}/{name}")
    if options.dry_run:
        from orchestrator import dry_run

        print(dry_run.show(run_dir, request, fork=options.fork))
        return 0
    if wrong := kubernetes_checks.refusals(job, cluster, _runs(options, job.runs)):
        raise SpecError(wrong)
    done = control.submit(run_dir, request, by=_me(), fork=options.fork, amending=options.amend)
    for change in done.changes:
        print(f"amended: {change}")
    shown = done.what == "attached" and not options.detach
    key = "stops it, as it does where it was submitted" if cluster.launcher == "local" else "leaves it running"
    more = f", and is shown (Ctrl-C {key})" if shown else ""
    print(f"run {name} {_WHAT[done.what]}{more}: {run_dir}", flush=True)
    return _go_on(run_dir, options)


def _read(options: Options, *, check_runs: bool = False) -> tuple[Job, ClusterProfile]:
    """The job and its cluster's profile. Raises SpecError with every mistake in both.

    check_runs: look for checkpoints of other runs, and remark on what `submit` would refuse. `submit` does both itself,
    and of a run that is there only looks for what it still has to take.
    """
    from orchestrator.cluster import read_cluster
    from orchestrator.remarks import refused, remarks
    from orchestrator.spec import leave_out_uncaptioned, read_job

    overrides = [*options.overrides, *([f"cluster={options.cluster}"] if options.cluster else [])]
    job = read_job(options.file, overrides, check_runs=check_runs, runs=getattr(options, "runs", None) or "")
    cluster = read_cluster(job.cluster)
    job, left_out = leave_out_uncaptioned(job, cluster)
    for line in [*left_out, *remarks(job, cluster), *(refused(job, cluster) if check_runs else [])]:
        print(f"dinoctl: {line}", file=sys.stderr)
    return job, cluster


def data(options: Options) -> int:
    from orchestrator import data_command

    return data_command.run(options)


def weights(options: Options) -> int:
    from orchestrator import weights_command

    return weights_command.run(options, _runs(options))


def ckpt(options: Options) -> int:
    from orchestrator import ckpt_command

    return ckpt_command.run(options, _runs(options))


# --- keeping a run going ----------------------------------------------------------------------------------------------


def _go_on(run_dir: str, options: Options) -> int:
    """Stay with the run, or leave it to a process in the background."""
    from orchestrator import controller_job, watch as watching

    if options.detach and statuses.load(run_dir).status == "done":
        print(f"the run is done, there is nothing left to watch; dinoctl status {run_dir}")
        return 0
    on_the_cluster = controller_job.start(run_dir)
    if on_the_cluster:
        print(f"{on_the_cluster}; dinoctl status {run_dir}", flush=True)
    if options.detach and on_the_cluster:
        return 0
    if options.detach:
        pid = watching.detach(run_dir)
        print(f"watched by process {pid} (log: {watching.log_file(run_dir)}); dinoctl status {run_dir}")
        return 0
    return _stay(run_dir, options.command)


def _stay(run_dir: str, command: str) -> int:
    from orchestrator import watch as watching

    console = _console()
    end = watching.stay(run_dir, console, command)
    return watching.conclude(run_dir, end, console)


def resume(options: Options) -> int:
    from orchestrator import control

    run_dir = _find(options)
    control.resume(run_dir, by=_me(), new_code=options.code == "new", skip_data=options.skip_data)
    return _go_on(run_dir, options)


def watch(options: Options) -> int:
    from orchestrator import watch as watching

    if options.run is not None:
        return _stay(_find(options), "watch")
    folder = _folder(options)
    print(f"keeping all live runs of {folder} going; Ctrl-C leaves them as they are", flush=True)
    watching.keep_all(folder)
    return 130


def tick(options: Options) -> int:
    from orchestrator import control, launchers, many

    if options.run is not None:
        run_dir = _find(options)
        this = control.controller(run_dir, launchers.launcher_for, command="tick", every=0.0)
        followed = control.follow(this)
        _say_left_alone([run_dir] if followed.left_alone else [])
        for said in this.uncleared:
            print(f"dinoctl: {run_dir}: {said}; tick again later", file=sys.stderr)
        return 1 if this.uncleared else 0
    folder = _folder(options)
    keeper = many.keeper(folder, launchers.launcher_for, command="tick", every=0.0)
    done = many.follow(keeper)
    _say_left_alone(many.left_alone(keeper, done, contract.now()))
    for run_dir, error in done.errors.items():
        print(f"dinoctl: {run_dir}: {error}", file=sys.stderr)
    print(f"{len(done.results)} live runs in {folder}")
    return 1 if done.errors else 0


def _say_left_alone(run_dirs: Iterable[str]) -> None:
    """Of runs whose attempts do not tick at their end, and that nobody watches."""
    for run in run_dirs:
        print(
            f"dinoctl: nobody watches {run}: what is due when its attempt ends is done by the next `dinoctl tick {run}`"
            f", or by who stays, `dinoctl watch {run}` (runbooks/nobody-watches.md)",
            file=sys.stderr,
        )


def _folder(options: Options) -> str:
    """The folder of runs. Raises RunNotFoundError if it is not there."""
    folder = _runs(options)
    if not storage.is_uri(folder) and not os.path.isdir(folder):
        raise statuses.RunNotFoundError(f"no such folder of runs: {folder} (--runs or DINOCTL_RUNS names it)")
    return folder


def stop(options: Options) -> int:
    from orchestrator import control

    run_dir = _find(options)
    state = control.load(run_dir)
    if state.status == "done":
        raise control.ControlError(f"run {state.created.run} is done; there is nothing to stop")
    control.request_stop(run_dir, by=_me(), hard=options.now)
    print("asked to end at once" if options.now else "asked to seal and stop", flush=True)
    state = _see_it_end(run_dir, "stop")
    print(f"run {state.created.run} is {state.status}; dinoctl resume {run_dir} goes on")
    return 0


def cancel(options: Options) -> int:
    from orchestrator import control

    run_dir = _find(options)
    control.cancel(run_dir, by=_me())
    print("asked to seal and stop", flush=True)
    state = _see_it_end(run_dir, "cancel")
    print(f"run {state.created.run} is {state.status}; dinoctl resume {run_dir} goes on after all")
    return 0


def _see_it_end(run_dir: str, command: str) -> State:
    """See to it that the attempt stops, whoever else watches. Ctrl-C leaves: what was asked for stays in the log."""
    from orchestrator import control, launchers
    from orchestrator.watch import pause

    this = control.controller(run_dir, launchers.launcher_for, command=command)
    while (result := control.tick(this, contract.now())).state.status == "running":
        time.sleep(pause(result))
    return result.state


# --- looking at runs --------------------------------------------------------------------------------------------------


def status(options: Options) -> int:
    now = contract.now()
    if options.run is None:
        folder = _runs(options)
        if options.runs and not storage.is_uri(folder) and not os.path.isdir(folder):
            raise statuses.RunNotFoundError(f"no such folder of runs: {folder} (--runs or DINOCTL_RUNS names it)")
        summaries = statuses.summaries(folder, now)
        if options.json:
            print_json(summaries)
        elif not summaries:
            print(f"no runs in {folder} (another folder: --runs or DINOCTL_RUNS)")
        else:
            from orchestrator import overview

            print(overview.runs(summaries, now))
        return 0
    from orchestrator import asking

    view = statuses.detail(_find(options), now, asking.launch_view)
    if options.json:
        print_json(view)
    else:
        from orchestrator import render

        _console().print(render.detail(view, now))
    return 0


def logs(options: Options) -> int:
    from orchestrator import logs_command

    return logs_command.run(options, _find(options))


# --- before the first run --------------------------------------------------------------------------------------------


def doctor(options: Options) -> int:
    """Each finding is printed when it is there: the checks by jobs may wait in a queue."""
    from orchestrator import control, doctor
    from orchestrator.cluster import read_cluster
    from orchestrator.findings import Patient

    job, cluster = _read(options) if options.file else (None, read_cluster(options.cluster or "local"))
    runs = control.absolute(_runs(options, job.runs if job else DEFAULT_RUNS))
    patient = Patient(cluster, job, runs, options.nodes)
    findings = []
    for finding in doctor.examine(patient, jobs=options.jobs, seconds=options.timeout):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print_json(doctor.as_mapping(cluster, findings))
    return 1 if any(finding.level == "wrong" for finding in findings) else 0


# --- what needs torch: processes of their own -------------------------------------------------------------------------


def replay(options: Options) -> int:
    given = {"--device": options.device, "--tolerance": options.tolerance}
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    return _model("replay", options.file, *words, *(["--double"] if options.double else []))


def _model(module: str, *words: str) -> int:
    """Run `model.<module>` as a process of its own, in this terminal; its exit code."""
    return subprocess.run([sys.executable, "-P", "-m", f"model.{module}", *words], check=False).returncode


# --- small things -----------------------------------------------------------------------------------------------------


def _runs(options: Options, otherwise: str = DEFAULT_RUNS) -> str:
    return str(options.runs or otherwise).rstrip("/")


def _find(options: Options) -> str:
    return statuses.find(options.run, _runs(options))


def _me() -> str:
    return f"{os.environ.get('USER', 'somebody')} on {contract.hostname()}"


def _console() -> Console:
    """A pipe is as wide as it needs to be: rich would fold at 80 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
