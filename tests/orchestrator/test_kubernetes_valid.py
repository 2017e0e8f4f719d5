"""What the API server would say to what is sent, and what is told before: without a server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from orchestrator.cluster import read_cluster
from orchestrator.problems import Problem, SpecError
from orchestrator.remarks import remarks
from orchestrator.spec import read_job
from tests.orchestrator.manifests import mistakes
from tests.orchestrator.test_kubernetes_render import BARE, FULL, JOBS, SCHEDULERS, objects, templates

POD_GROUPS = {"1.36": "v1alpha2", "1.37": "v1beta1"}
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]


def as_known(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is of Kubernetes' own kinds in it: a JobSet's Job, the pods of Volcano's."""
    found = []
    for one in made:
        match one["kind"], one["apiVersion"]:
            case "JobSet", _:
                (inner,) = one["spec"]["replicatedJobs"]
                job = {"apiVersion": "batch/v1", "kind": "Job", **inner["template"]}
                job["metadata"] = {**job["metadata"], "name": f"{one['metadata']['name']}-node-0"}
                found.append(job)
            case _, "batch.volcano.sh/v1alpha1":
                name = one["metadata"]["name"]
                for number, template in enumerate(templates(one)):
                    meta = {**template["metadata"], "name": f"{name}-node-{number}-0"}
                    found.append({"apiVersion": "v1", "kind": "Pod", **template, "metadata": meta})
            case _:
                found.append(one)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_it(version: str, tmp_path: Path) -> None:
    jobs = [
        *objects(tmp_path / "bare", BARE), *objects(tmp_path / "full", FULL, nodes=2, minutes=60, exclude=["n9"]),
        *as_known(objects(tmp_path / "set", FULL, "jobset", nodes=2)),
        *as_known(objects(tmp_path / "volcano", FULL, "volcano")),
    ]  # fmt: skip
    if version in POD_GROUPS:
        jobs = [*objects(tmp_path / "group", {**FULL, "pod_group_api": POD_GROUPS[version]}, "pod-group"), *jobs]
    for one in jobs:
        assert kubernetes_validate.validate(one, version, strict=True) == version
    broken = copy.deepcopy(jobs[-1])
    broken["spec"]["containers"][0]["securityContext"]["privilegd"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="privilegd"):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("section", [BARE, FULL], ids=["bare", "full"])
def test_what_schemas_miss(section: dict[str, Any], scheduler: str, tmp_path: Path) -> None:
    made = objects(tmp_path / "run", section, scheduler, nodes=32, exclude=["n9"], minutes=60)
    assert [mistake for one in [*made, *as_known(made)] for mistake in mistakes(one)] == []


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda job: job["metadata"].update(name="Big"), "name Big"),
        (lambda job: job["metadata"]["labels"].update({"dinoctl/name": "a" * 64}), "labels"),
        (lambda job: job["spec"]["template"]["spec"].update(restartPolicy="Sometimes"), "restartPolicy"),
        (lambda job: job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"].append(0), "codes"),
        (lambda job: job["spec"]["template"]["spec"]["volumes"][0].update(name="other"), "mounted"),
        (lambda job: container_of(job)["env"].reverse(), "before DINOCTL_NODE"),
        (lambda job: container_of(job)["resources"]["limits"].update({"nvidia.com/gpu": "3"}), "alike"),
        (lambda job: container_of(job)["resources"]["requests"].update(cpu="many"), "cpu: many"),
        (lambda job: container_of(job).update(name="other"), "no container agent"),
    ],
)
def test_the_checks_of_what_schemas_miss_find_it(
    breaks: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    job = copy.deepcopy(objects(tmp_path / "run", BARE)[-1])
    breaks(job)
    assert any(says in mistake for mistake in mistakes(job))


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    return container


# --- what is refused --------------------------------------------------------------------------------------------------


def problems(*overrides: str, file: str = "demo.yaml", cluster: str = "h100_kubernetes") -> tuple[Problem, ...]:
    with pytest.raises(SpecError) as refused:
        read_job(str(JOBS / file), [f"cluster={cluster}", *overrides], check_data=False)
    return refused.value.problems


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{env: {DINOCTL_NODE: '1'}}", "DINOCTL_NODE is set by dinoctl"),
        ("{env: {'9': x}}", "'9' is not a variable's name"),
        ("{env: {A: x}, secret_env: {A: s/k}}", "A is in env and in secret_env"),
        ("{secret_env: {A: hunter2}}", "never the secret itself"),
        ("{labels: {dinoctl/name: x}}", "dinoctl/name is set by dinoctl or by Kubernetes"),
        ("{labels: {team: not so}}", "'not so' is not a label's value"),
        ("{extra_resources: {rdma/hca: one}}", "'one' is not an amount"),
        ("{memory: 4GB}", "'4GB' is not an amount"),
        ("{namespace: Mine}", "'Mine' is not a name"),
        ("{together: a rack}", "'a rack' is not a label's name"),
        ("{image: two words}", "'two words' is not an image"),
        ("{volumes: {A: {path: /a, claim: a}}}", "'A' is not a volume's name"),
        ("{volumes: {a: {path: /a, claim: a}, b: {path: /a/, claim: b}}}", "two volumes at /a"),
        ("{volumes: {a: {path: /a, claim: a, nfs: b:/c}}}", "and not 2"),
        ("{tolerations: [{key: a, value: b}]}", "a value is for operator: Equal"),
        ("{capabilities: [IPC_LOCK]}", "capabilities are for run_as_user: 0"),
    ],
)
def test_what_the_api_server_would_refuse_is_told_before(section: str, words: str) -> None:
    found = problems(f"resources.kubernetes={section}")
    assert any(words in problem.message for problem in found), found
    assert {problem.path.split("[")[0].startswith("resources.kubernetes") for problem in found} == {True}


def test_an_unknown_key_is_told_with_its_path_and_what_was_meant() -> None:
    (problem,) = problems("phases.gram.resources.kubernetes={namespce: mine}", file="v3_7b.yaml")
    assert problem.path == "phases.gram.resources.kubernetes.namespce"
    assert "did you mean namespace" in problem.hint
    (problem,) = problems("resources.kubernetes={namespce: mine}", cluster="local")
    assert "did you mean namespace" in problem.hint


def test_a_time_limit_that_the_grace_uses_up() -> None:
    (problem,) = problems("resources.time_limit_minutes=2")
    assert problem.path == "resources.time_limit_minutes"
    assert "of which 120 s are for stopping" in problem.found
    assert problem.allowed == "3 or more"


def test_elsewhere_it_says_nothing_and_that_is_said() -> None:
    job = read_job(str(JOBS / "demo.yaml"), ["resources.kubernetes={namespace: mine}"], check_data=False)
    (line,) = [line for line in remarks(job, read_cluster("local")) if "kubernetes" in line]
    assert "says nothing to cluster local, whose launcher is local" in line
    assert not [line for line in remarks(job, read_cluster("h100_kubernetes")) if "says nothing" in line]
