"""A phase in training: what it is made of, where it stands, and where an attempt goes on from.

begin(attempt, ...) -> Job      from a checkpoint of its own, or at step 0 with what it takes of other phases
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import msgspec
import torch
from torch import Tensor

from model import config, contract, optim, parallel, sealed, sharding, storage
from model.contract import Attempt, CheckpointRef, File, Manifest
from model.data.batch import Batch
from model.data.loader import Loader, Stream, learn_tokenizer
from model.data.skips import MOST_NAMES
from model.data.sources import Found, build_or_read
from model.data.waiting import awaited
from model.looking import Looking, LookingForAll, wait_for_rank_0
from model.networks.init import Make, create
from model.objectives.base import Moment, Objective
from model.objectives.build import build
from model.progress import Progress
from model.saver import Saver
from model.sealed import CheckpointError
from model.stopping import Stop
from model.weights import networks, start, stem
from model.worker import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loop:
    """Where a phase stands: all that a resumed run needs and that is no tensor."""

    step: int  # updates of this phase
    origin: str  # the phase in which the chain of `init` hand-offs began; it names the streams of draws
    clock: int  # updates since the origin
    position: int  # in the data's order: images seen or jumped over since the origin
    non_finite: int = 0  # steps in a row, up to now, that changed nothing
    jumps: tuple[tuple[int, int], ...] = ()  # (clock, steps) of data that was, or will be, jumped over since the origin
    every: int | None = None  # steps between saves that `checkpoints.every: auto` has settled on in this phase

    @classmethod
    def of(cls, manifest: Manifest) -> Loop:
        """As the checkpoint says it."""
        return msgspec.convert(manifest.loop, cls)

    def with_jumps(self, ahead: Sequence[config.Jump]) -> Loop:
        """What was jumped over stays as the checkpoint says it; `ahead` is what the phase is told of the rest."""
        first = self.clock - self.step
        past = [(at, steps) for at, steps in self.jumps if at < self.clock]
        following = [(first + jump.at, jump.steps) for jump in ahead if jump.at >= self.step]
        return replace(self, jumps=(*past, *following))

    def after_step(self, images: int) -> Loop:
        """One step further, of so many images; whether it changed anything is known later (`settled`)."""
        batches = 1 + sum(steps for at, steps in self.jumps if at == self.clock)
        return replace(self, step=self.step + 1, clock=self.clock + 1, position=self.position + batches * images)

    def in_batches_of(self, images: int) -> Loop:
        """The next whole batch of so many images comes next: a phase joined by `init` may have another `batch_size`,
        and a mixture deals out whole batches."""
        return replace(self, position=-(-self.position // images) * images)

    def settled(self, finite: bool) -> Loop:
        return replace(self, non_finite=0 if finite else self.non_finite + 1)


@dataclass(frozen=True)
class Begun:
    """A step that the device is asked to make; what it came to is read one step later, so that nobody waits for it."""

    moment: Moment
    batch: Batch
    names: tuple[str, ...]
    values: Tensor  # float64 [names], on the host once `there` has happened
    there: torch.cuda.Event | None  # None on a CPU
    known: dict[str, float]  # metrics that the host knew at once
    images_per_second: float

    @classmethod
    def of(
        cls,
        moment: Moment,
        batch: Batch,
        names: tuple[str, ...],
        values: Tensor,
        known: dict[str, float],
        images_per_second: float,
    ) -> Begun:
        """With `values` of the device on their way to the host."""
        there = None
        if values.is_cuda:
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = on_host.copy_(values, non_blocking=True)
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record()
        return cls(moment, batch, names, values, there, known, images_per_second)

    def metrics(self) -> dict[str, float]:
        """Waits for the device."""
        if self.there is not None:
            self.there.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True)) | self.known


@dataclass
class Job:
    """A phase in training."""

    attempt: Attempt
    settings: config.AnyPhase
    device: torch.device
    stop: Stop
    progress: Progress
    objective: Objective[Any, Any]
    optimizer: optim.Optimizer
    loader: Loader
    saver: Saver
    loop: Loop
    stored: dict[str, list[File]] = field(default_factory=dict)  # files of frozen parts, once they are in the run
    sealed: dict[int, Manifest] = field(default_factory=dict)  # by this attempt, and not yet removed
    last_sealed: CheckpointRef | None = None  # of this phase, by this attempt or one that it goes on from
    begun: Begun | None = None  # the last step, as long as the host does not know what it came to
    recorded_non_finite: bool = False  # a step that was not finite was written down (`model.recording`)
    skips_told: int = 0  # unreadable images of all ranks that somebody was told of
    skips_named: int = 0  # those of this rank that its log names

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks, and of what they look at."""
        return dtype_of(self.settings)

    def batches(self) -> Iterator[Batch]:
        """Those that are left of the phase, on the device. While one is waited for, the agent can see that."""
        waiting = contract.waiting_file(self.attempt.launch_name, parallel.rank())
        for batch in awaited(self.loader, waiting, self.settings.data.shown):
            yield batch.to(self.device, self.dtype)


