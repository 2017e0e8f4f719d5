"""A real job in a folder of its own: what the job tests start, watch, strike and compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image, ImageDraw

from model import contract, storage
from orchestrator import logs

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "jobs" / "tiny.yaml"
PHASES = ("pretrain", "gram", "highres", "text")
STAGES = (*PHASES, contract.EVALUATE)
EVERY = 6
"""`checkpoints.every` of tiny.yaml."""

PATIENCE = 240.0
"""Seconds for anything that a test waits for: a start takes four on a quiet machine, and machines are not."""


def draw_images(folder: Path, count: int = 60) -> None:
    """Shapes on transparent ground, three categories, each with a caption and an alpha mask: real PNG files."""
    rng = np.random.default_rng(0)
    shapes: dict[str, Callable[[ImageDraw.ImageDraw, tuple[int, int, int, int], Any], None]] = {
        "circles": lambda d, box, fill: d.ellipse(box, fill=fill),
        "squares": lambda d, box, fill: d.rectangle(box, fill=fill),
        "triangles": lambda d, box, fill: d.polygon([(box[0], box[3]), (box[2], box[3]), (box[2], box[1])], fill=fill),
    }
    for number in range(count):
        name = list(shapes)[number % 3]
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        left, top = (int(v) for v in rng.integers(2, 24, 2))
        right, bottom = left + int(rng.integers(18, 36)), top + int(rng.integers(18, 36))
        fill = (*(int(v) for v in rng.integers(0, 255, 3)), 255)
        shapes[name](ImageDraw.Draw(image), (left, top, right, bottom), fill)
        noise = np.asarray(image).copy()
        noise[..., :3] = np.clip(noise[..., :3] + rng.integers(-30, 30, (64, 64, 3)), 0, 255)
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(folder / name / f"{number:03d}.png")
        (folder / name / f"{number:03d}.txt").write_text(f"one of the {name}, number {number}\n")


def part_of_tiny(file: Path, phases: Sequence[str], **settings: Any) -> Path:
    """tiny.yaml with these phases only and no evaluation, in `file`. settings: laid over the top."""
    spec = yaml.safe_load(TINY.read_text())
    spec["phases"] = {name: spec["phases"][name] for name in phases}
    del spec["evaluate"]
    file.write_text(yaml.safe_dump({**spec, **settings}, sort_keys=False))
    return file


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """`dinoctl` on the spec `file`, called in `folder`, as run `name` in `folder`/runs, or in `bucket` (s3://...)."""

    folder: Path
    images: Path | str  # a folder, or tar shards
    file: Path = TINY
    name: str = "tiny"
    environment: Mapping[str, str] = field(default_factory=dict)
    bucket: str = ""
    started: list[subprocess.Popen[str]] = field(default_factory=list, compare=False)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run_dir(self) -> Path:
        return self.runs / self.name

    @property
    def where(self) -> str:
        """The run's directory, wherever it is."""
        return f"{self.bucket}/{self.name}" if self.bucket else str(self.run_dir)

    # dinoctl

    def submit(self, *words: str) -> list[str]:
        """The words of a submit; data.path comes last, so that `words` may be options and overrides."""
        return ["submit", str(self.file), "--run", self.name, *words, f"data.path={self.images}"]

    def on_the_run(self, command: str, *words: str) -> list[str]:
        return [command, self.name, *words]

    def start(self, words: list[str], **popen: Any) -> subprocess.Popen[str]:
        """dinoctl in a session of its own, so that a signal for it reaches it alone. Its output goes to `output`."""
        with (self.folder / f"{self.name}.out").open("a") as log:
            dinoctl = subprocess.Popen(
                self._command(words), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, text=True, start_new_session=True, env=self._environment(), **popen,
            )  # fmt: skip
        self.started.append(dinoctl)
        return dinoctl

    def dinoctl(self, words: list[str], **popen: Any) -> subprocess.CompletedProcess[str]:
        """dinoctl to its end; stdout and stderr in one."""
        return subprocess.run(
            self._command(words), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, env=self._environment(), **popen,
        )  # fmt: skip

    def _command(self, words: list[str]) -> list[str]:
        return [sys.executable, "-P", "-m", "orchestrator.cli", *words, "--runs", self.bucket or str(self.runs)]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def output(self) -> str:
        return (self.folder / f"{self.name}.out").read_text()

    def status(self) -> dict[str, Any]:
        shown = self.dinoctl(self.on_the_run("status", "--json"))
        assert shown.returncode == 0, shown.stdout
        status: dict[str, Any] = json.loads(shown.stdout)
        return status

    # its directory

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """The log, or those of its events that are of one kind."""
        folder = f"{self.where}/{contract.EVENTS_DIR}"
        files = storage.read_many([f"{folder}/{name}" for name in storage.names(folder) if name[0].isdigit()])
        return [event for event in map(json.loads, files) if kind in ("", event["event"])]

    def attempts(self, phase: str) -> list[int]:
        return [e["attempt"] for e in self.events("AttemptIntended") if e["phase"] == phase]

    def attempt(self, number: int) -> contract.Attempt:
        path = f"{self.where}/{contract.attempt_yaml(number)}"
        return contract.read_attempt(storage.read(path), path)

    def end(self, number: int) -> dict[str, Any]:
        return next(e for e in self.events("AttemptEnded") if e["attempt"] == number)

    def records(self, attempt: int) -> list[contract.Step]:
        """What an attempt's progress says, in the order in which it was trained."""
        folder = f"{self.where}/{contract.progress_dir(attempt)}"
        chunks = storage.read_many([f"{folder}/{name}" for name in storage.names(folder)])
        return [contract.decode(line, contract.Step, folder) for chunk in chunks for line in chunk.splitlines()]

    def steps(self, attempt: int) -> list[int]:
        return [record.step for record in self.records(attempt)]

    def log(self, attempt: int, rank: int = 0) -> str:
        return logs.read(f"{self.where}/{contract.rank_log(attempt, rank)}").decode()

    def sealed(self, phase: str) -> list[tuple[int, int]]:
        """(step, attempt) of every sealed checkpoint of a phase, ascending."""
        folder = f"{self.where}/checkpoints/{phase}"
        steps = [(int(step), int(by)) for by in storage.names(folder) for step in storage.names(f"{folder}/{by}")]
        return sorted((step, by) for step, by in steps if storage.exists(f"{folder}/{by}/{step}/manifest.json"))

    def manifest(self, phase: str, attempt: int, step: int) -> contract.Manifest:
        path = f"{self.where}/{contract.manifest_file(phase, attempt, step)}"
        return contract.read_manifest(storage.read(path), (), path)

    def final(self, phase: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The last checkpoint of a phase: its loop, and the checksums of all its parts. Equal means bit for bit."""
        step, attempt = self.sealed(phase)[-1]
        manifest = self.manifest(phase, attempt, step)
        return manifest.loop, {part: [file.sha256 for file in files] for part, files in manifest.parts.items()}

    # its processes

    def ranks(self, attempt: int) -> list[psutil.Process]:
        """The ranks of an attempt in their order, as far as they have begun, on whichever node or in whichever pod of
        this machine."""
        own = f"{self.where}/{contract.attempt_yaml(attempt)}"
        seen = psutil.process_iter(["cmdline", "ppid"])
        there = {p.pid: p for p in seen if (p.info["cmdline"] or [])[-1:] == [own]}  # a zombie has none
        started = [p for p in there.values() if "model.rank" in p.info["cmdline"][:6] and p.info["ppid"] in there]
        ranks = [p for p in started if "model.rank" not in there[p.info["ppid"]].info["cmdline"][:6]]  # no loader's
        return sorted(ranks, key=lambda rank: int(rank.environ().get("RANK", "0")))

    def processes(self) -> list[psutil.Process]:
        """Every process, zombies aside, that belongs to this run or to its dinoctl; not what brings it to MLflow."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or [])
            ours = (
                (self.bucket or str(self.runs)) in words
                and "orchestrator.tracking" not in words
                and process.pid != os.getpid()
            )
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def no_process_is_left(self) -> None:
        """Now or soon: the agent's last act, a tick, ends by itself."""
        wait_until(lambda: not self.processes(), "the run's processes to be gone")

    def agent(self, attempt: int) -> int:
        """The pid of an attempt's agent."""
        launched = next(e for e in self.events("AttemptLaunched") if e["attempt"] == attempt)
        return int(launched["handle"]["pid"])


def wait_until(true: Callable[[], Any], what: str, seconds: float = PATIENCE, pause: float = 0.02) -> Any:
    """The first truthy answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := true():
            return answer
        time.sleep(pause)
    raise AssertionError(f"not within {seconds:g} s: {what}")


# --- striking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Ranks held still. sealed: the newest sealed step; anything that was trained since would be lost by a kill."""

    phase: str
    attempt: int
    sealed: int
    ranks: tuple[int, ...]
    scratch: tuple[Path, ...]

    def kill_rank(self, rank: int) -> None:
        os.kill(self.ranks[rank], signal.SIGKILL)

    def asked(self) -> bool:
        """Whether an agent has passed on a request to stop."""
        return any((folder / "stop").exists() for folder in self.scratch)

    def let_go(self) -> None:
        for pid in self.ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def hold(
    job: Job, phase: str, step: int = EVERY, *, between: bool = True, ranks: int = 2, every: int = EVERY
) -> Moment:
    """Wait until the phase's newest attempt has sealed `step` or a later one, then stop its ranks in their tracks.

    between: only once steps were trained since the last seal, so that a strike has something to destroy. Not by
    counting steps, which a busy machine gets wrong: the pulse of a step is younger than the last seal.
    And not while the next save (`every` steps later) can be seen to be under way beside training.
    """

    def sealed_by_the_newest() -> dict[str, Any] | None:
        sealed = [by for at, by in job.sealed(phase) if at >= step]
        newest = job.events("AttemptIntended")[-1] if sealed else None
        return newest if newest is not None and newest["attempt"] in sealed else None

    intent = wait_until(sealed_by_the_newest, f"{phase}@{step} to be sealed", pause=0.001)
    processes = job.ranks(intent["attempt"])
    assert len(processes) == ranks
    pids = tuple(process.pid for process in processes)
    scratch = tuple(scratch_of(process, intent["launch_name"]) for process in processes)
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(psutil.Process(p).status() == psutil.STATUS_STOPPED for p in pids), "the ranks to halt")
        sealed, attempt = job.sealed(phase)[-1]
        moment = Moment(phase, intent["attempt"], sealed, pids, scratch)
        pulse = max(file.stat().st_mtime for folder in scratch for file in folder.glob("pulse-0"))
        trained = pulse > job.manifest(phase, attempt, sealed).sealed_at
        following = f"{job.where}/{contract.checkpoint_dir(phase, attempt, sealed + every)}"
        if not between or (trained and not storage.names(following)):
            return moment
        moment.let_go()
        time.sleep(0.005)


def scratch_of(rank: psutil.Process, launch_name: str) -> Path:
    """The folder of an attempt on the node of a rank, which may have a disk of its own; gone with the rank."""
    folder = Path(rank.environ().get("TMPDIR", "/tmp")) / contract.scratch_dir(launch_name).relative_to(
        tempfile.gettempdir()
    )
    return Path(f"/proc/{rank.pid}/root") / folder.relative_to("/")


def kill_everything(job: Job, dinoctl: subprocess.Popen[str]) -> None:
    """As a power cut would: dinoctl, agent, torchrun and ranks by SIGKILL."""
    for process in job.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    dinoctl.wait(PATIENCE)
    job.no_process_is_left()


@contextmanager
def cleaned_up(job: Job) -> Iterator[Job]:
    """A failure says how far the run came, and whatever a test that failed has left running is ended."""
    try:
        yield job
    except BaseException as error:
        error.add_note(_how_far(job))
        raise
    finally:
        for process in job.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for dinoctl in job.started:
            dinoctl.kill()
            dinoctl.wait()


def _how_far(job: Job) -> str:
    """What its dinoctl said, when what happened, and the end of the log that its newest attempt has."""
    parts = [job.output()] if job.started else ["dinoctl was not started"]
    with suppress(Exception):  # the failure itself is what counts
        parts += [f"{e.get('at', 0):.1f} {e['event']} {e.get('phase', '')} {e.get('cause', '')}" for e in job.events()]
        parts += job.log(job.events("AttemptIntended")[-1]["attempt"]).splitlines()[-40:]
    return "\n".join(parts)


# --- comparing --------------------------------------------------------------------------------------------------------


def went_on_exactly(job: Job, phase: str, since: Moment, every: int = EVERY) -> None:
    """The attempt after `since` began with the step after the last sealed one, and nobody trained more again: of the
    saves that had fallen due at most one was lost, that which was under way."""
    following = job.attempt(next(number for number in job.attempts(phase) if number > since.attempt))
    resumed = following.resume[0].step
    assert resumed == max(job.end(since.attempt)["steps"]) >= since.sealed
    assert job.steps(following.attempt)[0] == resumed + 1
    repeated = [step for step in job.steps(since.attempt) if step > resumed]
    assert len(repeated) < 2 * every


def each_phase_ran_once(job: Job, stages: Sequence[str] = STAGES) -> None:
    """One phase after the other: none again that was over, no attempt launched twice, and every step trained."""
    intended = [event["phase"] for event in job.events("AttemptIntended")]
    assert [name for at, name in enumerate(intended) if at == 0 or intended[at - 1] != name] == list(stages)
    launched = [event["attempt"] for event in job.events("AttemptLaunched")]
    assert len(launched) == len(set(launched))
    for phase in stages:
        if phase != contract.EVALUATE:
            ends = [job.end(number) for number in job.attempts(phase)]
            assert [end["cause"] == "done" for end in ends] == [False] * (len(ends) - 1) + [True]


def same_weights(job: Job, reference: Job, phases: Sequence[str] = PHASES) -> None:
    """Every part of every phase's last checkpoint, optimizer and loop included, is the undisturbed run's."""
    digests = {one.events("RunCreated")[0]["code_digest"] for one in (job, reference)}
    assert len(digests) == 1, "somebody edited model/ while the tests ran: nothing can be compared"
    for phase in phases:
        assert job.final(phase) == reference.final(phase), phase
