"""The training of one attempt: `python -P -m model.rank model.train ATTEMPT_YAML` under torchrun, in every process.

    main -> run -> begin (networks, optimizer, and where to go on from) -> train (the loop)

The loop is the same for every kind of phase and asks no objective which it is. How this process ended is published as
`attempts/<n>/ranks/<rank>.json`, and its exit code is the contract's.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint, config, contract, health, optim, parallel, storage
from model.checkpoint import CheckpointError
from model.contract import Attempt, Cause, CheckpointRef, File, Manifest, RankEnd
from model.data.batch import Batch
from model.data.errors import BadDataError, DataError
from model.data.index import build_or_read
from model.data.loader import Loader
from model.objectives import base
from model.objectives.base import Moment, Objective
from model.progress import Progress
from model.stopping import Stop, TooLateError

log = logging.getLogger(__name__)


class UserError(Exception):
    """The attempt asks for something impossible."""


class DivergedError(Exception):
    """Too many steps in a row had a loss or a gradient that was not finite."""


CAUSES: tuple[tuple[type[Exception], Cause], ...] = (
    (UserError, Cause.USER_ERROR),
    (DataError, Cause.USER_ERROR),
    (DivergedError, Cause.DIVERGED),
    (BadDataError, Cause.BAD_DATA),
    (CheckpointError, Cause.BAD_CHECKPOINT),
    (checkpoint.ClosedError, Cause.SUPERSEDED),
    (TooLateError, Cause.UNSEALED),
    (storage.DiskFullError, Cause.DISK_FULL),
    (storage.AlreadyPublished, Cause.SUPERSEDED),  # somebody else writes this attempt's files
    (storage.StoreError, Cause.STORE_LOST),
)
"""What an exception that ends the training is to the controller; any other is a crash."""


@dataclass(frozen=True)
class Loop:
    """Where a phase stands: all that a resumed run needs and that is no tensor."""

    step: int  # updates of this phase
    origin: str  # the phase in which the chain of `init` hand-offs began; it names the streams of draws
    clock: int  # updates since the origin
    position: int  # images consumed since the origin
    non_finite: int = 0  # steps in a row, up to now, that changed nothing

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


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(job: Job) -> Cause:
    """Train from where the job stands to the end of the phase (DONE), or to the step at which the ranks agreed to stop
    (STOPPED); sealed either way."""
    settings, objective, optimizer = job.settings, job.objective, job.optimizer
    trained = objective.networks().trained
    pulse = contract.pulse_file(job.attempt.launch_name, parallel.rank())
    began = time.monotonic()
    for batch in (one.to(job.device) for one in job.loader):
        moment = Moment(step=job.loop.step, steps=settings.steps, clock=job.loop.clock)
        targets = objective.targets(batch, moment)
        terms = _backward(job, batch, targets, moment)
        parallel.reduce_gradients(p for network in trained.values() for p in network.parameters() if p.requires_grad)

        # Sums over the ranks, the same on all of them: no rank can take another way from here.
        norms = {f"grad_norm/{name}": float(norm) for name, norm in optim.clip(trained, settings.optim.clip).items()}
        metrics = {**_summed(terms), **norms}
        finite = all(math.isfinite(value) for value in metrics.values())
        if finite:
            metrics |= optim.set_step(optimizer, settings.optim, moment.step, moment.steps)
            optimizer.step()
            objective.after_step(moment)
        optimizer.zero_grad(set_to_none=True)
        job.loop = job.loop.after_step(settings.optim.batch_size, finite)
        if job.loop.step % settings.health.every == 0:
            metrics |= health.measure(objective, targets)

        job.progress.step(job.loop.step, settings.optim.batch_size / (time.monotonic() - began), metrics)
        pulse.touch()
        if not finite:
            _changed_nothing(job, metrics)
        stopping = job.stop.at(job.loop.step, settings.steps)
        if stopping or job.loop.step == settings.steps or job.loop.step % settings.checkpoints.every == 0:
            seal(job)
        if stopping and job.loop.step < settings.steps:
            return Cause.STOPPED
        began = time.monotonic()
    return Cause.DONE


def _backward(job: Job, batch: Batch, targets: base.Slices, moment: Moment) -> dict[str, Tensor]:
    """Add up the gradients of the micro-batches. Returns this rank's share of each term of the loss."""
    images = len(batch.positions) // job.settings.optim.accumulate
    sums: dict[str, Tensor] = {}
    for start in range(0, len(batch.positions), images):
        end = start + images
        terms = job.objective.loss(batch.slice(start, end), targets.slice(start, end), moment)
        terms["total"].backward()  # type: ignore[no-untyped-call]
        sums = {name: term.detach() + sums.get(name, 0) for name, term in terms.items()}
    return sums


def _summed(terms: dict[str, Tensor]) -> dict[str, float]:
    """The terms over all ranks: `loss`, and each part of it as `loss/<name>`."""
    values = parallel.all_reduce_sum(torch.stack(list(terms.values()))).tolist()
    return {"loss" if name == "total" else f"loss/{name}": value for name, value in zip(terms, values, strict=True)}


def _changed_nothing(job: Job, metrics: dict[str, float]) -> None:
    names = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
    job.progress.note(f"step {job.loop.step} changed nothing: not finite: {names}")
    limit = job.settings.health.non_finite_steps
    if job.loop.non_finite >= limit:
        raise DivergedError(f"step {job.loop.step} is the last of {limit} in a row that were not finite: {names}")


