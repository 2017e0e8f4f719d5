"""How long a job has from the first word of its end to the kill, as the cluster is set up, and what that costs. Pure.

Kubernetes' (pod-lifecycle, "Pod termination"; looked at on 1.36): a pod that is preempted, evicted or deleted gets
TERM, and KILL terminationGracePeriodSeconds later, which the profile says.

Slurm's own rules (slurm.conf(5), preempt.html; looked at on 22.05): a preempted job gets CONT and TERM, or with
`SlurmctldParameters=preempt_send_user_signal` the signal of its own --signal; GraceTime later TERM again, and KillWait
after that KILL. With GraceTime 0 all signals come together and only KillWait is left. The agent takes a TERM after
GraceTime as "at once", so what a save has is GraceTime where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.slurm_cluster import Fields, duration

if TYPE_CHECKING:
    from orchestrator.cluster import Slurm
    from orchestrator.kubernetes_section import Kubernetes

STEPS_TO_AGREE = 3
"""Steps that may go by from the request to stop until all ranks stand at the same one (`model.stopping`)."""

SURE = 1.25
"""A save is taken to fit if so many times its expected duration does, as `model.cadence` has it."""

EVICT = "EVICT"
"""What becomes of a pod on Kubernetes, in the place of Slurm's words for it."""

KILLS = ("CANCEL", "REQUEUE", EVICT)


@dataclass(frozen=True)
class Notice:
    """`mode`: what preemption does to a job of ours (OFF, CANCEL, REQUEUE, SUSPEND, GANG, EVICT); `told`: its first
    signal."""

    mode: str
    grace: float  # seconds
    kill_wait: float
    told: str
    source: str  # where it is from, for a person

    @property
    def kills(self) -> bool:
        return self.mode in KILLS

    @property
    def seconds(self) -> float:
        """What a save has when the job is preempted."""
        return self.grace or self.kill_wait

    def __str__(self) -> str:
        if not self.kills:
            what = {"OFF": "jobs are not preempted", "SUSPEND": "preempted jobs stand still, and go on later"}
            return f"{what.get(self.mode, f'PreemptMode {self.mode}')} ({self.source})"
        if self.mode == EVICT:
            return f"a preempted or evicted pod gets {self.told}, and {self.seconds:g} s to seal ({self.source})"
        parts = f"GraceTime {self.grace:g} s, KillWait {self.kill_wait:g} s; {self.source}"
        return f"a preempted job ({self.mode}) gets {self.told}, and {self.seconds:g} s to seal ({parts})"


def read(config: Fields, partitions: dict[str, Fields], partition: str, qos: Fields | None, signal: str) -> Notice:
    """config: the cluster's settings; qos: the one that our jobs run under, as far as it is known; signal: what our
    jobs ask for with --signal."""
    kill_wait = duration(config.get("KillWait", "30 sec")) or 0.0
    default = config.get("PreemptMode", "OFF")
    match config.get("PreemptType", "preempt/none").removeprefix("preempt/"):
        case "partition_prio":
            fields = partitions[partition]
            mode, grace = fields.get("PreemptMode", default), duration(fields.get("GraceTime", "0"))
            source = f"partition {partition}"
            if not _outranked(partitions, partition):
                mode, source = "OFF", f"no partition has a higher PriorityTier than {partition}"
        case "qos":
            mode, grace, source = default, 0.0, "QOS not known, the cluster's default"
            if qos is not None:
                mode = default if qos["PreemptMode"].lower() in ("cluster", "") else qos["PreemptMode"].upper()
                grace, source = duration(qos["GraceTime"]), f"QOS {qos['Name']}"
        case other:
            mode, grace, source = "OFF", 0.0, f"PreemptType {other}"
    # With gang scheduling the mode is a list: what happens to the preempted is the other word.
    words = [word for word in mode.upper().split(",") if word not in ("GANG", "WITHIN")] or [mode.upper()]
    to_user = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    told = (signal if grace else f"{signal} and TERM together") if to_user else "TERM"
    return Notice(words[0], grace or 0.0, kill_wait, told, source)


