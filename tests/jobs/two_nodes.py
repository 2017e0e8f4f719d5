"""jobs/ci.yaml on two nodes of a real cluster, two processes each: what its runs on Slurm and on Kubernetes share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.jobs.harness import ROOT, Job, Moment, hold, wait_until

NODES = 3
"""Of the cluster, one more than an attempt takes: a node that failed is left out of the run's next attempts."""

EVERY = 5


def make_job(folder: Path, name: str, profile: Mapping[str, Any], environment: Mapping[str, str]) -> Job:
    """profile: of the cluster, without its name; environment: what reaches it."""
    (folder / "test.yaml").write_text(yaml.safe_dump({"name": "test", "gpus_per_node": 8, **profile}))
    return Job(folder, "", ROOT / "jobs" / "ci.yaml", name, environment=environment)


def submitted(job: Job, file: Path | None = None) -> list[str]:
    """The words of a submit; file: another than the job's."""
    layout = ["resources.nodes=2", "resources.processes_per_node=2", f"checkpoints.every={EVERY}"]
    return ["submit", str(file or job.file), "--run", job.name, "--cluster", str(job.folder / "test.yaml"), *layout]


def held(job: Job, phase: str, step: int) -> Moment:
    """Its four ranks, still once that step is sealed. The phase before it has a start of its own to be waited for."""
    wait_until(lambda: job.attempts(phase), f"{phase} to begin")
    return hold(job, phase, step, ranks=4, every=EVERY)


def repeated(job: Job, since: Moment) -> int:
    """Steps that the attempt had trained beyond what counts of it: they were trained again."""
    counts = max(job.end(since.attempt)["steps"])
    return sum(step > counts for step in job.steps(since.attempt))
