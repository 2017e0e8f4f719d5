"""What the two houses agree on: file names, ends and exit codes, manifests, and the records that pass between them.

No torch, no pydantic: `dinoctl status` imports this and must answer at once. Records are frozen msgspec structs:
they refuse unknown fields, and JSON is their only form on disk.

The files of a run's directory: `model.run_files`.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import msgspec

# All of these are parts of this module: nobody else imports them.
from model import kept as kept, node_report as node_report
from model.host_list import hosts as hosts
from model.run_files import (
    ATTEMPTS_DIR as ATTEMPTS_DIR,
    BAD_DIR as BAD_DIR,
    CONTROLLER_FILE as CONTROLLER_FILE,
    EVENTS_DIR as EVENTS_DIR,
    PINS_DIR as PINS_DIR,
    REPORT_DIR as REPORT_DIR,
    REPORT_FILE as REPORT_FILE,
    WATCHERS_DIR as WATCHERS_DIR,
    agent_log as agent_log,
    attempt_dir as attempt_dir,
    attempt_yaml as attempt_yaml,
    bad_file as bad_file,
    checkpoint_dir as checkpoint_dir,
    claim_file as claim_file,
    closed_file as closed_file,
    dropped_file as dropped_file,
    event_file as event_file,
    log_dir as log_dir,
    looked_file as looked_file,
    manifest_file as manifest_file,
    node_file as node_file,
    outcome_file as outcome_file,
    pin_file as pin_file,
    progress_chunk as progress_chunk,
    progress_dir as progress_dir,
    rank_file as rank_file,
    rank_log as rank_log,
    recorded_file as recorded_file,
)
from model.scratch import (
    end_file as end_file,
    looking_file as looking_file,
    pid_file as pid_file,
    pulse_file as pulse_file,
    scratch_dir as scratch_dir,
    stop_file as stop_file,
    waiting_file as waiting_file,
)

FORMAT = 1  # of everything below; a run directory of a higher format was written by a newer dinoctl and is refused


class Cause(StrEnum):
    """Why an attempt ended. Each has an exit code here, a budget in `orchestrator.failures`, a page in runbooks/."""

    DONE = "done"  # every step was trained and the final checkpoint sealed
    STOPPED = "stopped"  # asked to stop (signal, preemption, time limit), sealed and stopped
    UNSEALED = "unsealed"  # asked to stop, ended without sealing (second signal, notice too short)
    CRASHED = "crashed"  # an exception in the trainer
    USER_ERROR = "user-error"  # the spec or the data asks for something impossible
    KILLED = "killed"  # a rank was killed from outside (SIGKILL, out of memory)
    HUNG = "hung"  # no step for longer than `health.stall_seconds`, though the batch was there
    DATA_STALLED = "data-stalled"  # no batch for that long, or the store of the images failed for minutes
    DIVERGED = "diverged"  # the loss stayed non-finite
    BAD_DATA = "bad-data"  # more unreadable images than `data.max_skip_rate`
    DISK_FULL = "disk-full"  # no space to write a checkpoint or a record
    BAD_CHECKPOINT = "bad-checkpoint"  # no checkpoint of those named could be read
    STORE_LOST = "store-lost"  # the run directory could not be reached for longer than the lease
    SUPERSEDED = "superseded"  # another process holds this attempt's claim, or the controller closed it
    VANISHED = "vanished"  # a node was lost, or the launcher knows nothing of it any more and it left no outcome
    NOT_LAUNCHED = "not-launched"  # the launcher refused it, or whoever meant to launch it died first
    UNPLACED = "unplaced"  # the cluster had room for some of its pods only, for too long: they were given back


EXIT_CODES: dict[Cause, int] = {
    Cause.DONE: 0,
    Cause.CRASHED: 1,
    Cause.USER_ERROR: 2,
    Cause.STOPPED: 80,
    Cause.UNSEALED: 81,
    Cause.KILLED: 82,
    Cause.HUNG: 83,
    Cause.DIVERGED: 84,
    Cause.BAD_DATA: 85,
    Cause.DISK_FULL: 86,
    Cause.BAD_CHECKPOINT: 87,
    Cause.STORE_LOST: 88,
    Cause.SUPERSEDED: 89,
    Cause.DATA_STALLED: 90,
    Cause.VANISHED: 91,
}
"""What the agent exits with. NOT_LAUNCHED and UNPLACED are the controller's own findings and have none."""

