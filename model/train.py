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
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from model import contract, health, optim, parallel, recording, retention, sharding, storage, worker
from model.checkpoint import GivenUpError
from model.contract import Attempt, Cause, CheckpointRef, Manifest, RankEnd
from model.data.batch import Batch
from model.data.skips import MOST_NAMES, are_too_many, too_many
from model.job import Begun, Job, begin
from model.objectives.base import Moment
from model.objectives.pure import Slices
from model.saver import Saved
from model.stopping import Stop
from model.worker import DivergedError

log = logging.getLogger(__name__)

REPLACED, UNREADABLE = "data/replaced", "data/unreadable"
"""How often an image was replaced as it could not be read, and how many different ones each rank met. The second is for
the note alone, which would else come again with each epoch."""


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(job: Job) -> Cause:
    """Train from where the job stands to the end of the phase (DONE), or to the step at which the ranks agreed to stop
    (STOPPED); sealed either way.

    The host asks the device for a step and reads what it came to one step later (`_settle`), so neither waits for the
    other. Whether a step counts is decided on the device: a flag gates weights, moments, EMA and centres.
    """
    settings, objective, optimizer = job.settings, job.objective, job.optimizer
    trained = objective.networks().trained
    pulse = contract.pulse_file(job.attempt.launch_name, parallel.rank())
    began = time.monotonic()
    for batch in job.batches():
        moment = Moment(step=job.loop.step, steps=settings.steps, clock=job.loop.clock)
        if recording.due(settings, moment):
            _settle(job)
            recording.record(job, batch, moment)
        targets = objective.targets(batch, moment)
        terms = _backward(job, batch, targets, moment)
        parallel.reduce_gradients(p for network in trained.values() for p in network.parameters() if p.requires_grad)
        _settle(job)  # the step before: its end is behind the work that the device was just given

        # Sums over the ranks, the same on all of them: no rank can take another way from here.
        norms = optim.clip(trained, settings.optim.clip, settings.optim.clip_each)
        terms |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        values = torch.stack([term.double() for term in terms.values()])
        finite = values.isfinite().all()
        known = optim.set_step(optimizer, settings.optim, moment.step, moment.steps)
        optim.update(optimizer, finite)
        objective.after_step(moment, finite)
        optimizer.zero_grad()
        job.loop = job.loop.after_step(settings.optim.batch_size)
        if job.loop.step % settings.health.every == 0 or job.loop.step == settings.steps:
            known |= health.measure(objective, targets, terms.get("loss/dino_global"))
        _name_skipped(job)
        take_in(job, job.saver.ended())
        rate = settings.optim.batch_size / (time.monotonic() - began)
        job.begun = Begun.of(moment, batch, tuple(terms), values, known, rate)
        pulse.touch()
        stopping = job.stop.at(job.loop.step, settings.steps)
        last = stopping or job.loop.step == settings.steps
        if last or job.saver.due(job.loop.step):
            _settle(job)
            seal(job, last)
        if stopping and job.loop.step < settings.steps:
            return Cause.STOPPED
        began = time.monotonic()
    return Cause.DONE


def _backward(job: Job, batch: Batch, targets: Slices, moment: Moment) -> dict[str, Tensor]:
    """Add up the gradients of the micro-batches. Returns each term of the global loss, under its metric's name, and how
    many images could not be read so far; all of them sums over the ranks."""
    parts = job.settings.optim.micro_batches(parallel.world())
    images = len(batch.positions) // parts
    sums: dict[str, Tensor] = {}
    for start in range(0, len(batch.positions), images):
        end = start + images
        terms = job.objective.loss(batch.slice(start, end), targets.slice(start, end), moment)
        sharding.last_micro_batch(job.objective.networks().trained, end == len(batch.positions))
        terms["total"].backward()  # type: ignore[no-untyped-call]
        sums = {name: term.detach() + sums.get(name, 0) for name, term in terms.items()}
    named = {"loss" if name == "total" else f"loss/{name}": term for name, term in sums.items()}
    # The counts ride along: filled in on the device, so nobody waits, and whole numbers in fp32 up to 16 million.
    skipped = job.loader.skipped
    counts = {REPLACED: skipped.replaced, UNREADABLE: skipped.count}
    named |= {name: sums["total"].new_full((), count) for name, count in counts.items()}
    return dict(zip(named, parallel.all_reduce_sum(torch.stack(list(named.values()))), strict=True))


