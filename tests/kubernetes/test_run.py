"""All phases of jobs/ci.yaml as pods on two real nodes, two processes each: preempted in each phase, a node killed, the
API server restarted, the controller killed. They end with the weights of a run that nobody disturbed, as JobSets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.dev.kubernetes import profile
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
from tests.kubernetes.cluster import Cluster, running

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.requires("kubernetes"),
    pytest.mark.requires("stamps"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """More patient with its nodes than the dev cluster is by itself: should a busy machine lose two, the run leaves
    them out from then on, and one is too few."""
    folder = tmp_path_factory.mktemp("kubernetes")
    with running(folder, nodes=NODES, real_nodes=True, node_grace=30, toleration=15) as cluster:
        yield cluster


def in_pods(folder: Path, cluster: Cluster, name: str, scheduler: str) -> Job:
    runs = folder / "runs"
    runs.mkdir()
    section = profile.section(runs, namespace="default", python=Path(sys.executable), owner=os.getuid())
    changed = {"scheduler": scheduler, "grace_seconds": 120}  # machines may be slow
    return make_job(folder, name, {"launcher": "kubernetes", "kubernetes": section | changed}, cluster.environment())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[Job]:
    job = in_pods(tmp_path_factory.mktemp("undisturbed"), cluster, "undisturbed", "jobset")
    with cleaned_up(job):
        assert job.start(submitted(job)).wait(3 * PATIENCE) == 0, job.output()
        yield job


def node_of(cluster: Cluster, job: Job, attempt: int, number: int) -> str:
    """Where the pod of that number of the attempt runs."""
    name = job.attempt(attempt).launch_name
    chosen = f"dinoctl/name={name},batch.kubernetes.io/job-completion-index={number}"
    return cluster.kubectl("get", "pod", "-l", chosen, "-o", "jsonpath={.items[0].spec.nodeName}")


def preempt(cluster: Cluster, job: Job, moment: Moment, number: int) -> None:
    """A pod of a higher priority takes a node away; the ranks, held still, then learn of it."""
    bully = cluster.preempt(node_of(cluster, job, moment.attempt, number), "default")
    wait_until(moment.asked, "an agent to be asked to stop")
    moment.let_go()
    wait_until(lambda: len(job.attempts(moment.phase)) > job.attempts(moment.phase).index(moment.attempt) + 1,
               "the next attempt")  # fmt: skip
    cluster.release(bully, "default")


def test_preempted_in_each_phase_a_node_the_api_server_and_the_controller_killed(
    cluster: Cluster, undisturbed: Job, tmp_path: Path
) -> None:
    with cleaned_up(in_pods(tmp_path, cluster, "ci", "indexed-job")) as job:
        dinoctl = job.start(submitted(job))
        preempted = [held(job, "pretrain", 5)]
        preempt(cluster, job, preempted[0], 0)

        moment = held(job, "pretrain", 10)
        dinoctl.kill()
        dinoctl.wait()
        moment.let_go()
        dinoctl = job.start(["resume", job.name])

        preempted.append(held(job, "gram", 5))
        preempt(cluster, job, preempted[-1], 1)
        preempted.append(held(job, "highres", 5))
        cluster.restart_apiserver()
        preempt(cluster, job, preempted[-1], 0)
        preempted.append(held(job, "text", 5))
        preempt(cluster, job, preempted[-1], 0)

        lost = held(job, "text", 10)
        node = node_of(cluster, job, lost.attempt, 1)
        cluster.kill_node(node)
        lost.let_go()
        assert dinoctl.wait(3 * PATIENCE) == 0, job.output()

        for moment in [*preempted, lost]:
            went_on_exactly(job, moment.phase, moment, EVERY)
        assert [repeated(job, moment) for moment in preempted] == [0] * len(PHASES)  # sealed where they stopped
        assert repeated(job, lost) < EVERY
        assert [job.end(moment.attempt)["cause"] for moment in preempted] == ["stopped"] * len(PHASES)
        assert job.end(lost.attempt)["bad_nodes"] == [node]
        assert job.attempt(job.attempts("text")[-1]).exclude == [node]
        each_phase_ran_once(job)
        same_weights(job, undisturbed)