def dtype_of(settings: config.AnyPhase) -> torch.dtype:
    """Of weights and everything that is no product."""
    return torch.float64 if settings.precision.compute == "fp64" else torch.float32


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
        begun = _on_every_rank(attempt, partial(_resume, make, ref))
        if isinstance(begun, Job):
            progress.note(f"goes on from {ref}{_jumps(begun.loop)}")
            return begun
        progress.note(f"cannot resume from {ref}: {begun.says}")
        failures.append(f"{ref}: {begun.says}")
    if failures:
        raise CheckpointError(f"none of the checkpoints to resume from could be read: {'; '.join(failures)}")
    begun = _on_every_rank(attempt, partial(_hand_over, make, attempt))
    if isinstance(begun, Job):
        return begun
    raise (storage.StoreError if begun.store else CheckpointError)(begun.says)


@contextmanager
def _user_errors(opened: Iterable[Mapping[str, sealed.Stored]] = ()) -> Iterator[None]:
    """Around what refuses, with a ValueError (pydantic's is one), settings or checkpoints that do not fit together.

    opened: what is read of a checkpoint. Names and shapes are read unverified: one flipped bit there makes other
    tensors of them, and is no mistake of the user's. Raises DamagedError then.
    """
    try:
        yield
    except ValueError as error:
        for tensor in (tensor for part in opened for tensor in part.values()):
            tensor.verify()
        raise UserError(str(error)) from error


def check_layout(settings: config.AnyPhase, world: int) -> None:
    """Raises ValueError unless every rank's micro-batch is made of whole groups and the machine can do what is asked
    of it."""
    try:
        settings.optim.micro_batches(world)
    except ValueError as error:
        raise ValueError(f"{error}; these can: {settings.optim.worlds()}") from None
    if isinstance(settings, config.SslPhase) and not settings.koleo_fits(world):
        raise ValueError(
            f"losses.koleo.group_size {settings.koleo_group} fits neither in a micro-batch nor as whole shares of "
            f"{world} processes: take a number of processes that `validate` lists, or larger micro-batches"
        )
    sharding.check(settings, world)


def _index(attempt: Attempt, settings: config.AnyPhase) -> list[Found]:
    """The run's index; rank 0 makes it, if this attempt is the first to need it, and the others wait."""
    if parallel.rank() == 0:
        looking = LookingForAll(attempt)
        learn_tokenizer(settings, build_or_read(settings.data, attempt.run_dir, looking), attempt.run_dir)
        looking.ready()
    else:
        wait_for_rank_0(contract.looking_file(attempt.launch_name, parallel.rank()))
    return build_or_read(settings.data, attempt.run_dir, Looking(attempt, parallel.rank()))


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
        prepare = sharding.Prepare(settings.parallel, settings.precision, device)
        make = cast(Make, partial(create, prepare=prepare, device=device, dtype=dtype_of(settings)))
        objective = build(settings, model, attempt.seed, loop.origin, make)
    optimizer = optim.build(objective.networks().trained, settings.optim)
    batch = settings.optim.batch_size
    loop = loop.with_jumps(settings.data.skip).in_batches_of(batch)
    clocks, ahead = range(loop.clock, loop.clock + settings.steps - loop.step), loop.position // batch - loop.clock
    stream = Stream(attempt.seed, loop.origin, clocks, parallel.rank(), parallel.world(), loop.jumps, ahead)
    loader = Loader(settings, stream, index, attempt.run_dir, objective.views)
    saver = Saver(attempt, settings.checkpoints, stop.store, progress, loop.every)
    return Job(attempt, settings, device, stop, progress, objective, optimizer, loader, saver, loop)


