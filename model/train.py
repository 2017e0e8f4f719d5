"""The training of one attempt: `python -P -m model.rank model.train ATTEMPT_YAML` under torchrun, in every process.

    main -> run -> job.begin (networks, optimizer, and where to go on from) -> train (the loop)

The loop is the same for every kind of phase and asks no objective which it is. How this process ended is published as
`attempts/<n>/ranks/<rank>.json`, and its exit code is the contract's.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from dataclasses import asdict

import torch
from torch import Tensor

from model import checkpoint, contract, health, optim, parallel, recording, storage, worker
from model.contract import Attempt, Cause, CheckpointRef, RankEnd
from model.data.batch import Batch
from model.data.waiting import awaited
from model.job import Job, begin
from model.objectives.base import Moment
from model.objectives.pure import Slices
from model.stopping import Stop
from model.worker import DivergedError

log = logging.getLogger(__name__)


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(job: Job) -> Cause:
    """Train from where the job stands to the end of the phase (DONE), or to the step at which the ranks agreed to stop
    (STOPPED); sealed either way."""
    settings, objective, optimizer = job.settings, job.objective, job.optimizer
    trained = objective.networks().trained
    pulse = contract.pulse_file(job.attempt.launch_name, parallel.rank())
    began = time.monotonic()
    waiting = contract.waiting_file(job.attempt.launch_name, parallel.rank())
    for batch in (one.to(job.device) for one in awaited(job.loader, waiting, settings.data.shown)):
        moment = Moment(step=job.loop.step, steps=settings.steps, clock=job.loop.clock)
        recording.record_if_due(job, batch, moment)
        targets = objective.targets(batch, moment)
        terms = _backward(job, batch, targets, moment)
        parallel.reduce_gradients(p for network in trained.values() for p in network.parameters() if p.requires_grad)

        # Sums over the ranks, the same on all of them: no rank can take another way from here.
        norms = {f"grad_norm/{name}": float(norm) for name, norm in _clipped(job).items()}
        metrics = {**_summed(terms), **norms}
        finite = all(math.isfinite(value) for value in metrics.values())
        if finite:
            metrics |= optim.set_step(optimizer, settings.optim, moment.step, moment.steps)
            optimizer.step()
            objective.after_step(moment)
        optimizer.zero_grad(set_to_none=True)
        job.loop = job.loop.after_step(settings.optim.batch_size, finite)
        if job.loop.step % settings.health.every == 0 or job.loop.step == settings.steps:
            metrics |= health.measure(objective, targets, metrics.get("loss/dino_global"))
        if job.loop.step == settings.steps and (collapsed := health.collapse(metrics)):
            job.progress.note(f"collapsed: {collapsed}")
        metrics |= _tell_skipped(job)
        job.progress.step(job.loop.step, settings.optim.batch_size / (time.monotonic() - began), metrics)
        pulse.touch()
        if not finite:
            _changed_nothing(job, batch, moment, metrics)
        stopping = job.stop.at(job.loop.step, settings.steps)
        if stopping or job.loop.step == settings.steps or job.loop.step % settings.checkpoints.every == 0:
            seal(job)
        if stopping and job.loop.step < settings.steps:
            return Cause.STOPPED
        began = time.monotonic()
    return Cause.DONE


def _backward(job: Job, batch: Batch, targets: Slices, moment: Moment) -> dict[str, Tensor]:
    """Add up the gradients of the micro-batches. Returns this rank's share of each term of the loss."""
    images = len(batch.positions) // job.settings.optim.accumulate
    sums: dict[str, Tensor] = {}
    for start in range(0, len(batch.positions), images):
        end = start + images
        terms = job.objective.loss(batch.slice(start, end), targets.slice(start, end), moment)
        terms["total"].backward()  # type: ignore[no-untyped-call]
        sums = {name: term.detach() + sums.get(name, 0) for name, term in terms.items()}
    return sums


def _clipped(job: Job) -> dict[str, Tensor]:
    settings = job.settings.optim
    return optim.clip(job.objective.networks().trained, settings.clip, settings.clip_each)


def _summed(terms: dict[str, Tensor]) -> dict[str, float]:
    """The terms over all ranks: `loss`, and each part of it as `loss/<name>`."""
    values = parallel.all_reduce_sum(torch.stack(list(terms.values()))).tolist()
    return {"loss" if name == "total" else f"loss/{name}": value for name, value in zip(terms, values, strict=True)}


def _tell_skipped(job: Job) -> dict[str, float]:
    """This rank's unreadable images, by name for a person and, once there is one, as a metric."""
    skipped = job.loader.skipped
    if skipped.count > job.skips_told:
        job.skips_told = skipped.count
        last = ", ".join(f"{image.path} ({image.reason})" for image in skipped.last)
        job.progress.note(f"{skipped.count} unreadable images replaced so far, last: {last}")
    return {"data/replaced": float(skipped.replaced)} if skipped.replaced else {}


def _changed_nothing(job: Job, batch: Batch, moment: Moment, metrics: dict[str, float]) -> None:
    names = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
    job.progress.note(f"step {job.loop.step} changed nothing: not finite: {names}")
    if not job.recorded_non_finite:  # the first is the one to study; the weights are still those that it had
        job.recorded_non_finite = True
        recording.record(job, batch, moment)
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
    job.last_sealed = CheckpointRef(job.attempt.run_dir, job.attempt.phase, job.attempt.attempt, job.loop.step)
    job.progress.note(f"sealed {job.loop.step}")
    if parallel.rank() == 0:
        job.sealed[job.loop.step] = manifest
        job.sealed = checkpoint.prune(job.attempt, job.settings.checkpoints, job.sealed)


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
    if job is not None:
        try:
            job.progress.flush()
        except storage.StoreError as second:
            log.error("the last steps could not be recorded: %s", second)
    return worker.failed(error, job.loop.step if job else None)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1], run))