def seal(job: Job) -> None:
    """Seal the state as it is, and remove the checkpoints that retention does not keep."""
    job.progress.flush()
    frozen = job.objective.frozen_parts()
    stored = {part: files for part, files in job.stored.items() if part in frozen}
    parts = {**job.objective.state(), "optimizer": optim.state(job.optimizer)}
    written = {part: tensors for part, tensors in parts.items() if part not in stored}
    described = {"networks": job.attempt.model, "phase": job.attempt.settings, "tokenizer": job.loader.tokenizer}
    manifest = checkpoint.seal(job.attempt, job.loop.step, written, stored, asdict(job.loop), described)
    job.stored = {part: manifest.parts[part] for part in frozen}
    job.progress.note(f"sealed {job.loop.step}")
    if parallel.rank() == 0:
        job.sealed[job.loop.step] = manifest
        job.sealed = checkpoint.prune(job.attempt, job.settings.checkpoints, job.sealed)


# --- where to go on from ----------------------------------------------------------------------------------------------


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
    make = partial(_make, attempt, settings, device, stop, progress)
    failures = []
    for ref in attempt.resume:
        job, failure = _on_every_rank(partial(_resume, make, ref))
        if job is not None:
            progress.note(f"goes on from {ref}")
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
    asked = {
        "parallel.shard": ways.shard != "none",
        "parallel.activation_checkpointing": ways.activation_checkpointing,
        "parallel.compile": ways.compile,
        "precision.fp8": settings.precision.fp8 != "none",
    }
    if missing := [name for name, wanted in asked.items() if wanted]:
        raise ValueError(f"{', '.join(missing)}: this version of the trainer cannot do that yet; leave it out")


def _make(
    attempt: Attempt, settings: config.AnyPhase, device: torch.device, stop: Stop, progress: Progress, loop: Loop
) -> Job:
    """The job at `loop`, with networks and optimizer fresh."""
    with _user_errors():
        model = config.read(config.Model, attempt.model)
        objective = base.build(settings, model, attempt.seed, loop.origin)
    networks = objective.networks()
    for network in (*networks.trained.values(), *networks.frozen.values()):
        network.to(device)
    optimizer = optim.build(networks.trained, settings.optim)
    loader = _loader(attempt, settings, objective, loop)
    return Job(attempt, settings, device, stop, progress, objective, optimizer, loader, loop)


def _loader(attempt: Attempt, settings: config.AnyPhase, objective: Objective[Any, Any], loop: Loop) -> Loader:
    """The loader from `loop` to the phase's end. Rank 0 makes the run's index, if it is the first to need it."""
    if parallel.rank() == 0:
        build_or_read(settings.data, attempt.run_dir)
    parallel.gather_text("the index is there")
    return Loader(
        settings,
        attempt.seed,
        loop.origin,
        build_or_read(settings.data, attempt.run_dir),
        attempt.run_dir,
        objective.views,
        parallel.rank(),
        parallel.world(),
        start_clock=loop.clock,
        stop_clock=loop.clock + settings.steps - loop.step,
    )


def _resume(make: partial[Job], ref: CheckpointRef) -> Job:
    manifest = checkpoint.read_manifest(ref)
    job = make(Loop(**manifest.loop))
    with _user_errors():
        for part in job.objective.state():
            job.objective.load(part, checkpoint.load_files(ref, manifest, part))
        optim.load(job.optimizer, checkpoint.load_files(ref, manifest, "optimizer"))
    job.stored = {part: manifest.parts[part] for part in job.objective.frozen_parts()}
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


# --- the process ------------------------------------------------------------------------------------------------------


def run(attempt: Attempt) -> RankEnd:
    """Train the attempt in this process, to whatever end."""
    job: Job | None = None
    try:
        device = _device()
        store = parallel.join("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        stop = Stop(store, contract.stop_file(attempt.launch_name))
        stop.file.parent.mkdir(parents=True, exist_ok=True)
        job = begin(attempt, stop, device)
        cause = train(job)
        job.progress.flush()
        parallel.leave()
    except Exception as error:
        return _failed(error, job)
    finally:
        if job is not None:
            job.loader.close()
    said = "every step is trained" if cause is Cause.DONE else "stopped as asked"
    return RankEnd(cause=cause, message=f"{said}, {job.loop.step} is sealed", step=job.loop.step)


def _failed(error: Exception, job: Job | None) -> RankEnd:
    log.exception("the training ends")
    if job is not None:
        try:
            job.progress.flush()
        except storage.StoreError as second:
            log.error("the last steps could not be recorded: %s", second)
    cause = next((cause for kind, cause in CAUSES if isinstance(error, kind)), Cause.CRASHED)
    text = str(error) if cause is not Cause.CRASHED else f"{type(error).__name__}: {error}"
    first, *rest = text.splitlines() or [type(error).__name__]
    detail = "".join(traceback.format_exception(error)) if cause is Cause.CRASHED else "\n".join(rest)
    return RankEnd(cause=cause, message=first, step=job.loop.step if job else None, detail=detail)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def main(attempt_yaml: str) -> int:
    """Train what `attempt_yaml` says and publish how it ended. Returns the exit code of the contract."""
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank}: %(message)s", stream=sys.stderr)
    attempt = contract.read_attempt(Path(attempt_yaml).read_bytes(), attempt_yaml)
    torch.set_num_threads(attempt.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to be deterministic
    torch.use_deterministic_algorithms(True)
    end = run(attempt)
    try:
        storage.publish(f"{attempt.run_dir}/{contract.rank_file(attempt.attempt, rank)}", contract.encode(end))
    except storage.StoreError as error:
        log.error("%s; and that could not be published: %s", end.message, error)
    return contract.EXIT_CODES[end.cause]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