def _resume(make: partial[Job], ref: CheckpointRef) -> Job:
    manifest = sealed.read_manifest(ref)
    job = make(Loop.of(manifest))
    parts = [*job.objective.state(), "optimizer"]
    opened = {part: sealed.open_part(ref, manifest, part) for part in parts}
    with _user_errors(opened.values()):
        for part in job.objective.state():
            job.objective.load(part, opened[part])
        optim.load(job.optimizer, opened["optimizer"])
    if ref.run == job.attempt.run_dir:  # a manifest names files of its own run alone
        job.stored = {part: manifest.parts[part] for part in job.objective.frozen_parts()}
    job.last_sealed = ref
    return job


class _Failure(contract.Record, frozen=True):
    """Why a rank could not begin from a checkpoint."""

    says: str
    damaged: CheckpointRef | None = None
    store: bool = False  # the store failed, and the checkpoint may be whole


def _on_every_rank(attempt: Attempt, begin_it: Callable[[], Job]) -> Job | _Failure:
    """The job if every rank has it, else why the first rank that failed has not. Damaged checkpoints are marked."""
    job, failure = None, None
    try:
        job = begin_it()
    except sealed.DamagedError as error:
        failure = _Failure(says=str(error), damaged=error.ref)
    except CheckpointError as error:
        failure = _Failure(says=str(error))
    except storage.StoreError as error:
        failure = _Failure(says=str(error), store=True)
    texts = parallel.gather_text(contract.encode(failure).decode() if failure else "")
    failures = [contract.decode(text, _Failure, "a rank's answer") for text in texts if text]
    if parallel.rank() == 0:
        for failure in failures:
            if failure.damaged is not None:
                sealed.mark(failure.damaged, failure.says, attempt)
    if failures:
        return failures[0]
    assert job is not None
    return job


def _take_file(job: Job, name: str, where: str) -> None:
    """Weights that no run of ours made: a backbone, often without heads, which then begin fresh."""
    model = config.read(config.Model, job.attempt.model)
    source = start.open_fitting(where, model)
    tensors = start.read(source, model)
    backbone = {key: tensor for key, tensor in tensors.items() if not networks.is_head(key)}
    heads = {key: tensor for key, tensor in tensors.items() if networks.is_head(key)}
    fresh = job.objective.state()["teacher_heads"]  # student's and teacher's are alike still
    job.objective.take(name, {"teacher_backbone": backbone, "teacher_heads": {**fresh, **heads}}.__getitem__)
    job.progress.note(f"takes {name} from {where} ({source.format}){start.told(source, model, job.settings.data)}")


def _hand_over(make: partial[Job], attempt: Attempt) -> Job:
    """Step 0: fresh networks that take what the phase names. With `init` the clock goes on too."""
    manifests = {name: sealed.read_manifest(ref) for name, ref in attempt.inputs.items()}
    loop = Loop(step=0, origin=attempt.phase, clock=0, position=0)
    if "init" in manifests:
        loop = replace(Loop.of(manifests["init"]), step=0, non_finite=0, every=None)
    job = make(loop)
    for name, manifest in manifests.items():
        opened: dict[str, dict[str, sealed.Stored]] = {}
        stored = partial(_open, opened, attempt.inputs[name], manifest)
        with _user_errors(opened.values()):
            read, told = stem.handed_over(name, stored, manifest.model["networks"], attempt.model)
            job.objective.take(name, read)
            if name == "init":
                optim.load(job.optimizer, read("optimizer"))
        job.progress.note(f"takes {name} from {attempt.inputs[name]}{told}")
    for name, where in attempt.files.items():
        with _user_errors():
            _take_file(job, name, where)
    job.stored = _stored_already(job, manifests)
    return job


def _open(
    opened: dict[str, dict[str, sealed.Stored]], ref: CheckpointRef, manifest: Manifest, part: str
) -> dict[str, sealed.Stored]:
    """A part of a checkpoint, noted in `opened`."""
    opened[part] = sealed.open_part(ref, manifest, part)
    return opened[part]


def _stored_already(job: Job, manifests: dict[str, Manifest]) -> dict[str, list[File]]:
    """The files of frozen parts that are in this run: what was handed over is what the checkpoint holds."""
    taken_as = {"gram_teacher": "gram_teacher", "vision_tower": "teacher_backbone"}
    return {
        taken_as[name]: manifest.parts["teacher_backbone"]
        for name, manifest in manifests.items()
        if taken_as.get(name) in job.objective.frozen_parts() and job.attempt.inputs[name].run == job.attempt.run_dir
    }