CAUSES: dict[int, Cause] = {code: cause for cause, code in EXIT_CODES.items()}


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of everything that is written to a run directory as JSON."""


class CheckpointRef(Record, frozen=True):
    """A sealed checkpoint: `<run>/checkpoints/<phase>/<attempt>/<step>`, the state after `step` updates of `phase`."""

    run: str  # absolute path or URI of the run directory that holds it
    phase: str
    attempt: int
    step: int

    @property
    def path(self) -> str:
        return f"{self.run}/{checkpoint_dir(self.phase, self.attempt, self.step)}"

    def __str__(self) -> str:
        return f"{self.phase}@{self.step} (attempt {self.attempt})"


class File(Record, frozen=True):
    """One file of a checkpoint. `path` is relative to the run directory, so that a frozen network is stored once."""

    path: str
    bytes: int
    sha256: str


class Attempt(Record, frozen=True):
    """`attempt.yaml`: all that an attempt is told, resolved, immutable; the only argument of agent and trainer."""

    format: int
    run: str  # the run's name
    run_id: str  # hex, drawn once, in the run's first event
    run_dir: str  # absolute path or URI
    attempt: int  # 1, 2, 3 ... over the whole run
    phase: str  # its name in the spec, or EVALUATE
    launch_name: str  # <run>-<8 hex of run_id>-<phase>-<attempt>, at most 63 characters
    seed: int
    model: dict[str, Any]  # model.config.Model
    settings: dict[str, Any]  # model.config's phase of that kind, or its Evaluate
    inputs: dict[str, CheckpointRef]  # init, weights, gram_teacher, vision_tower: those the phase names, pinned
    resume: list[CheckpointRef]  # of this phase, newest first: the one to go on from and its fallbacks; empty: step 0
    keep_steps: list[int]  # checkpoints of this phase that something refers to: sealed in any case, never pruned
    nodes: int
    processes_per_node: int
    threads: int
    code_dir: str  # the read-only copy: PYTHONPATH of all that the agent starts for training; empty: the image's code
    on_end: list[str]  # the command that the agent runs as its last act (a tick), in its own environment
    spec_digest: str
    code_digest: str
    keep_parts: dict[int, list[str]] = {}  # the parts that stay of a keep step, once it is old; not named: all of them
    exclude: list[str] = []  # nodes that the launcher is not to place it on, as they failed this run lately
    files: dict[str, str] = {}  # inputs that are no checkpoint of a run: path or URI of a file or folder of weights
    watch_seconds: float = 1.0  # how often the agent looks at its processes; progress chunks are at most this frequent


PARTS = ("student", "optimizer", "teacher_backbone", "teacher_heads", "gram_teacher", "loop")
"""What a checkpoint is made of. Loads, copies and pins name parts. A text phase's trained networks are its student."""


class Manifest(Record, frozen=True):
    """`manifest.json`, by `seal_manifest`: published last, and alone what makes a folder a checkpoint."""

    format: int
    run_id: str
    phase: str
    attempt: int
    step: int
    parts: dict[str, list[File]]  # by name, those of PARTS that it has
    loop: dict[str, Any]  # everything that is not a tensor: step, clocks, counters
    model: dict[str, Any]  # architecture, patch size, normalisation, dtypes: an evaluation needs no spec
    world: dict[str, int]  # nodes, processes
    spec_digest: str
    code_digest: str
    versions: dict[str, str]  # torch, numpy, python
    sealed_at: float
    nonce: str
    sha256: str = ""  # of all of it that comes before, see `seal_manifest`; empty once it is read


class Claim(Record, frozen=True):
    """Who trains an attempt: the agent of its node 0. `started` is the process's start time, as a pid alone may be
    another's by now."""

    launch_name: str
    host: str
    boot_id: str
    pid: int
    started: float
    nonce: str
    job: str = ""  # the cluster's name of the job and how often it was restarted: `<job id>.<restarts>`; none: local
    address: str = ""  # where the agents of several nodes meet: host and port of node 0's
    port: int = 0


class Outcome(Record, frozen=True):
    """How an attempt ended, published by its agent as its last word."""

    cause: Cause
    message: str  # one line for a person
    step: int | None  # updates done when it ended, where known
    detail: str = ""  # traceback or log tail, for `status` and `logs`
    ended_at: float = 0.0
    nonce: str = ""
    bad_nodes: list[str] = []  # hosts that were lost or cannot work: the next attempts are not placed on them


