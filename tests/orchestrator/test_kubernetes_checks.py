"""What `validate` remarks on and `submit` refuses of a job for a cluster of pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import cli, kubernetes_checks
from orchestrator.cluster import read_cluster
from orchestrator.problems import Problem, SpecError
from orchestrator.remarks import remarks
from orchestrator.spec import Job, read_job
from tests.orchestrator.pretend import tiny_code

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/orchestrator/valid.yaml"
IMAGE = "registry.example.org/worker@sha256:" + "a" * 64
SHARED = {"shared": {"path": "/shared", "claim": "shared", "here": True}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def profile(**section: Any) -> str:
    section = {"image": IMAGE, "grace_seconds": 120, **section}
    Path("pods.yaml").write_text(yaml.safe_dump({"name": "pods", "launcher": "kubernetes", "kubernetes": section}))
    return "cluster=./pods.yaml"


def read(*overrides: str, **section: Any) -> Job:
    return read_job(str(TINY), [profile(**section), "runs=s3://bucket/runs", "tracking.enabled=false", *overrides])


def wrong(*overrides: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        read(*overrides)
    return caught.value.problems


def refused(*overrides: str, runs: str = "s3://bucket/runs", **section: Any) -> list[Problem]:
    job = read(*overrides, **section)
    return kubernetes_checks.refusals(job, read_cluster(job.cluster), runs)


ON_SHARED = ("data.path=/shared/images", "data.also=[]")


# --- resources.kubernetes ---------------------------------------------------------------------------------------------


def test_what_a_job_says_to_kubernetes_is_looked_at_before_it_is_sent() -> None:
    assert read("resources.kubernetes={priority_class: high, node_selector: {zone: a}}")
    (unknown,) = wrong("phases.gram.resources.kubernetes={priority: high}")
    assert unknown.path == "phases.gram.resources.kubernetes.priority"
    assert "priority_class" in unknown.allowed + unknown.hint
    (memory,) = wrong("phases.gram.resources.kubernetes={memory: lots}")
    assert memory.path == "phases.gram.resources.kubernetes.memory"


@pytest.mark.parametrize("option", ["image: other", "poll_seconds: 1", "context: there"])
def test_what_is_the_clusters_no_job_says(option: str) -> None:
    (problem,) = wrong(f"phases.gram.resources.kubernetes={{{option}}}")
    assert problem.path == f"phases.gram.resources.kubernetes.{option.split(':')[0]}"
    assert "it is the cluster's" in problem.message
    assert "cluster=FILE.yaml" in problem.hint


def test_what_is_said_to_pods_is_nothing_to_another_cluster() -> None:
    job = read_job(str(TINY), ["phases.gram.resources.kubernetes={priority_class: high}"], check_data=False)
    said = [line for line in remarks(job, read_cluster("h100_slurm")) if "kubernetes" in line]
    assert said == ["phases.gram.resources.kubernetes: says nothing to cluster h100_slurm, whose launcher is slurm"]


# --- what pods see ----------------------------------------------------------------------------------------------------


def test_a_bucket_needs_nothing_and_a_folder_here_a_volume_that_is_here_too() -> None:
    assert refused(*ON_SHARED, volumes=SHARED) == []
    assert refused(*ON_SHARED, volumes=SHARED, runs="/shared/runs") == []
    (problem,) = refused(*ON_SHARED, volumes=SHARED, runs="/home/me/runs")
    assert (problem.path, problem.found) == ("runs", "/home/me/runs")
    assert problem.allowed.endswith(": /shared")
    for changed in ({"here": False}, {"read_only": True}):
        (problem,) = refused(*ON_SHARED, volumes={"shared": {**SHARED["shared"], **changed}}, runs="/shared/runs")
        assert "the profile has none" in problem.allowed
    (one_phase,) = refused(
        *ON_SHARED, "phases.gram.resources.kubernetes={volumes: {shared: {path: /shared, claim: mine}}}",
        volumes=SHARED, runs="/shared/runs",
    )  # fmt: skip
    assert one_phase.message.startswith("the pods of gram cannot write there")


def test_images_that_pods_do_not_have() -> None:
    found = refused("data.path=/home/me/images", "data.also=[]", volumes={"data": {"path": "/data", "nfs": "a:/b"}})
    assert {problem.path for problem in found} >= {"phases.pretrain.data.path", "phases.gram.data.path"}
    assert all(problem.allowed.endswith(": /data") for problem in found)
    cached = refused("data.path=cache:tuxpaint-stamps", "data.also=[]")
    assert "a cache is of one machine" in cached[0].found
    of_all = {"volumes": {"data": {"path": "/data", "nfs": "a:/b"}}, "env": {"XDG_CACHE_HOME": "/data/cache"}}
    assert refused("data.path=cache:tuxpaint-stamps", "data.also=[]", **of_all) == []
    assert refused("data.path=/data/images", "data.also=[]", volumes={"data": {"path": "/data", "nfs": "a:/b"}}) == []
    shards = "data.path=['/data/a-{00..99}.tar', /scratch/b.tar]"
    index = refused(shards, "data.also=[]", "evaluate=null", volumes={"data": {"path": "/data", "claim": "d"}})
    assert {problem.found for problem in index} == {"/scratch/b.tar: on this machine's disk"}


def test_weights_and_runs_that_pods_do_not_have(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    weights, teacher = f"{tmp_path}/w.safetensors", "phases.gram.gram_teacher=/other/run#pretrain@5"
    found = refused(*ON_SHARED, f"phases.pretrain.weights={weights}", teacher, volumes=SHARED)
    assert [(problem.path, problem.found) for problem in found] == [
        ("phases.pretrain.weights", f"{weights}: on this machine's disk"),
        ("phases.gram.gram_teacher", "/other/run: on this machine's disk"),
    ]


# --- the image, the controller, the grace -----------------------------------------------------------------------------


def test_an_image_by_its_tag_is_remarked_on_and_not_sent() -> None:
    (problem,) = refused(*ON_SHARED, volumes=SHARED, image="worker:latest")
    assert "could be moved to other code" in problem.message
    assert "worker:latest of pods" in problem.found
    assert refused(*ON_SHARED, volumes=SHARED, image="worker:dev", pull_policy="Never") == []
    job = read(*ON_SHARED, volumes=SHARED, image="worker:latest")
    (line,) = remarks(job, read_cluster(job.cluster))
    assert line.startswith("cluster: `submit` refuses it: the workers' image has no digest")


def test_a_controller_of_ones_own_is_a_deployment() -> None:
    (problem,) = refused(*ON_SHARED, "controller.on=cluster", volumes=SHARED)
    assert problem.path == "controller.on"
    assert "clusters/kubernetes/controller.yaml" in problem.hint


def test_a_grace_in_which_no_agent_could_say_how_it_ended() -> None:
    job = read(*ON_SHARED, "phases.gram.resources.kubernetes={grace_seconds: 35}", volumes=SHARED)
    (line,) = [line for line in remarks(job, read_cluster(job.cluster)) if "gram" in line]
    assert line.startswith("phases.gram.health.notice_seconds: with 30 s the pod may be killed before")
    assert "is to be 40 or more" in line


def test_submit_refuses_all_at_once_and_a_dry_run_only_remarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_code(tmp_path, monkeypatch)
    words = [str(TINY), profile(image="worker:latest"), "data.path=/home/me/images", "data.also=[]"]
    assert cli.main(["submit", *words, "controller.on=cluster", "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    for part in ("controller.on", "no digest", "cannot write there", "phases.gram.data.path: the pods cannot see it"):
        assert part in said
    assert not (tmp_path / "runs").exists()
    assert cli.main(["validate", *words]) == 0
    assert "`submit` refuses it: the pods cannot see it" in capsys.readouterr().err
