"""What is at stake in each phase of a job when it is preempted: how long a save and a step take, and what is lost where
a save does not fit into the notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model import accounting, storage
from model.config import AnyPhase, Model, read
from model.contract import Step
from model.storage import StoreError
from orchestrator import notice, progress, sections, slurm_cluster, store
from orchestrator.asking_slurm import NoAnswerError
from orchestrator.cluster import ClusterProfile, Slurm
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.notice import Cost, Notice, Work
from orchestrator.overview import size
from orchestrator.spec import Job
from orchestrator.state import fold

CHUNKS = 200
"""Progress chunks that are looked through for the newest save, at most."""


@dataclass(frozen=True)
class Measured:
    """Of a run's newest attempt of a phase, in seconds; None: it recorded none."""

    save: float | None = None
    step: float | None = None


def works(job: Job, cluster: ClusterProfile, run_dir: str | None = None, write_mb_s: float | None = None) -> list[Work]:
    """What is at stake in each phase. run_dir: a run of this job, if there is one, whose own times count first;
    write_mb_s: what a node has just been measured to write; else the profile's."""
    stated = f"{write_mb_s:,.0f} MB/s a node as just measured" if write_mb_s else ""
    if not write_mb_s and cluster.write_mb_s:
        write_mb_s, stated = cluster.write_mb_s, f"{cluster.write_mb_s:,.4g} MB/s a node by the profile"
    found = measured(run_dir) if run_dir else {}
    return [_work(job, cluster, name, write_mb_s, stated, found.get(name, Measured())) for name in job.phases]


def _work(job: Job, cluster: ClusterProfile, name: str, write_mb_s: float | None, stated: str, seen: Measured) -> Work:
    phase = job.phases[name]
    save, source = _forecast(job.model, phase, write_mb_s, stated)
    if seen.save is not None:
        save, source = seen.save, "as this run measured it"
    step = seen.step
    if step is None and cluster.sustained_tflops:
        flops = accounting.step_flops(job.model, phase) * phase.optim.batch_size
        step = flops / (cluster.sustained_tflops * 1e12 * _processes(phase))
    every = phase.checkpoints.every
    return Work(
        phase=name,
        processes=_processes(phase),
        gpus=_on_gpus(job, cluster, name),
        save_seconds=save,
        save_from=source,
        step_seconds=step,
        every=None if every == "auto" else every,
        patience=phase.health.notice_seconds,
    )


def _processes(phase: AnyPhase) -> int:
    return phase.resources.nodes * phase.resources.processes_per_node


def _forecast(model: Model, phase: AnyPhase, write_mb_s: float | None, stated: str) -> tuple[float | None, str]:
    """Seconds that a save takes, and from what that is known."""
    parts = accounting.checkpoint_bytes(model, phase)
    count = sum(parts.values()) - sum(parts[part] for part in accounting.frozen_parts(phase))
    if write_mb_s is None:
        return None, f"the profile has no write_mb_s for its {size(count)}; dinoctl doctor measures it"
    speed, source = write_mb_s * phase.resources.nodes, f"{size(count)} at {stated}"
    limit = phase.checkpoints.upload_limit_mb_s
    if limit is not None and limit * _processes(phase) < speed:
        speed, source = limit * _processes(phase), f"{size(count)} at upload_limit_mb_s {limit:g} a process"
    return count / (speed * 1e6), source


def section(job: Job, cluster: ClusterProfile, phase: str) -> Slurm:
    """What sbatch is told of a phase: the profile's section with the job's own words over it."""
    resources = job.phases[phase].resources.model_dump(mode="json")
    return read(Slurm, sections.merged("slurm", cluster.model_dump(mode="json"), resources))


def pods(job: Job, cluster: ClusterProfile, phase: str) -> Kubernetes:
    """What the pods of a phase are: the same on Kubernetes."""
    resources = job.phases[phase].resources.model_dump(mode="json")
    return read(Kubernetes, sections.merged("kubernetes", cluster.model_dump(mode="json"), resources))


def _on_gpus(job: Job, cluster: ClusterProfile, phase: str) -> bool:
    told = pods(job, cluster, phase) if cluster.launcher == "kubernetes" else section(job, cluster, phase)
    return told.gpus


# --- what a run has measured ------------------------------------------------------------------------------------------


