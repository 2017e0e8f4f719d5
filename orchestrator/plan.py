"""What a job would do, before anything runs: phases in order, inputs, layout, sizes, disk and, where derivable, hours.

Pure: reads nothing, starts nothing. Numbers come from `model.accounting`; what is derived says from what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model import accounting
from model.config import AnyPhase, Model, SslPhase
from model.contract import EVALUATE, kept
from orchestrator import handoff
from orchestrator.cluster import ClusterProfile
from orchestrator.layouts import fitting_worlds, world
from orchestrator.overview import size
from orchestrator.problems import listed
from orchestrator.spec import Job, resolved


@dataclass(frozen=True)
class Input:
    """One thing that a stage takes, and the parts of the checkpoint that it reads."""

    name: str
    reference: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Keeps:
    """What a rule of retention leaves of a phase; a checkpoint that several keep is counted at the first of them."""

    rule: str
    steps: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Disk:
    """Bytes of tensors. `most`: all that retention lets lie there at once, one being written included."""

    checkpoint: int  # one sealed checkpoint, its frozen parts included
    kept: tuple[int, ...]  # steps that stay when the phase is over
    kept_by: tuple[Keeps, ...]
    most: int
    left: int  # when the phase is over


@dataclass(frozen=True)
class PhasePlan:
    name: str
    kind: str
    inputs: tuple[Input, ...]
    steps: int
    images: int  # seen in all, each with all its crops
    batch_size: int
    nodes: int
    processes: int
    images_per_process: int  # a micro-batch
    fitting_worlds: tuple[int, ...]
    views: tuple[str, ...]
    trained_parameters: int
    frozen_parameters: int
    flops_per_image: float
    process_hours: float | None  # of all processes together; None where the profile has no speed
    disk: Disk


@dataclass(frozen=True)
class Plan:
    name: str
    cluster: str
    launcher: str
    runs: str
    backbone_parameters: int
    phases: tuple[PhasePlan, ...]
    evaluate: tuple[Input, ...] | None  # None: no evaluation
    tflops: float | None  # sustained, of one process, by the cluster's profile
    notes: tuple[str, ...]
    preemption: tuple[str, ...] = ()  # what the cluster says of it, and what it costs; asked by whoever prints the plan

    @property
    def disk_most(self) -> int:
        """Bytes at the fullest moment: what earlier phases left, and the most of the one that runs."""
        left, most = 0, 0
        for phase in self.phases:
            most = max(most, left + phase.disk.most)
            left += phase.disk.left
        return most

    @property
    def disk_left(self) -> int:
        """Bytes when all is over."""
        return sum(phase.disk.left for phase in self.phases)

    def as_mapping(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "disk_most": self.disk_most, "disk_left": self.disk_left}


def make_plan(job: Job, cluster: ClusterProfile) -> Plan:
    """The plan of a job that `read_job` accepted."""
    spec = resolved(job)
    tflops = cluster.sustained_tflops
    return Plan(
        name=job.name,
        cluster=cluster.name,
        launcher=cluster.launcher,
        runs=job.runs,
        backbone_parameters=accounting.backbone_parameters(job.model.backbone),
        phases=tuple(_phase(spec, name, phase, job.model, tflops) for name, phase in job.phases.items()),
        evaluate=_inputs(spec, EVALUATE) if job.evaluate is not None else None,
        tflops=tflops,
        notes=(*_notes(tflops), *_cadences(job)),
    )


def _phase(spec: Mapping[str, Any], name: str, phase: AnyPhase, model: Model, tflops: float | None) -> PhasePlan:
    processes, optim = world(phase.resources), phase.optim
    images, flops = phase.steps * optim.batch_size, accounting.step_flops(model, phase)
    frozen = phase.kind != "pretrain"  # the Gram teacher, or the vision tower
    return PhasePlan(
        name=name,
        kind=phase.kind,
        inputs=_inputs(spec, name),
        steps=phase.steps,
        images=images,
        batch_size=optim.batch_size,
        nodes=phase.resources.nodes,
        processes=processes,
        images_per_process=optim.batch_size // (processes * optim.micro_batches(processes)),
        fitting_worlds=tuple(fitting_worlds(phase)),
        views=_views(phase),
        trained_parameters=accounting.trained_parameters(model, phase),
        frozen_parameters=accounting.backbone_parameters(model.backbone) if frozen else 0,
        flops_per_image=flops,
        process_hours=None if tflops is None else images * flops / (tflops * 1e12) / 3600,
        disk=_disk(spec, name, phase, model),
    )


def _inputs(spec: Mapping[str, Any], stage: str) -> tuple[Input, ...]:
    taken = handoff.references(spec, stage).items()
    files = handoff.files(spec, stage).items()
    of_phases = [Input(name, str(ref), handoff.PARTS_TAKEN.get(name, ())) for name, ref in taken]
    return (*of_phases, *(Input(name, file, ("the backbone", "the heads that it has")) for name, file in files))


def _views(phase: AnyPhase) -> tuple[str, ...]:
    """One line for each resolution that may be drawn."""
    if not isinstance(phase, SslPhase):
        return (f"{phase.image_size} px, captions of {phase.text.context} tokens",)
    ratios = sum(resolution.ratio for resolution in phase.crops.resolutions)
    lines = []
    for resolution in phase.crops.resolutions:
        gram = f", Gram teacher {resolution.gram_size or resolution.global_size}" if phase.kind != "pretrain" else ""
        share = f" ({resolution.ratio / ratios:.0%})" if len(phase.crops.resolutions) > 1 else ""
        crops = f"2 x {resolution.global_size} + {phase.crops.local_count} x {resolution.local_size} px"
        lines.append(crops + gram + share)
    return tuple(lines)


# --- disk -------------------------------------------------------------------------------------------------------------


def _disk(spec: Mapping[str, Any], name: str, phase: AnyPhase, model: Model) -> Disk:
    """A frozen part lies there once, and not again where an earlier phase of the run holds it; everything else in each
    checkpoint, but that of one which only a later phase refers to just those parts stay that are taken. Before the last
    checkpoint is sealed, the one that it pushes out of the newest ones is still there, with all parts."""
    parts = accounting.checkpoint_bytes(model, phase)
    frozen = sum(parts[part] for part in accounting.frozen_parts(phase))
    each = sum(parts.values()) - frozen  # with all parts
    once = 0 if _holds_already(spec, name) else frozen
    reasons, cadence = _reasons(spec, name), phase.checkpoints
    own = {part: size for part, size in parts.items() if part not in accounting.frozen_parts(phase)}
    stays = {
        step: sum(size for part, size in own.items() if named is None or part in named)
        for step, (_, named) in reasons.items()
    }
    left = sum(stays.values()) + once
    by: dict[str, list[int]] = {}
    for step, (rule, _) in reasons.items():
        by.setdefault(rule, []).append(step)
    keeps = [Keeps(rule, tuple(steps), sum(stays[step] for step in steps)) for rule, steps in by.items()]
    keeps += [Keeps("a frozen network, once", (), once)] if once else []
    if cadence.every == "auto":  # the newest but the last are at steps that nobody knows yet
        others = (cadence.keep_last - 1) * each
        keeps += [Keeps(f"keep_last {cadence.keep_last}", (), others)] if others else []
        return Disk(each + frozen, tuple(reasons), tuple(keeps), left + others + each, left + others)
    newest = list(range(cadence.every, phase.steps, cadence.every))[-cadence.keep_last :]
    pushed_out = sum(each - stays.get(step, 0) for step in newest)
    return Disk(each + frozen, tuple(reasons), tuple(keeps), left + pushed_out, left)


def _holds_already(spec: Mapping[str, Any], name: str) -> bool:
    """Whether the frozen network of a phase is a checkpoint of this run."""
    taken = handoff.references(spec, name)
    return any(taken[name].run is None for name in ("gram_teacher", "vision_tower") if name in taken)


def kept_steps(spec: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The checkpoints of a phase that lie there when it is over, ascending. With `every: auto` the newest but the last
    are left out: at which steps they are is known when they are made."""
    return tuple(_reasons(spec, name))


