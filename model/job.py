"""A phase in training: what it is made of, where it stands, and where an attempt goes on from.

begin(attempt, ...) -> Job      from a checkpoint of its own, or at step 0 with what it takes of other phases
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from model import checkpoint, config, contract, optim, parallel, storage
from model.checkpoint import CheckpointError
from model.contract import Attempt, CheckpointRef, File, Manifest
from model.data.loader import Loader, Stream, prepare
from model.data.skips import MOST_NAMES
from model.data.sources import Found, build_or_read
from model.objectives.base import Objective
from model.objectives.build import build
from model.progress import Progress
from model.stopping import Stop
from model.weights import networks, start
from model.worker import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loop:
    """Where a phase stands: all that a resumed run needs and that is no tensor."""

    step: int  # updates of this phase
    origin: str  # the phase in which the chain of `init` hand-offs began; it names the streams of draws
    clock: int  # updates since the origin
    position: int  # images consumed since the origin
    non_finite: int = 0  # steps in a row, up to now, that changed nothing
    jumps: tuple[tuple[int, int], ...] = ()  # (clock, steps) of data that was, or will be, jumped over since the origin

    def with_jumps(self, ahead: Sequence[config.Jump]) -> Loop:
        """What was jumped over stays as the checkpoint says it; `ahead` is what the phase is told of the rest."""
        first = self.clock - self.step
        past = [(at, steps) for at, steps in self.jumps if at < self.clock]
        following = [(first + jump.at, jump.steps) for jump in ahead if jump.at >= self.step]
        return replace(self, jumps=(*past, *following))

    def after_step(self, images: int, finite: bool) -> Loop:
        return replace(
            self,
            step=self.step + 1,
            clock=self.clock + 1,
            position=self.position + images,
            non_finite=0 if finite else self.non_finite + 1,
        )


@dataclass
class Job:
    """A phase in training."""

    attempt: Attempt
    settings: config.AnyPhase
    device: torch.device
    stop: Stop
    progress: Progress
    objective: Objective[Any, Any]
    optimizer: torch.optim.Optimizer
    loader: Loader
    loop: Loop
    stored: dict[str, list[File]] = field(default_factory=dict)  # files of frozen parts, once they are in the run
    sealed: dict[int, Manifest] = field(default_factory=dict)  # by this attempt, and not yet removed
    last_sealed: CheckpointRef | None = None  # of this phase, by this attempt or one that it goes on from
    recorded_non_finite: bool = False  # a step that was not finite was written down (`model.recording`)
    skips_told: int = 0  # unreadable images that somebody was told of


def begin(attempt: Attempt, stop: Stop, device: torch.device) -> Job:
    """The job as its attempt says: from the first checkpoint of `resume` that loads whole on every rank, or at step 0
    with what the phase takes of others.

    Raises UserError or DataError if the attempt asks for something impossible, CheckpointError if no checkpoint could
    be read.
    """
    with _user_errors():
        settings = config.read_phase(attempt.settings)
        check_layout(settings, parallel.world())
    progress = Progress(attempt, settings.steps)
    # Outside of what is tried again below: there a rank may fail alone, so nothing there may wait for another rank.
    index = _index(attempt, settings)
    for found in index:
        if found.skipped:
            progress.note(_left_out(found))
    make = partial(_make, attempt, settings, index, device, stop, progress)
    failures = []
    for ref in attempt.resume:
        job, failure = _on_every_rank(partial(_resume, make, ref))
        if job is not None:
            progress.note(f"goes on from {ref}{_jumps(job.loop)}")
            return job
        progress.note(f"cannot resume from {ref}: {failure}")
        failures.append(f"{ref}: {failure}")
    if failures:
        raise CheckpointError(f"none of the checkpoints to resume from could be read: {'; '.join(failures)}")
    return _hand_over(make, attempt)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Around what refuses, with a ValueError (pydantic's is one), settings or checkpoints that do not fit together."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def check_layout(settings: config.AnyPhase, world: int) -> None:
    """Raises ValueError unless every rank's micro-batch is made of whole groups and the settings are ones that this
    loop can honour."""
    optim_settings, ways = settings.optim, settings.parallel
    unit = optim_settings.group_size * optim_settings.accumulate
    if optim_settings.batch_size % (world * unit):
        fitting = [n for n in range(1, optim_settings.batch_size + 1) if optim_settings.batch_size % (n * unit) == 0]
        raise ValueError(
            f"{world} processes cannot share batch_size {optim_settings.batch_size} in whole groups of "
            f"{optim_settings.group_size} and {optim_settings.accumulate} micro-batches; these can: {fitting}"
        )
    if isinstance(settings, config.SslPhase) and not settings.koleo_fits(world):
        raise ValueError(
            f"losses.koleo.group_size {settings.koleo_group} fits neither in a micro-batch nor as whole shares of "
            f"{world} processes: take a number of processes that `validate` lists, or optim.accumulate 1"
        )
    asked = {
        "parallel.shard": ways.shard != "none",
        "parallel.activation_checkpointing": ways.activation_checkpointing,
        "parallel.compile": ways.compile,
        "precision.fp8": settings.precision.fp8 != "none",
    }
    if missing := [name for name, wanted in asked.items() if wanted]:
        raise ValueError(f"{', '.join(missing)}: this version of the trainer cannot do that yet; leave it out")


def _index(attempt: Attempt, settings: config.AnyPhase) -> list[Found]:
    """The run's index; rank 0 makes it, if this attempt is the first to need it, and the others wait."""
    pulse = contract.pulse_file(attempt.launch_name, parallel.rank())

    def tell(done: int, total: int) -> None:
        if done == total or done % 100 == 0:
            log.info("indexed %s of %s tar shards", f"{done:,}", f"{total:,}")
        pulse.touch()  # this may take longer than `health.stall_seconds`

    if parallel.rank() == 0:
        prepare(settings, build_or_read(settings.data, attempt.run_dir, tell), attempt.run_dir)
    parallel.gather_text("the index is there")
    return build_or_read(settings.data, attempt.run_dir, tell)