def measured(run_dir: str) -> dict[str, Measured]:
    """By phase, of its newest attempt. Empty if there is no run."""
    state = fold(store.read(run_dir)) if storage.exists(f"{run_dir}/events/000001.json") else None
    if state is None:
        return {}
    newest = {attempt.phase: attempt.number for attempt in state.attempts if attempt.phase in state.spec["phases"]}
    return {phase: _newest(run_dir, number, _batch(state.spec, phase)) for phase, number in newest.items()}


def _batch(spec: dict[str, dict[str, dict[str, dict[str, int]]]], phase: str) -> int:
    return int(spec["phases"][phase]["optim"]["batch_size"])


def _newest(run_dir: str, attempt: int, batch: int) -> Measured:
    last = progress.last_chunk(run_dir, attempt)
    seen: list[Step] = []
    for chunk in range(last, max(-1, last - CHUNKS), -1):
        seen = [*progress.read_chunk(run_dir, attempt, chunk), *seen]
        if any("checkpoint/save_seconds" in step.metrics for step in seen):
            break
    saves = [step.metrics["checkpoint/save_seconds"] for step in seen if "checkpoint/save_seconds" in step.metrics]
    speeds = sorted(step.images_per_second for step in seen if step.images_per_second > 0)
    return Measured(saves[-1] if saves else None, batch / speeds[len(speeds) // 2] if speeds else None)


# --- asked of the cluster ---------------------------------------------------------------------------------------------


def costs(notice_: Notice, works_: Sequence[Work]) -> list[Cost]:
    return [notice.cost(work, notice_.seconds) for work in works_] if notice_.kills else []


def ask_notice(slurm: Slurm) -> Notice:
    """How long a preemption's notice is for jobs with this section. Raises NoAnswerError, also for a partition that is
    not there."""
    config, partitions = slurm_cluster.settings(), slurm_cluster.partitions()
    partition = slurm.partition or slurm_cluster.default_partition(partitions)
    if partition is None or partition not in partitions:
        raise NoAnswerError(f"there is no partition {partition or 'by default'}; there are {', '.join(partitions)}")
    return notice.read(config, partitions, partition, _qos(config, slurm), slurm.signal)


def _qos(config: slurm_cluster.Fields, slurm: Slurm) -> slurm_cluster.Fields | None:
    if not slurm_cluster.accounting(config):
        return None
    name = slurm.qos or slurm_cluster.default_qos(slurm.account)
    return slurm_cluster.qos(name) if name else None


def lines(job: Job, cluster: ClusterProfile, run_dir: str | None) -> list[str]:
    """What `plan` says of preemptions: asked of the cluster where its commands are here, and said so where not."""
    first = next(iter(job.phases))
    if cluster.launcher == "kubernetes":
        return _told(job, cluster, run_dir, notice.of_pods(pods(job, cluster, first)))
    if cluster.launcher != "slurm":
        return []
    gone = slurm_cluster.missing()
    if gone:
        return [f"{cluster.name} was not asked how long a preemption's notice is: {', '.join(gone)} not here."]
    try:
        return _told(job, cluster, run_dir, ask_notice(section(job, cluster, first)))
    except (NoAnswerError, ValueError) as error:
        return [f"How long a preemption's notice is could not be found out: {error}."]


def _told(job: Job, cluster: ClusterProfile, run_dir: str | None, found: Notice) -> list[str]:
    told = [f"On {cluster.name} {found}."]
    try:
        at_stake = works(job, cluster, run_dir)
    except StoreError as error:
        told.append(f"   What a run there has measured is not known: {error.strerror}.")
        at_stake = works(job, cluster)
    told += [f"   {cost.text}." for cost in costs(found, at_stake)]
    told += [f"   {line}." for line in contradictions(job, cluster, found)]
    return told


def contradictions(job: Job, cluster: ClusterProfile, found: Notice | None) -> list[str]:
    """`notice.contradictions` of every phase; what several have in common is said once. Those of pods are among the
    remarks on a job (`kubernetes_checks`)."""
    if cluster.launcher != "slurm":
        return []
    told: dict[str, list[str]] = {}
    for name, phase in job.phases.items():
        for text in notice.contradictions(section(job, cluster, name), phase.health.notice_seconds, found):
            told.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in told.items()]