def _reasons(spec: Mapping[str, Any], name: str) -> dict[int, tuple[str, kept.Parts]]:
    """Those, each with the first rule that keeps it and the parts that stay, as if no attempt were ever interrupted."""
    phase = spec["phases"][name]
    cadence, last = phase["checkpoints"], phase["steps"]
    every, newest = cadence["keep_every"], cadence["keep_last"]
    if cadence["every"] == "auto":
        sealed, newest = sorted({*handoff.keep_steps(spec, name), *range(every or last, last, every or last), last}), 1
    else:
        sealed = [*range(cadence["every"], last, cadence["every"]), last]
    why = kept.why(
        [(1, step) for step in sealed],
        keep_last=newest,
        keep_every=every,
        keep_steps=handoff.keep_parts(spec, name),
    )
    rules = {f"every {every}": f"keep_every {every}", "newest": f"keep_last {newest}", "referred to": "a later phase"}
    first = {step: next(rules[rule] for rule in rules if rule in found.why) for (_, step), found in why.items()}
    return {step: ("final" if step == last else first[step], why[1, step].parts) for step in sorted(first)}


def _cadences(job: Job) -> Iterator[str]:
    """How `checkpoints.every: auto` will find out."""
    for name, phase in job.phases.items():
        hours, nodes = phase.checkpoints.node_mtbf_hours, phase.resources.nodes
        if phase.checkpoints.every == "auto" and hours is not None:
            yield (
                f"{name} saves at steps 10, 20, 40 and so on until two saves are measured, then as far apart as loses "
                f"the least time with a failure every {hours / nodes:,.4g} h ({hours:,g} h a node, {nodes} of them); "
                f"its newest {phase.checkpoints.keep_last} count as {phase.checkpoints.keep_last} checkpoints of disk."
            )


