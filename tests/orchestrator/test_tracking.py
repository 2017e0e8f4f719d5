"""The MLflow shipper against real stores: SQLite, and a real server that is down first."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from model import storage
from model.contract import Cause
from orchestrator import events, shipper, tracking
from tests.orchestrator.written import SPEC, Run, row

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tracking.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: its fifty migrations take a second each time."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def runs(tmp_path: Path, empty_database: Path) -> Path:
    """A folder of runs whose database is there."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def points(mlflow: Any, run: str, key: str = "loss") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in mlflow.get_metric_history(run, key))


def shipped(mlflow: Any) -> dict[str, Any]:
    """MLflow's runs by the phase they are tagged with; the parent is ''."""
    experiment = mlflow.get_experiment_by_name("tests")
    runs = mlflow.search_runs([experiment.experiment_id])
    by_phase = {run.data.tags[shipper.PHASE_TAG]: run for run in runs}
    assert len(by_phase) == len(runs), "a run was made twice"
    return by_phase


def test_one_parent_one_child_a_phase_and_nothing_twice(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0, 2: 5.0, 3: 4.0})
    assert tracking.ship(run.path) == tracking.Pass(sent=3, over=False)
    mlflow = client(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert {phase: r.info.status for phase, r in shipped(mlflow).items()} == {"": "RUNNING", "pretrain": "RUNNING"}

    run.end(1, Cause.KILLED, [2])
    run.launch(2, "pretrain")
    run.record(2, 0, {3: 4.0, 4: 3.0, 5: 2.0, 6: 1.0})
    run.end(2, Cause.DONE, [4, 6])
    run.launch(3, "gram")
    run.record(3, 0, {1: 9.0})
    run.report(row("recall@1", trained=3.0))
    assert tracking.ship(run.path).sent == 5
    assert tracking.ship(run.path).sent == 0
    storage.remove(f"{run.path}/tracking/ledger.json")
    assert tracking.ship(run.path).error == ""

    runs = shipped(mlflow)
    assert set(runs) == {"", "pretrain", "gram"}
    assert runs["pretrain"].data.tags["mlflow.parentRunId"] == runs[""].info.run_id
    assert runs["pretrain"].info.status == "FINISHED"
    assert runs[""].data.tags[shipper.RUN_TAG] == "ab" * 16
    assert runs[""].data.tags["dinoctl.code_digest"] == "c" * 64
    assert runs[""].data.params["seed"] == "0"
    assert runs["pretrain"].data.params["optim.lr.peak"] == "0.001"
    assert points(mlflow, runs["pretrain"].info.run_id) == [(1, 6), (2, 5), (3, 4), (4, 3), (5, 2), (6, 1)]
    assert points(mlflow, runs["gram"].info.run_id) == [(1, 9)]
    assert runs[""].data.metrics["recall-1/trained"] == 3.0


def test_artifacts_lie_beside_the_database(runs: Path) -> None:
    run = Run(runs / "tiny")
    run.launch(1, "pretrain")
    run.report()
    assert tracking.ship(run.path).error == ""
    names = {path.name for path in (runs / "mlflow-artifacts").rglob("*") if path.is_file()}
    assert names == {"spec-dddddddd.yaml", "report.json", "report.txt", "pca.png"}


def test_a_step_that_came_out_differently_is_sent_again_and_counts(runs: Path) -> None:
    run = Run(runs / "tiny")
    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0, 2: 5.0})
    tracking.ship(run.path)
    run.end(1, Cause.KILLED, [1])
    run.launch(2, "pretrain")
    run.record(2, 0, {2: 4.5})
    tracking.ship(run.path)
    mlflow = client(f"sqlite:///{runs}/mlflow.db")
    pretrain = shipped(mlflow)["pretrain"]
    assert points(mlflow, pretrain.info.run_id) == [(1, 6.0), (2, 4.5), (2, 5.0)]
    assert pretrain.data.metrics["loss"] == 4.5


def test_an_amended_spec_is_an_artifact_of_its_own(runs: Path) -> None:
    run = Run(runs / "tiny")
    run.launch(1, "pretrain")
    tracking.ship(run.path)
    spec = {**SPEC, "seed": 1}
    run.add(events.SpecAmended, spec=spec, cluster={}, spec_digest="e" * 64, changed=["seed"])
    assert tracking.ship(run.path).error == ""
    parent = shipped(client(f"sqlite:///{runs}/mlflow.db"))[""]
    assert parent.data.params["seed"] == "0"
    assert parent.data.tags["dinoctl.spec_digest"] == "e" * 64


def test_what_was_deleted_over_there_is_sent_again(runs: Path) -> None:
    run = Run(runs / "tiny")
    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0})
    tracking.ship(run.path)
    mlflow = client(f"sqlite:///{runs}/mlflow.db")
    for old in shipped(mlflow).values():
        mlflow.delete_run(old.info.run_id)
    assert tracking.ship(run.path).sent == 1
    assert points(mlflow, shipped(mlflow)["pretrain"].info.run_id) == [(1, 6.0)]


def test_a_run_that_is_over_says_so(runs: Path) -> None:
    run = Run(runs / "tiny")
    run.launch(1, "pretrain")
    run.end(1, Cause.DIVERGED, [])
    run.add(events.RunFailed, cause=Cause.DIVERGED, message="")
    assert tracking.ship(run.path).over
    sent = shipped(client(f"sqlite:///{runs}/mlflow.db"))
    assert {r.info.status for r in sent.values()} == {"FAILED"}


def test_a_server_that_is_down_is_an_answer(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny", uri=f"http://127.0.0.1:{free_port()}")
    result = tracking.ship(run.path)
    assert result.error
    assert not result.over


def test_no_run_there(tmp_path: Path) -> None:
    assert "no run in" in tracking.ship(str(tmp_path)).error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(
            [*command, *stores, "--workers", "1"], stdout=out, stderr=out, cwd=folder, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(process.pid, 9)
            process.wait()


@pytest.mark.jobs
def test_a_server_that_is_down_first_gets_everything_later(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    run = Run(tmp_path / "runs" / "tiny", uri=uri)
    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0, 2: 5.0})
    process = tracking.start(run.path)
    try:
        until(lambda: "trying again" in tracking.log_file(run.path).read_text(), 60)
        second = tracking.start(run.path)
        assert second.wait(timeout=60) == 0
        assert "another shipper" in tracking.log_file(run.path).read_text()
        run.end(1, Cause.DONE, [6])
        run.report()
        run.add(events.Cancelled, by="a test")
        assert process.poll() is None, "it gave up"
        with server(tmp_path / "server", port):
            assert process.wait(timeout=240) == 0
            mlflow = client(uri)
            runs = shipped(mlflow)
            assert points(mlflow, runs["pretrain"].info.run_id) == [(1, 6.0), (2, 5.0)]
            assert runs[""].info.status == "KILLED"
            assert [item.path for item in mlflow.list_artifacts(runs[""].info.run_id, "report")] == [
                "report/pca.png", "report/report.json", "report/report.txt"
            ]  # fmt: skip
    finally:
        process.kill()
        process.wait()
    assert "everything has arrived" in tracking.log_file(run.path).read_text()


def until(true: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
