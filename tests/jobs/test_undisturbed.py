"""The whole way through, left alone: what a run leaves behind, and that a second submit does nothing again."""

from __future__ import annotations

import json

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from model import contract
from tests.jobs.harness import PHASES, STAGES, Job, each_phase_ran_once, wait_until

pytestmark = [
    pytest.mark.jobs,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's own
]

STEPS = {"pretrain": 20, "gram": 14, "highres": 14, "text": 14}


def test_each_phase_is_one_attempt_that_takes_what_the_spec_says(reference: Job) -> None:
    each_phase_ran_once(reference)
    assert {phase: reference.attempts(phase) for phase in STAGES} == {p: [i + 1] for i, p in enumerate(STAGES)}
    for phase, steps in STEPS.items():
        assert reference.steps(reference.attempts(phase)[0]) == list(range(1, steps + 1))
    taken = {
        phase: {name: (ref.phase, ref.step) for name, ref in reference.attempt(number + 1).inputs.items()}
        for number, phase in enumerate(STAGES)
    }
    assert taken == {
        "pretrain": {},
        "gram": {"init": ("pretrain", 20), "gram_teacher": ("pretrain", 6)},
        "highres": {"weights": ("gram", 14), "gram_teacher": ("gram", 14)},
        "text": {"vision_tower": ("highres", 14)},
        "evaluate": {"backbone": ("highres", 14), "text": ("text", 14)},
    }
    reference.no_process_is_left()


def test_retention_keeps_what_later_phases_take(reference: Job) -> None:
    assert [step for step, _ in reference.sealed("pretrain")] == [6, 18, 20]
    assert [step for step, _ in reference.sealed("gram")] == [12, 14]


def test_the_report_is_shown_and_lies_in_the_run(reference: Job) -> None:
    report = json.loads((reference.run_dir / contract.REPORT_FILE).read_bytes())
    scores = [row["score"] for row in report["rows"]]
    assert len(scores) == 5
    assert not report["left_out"]
    for text in (*scores, "beats untrained", "is done"):
        assert text in reference.output()
    for picture in report["pictures"]:
        assert (reference.run_dir / picture).read_bytes().startswith(b"\x89PNG")
    assert len(report["pictures"]) == 2


def test_mlflow_has_one_parent_one_child_a_phase_and_metrics_at_their_steps(reference: Job) -> None:
    client = MlflowClient(f"sqlite:///{reference.runs}/mlflow.db")

    def runs() -> list[Run]:
        experiment = client.get_experiment_by_name("dinoctl")
        found = list(client.search_runs([experiment.experiment_id])) if experiment else []
        return found if found and all(run.info.status == "FINISHED" for run in found) else []

    # dinoctl waits only so long for the shipper, which goes on by itself.
    found: list[Run] = wait_until(runs, "everything to arrive in MLflow", pause=1)
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["dinoctl.phase"]: run for run in found if "mlflow.parentRunId" in run.data.tags}
    assert [run.info.run_name for run in parents] == ["reference"]
    parent = parents[0].info.run_id
    assert set(children) == set(STAGES)
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent}
    for phase in PHASES:
        (attempt,) = reference.attempts(phase)
        recorded = [(record.step, record.metrics["loss"]) for record in reference.records(attempt)]
        history = client.get_metric_history(children[phase].info.run_id, "loss")
        assert sorted((metric.step, metric.value) for metric in history) == recorded
    digest = reference.events("RunCreated")[0]["spec_digest"]
    local = client.download_artifacts(parent, f"spec-{digest[:8]}.yaml")
    with open(local) as file:
        assert yaml.safe_load(file) == reference.events("RunCreated")[0]["spec"]
    assert {f.path for f in client.list_artifacts(parent, "report")} >= {"report/pca.png", "report/attention.png"}


def test_a_second_submit_of_a_done_run_does_nothing_again(reference: Job) -> None:
    before = reference.events()
    again = reference.dinoctl(reference.submit("tracking.enabled=true"))
    assert again.returncode == 0, again.stdout
    assert "is done" in again.stdout
    assert reference.events() == before
