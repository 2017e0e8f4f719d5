"""The ablations of jobs/ablations, their health in one picture and one table: `make ablations`.

Submits each job once (a run that is done already is not run again), writes runs/ablations.png with a line a job, and
prints as Markdown where each ended and what collapse the trainer named.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from tests.benchmarks import options as ask

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs" / "ablations"
CURVES = {
    "health/entropy": "teacher entropy (nats)",
    "health/kl": "KL of student to teacher (nats)",
    "health/prototypes_used": "share of prototypes in use",
    "health/effective_rank": "effective rank of the features",
}


@dataclass(frozen=True)
class Curve:
    """What one run said of its health, by step over all of its phases, and its last words about collapse."""

    steps: list[int]
    values: dict[str, list[float]]
    verdict: str


def submit(job: Path, runs: Path) -> Path:
    """Run the job, if it is not done, and return the run's directory."""
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "submit", str(job), "--runs", str(runs)]
    subprocess.run(command, cwd=ROOT, check=True)
    return runs / f"ablation-{job.stem}"


def read(run: Path) -> Curve:
    """The curve of a run. A step that two attempts trained is the later attempt's."""
    attempts = sorted((int(folder.name), folder) for folder in (run / "attempts").iterdir())
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    phases: list[str] = []
    for _, folder in attempts:
        phase = next(line for line in (folder / "attempt.yaml").read_text().splitlines() if line.startswith("phase:"))
        if phase not in phases:
            phases.append(phase)
        for chunk in sorted((folder / "progress").glob("*.jsonl")):
            for text in chunk.read_text().splitlines():
                line = json.loads(text)
                lines[phases.index(phase), line["step"]] = line
    before = [0]
    for number in range(len(phases)):
        before.append(before[-1] + max(step for at, step in lines if at == number))
    seen = {
        before[at] + step: lines[at, step]
        for at, step in sorted(lines)
        if CURVES.keys() <= lines[at, step]["metrics"].keys()
    }
    words = [part for line in lines.values() for part in line["note"].split("; ") if part.startswith("collapsed: ")]
    values = {name: [line["metrics"][name] for line in seen.values()] for name in CURVES}
    return Curve(list(seen), values, words[-1] if words else "no collapse")


def draw(curves: dict[str, Curve], to: Path) -> None:
    """A panel a metric, a line a job; the jobs of one version have one kind of line."""
    figure, panels = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    styles = {"v1": "-", "v2": "--", "v3": ":"}
    for panel, (name, title) in zip(panels.flat, CURVES.items(), strict=True):
        for job, curve in curves.items():
            panel.plot(curve.steps, curve.values[name], styles[job[:2]], label=job)
        panel.set_title(title)
        panel.set_xlabel("step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=120)


def table(curves: dict[str, Curve]) -> str:
    lines = ["| job | " + " | ".join(CURVES.values()) + " | verdict |", "|" + "---|" * (len(CURVES) + 2)]
    for job, curve in curves.items():
        ends = " | ".join(f"{curve.values[name][-1]:.3g}" for name in CURVES)
        lines.append(f"| {job} | {ends} | {curve.verdict} |")
    return "\n".join(lines)


def main(runs: Path) -> None:
    ask.parser(__doc__).parse_args()
    curves = {job.stem: read(submit(job, runs)) for job in sorted(JOBS.glob("*.yaml"))}
    draw(curves, runs / "ablations.png")
    print(table(curves))
    print(f"\n{runs / 'ablations.png'}")


if __name__ == "__main__":
    main(ROOT / "runs")
