"""Data that is jumped over: asked for once, known to every attempt from then on, and as if the job had said so."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.jobs.harness import PATIENCE, Job, hold, part_of_tiny, same_weights, wait_until

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1800)]


def test_a_resume_that_jumps_over_data(make_job: Callable[..., Job]) -> None:
    folder = make_job().folder
    file = part_of_tiny(folder / "one.yaml", ("pretrain",))
    job, told = make_job(file=file), make_job(file=file, name="told")

    dinoctl = job.start(job.submit())
    moment = hold(job, "pretrain")
    dinoctl.send_signal(signal.SIGTERM)
    wait_until(moment.asked, "the agent to ask the ranks to stop")
    moment.let_go()
    assert dinoctl.wait(PATIENCE) == 130, job.output()
    at = job.end(1)["steps"][-1]

    dinoctl = job.start(job.on_the_run("resume", "--skip-data", "3"))
    moment = hold(job, "pretrain", at + 1)  # once more, after the jump
    moment.kill_rank(1)
    moment.let_go()
    assert dinoctl.wait(PATIENCE) == 0, job.output()
    assert f"jumping over 3 steps of data at step {at}" in job.output()
    assert job.final("pretrain")[0]["jumps"] == [[at, 3]]

    skip = f"phases.pretrain.data.skip=[{{at: {at}, steps: 3}}]"
    assert told.start(told.submit(skip)).wait(PATIENCE) == 0, told.output()
    same_weights(job, told, ("pretrain",))