def _notes(tflops: float | None) -> tuple[str, ...]:
    sizes = "Bytes are those of the tensors in fp32: parameters by formula, AdamW's two moments, EMA and Gram teacher."
    work = "FLOPs are of forward and backward, in expectation over resolutions, masks and drop path; losses left out."
    if tflops is None:
        return (sizes, work, "No hours: the cluster's profile states no sustained_tflops, and none is guessed.")
    speed = f"{tflops:g} TFLOP/s a process (the profile's sustained_tflops)"
    return (sizes, work, f"Hours are derived: FLOPs over {speed}; stops, saves, loading left out.")


# --- for people -------------------------------------------------------------------------------------------------------


def as_text(plan: Plan) -> str:
    """The plan as `dinoctl plan` prints it."""
    backbone = f"backbone of {plan.backbone_parameters:,} parameters"
    head = f"{plan.name} on {plan.cluster} ({plan.launcher}), runs in {plan.runs}; {backbone}"
    stages = [_stage(number, phase) for number, phase in enumerate(plan.phases, 1)]
    if plan.evaluate is not None:
        taken = ", ".join(f"{given.name}: {given.reference}" for given in plan.evaluate)
        stages.append(f"{len(stages) + 1}. evaluate\n   takes      {taken}")
    return "\n\n".join([head, *stages, _disk_text(plan), "\n".join([*plan.preemption, *plan.notes])])


def _disk_text(plan: Plan) -> str:
    lines = [f"Checkpoints need {size(plan.disk_most)} at the fullest moment and {size(plan.disk_left)} at the end:"]
    for phase in plan.phases:
        by = [f"{size(one.bytes)} {one.rule}" + (f" ({len(one.steps)})" if len(one.steps) > 1 else "") for one in
              sorted(phase.disk.kept_by, key=lambda one: -one.bytes)]  # fmt: skip
        lines.append(f"   {phase.name:<10} {size(phase.disk.left):>7}: {', '.join(by)}")
    return "\n".join(lines)


def _stage(number: int, phase: PhasePlan) -> str:
    taken = [f"{given.name}: {given.reference} ({', '.join(given.parts)})" for given in phase.inputs]
    frozen = f", beside {phase.frozen_parameters:,} frozen" if phase.frozen_parameters else ""
    work = f"{phase.flops_per_image * phase.images:.2e} FLOPs ({phase.flops_per_image / 1e12:.3g} TFLOP an image)"
    if phase.process_hours is not None:
        work += f"; derived: {phase.process_hours:,.0f} process-hours, {phase.process_hours / phase.processes:,.1f} h"
    disk = phase.disk
    lines = [
        ("takes", "nothing: initial weights from the seed" if not taken else taken[0]),
        *(("", more) for more in taken[1:]),
        ("steps", f"{phase.steps:,} of {phase.batch_size:,} images: {phase.images:,} images"),
        *(("views" if index == 0 else "", view) for index, view in enumerate(phase.views)),
        ("layout", f"{_count(phase.nodes, 'node')}, {_count(phase.processes, 'process')} "
                   f"of {_count(phase.images_per_process, 'image')} at a time; "
                   f"would also fit: {listed([w for w in phase.fitting_worlds if w != phase.processes], 12)}"),
        ("trains", f"{phase.trained_parameters:,} parameters{frozen}"),
        ("work", work),
        ("saves", f"{size(disk.checkpoint)} a checkpoint; at most {size(disk.most)}, {size(disk.left)} stay: "
                  f"steps {_ends(disk.kept)}"),
    ]  # fmt: skip
    body = "\n".join(f"   {name:<10} {text}" for name, text in lines)
    return f"{number}. {phase.name} ({phase.kind})\n{body}"


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number:,} {what if number == 1 else plural}"


def _ends(steps: tuple[int, ...]) -> str:
    """All of a few steps, else the first and the last ones."""
    texts = [str(step) for step in steps]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:2], "...", *texts[-3:]])