def of_pods(kubernetes: Kubernetes) -> Notice:
    """Of the pods that a profile's section describes: it is asked of nobody, as it goes out with each pod."""
    return Notice(EVICT, float(kubernetes.grace_seconds), 0.0, "TERM", "kubernetes.grace_seconds")


def _outranked(partitions: dict[str, Fields], partition: str) -> bool:
    tiers = {name: int(fields.get("PriorityTier", "1")) for name, fields in partitions.items()}
    return any(tier > tiers[partition] for tier in tiers.values())


# --- does a save fit --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is at stake in a phase. Seconds are None where nobody knows them."""

    phase: str
    processes: int
    gpus: bool  # or CPUs alone
    save_seconds: float | None
    save_from: str  # how that is known
    step_seconds: float | None
    every: int | None  # steps between two saves; None: `auto`
    patience: float  # health.notice_seconds: the agent itself kills then


@dataclass(frozen=True)
class Cost:
    """What one preemption costs. `fits`: None where it cannot be told. steps: on average, and at most."""

    phase: str
    fits: bool | None
    text: str
    steps: tuple[float, float] | None = None
    gpu_minutes: tuple[float, float] | None = None


def cost(work: Work, seconds: float) -> Cost:
    """seconds: what a save has, by the cluster."""
    if work.save_seconds is None:
        return Cost(work.phase, None, f"{work.phase}: how long a save takes is not known: {work.save_from}")
    left = min(seconds, work.patience)
    agree = STEPS_TO_AGREE * (work.step_seconds or 0.0)
    need = SURE * work.save_seconds + agree
    steps = f"{STEPS_TO_AGREE} steps of {work.step_seconds:.3g} s" if work.step_seconds else "some steps (not known)"
    head = f"{work.phase}: a save takes {work.save_seconds:.3g} s ({work.save_from}), after up to {steps}"
    if need <= left:
        fits = f"{head}: fits in {left:g} s, nothing trained is lost"
        return Cost(work.phase, True, fits, (0.0, 0.0), (0.0, 0.0))
    limit = f" (health.notice_seconds; the cluster gives {seconds:g} s)" if work.patience < seconds else ""
    head += f", and may not fit in {left:g} s{limit}"
    if work.every is None:
        return Cost(work.phase, False, f"{head}: each preemption costs half of what `every: auto` chose, at most all")
    lost = (work.every / 2, float(work.every))
    minutes = None
    if work.step_seconds:
        minutes = (lost[0] * work.step_seconds * work.processes / 60, lost[1] * work.step_seconds * work.processes / 60)
    what = "GPU-minutes" if work.gpus else "process-minutes"
    worth = f", {minutes[0]:,.3g} to {minutes[1]:,.3g} {what}" if minutes else ""
    return Cost(work.phase, False, f"{head}: each preemption costs {lost[0]:,.0f} steps on average, at most "
                f"{lost[1]:,.0f}{worth}", lost, minutes)  # fmt: skip


def contradictions(slurm: Slurm, patience: float, notice: Notice | None) -> list[str]:
    """Where the three notices do not go together: health.notice_seconds (`patience`, after which the agent kills),
    the profile's (a time limit), the cluster's (a preemption). One line each."""
    mine, found = f"health.notice_seconds ({patience:g} s)", []
    if patience > slurm.notice_seconds:
        found.append(
            f"{mine} is longer than slurm.notice_seconds ({slurm.notice_seconds} s): at a time limit Slurm ends "
            "the job while the agent still waits for the save. Raise slurm.notice_seconds to it or above"
        )
    if notice is not None and notice.kills and patience > notice.seconds:
        end = (
            f"GraceTime ({notice.grace:g} s): a preempted save that takes longer is cut short (unsealed)"
            if notice.grace
            else f"KillWait ({notice.kill_wait:g} s), and there is no GraceTime: the agent is killed while it waits "
            "for the save, and leaves no word (vanished)"
        )
        found.append(f"{mine} is longer than {end}. Lower it to that, or ask the site for a longer GraceTime")
    return found
