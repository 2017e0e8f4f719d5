"""A real job in a folder of its own: what the job tests start, watch, strike and compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageDraw

from model import contract

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "jobs" / "tiny.yaml"


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


@dataclass(frozen=True)
class Job:
    """`dinoctl` on tests/jobs/tiny.yaml, run from `folder`, as run `name`."""

    folder: Path
    name: str = "tiny"

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.name

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "orchestrator.cli", *words]

    def submit_command(self, *overrides: str) -> list[str]:
        return self.command("submit", str(TINY), "--run", self.name, f"data.path={self.folder / 'images'}", *overrides)

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        log = (self.folder / f"{self.name}.out").open("a")
        # A session of its own, so that a signal for dinoctl reaches dinoctl alone.
        return subprocess.Popen(
            command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def run(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), cwd=self.folder, capture_output=True, text=True, timeout=timeout)

    def output(self) -> str:
        return (self.folder / f"{self.name}.out").read_text()

    def events(self) -> list[dict[str, Any]]:
        files = sorted((self.run_dir / contract.EVENTS_DIR).glob("*.json"))
        return [json.loads(file.read_bytes()) for file in files]

    def attempts(self, phase: str) -> list[int]:
        return [e["attempt"] for e in self.events() if e["event"] == "AttemptIntended" and e["phase"] == phase]

    def ends(self) -> dict[int, dict[str, Any]]:
        return {e["attempt"]: e for e in self.events() if e["event"] == "AttemptEnded"}

    def steps(self, attempt: int) -> list[int]:
        """The steps that an attempt's progress records show, in the order in which they were trained."""
        chunks = sorted((self.run_dir / contract.progress_dir(attempt)).glob("*.jsonl"))
        return [json.loads(line)["step"] for chunk in chunks for line in chunk.read_text().splitlines()]

    def sealed(self, phase: str) -> list[tuple[int, int]]:
        """(step, attempt) of every sealed checkpoint of a phase, ascending."""
        manifests = (self.run_dir / "checkpoints" / phase).glob("*/*/manifest.json")
        return sorted((int(m.parts[-2]), int(m.parts[-3])) for m in manifests)

    def manifest(self, phase: str, step: int, attempt: int) -> contract.Manifest:
        path = self.run_dir / contract.manifest_file(phase, attempt, step)
        return contract.decode(path.read_bytes(), contract.Manifest, str(path))

    def final(self, phase: str) -> dict[str, list[str]]:
        """Checksums of the last checkpoint of a phase, part by part: equal means equal bit for bit."""
        step, attempt = self.sealed(phase)[-1]
        parts = self.manifest(phase, step, attempt).parts
        return {part: [file.sha256 for file in files] for part, files in parts.items()}

    def live_processes(self) -> list[psutil.Process]:
        """Every process, zombies aside, that belongs to this run."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or [])
            if (
                str(self.run_dir) in words
                and process.info["status"] != psutil.STATUS_ZOMBIE
                and process.pid != os.getpid()
            ):
                found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        """The ranks: processes of model.train that are not torchrun."""
        return [
            p
            for p in self.live_processes()
            if "torch.distributed.run" not in " ".join(p.cmdline()) and "model.train" in " ".join(p.cmdline())
        ]


def wait_until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first truthy answer within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := true():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def kill_everything(job: Job, dinoctl: subprocess.Popen[str]) -> None:
    """As a power cut would: dinoctl, agent, torchrun and ranks by SIGKILL."""
    victims = job.live_processes()
    dinoctl.kill()
    for process in victims:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