class RankEnd(Record, frozen=True):
    """How one rank ended, in its own words; a rank that was killed leaves none."""

    cause: Cause
    message: str
    step: int | None
    detail: str = ""


class Bad(Record, frozen=True):
    """The mark of a checkpoint that cannot be read: nobody takes it. All marks of a run lie in one folder to list."""

    why: str  # names the file
    by: str  # who found out: a run and its attempt, or a person
    at: float


class Step(Record, frozen=True):
    """One line of a progress chunk."""

    step: int  # updates done, this one included
    steps: int  # updates of the phase
    time: float  # seconds since the epoch, when the step ended
    images_per_second: float
    metrics: dict[str, float]  # loss terms by name, learning rate, health; only those due at this step
    note: str = ""  # for a person: "sealed 500", "skipped 3 images: ..."


class Watcher(Record, frozen=True):
    """A dinoctl process that keeps a run going. `every` is how often it looks: silent for much longer means gone."""

    host: str
    boot_id: str
    pid: int
    started: float
    command: str
    seen_at: float
    every: float


class ControllerJob(Record, frozen=True):
    """A job on the cluster that is to keep this run going, as the scheduler knows it."""

    job: str
    name: str
    submitted_at: float


def read_attempt(data: bytes, where: str) -> Attempt:
    """An attempt from the bytes of its YAML."""
    try:
        return msgspec.yaml.decode(data, type=Attempt)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ContractError(f"{where}: not an attempt that this version of dinoctl writes: {error}") from error


T = TypeVar("T", bound=Record)


def encode(record: Record) -> bytes:
    """The record as JSON, one line, for a file or a progress chunk."""
    return msgspec.json.encode(record)


def decode(data: bytes | str, kind: type[T], where: str) -> T:
    """The record that `data` holds. Raises ContractError naming `where` if it is torn or of another shape."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ContractError(f"{where}: not a {kind.__name__} that this version of dinoctl writes: {error}") from error


def seal_manifest(manifest: Manifest) -> bytes:
    """A manifest as it is published: its last field is the sha256 of the same JSON with that field empty."""
    return _with_sha256(encode(msgspec.structs.replace(manifest, sha256="")))


def _with_sha256(body: bytes) -> bytes:
    return body[: -len('"}')] + hashlib.sha256(body).hexdigest().encode() + b'"}'


_ITS_SHA256 = re.compile(rb'(?<=,"sha256":")[0-9a-f]{64}(?="}\Z)')


def read_manifest(data: bytes, names: Iterable[str], where: str) -> Manifest:
    """The manifest that `data` holds, without the parts that are gone on purpose. names: what lies in its folder,
    looked at after the manifest was read. Raises ContractError, also if any of it was altered: its checksum is looked
    at first (those of earlier versions have none)."""
    body = _ITS_SHA256.sub(b"", data)
    if body != data != _with_sha256(body):
        raise ContractError(f"{where}: it was altered: it is not what its own sha256 says")
    manifest = decode(body, Manifest, where)
    if manifest.sha256:
        raise ContractError(f"{where}: it was altered: its own sha256 is none")
    gone = kept.dropped(names)
    return msgspec.structs.replace(manifest, parts={part: f for part, f in manifest.parts.items() if part not in gone})


class ContractError(ValueError):
    """A file in a run directory is torn or was written by another version."""


EVALUATE = "evaluate"
"""The stage after the last phase. It has attempts like a phase, and no phase may take its name."""


def cache_dir() -> Path:
    """Where downloaded images are kept: $XDG_CACHE_HOME/dinoctl, or ~/.cache/dinoctl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoctl"


def data_folder(path: str) -> Path:
    """The folder that a spec's `data.path` means: `cache:NAME` lies in the cache, anything else is itself."""
    name = path.removeprefix("cache:")
    return Path(os.path.expanduser(path)) if name == path else cache_dir() / name


IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif"})
"""What counts as an image in a data folder, in lower case."""


def new_nonce() -> str:
    return os.urandom(8).hex()


def boot_id() -> str:
    """Tells one boot of a machine from the next: an old pid is never taken for a live process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def hostname() -> str:
    return socket.gethostname()


def now() -> float:
    """The wall clock, in one place so that a reader finds every use of it."""
    return time.time()
