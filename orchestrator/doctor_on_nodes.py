"""The checks of `dinoctl doctor` that need nodes: one small job over two of them, or two processes of this machine.

What each node does is `model.doctor`; here it is started, answered about the time, waited for and judged.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from model import contract, storage
from model.contract import node_report
from orchestrator import asking_kubernetes
from orchestrator.asking_slurm import NoAnswerError, ask
from orchestrator.findings import Finding, Patient, about_saves, attempt_options, ok, preemption, warning, wrong
from orchestrator.launchers import slurm_control
from orchestrator.launchers.slurm_control import Small
from orchestrator.problems import listed

BYTES = 256 << 20
"""That each node writes to measure how fast the folder of runs is."""

LOOK_SECONDS, ASK_SECONDS = 0.1, 2.0
SKEW_SECONDS = 5.0
"""Clocks further apart than that: leases and heartbeats, of ten seconds and more, begin to be misjudged."""

PATIENCE = 0.4
"""Of the whole time, what a node waits for another, and torchrun for its all-reduce."""

GONE = "gone"
ENDED = (GONE, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
"""First words of what schedulers say of a job that is over."""

NO_ANSWER = (NoAnswerError, asking_kubernetes.NoAnswerError)

WHY_NOT = {
    "slurm": "is that folder on a file system that the nodes share, and Python of the profile there too?",
    "kubernetes": "is that folder on a volume that the pods have and their user can write, or in a bucket whose keys "
    "they have, and is dinoctl's model/ in the image?",
    "local": "can this user write there?",
}


@dataclass(frozen=True)
class Seen:
    """What came back. `log`: the end of what the job printed, if anything; `why`: why it is not all, if it is not."""

    reports: list[node_report.NodeReport]
    reduced: node_report.ReduceReport | None
    log: str
    why: str


def examine(patient: Patient, seconds: float) -> Iterator[Finding]:
    """Every check on nodes, in at most `seconds`."""
    folder = f"{patient.runs}/.doctor-{contract.new_nonce()}"
    launcher = patient.cluster.launcher
    tries = _tries(patient) if launcher == "slurm" else {}
    ask = node_report.Ask(nodes=patient.nodes, bytes=BYTES, patience=PATIENCE * seconds, tries=tries)
    storage.publish(f"{folder}/{node_report.ASK_FILE}", msgspec.json.encode(ask))
    try:
        yield from judge(patient, BY[launcher](patient, folder, seconds))
    except NO_ANSWER as error:
        yield wrong("on nodes", str(error), "`dinoctl doctor --no-jobs` leaves this out")
    finally:
        storage.remove_tree(folder)


def _tries(patient: Patient) -> dict[str, list[str]]:
    """What a node must be able to do so that a run goes on by itself."""
    python = _python(patient)
    test = ["sbatch", "--test-only", *slurm_control.placement(patient.slurm.model_dump()), "--ntasks=1", "--wrap=true"]
    return {"sbatch": test, "dinoctl": [*python, "-P", "-m", "orchestrator.cli", "--version"]}


def _python(patient: Patient) -> list[str]:
    return shlex.split(patient.slurm.python) if patient.slurm.python else [sys.executable]


# --- starting and waiting ---------------------------------------------------------------------------------------------


def small_job(patient: Patient, folder: str, seconds: float) -> Small:
    """The job of the checks, with the options that attempts are sent with. Pure."""
    log = f"{folder}/job.log" if not storage.is_uri(folder) else "/dev/null"
    options = (
        "--job-name=dinoctl-doctor", *attempt_options(patient, patient.nodes), f"--time={math.ceil(seconds / 60) + 1}",
        f"--output={log.replace('%', '%%')}", "--no-requeue",
    )  # fmt: skip
    run = ["srun", *patient.slurm.srun, "--ntasks-per-node=1", *_python(patient), "-P", "-m", "model.doctor", folder]
    return Small("dinoctl-doctor", options, "\n".join(["#!/bin/bash", *patient.slurm.setup, shlex.join(run), ""]))


def _by_slurm(patient: Patient, folder: str, seconds: float) -> Seen:
    job = slurm_control.submit(small_job(patient, folder, seconds))
    try:
        return _wait(
            patient, folder, seconds, lambda: ask("squeue", "-h", "-j", job, "-t", "all", "-o", "%T %r").strip() or GONE
        )
    finally:
        with suppress(NoAnswerError):
            ask("scancel", job)


def _by_kubernetes(patient: Patient, folder: str, seconds: float) -> Seen:
    from orchestrator import kubernetes_doctor_job

    with kubernetes_doctor_job.running(patient, folder) as pods:
        return _wait(patient, folder, seconds, pods.standing, pods.log)


def _here(patient: Patient, folder: str, seconds: float) -> Seen:
    """Two processes of this machine, as two nodes."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "model.doctor", folder, "--node", str(node)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        for node in range(patient.nodes)
    ]  # fmt: skip
    try:
        return _wait(
            patient, folder, seconds, lambda: "" if any(process.poll() is None for process in processes) else GONE
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()


BY = {"slurm": _by_slurm, "kubernetes": _by_kubernetes, "local": _here}


def _wait(
    patient: Patient, folder: str, seconds: float, ask_for: Callable[[], str], log: Callable[[], str] | None = None
) -> Seen:
    """Until every node has reported, nothing is left of the job, or the time is over. ask_for: what became of the job,
    in the scheduler's words; it is asked now and then, and may raise NO_ANSWER. log: what the job printed, where it is
    not in the folder."""
    deadline, asked, last, state = time.monotonic() + seconds, 0.0, False, "PENDING"
    while True:
        _answer(patient, folder)
        files = [f"{folder}/{node_report.node_file(node)}" for node in range(patient.nodes)]
        there = [file for file in files if storage.exists(file)]
        if len(there) == len(files) or last or time.monotonic() > deadline:
            break
        if time.monotonic() - asked > ASK_SECONDS:
            with suppress(*NO_ANSWER):
                state = ask_for()
            asked = time.monotonic()
        last = is_over(state)
        time.sleep(ASK_SECONDS if last else LOOK_SECONDS)  # once more: a shared file system may lag
    why = "" if len(there) == len(files) else f"the job is {state}" if last else f"{seconds:g} s are over ({state})"
    reduced = f"{folder}/{node_report.REDUCE_FILE}"
    return Seen(
        [_read(file, node_report.NodeReport) for file in there],
        _read(reduced, node_report.ReduceReport) if storage.exists(reduced) else None,
        "" if not why else log() if log else _log(folder),
        why,
    )


def is_over(state: str) -> bool:
    """Whether nothing more comes of a job of which a scheduler says that."""
    return re.split("[ :]", state)[0] in ENDED


def _answer(patient: Patient, folder: str) -> None:
    """Tell each node that asked what time it is here."""
    for node in range(patient.nodes):
        path = f"{folder}/{node_report.answer_file(node)}"
        if storage.exists(f"{folder}/{node_report.clock_file(node)}") and not storage.exists(path):
            storage.publish(path, repr(contract.now()).encode())


Part = TypeVar("Part", bound=node_report.Part)


def _read(path: str, kind: type[Part]) -> Part:
    return msgspec.json.decode(storage.read(path), type=kind)


def _log(folder: str) -> str:
    path = f"{folder}/job.log"
    if storage.is_uri(folder) or not storage.exists(path):
        return ""
    return " ".join(storage.read(path).decode(errors="replace").split())[-600:]


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(patient: Patient, seen: Seen) -> Iterator[Finding]:
    """What the reports of the nodes mean. Pure, but for what a job's own run has measured."""
    missing = patient.nodes - len(seen.reports)
    if missing:
        said = f": {seen.log}" if seen.log else f"; nothing of it is seen in {patient.runs}"
        todo = f"{WHY_NOT[patient.cluster.launcher]} A longer wait in the queue: --timeout SECONDS"
        yield wrong("on nodes", f"{missing} of {patient.nodes} did not report, {seen.why}{said}", todo)
    for report in seen.reports:
        for error in report.errors:
            yield wrong(f"node {report.host}", error, "the check named first could not be made there")
    if missing:
        return
    yield ok("on nodes", f"{listed(sorted(report.host for report in seen.reports))} reported")
    yield from _shared(patient, seen.reports)
    yield from _speed(patient, seen.reports)
    yield from _clocks(seen.reports)
    yield from _torch(patient, seen.reports)
    yield from _tried(seen.reports)
    yield from _reached(seen.reports)
    yield from _reduced(seen)


def _shared(patient: Patient, reports: Sequence[node_report.NodeReport]) -> Iterator[Finding]:
    winners = [report.winners for report in reports]
    if None in winners:
        return  # an error says why
    races = len(winners[0] or [])
    doubled = [race for race in range(races) if sum(race in report.wins for report in reports) != 1]
    if doubled or any(other != winners[0] for other in winners):
        found = f"{len(doubled)} of {races} names were won by none or by two, or the nodes see other winners"
        todo = "no run can lie there: put runs on a file system with an atomic link(2), or in a bucket"
        yield wrong("shared folder", found, todo)
    else:
        users = listed(sorted({f"user {report.user}" for report in reports if report.user is not None}))
        found = f"of each of {races} names exactly one node won, and every node sees the same one"
        yield ok("shared folder", found + (f" ({users})" if users else ""))


def _speed(patient: Patient, reports: Sequence[node_report.NodeReport]) -> Iterator[Finding]:
    speeds = [report.write_mb_s for report in reports if report.write_mb_s is not None]
    if not speeds:
        return
    slowest, stated = min(speeds), patient.cluster.write_mb_s
    text = f"{slowest:,.0f} MB/s a node, {len(speeds)} at once"
    if stated is not None and slowest < stated / 2:
        yield warning(
            "write speed",
            f"{text}; write_mb_s says {stated:g}",
            "lower write_mb_s in the profile, or look at the store",
        )
    else:
        yield ok(
            "write speed", f"{text}" + ("" if stated else f" (write_mb_s: {slowest:.0f} in the profile tells `plan`)")
        )
    if patient.job is not None:
        with suppress(NoAnswerError, ValueError):
            found = preemption(patient)
            yield from about_saves(patient, found, slowest) if found else ()


def _clocks(reports: Sequence[node_report.NodeReport]) -> Iterator[Finding]:
    for report in reports:
        if report.clock is None:
            continue
        low, high = report.clock
        least = max(low, -high, 0.0)
        text = f"{report.host}: between {low:+.2f} and {high:+.2f} s from here"
        if least > SKEW_SECONDS:
            yield wrong("clock", text, "have its clock set (chrony, ntpd): leases and heartbeats compare clocks")
        else:
            yield ok("clock", text)


def _torch(patient: Patient, reports: Sequence[node_report.NodeReport]) -> Iterator[Finding]:
    ours, gpus, launcher = _own_torch(), patient.cluster.gpus_per_node or 0, patient.cluster.launcher
    for report in reports:
        if report.torch is None:
            continue
        text = f"{report.host}: Python {report.python}, torch {report.torch}, {len(report.gpus)} GPUs"
        if ours is not None and _release(report.torch) != ours:
            yield wrong("torch", f"{text}; here it is {ours}", SAME_TORCH[launcher])
        elif _wants_gpus(patient) and len(report.gpus) < gpus:
            todo = f"a driver that is missing, a torch without CUDA, or {launcher}.gpus: false to train on CPUs"
            yield warning("torch", f"{text}, and gpus_per_node is {gpus}", todo)
        else:
            yield ok("torch", text)


SAME_TORCH = {
    "slurm": "let nodes use the same environment (slurm.python, setup)",
    "kubernetes": "make the worker image of the same release of dinoctl (kubernetes.image)",
    "local": "use one environment",
}


def _wants_gpus(patient: Patient) -> bool:
    match patient.cluster.launcher:
        case "slurm":
            return patient.slurm.gpus
        case "kubernetes":
            return patient.kubernetes.gpus
        case _:
            return False


def _own_torch() -> str | None:
    """The version here, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return _release(version("torch"))
    except PackageNotFoundError:
        return None


def _release(version: str) -> str:
    """Without what it was built for: 2.13.0+cu130 and 2.13.0 are the same code."""
    return version.split("+")[0]


def _tried(reports: Sequence[node_report.NodeReport]) -> Iterator[Finding]:
    says = {
        "sbatch": "a run goes on by itself only if nodes can submit: else keep a controller here (submit --detach)",
        "dinoctl": "the last act of an agent and the jobs after an attempt are `dinoctl tick`: install it there too",
    }
    for name, todo in says.items():
        failed = [report for report in reports if name in report.tries and report.tries[name].code != 0]
        if failed:
            yield warning(f"{name} there", f"{failed[0].host}: {failed[0].tries[name].said}", todo)
        elif any(name in report.tries for report in reports):
            yield ok(f"{name} there", "works on the nodes")


def _reached(reports: Sequence[node_report.NodeReport]) -> Iterator[Finding]:
    """Those that were not are errors of the nodes."""
    if all(report.reached is not None for report in reports):
        names = sorted({name for report in reports for name in report.reached or []})
        yield ok("reach", f"every node reaches the others, as {listed(names, 4)}")


def _reduced(seen: Seen) -> Iterator[Finding]:
    result = seen.reduced
    if result is None:
        if not any(error.startswith("reduce") for report in seen.reports for error in report.errors):
            yield wrong("all-reduce", "no result", "`--timeout` may be too short")
    elif not result.right:
        yield wrong(
            "all-reduce",
            f"{result.ranks} ranks ({result.backend}) got a wrong sum",
            "look at the network and its driver",
        )
    else:
        speed = result.bytes / 1e6 / result.seconds if result.seconds else 0.0
        yield ok("all-reduce", f"{result.ranks} ranks ({result.backend}): right, {speed:,.0f} MB/s")
