"""Runs that are struck, in every phase, after a sealed step and between two seals: they end with the same weights, bit
for bit, as the run that nobody disturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from model import contract
from tests.jobs.harness import (
    PATIENCE,
    Job,
    each_phase_ran_once,
    hold,
    kill_everything,
    same_weights,
    wait_until,
    went_on_exactly,
)

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1800)]

MakeJob = Callable[..., Job]


def evaluating(job: Job) -> int:
    """The pid of the evaluation's process, once it is at work."""
    wait_until(lambda: job.attempts(contract.EVALUATE), "the evaluation to be launched")
    name = job.events("AttemptIntended")[-1]["launch_name"]
    wait_until(contract.pulse_file(name, 0).exists, "the evaluation to be at work")
    return int(contract.pid_file(name, 0).read_text())


def test_stopped_interrupted_and_struck_by_single_kills(reference: Job, make_job: MakeJob) -> None:
    job = make_job()
    dinoctl = job.start(job.submit())

    # SIGTERM to dinoctl: sealed at the step at which the ranks agree to stop, and nothing is lost.
    pretrain = hold(job, "pretrain")
    dinoctl.send_signal(signal.SIGTERM)
    wait_until(pretrain.asked, "the agent to ask the ranks to stop")
    pretrain.let_go()
    assert dinoctl.wait(PATIENCE) == 130, job.output()
    end = job.end(pretrain.attempt)
    assert (end["cause"], end["reached"]) == ("stopped", end["steps"][-1])
    assert end["reached"] > pretrain.sealed
    assert job.status()["summary"]["status"] == "stopped"
    job.no_process_is_left()
    dinoctl = job.start(job.on_the_run("resume"))

    # kill -9 of one rank: noticed, and gone on from the last seal without anybody asked.
    gram = hold(job, "gram")
    gram.kill_rank(1)
    gram.let_go()

    # Ctrl-C twice: at once, without sealing.
    highres = hold(job, "highres")
    dinoctl.send_signal(signal.SIGINT)
    wait_until(lambda: len(job.events("StopRequested")) == 2, "the first Ctrl-C to be heeded")
    dinoctl.send_signal(signal.SIGINT)
    assert dinoctl.wait(PATIENCE) == 130, job.output()
    assert job.end(highres.attempt)["cause"] == "unsealed"
    job.no_process_is_left()
    dinoctl = job.start(job.submit())

    # kill -9 of the agent: its ranks die with it, and dinoctl launches the next attempt.
    text = hold(job, "text")
    os.kill(job.agent(text.attempt), signal.SIGKILL)

    # kill -9 in the evaluation, which begins again.
    os.kill(evaluating(job), signal.SIGKILL)

    assert dinoctl.wait(PATIENCE) == 0, job.output()
    job.no_process_is_left()
    assert job.end(gram.attempt)["cause"] == "killed"
    assert job.end(text.attempt)["cause"] == "vanished"
    assert [job.end(number)["cause"] for number in job.attempts(contract.EVALUATE)] == ["killed", "done"]
    each_phase_ran_once(job)
    for moment in (pretrain, gram, highres, text):
        assert len(job.attempts(moment.phase)) == 2
        went_on_exactly(job, moment.phase, moment)
    same_weights(job, reference)


def test_power_cuts_and_a_run_that_nobody_watches(reference: Job, make_job: MakeJob) -> None:
    job = make_job()
    dinoctl = job.start(job.submit())

    # kill -9 of everything, then the same submit.
    pretrain = hold(job, "pretrain", 12)
    kill_everything(job, dinoctl)
    assert job.status()["summary"]["watch"]["pid"] is None
    dinoctl = job.start(job.submit())

    # kill -9 of dinoctl alone: the run goes on into the next phase by itself, and status says that nobody watches.
    gram = hold(job, "gram")
    dinoctl.kill()
    dinoctl.wait(PATIENCE)
    gram.let_go()
    highres = hold(job, "highres")
    assert job.end(gram.attempt)["cause"] == "done"
    summary = job.status()["summary"]
    assert (summary["status"], summary["stage"], summary["watch"]["pid"]) == ("running", "highres", None)
    assert summary["watch"]["since"] is not None
    assert "nobody" in job.dinoctl(job.on_the_run("status")).stdout

    # kill -9 of the agent while nobody watches: the run stands still until somebody goes on with it.
    os.kill(job.agent(highres.attempt), signal.SIGKILL)
    job.no_process_is_left()
    assert job.attempts("highres") == [highres.attempt]
    dinoctl = job.start(job.on_the_run("resume"))

    # kill -9 of everything right after a seal, and once more in the evaluation.
    text = hold(job, "text", between=False)
    kill_everything(job, dinoctl)
    dinoctl = job.start(job.submit())
    evaluating(job)
    kill_everything(job, dinoctl)
    assert job.start(job.submit()).wait(PATIENCE) == 0, job.output()

    job.no_process_is_left()
    each_phase_ran_once(job)
    assert len(job.attempts("gram")) == 1
    for moment in (pretrain, highres, text):
        assert job.end(moment.attempt)["cause"] == "vanished"
        went_on_exactly(job, moment.phase, moment)
    same_weights(job, reference)