def _settle(job: Job) -> None:
    """Read what the last step came to, and tell of it. Raises DivergedError after too many that changed nothing,
    BadDataError when too many images had to be replaced."""
    begun, job.begun = job.begun, None
    if begun is None:
        return
    metrics = begun.metrics()
    names = ", ".join(name for name in begun.names if not math.isfinite(metrics[name]))
    job.loop = job.loop.settled(finite=not names)
    _tell_replaced(job, metrics)
    step = begun.moment.step + 1
    if step == job.settings.steps and (collapsed := health.collapse(metrics)):
        job.progress.note(f"collapsed: {collapsed}")
    job.progress.step(step, begun.images_per_second, metrics)
    _judge_replaced(job, int(metrics.get(REPLACED, 0)))
    if names:
        _changed_nothing(job, begun, step, names)


def _changed_nothing(job: Job, begun: Begun, step: int, names: str) -> None:
    job.progress.note(f"step {step} changed nothing: not finite: {names}")
    if not job.recorded_non_finite:  # the first is the one to study; the weights are still those that it had
        job.recorded_non_finite = True
        recording.record(job, begun.batch, begun.moment)
    limit = job.settings.health.non_finite_steps
    if job.loop.non_finite >= limit:
        raise DivergedError(f"step {step} is the last of {limit} in a row that were not finite: {names}")


def _tell_replaced(job: Job, metrics: dict[str, float]) -> None:
    """All ranks' unreadable images: a note when there are more of them, and a metric once there is one."""
    unreadable = int(metrics.pop(UNREADABLE))
    if not metrics[REPLACED]:
        del metrics[REPLACED]
    if unreadable > job.skips_told and parallel.rank() == 0:
        job.skips_told = unreadable
        own = f"; last of rank 0: {job.loader.skipped.named}" if job.loader.skipped.last else ""
        job.progress.note(f"{unreadable} unreadable images replaced so far, over all ranks{own}")


def _judge_replaced(job: Job, replaced: int) -> None:
    """Raises BadDataError, on all ranks at once, when more images were replaced than `data.max_skip_rate` allows. Over
    all ranks: one that reads a damaged shard alone stops nobody."""
    skipped, left_out, most = job.loader.skipped, job.loader.left_out, job.settings.data.max_skip_rate
    due = job.loader.due * parallel.world()
    if are_too_many(replaced, due, job.loader.total, left_out, most):
        of_each = [text.splitlines() for text in parallel.gather_text("\n".join(map(str, reversed(skipped.last))))]
        in_turn = (line for lines in zip_longest(*of_each) for line in lines if line)
        last = list(dict.fromkeys(in_turn))[:MOST_NAMES]
        beside = f", beside {left_out:,} that the index left out," if left_out else ""
        raise too_many(replaced, f"of the {due:,} images that were due{beside}", most, last)


def _name_skipped(job: Job) -> None:
    """This rank's own unreadable images by name, in its log: names are not sent around."""
    skipped = job.loader.skipped
    if skipped.count > job.skips_named:
        job.skips_named = skipped.count
        log.info("%d unreadable images of this rank replaced so far, last: %s", skipped.count, skipped.named)


def seal(job: Job, last: bool) -> None:
    """Save the state as it is, and remove the checkpoints that retention does not keep. Training waits for the copy
    only; the last save is waited for."""
    job.progress.flush()
    if last:
        job.saver.make_way(job.loop.step, job.stop.left(job.settings.health.notice_seconds))
    take_in(job, job.saver.ended(wait=True))
    frozen = job.objective.frozen_parts()
    stored = {part: files for part, files in job.stored.items() if part in frozen}
    parts = {**job.objective.state(), "optimizer": optim.state(job.optimizer)}
    written = {part: tensors for part, tensors in parts.items() if part not in stored}
    described = {"networks": job.attempt.model, "phase": job.attempt.settings, "tokenizer": job.loader.tokenizer}
    loop = asdict(replace(job.loop, every=job.saver.chosen))
    job.saver.start(job.loop.step, written, stored, loop, described, partial(_prune, job))
    if last:
        take_in(job, job.saver.ended(wait=True))
        if job.last_sealed is None or job.last_sealed.step != job.loop.step:
            raise GivenUpError(f"the last save, of step {job.loop.step}, was given up by another rank")


def take_in(job: Job, saved: Saved | None) -> None:
    """Note that a save is over, if one is."""
    if saved is None:
        return
    manifest = saved.manifest
    job.stored = {part: manifest.parts[part] for part in job.objective.frozen_parts()}
    job.last_sealed = CheckpointRef(job.attempt.run_dir, job.attempt.phase, job.attempt.attempt, manifest.step)
    job.progress.note(str(saved), saved.metrics)


def _prune(job: Job, manifest: Manifest) -> None:
    """In the thread of rank 0's saves, which alone looks at `job.sealed`."""
    job.sealed[manifest.step] = manifest
    job.sealed = retention.prune(job.attempt, job.settings.checkpoints, job.sealed)


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
            job.saver.close(job.settings.health.notice_seconds)
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