def _jumps(loop: Loop) -> str:
    """For a person: what is about to be jumped over."""
    first = loop.clock - loop.step
    ahead = [f"{steps} steps of data at step {at - first}" for at, steps in loop.jumps if at >= loop.clock]
    return f", jumping over {', '.join(ahead)}" if ahead else ""


def _left_out(index: Found) -> str:
    last = ", ".join(f"{one.path} ({one.reason})" for one in index.skipped[-MOST_NAMES:])
    return f"{len(index.skipped)} of {index.holds} are unreadable and left out, last: {last}"


def _make(
    attempt: Attempt,
    settings: config.AnyPhase,
    index: list[Found],
    device: torch.device,
    stop: Stop,
    progress: Progress,
    loop: Loop,
) -> Job:
    """The job at `loop`, with networks and optimizer fresh."""
    with _user_errors():
        model = config.read(config.Model, attempt.model)
        objective = build(settings, model, attempt.seed, loop.origin)
    built = objective.networks()
    for network in (*built.trained.values(), *built.frozen.values()):
        network.to(device)
    optimizer = optim.build(built.trained, settings.optim)
    loop = loop.with_jumps(settings.data.skip)
    clocks = range(loop.clock, loop.clock + settings.steps - loop.step)
    stream = Stream(attempt.seed, loop.origin, clocks, parallel.rank(), parallel.world(), loop.jumps)
    loader = Loader(settings, stream, index, attempt.run_dir, objective.views)
    return Job(attempt, settings, device, stop, progress, objective, optimizer, loader, loop)


def _resume(make: partial[Job], ref: CheckpointRef) -> Job:
    manifest = checkpoint.read_manifest(ref)
    job = make(Loop(**manifest.loop))
    with _user_errors():
        for part in job.objective.state():
            job.objective.load(part, checkpoint.load_files(ref, manifest, part))
        optim.load(job.optimizer, checkpoint.load_files(ref, manifest, "optimizer"))
    job.stored = {part: manifest.parts[part] for part in job.objective.frozen_parts()}
    job.last_sealed = ref
    return job


def _on_every_rank(attempt_it: partial[Job]) -> tuple[Job | None, str]:
    """The job if every rank has it, else none and why the first rank that failed did."""
    job, failure = None, ""
    try:
        job = attempt_it()
    except (CheckpointError, storage.StoreError) as error:
        failure = str(error)
    first = next((text for text in parallel.gather_text(failure) if text), "")
    return (None, first) if first else (job, "")


def _take_file(job: Job, name: str, where: str) -> None:
    """Weights that no run of ours made: a backbone, often without heads, which then begin fresh."""
    source = start.open_fitting(where, config.read(config.Model, job.attempt.model))
    tensors = {key: entry.read() for key, entry in source.own.items()}
    backbone = {key: tensor for key, tensor in tensors.items() if not networks.is_head(key)}
    heads = {key: tensor for key, tensor in tensors.items() if networks.is_head(key)}
    fresh = job.objective.state()["teacher_heads"]  # student's and teacher's are alike still
    job.objective.take(name, {"teacher_backbone": backbone, "teacher_heads": {**fresh, **heads}}.__getitem__)
    without = start.fresh_heads(source)
    told = f"; it has no {' and no '.join(without)}: fresh ones" if without else ""
    job.progress.note(f"takes {name} from {where} ({source.format}){told}")


def _hand_over(make: partial[Job], attempt: Attempt) -> Job:
    """Step 0: fresh networks that take what the phase names. With `init` the clock goes on too."""
    manifests = {name: checkpoint.read_manifest(ref) for name, ref in attempt.inputs.items()}
    loop = Loop(step=0, origin=attempt.phase, clock=0, position=0)
    if "init" in manifests:
        loop = replace(Loop(**manifests["init"].loop), step=0, non_finite=0)
    job = make(loop)
    for name, manifest in manifests.items():
        read = partial(checkpoint.load_files, attempt.inputs[name], manifest)
        with _user_errors():
            job.objective.take(name, read)
            if name == "init":
                optim.load(job.optimizer, read("optimizer"))
        job.progress.note(f"takes {name} from {attempt.inputs[name]}")
    for name, where in attempt.files.items():
        with _user_errors():
            _take_file(job, name, where)
    in_this_run = [
        file
        for name, manifest in manifests.items()
        if attempt.inputs[name].run == attempt.run_dir
        for files in manifest.parts.values()
        for file in files
    ]
    state = job.objective.state()
    found = {part: checkpoint.find_stored(state[part], in_this_run) for part in job.objective.frozen_parts()}
    job.stored = {part: files for part, files in found.items() if files is not None}
    return job
