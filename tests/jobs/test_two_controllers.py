"""Two processes that keep one run going: what is launched is launched once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.jobs.harness import PATIENCE, Job, each_phase_ran_once, hold, kill_everything, part_of_tiny, wait_until

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1800)]

TWO = ("pretrain", "text")


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    """Two phases, so that there is a hand-over."""
    job = make_job()
    return make_job(file=part_of_tiny(job.folder / "two.yaml", TWO))


SUBMIT = ("phases.text.vision_tower=pretrain@final",)


def test_two_submits_of_one_spec_at_the_same_moment(job: Job) -> None:
    both = [job.start(job.submit(*SUBMIT)) for _ in range(2)]
    assert [dinoctl.wait(PATIENCE) for dinoctl in both] == [0, 0], job.output()
    job.no_process_is_left()
    assert len(job.events("RunCreated")) == 1
    assert [event["attempt"] for event in job.events("AttemptLaunched")] == [1, 2]
    each_phase_ran_once(job, TWO)
    # Both watched: each has said that it is over.
    assert job.output().count("run tiny is done") == 2
    assert job.output().count("is new") == 1


def test_two_ticks_at_once_take_up_a_run_that_everybody_left(job: Job) -> None:
    dinoctl = job.start(job.submit(*SUBMIT))
    moment = hold(job, "pretrain")
    kill_everything(job, dinoctl)
    ticks = [job.start(job.on_the_run("tick")) for _ in range(2)]
    assert [tick.wait(PATIENCE) for tick in ticks] == [0, 0], job.output()
    # From here on nobody watches: each agent's last act brings the run one step further.
    wait_until(lambda: job.status()["summary"]["status"] == "done", "the run to go on to its end", pause=1)
    job.no_process_is_left()
    assert job.end(moment.attempt)["cause"] == "vanished"
    each_phase_ran_once(job, TWO)
    assert (len(job.attempts("pretrain")), len(job.attempts("text"))) == (2, 1)
