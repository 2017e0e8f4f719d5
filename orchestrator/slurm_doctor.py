"""What `dinoctl doctor` asks a Slurm before it starts a job there, and how it judges the answers."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Sequence

from orchestrator import slurm_cluster, stakes
from orchestrator.asking_slurm import NoAnswerError, ask
from orchestrator.findings import Finding, Patient, about_saves, attempt_options, ok, warning, wrong
from orchestrator.problems import listed
from orchestrator.slurm_cluster import Fields, Node


def examine(patient: Patient) -> Iterator[Finding]:
    """Every check that starts no job. Stops where the rest would only say the same again."""
    gone = slurm_cluster.missing()
    if gone:
        yield wrong(
            "commands", f"not on the PATH: {listed(gone)}", "run dinoctl where Slurm's commands are: a login node"
        )
        return
    try:
        config, version = slurm_cluster.settings(), slurm_cluster.version()
    except NoAnswerError as error:
        yield wrong("controller", str(error), "ask whoever runs the cluster; `scontrol ping` says the same")
        return
    yield from _versions(config, version)
    yield _accounting(config)
    partitions = slurm_cluster.partitions()
    name = patient.slurm.partition or slurm_cluster.default_partition(partitions)
    if name is None or name not in partitions:
        asked = f"no partition {name}" if name else "no partition is the default"
        yield wrong("partition", f"{asked}; there are {listed(list(partitions))}", "set slurm.partition in the profile")
        return
    yield from _partition(patient, partitions[name], slurm_cluster.nodes(name))
    yield from _limits(patient, partitions[name])
    yield from _who(patient, config)
    yield _would_take(patient)
    yield from _notice(patient)


def _versions(config: Fields, version: str) -> Iterator[Finding]:
    yield ok("commands", f"{listed(slurm_cluster.COMMANDS)}, version {version}")
    theirs = config.get("SLURM_VERSION", "unknown")
    answers = f"{config.get('ClusterName', 'the cluster')} answers, version {theirs}"
    if theirs.split(".")[:2] == version.split(".")[:2]:
        yield ok("controller", answers)
    else:
        yield warning("controller", f"{answers}, other than the commands here", "ask for commands of the same release")


def _accounting(config: Fields) -> Finding:
    if slurm_cluster.accounting(config):
        return ok("accounting", "on: how a job ended can be looked up")
    age = config.get("MinJobAge", "unknown")
    todo = "nothing, while a controller watches; what ends unseen for longer is taken for vanished"
    return warning("accounting", f"off: how a job ended is known for MinJobAge ({age}) only", todo)


def _partition(patient: Patient, partition: Fields, nodes: Sequence[Node]) -> Iterator[Finding]:
    name, state = partition["PartitionName"], partition.get("State", "unknown")
    if state != "UP":
        yield wrong("partition", f"{name} is {state}", "choose another, or ask whoever runs the cluster")
        return
    usable = [node for node in nodes if node.usable]
    needed = patient.needed
    text = f"{name} is up, {len(usable)} of {len(nodes)} nodes in service"
    if len(usable) < needed:
        yield wrong("partition", f"{text}, {needed} needed", "wait for nodes, or ask for fewer (resources.nodes)")
    else:
        yield ok("partition", text)
    if out := [node for node in nodes if not node.usable]:
        names = listed([f"{node.name} ({node.state}: {node.reason})" for node in out], 8)
        yield warning("nodes", f"out of service: {names}", "`scontrol show node NAME` says since when; jobs avoid them")
    yield from _gpus(patient, usable, needed)


def _gpus(patient: Patient, usable: Sequence[Node], needed: int) -> Iterator[Finding]:
    stated, asked = patient.cluster.gpus_per_node, patient.slurm.gpus
    counts = sorted({node.gpus for node in usable})
    text = f"nodes in service have {listed(counts)} (gres)"
    if not asked:
        yield ok("gpus", "none asked for (slurm.gpus: false)")
    elif stated is None:
        yield warning("gpus", f"{text}, and the profile does not say how many", "set gpus_per_node in the profile")
    elif len([node for node in usable if node.gpus >= stated]) < needed:
        todo = "set gpus_per_node to what the nodes have, or slurm.gpus: false to train on CPUs"
        yield wrong("gpus", f"{text}, fewer than gpus_per_node ({stated}) on all but too few", todo)
    else:
        yield ok("gpus", f"{text}, gpus_per_node is {stated}")


def _limits(patient: Patient, partition: Fields) -> Iterator[Finding]:
    name, longest = partition["PartitionName"], slurm_cluster.duration(partition.get("MaxTime", "UNLIMITED"))
    shown = partition.get("MaxTime", "UNLIMITED")
    phases = patient.job.phases if patient.job else {}
    over = {
        phase: told.resources.time_limit_minutes
        for phase, told in phases.items()
        if longest is not None and (told.resources.time_limit_minutes or 0) * 60 > longest
    }
    if over:
        asked = ", ".join(f"{phase} {minutes} min" for phase, minutes in over.items())
        yield wrong(
            "time limit", f"MaxTime of {name} is {shown}, asked for: {asked}", "lower resources.time_limit_minutes"
        )
    else:
        yield ok("time limit", f"MaxTime of {name} is {shown}; a run goes on over any number of jobs")
    most = partition.get("MaxNodes", "UNLIMITED")
    if most.isdecimal() and int(most) < patient.needed:
        found = f"{name} gives a job {most} nodes at most, asked for: {patient.needed}"
        yield wrong("nodes", found, "lower resources.nodes")


def _who(patient: Patient, config: Fields) -> Iterator[Finding]:
    """Account and QOS, as the accounting database has them."""
    slurm, user = patient.slurm, getpass.getuser()
    if not slurm_cluster.accounting(config):
        return
    try:
        mine = slurm_cluster.associations(user)
    except NoAnswerError as error:
        yield warning("account", str(error), "nothing: sbatch has the last word, below")
        return
    accounts, enforced = sorted({row["Account"] for row in mine}), config.get("AccountingStorageEnforce", "none")
    text = f"{user} may use {listed(accounts) or 'none'}"
    if slurm.account and slurm.account not in accounts:
        yield wrong("account", f"{text}, not {slurm.account}", "set slurm.account in the profile to one of them")
    elif not accounts and "associations" in enforced:
        yield wrong("account", f"{text}, and the cluster demands one", "ask whoever runs the cluster for an account")
    else:
        yield ok("account", text)
    allowed = sorted({one for row in mine for one in row["QOS"].split(",") if one})
    if slurm.qos and slurm.qos not in allowed:
        yield wrong(
            "qos", f"{user} may use {listed(allowed) or 'none'}, not {slurm.qos}", "set slurm.qos in the profile"
        )


def _would_take(patient: Patient) -> Finding:
    """sbatch itself on a job like ours, which it does not start."""
    words = ["sbatch", "--test-only", *attempt_options(patient, patient.nodes), "--wrap", "true"]
    try:
        ask(*words)
    except NoAnswerError as error:
        return wrong("sbatch", str(error), "what it says is about the profile's slurm section")
    return ok("sbatch", f"would take a job of {patient.nodes} nodes with the profile's options")


def _notice(patient: Patient) -> Iterator[Finding]:
    """How long a preemption's notice is, and whether a save fits."""
    try:
        found = stakes.ask_notice(patient.slurm)
    except (NoAnswerError, ValueError) as error:
        yield warning(
            "preemption", f"not found out: {error}", "ask whoever runs the cluster for PreemptMode and GraceTime"
        )
        return
    short = found.kills and not found.grace
    if short:
        yield warning("preemption", str(found), "see runbooks/notice-too-short.md")
    else:
        yield ok("preemption", str(found))
    if patient.job is not None:
        yield from about_saves(patient, found, None)
