"""All phases of jobs/ci.yaml on two nodes of two processes of a real Slurm: preempted in each phase, one node killed,
the controller killed. They end with the weights of a run on the same layout that nobody disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.jobs.harness import (
    PATIENCE,
    PHASES,
    Job,
    Moment,
    cleaned_up,
    each_phase_ran_once,
    same_weights,
    wait_until,
    went_on_exactly,
)
from tests.jobs.two_nodes import EVERY, NODES, held, make_job, repeated, submitted
from tests.slurm.cluster import Cluster, running

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.requires("slurm"),
    pytest.mark.requires("stamps"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm"), nodes=NODES) as cluster:
        yield cluster


def on_slurm(folder: Path, cluster: Cluster, name: str) -> Job:
    profile = {"launcher": "slurm", "slurm": {"partition": "low"}}
    return make_job(folder, name, profile, cluster.environment())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[Job]:
    job = on_slurm(tmp_path_factory.mktemp("undisturbed"), cluster, "undisturbed")
    with cleaned_up(job):
        assert job.start(submitted(job)).wait(3 * PATIENCE) == 0, job.output()
        yield job


def at_work(cluster: Cluster) -> str:
    """The nodes of the job that runs, as Slurm writes them: node[1-2]."""
    return cluster.run("squeue", "--noheader", "--states=R", "--partition=low", "--format=%N").split()[0]


def preempt(cluster: Cluster, job: Job, moment: Moment) -> None:
    """A job of a partition with a higher priority takes the nodes away; the ranks, held still, then learn of it. They
    may still pass a save: who wants to hold the next attempt has to wait for it."""
    words = ("--partition=high", "--exclusive", f"--nodelist={at_work(cluster)}", "--output=/dev/null")
    cluster.run("sbatch", *words, "--wrap=sleep 1")
    wait_until(moment.asked, "an agent to be asked to stop")
    moment.let_go()
    wait_until(lambda: job.attempts(moment.phase)[-1] != moment.attempt, "the next attempt")


def test_preempted_in_each_phase_a_node_and_the_controller_killed(
    cluster: Cluster, undisturbed: Job, tmp_path: Path
) -> None:
    with cleaned_up(on_slurm(tmp_path, cluster, "ci")) as job:
        dinoctl = job.start(submitted(job))
        preempted = [held(job, "pretrain", 5)]
        preempt(cluster, job, preempted[0])

        moment = held(job, "pretrain", 10)
        dinoctl.kill()
        dinoctl.wait()
        moment.let_go()
        preempted.append(held(job, "gram", 5))  # begun by the agent's last act: no other process of ours was there
        preempt(cluster, job, preempted[-1])  # its next attempt begins though nobody watches
        dinoctl = job.start(["resume", job.name])

        preempted.append(held(job, "highres", 5))
        preempt(cluster, job, preempted[-1])
        preempted.append(held(job, "text", 5))
        preempt(cluster, job, preempted[-1])

        lost = held(job, "text", 10)
        node = cluster.run("scontrol", "show", "hostnames", at_work(cluster)).split()[-1]  # not that of rank 0
        cluster.kill_node(node)
        lost.let_go()
        assert dinoctl.wait(2 * PATIENCE) == 0, job.output()

        for moment in [*preempted, lost]:
            went_on_exactly(job, moment.phase, moment, EVERY)
        assert [repeated(job, moment) for moment in preempted] == [0] * len(PHASES)  # sealed where they stopped
        assert repeated(job, lost) < EVERY
        assert [job.end(moment.attempt)["cause"] for moment in preempted] == ["stopped"] * len(PHASES)
        assert job.end(lost.attempt)["bad_nodes"] == [node]
        assert job.attempt(job.attempts("text")[-1]).exclude == [node]
        each_phase_ran_once(job)
        same_weights(job, undisturbed)


def test_after_a_lost_node_it_goes_on_with_those_that_are_left(
    tmp_path: Path, short_path: Path, undisturbed: Job
) -> None:
    with running(short_path, nodes=2) as cluster, cleaned_up(on_slurm(tmp_path, cluster, "fewer")) as job:
        spec = yaml.safe_load(job.file.read_text())
        spec["phases"] = {"pretrain": spec["phases"]["pretrain"]}
        del spec["evaluate"]
        file = tmp_path / "pretrain.yaml"
        file.write_text(yaml.safe_dump(spec, sort_keys=False))
        dinoctl = job.start([*submitted(job, file), "resources.min_nodes=1"])
        lost = held(job, "pretrain", 5)
        cluster.kill_node("node2")
        lost.let_go()
        assert dinoctl.wait(2 * PATIENCE) == 0, job.output()

        assert [job.attempt(number).nodes for number in job.attempts("pretrain")] == [2, 1]
        went_on_exactly(job, "pretrain", lost, EVERY)
        assert repeated(job, lost) < EVERY
        losses = [one.records(one.attempts("pretrain")[-1])[-1].metrics["loss"] for one in (job, undisturbed)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the same global batch, summed in another order
