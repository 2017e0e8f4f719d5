"""What a job may say and hardly means. It is no mistake, so nothing is refused: a smoke test of a large recipe has a
warm-up longer than its few steps, and a toy folder fewer images than a batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from model import contract, storage
from model.config import AnyPhase, Schedule, Section
from orchestrator import data_places, kubernetes_checks, slurm_checks
from orchestrator.cluster import ClusterProfile
from orchestrator.problems import Path, dotted

if TYPE_CHECKING:
    from orchestrator.spec import Job


def remarks(job: Job, cluster: ClusterProfile) -> list[str]:
    """One line each, beginning with the YAML path, or with the paths where phases have it in common."""
    found: dict[str, list[str]] = {}
    for name, phase in job.phases.items():
        both = [*_warmups(phase, ("phases", name))]
        if cluster.launcher == "local":
            both += _batch(phase, ("phases", name))
        for told in (slurm_checks, kubernetes_checks):
            if text := told.elsewhere(phase.resources, cluster):
                both.append((("phases", name, *told.AT), text))
        for at, text in both:
            found.setdefault(text, []).append(dotted(at))
    for at, text in kubernetes_checks.remarks(job, cluster):
        found.setdefault(text, []).append(dotted(at))
    return [f"{', '.join(paths)}: {text}" for text, paths in found.items()]


def refused(job: Job, cluster: ClusterProfile) -> list[str]:
    """What `submit` will refuse of a valid job, a line each: the trainer cannot do it yet."""
    from orchestrator.spec import not_there_yet

    return [
        f"{problem.found}: `submit` refuses it: {problem.message}{f' (hint: {problem.hint})' if problem.hint else ''}"
        for problem in not_there_yet(job, cluster)
    ]


def _warmups(phase: AnyPhase, at: Path) -> Iterator[tuple[Path, str]]:
    """Schedules that never get to their peak."""
    for path, schedule in _schedules(phase, at):
        moves = schedule.start not in (None, schedule.peak)
        if moves and schedule.warmup_steps > phase.steps:
            steps = f"{schedule.warmup_steps} steps of warm-up are more than the phase has ({phase.steps})"
            yield (*path, "warmup_steps"), f"{steps}: it ends before the peak of {schedule.peak:g}"


def _schedules(section: Section, at: Path) -> Iterator[tuple[Path, Schedule]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Schedule):
            yield (*at, name), value
        elif isinstance(value, Section):
            yield from _schedules(value, (*at, name))


def _batch(phase: AnyPhase, at: Path) -> Iterator[tuple[Path, str]]:
    """Batches that show an image twice, as far as can be told without opening one: what is in tar shards cannot, and
    what `hold_out` hides is still counted."""
    places = {part.shown for _, part in phase.data.parts}
    if any(part.shards or storage.is_uri(part.shown) for _, part in phase.data.parts):
        return
    batch, there = phase.optim.batch_size, 0
    for place in places:
        there += sum(
            1 for _ in islice(data_places.images(contract.data_folder(place), phase.data.suffixes), batch - there)
        )
    if there < batch:
        where = ", ".join(sorted(places))
        text = f"{batch} images a step are more than there are ({there} in {where}): some come twice or more in a batch"
        yield (*at, "optim", "batch_size"), text
