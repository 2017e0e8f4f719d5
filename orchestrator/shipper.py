"""One pass of bringing a run to MLflow: everything that is in the run directory and not there yet.

One parent run a dinoctl run, one child a phase. A pass may be cut off anywhere and repeated: runs are found again by
their tags, a metric with the same key, step, time and value is stored once, and the ledger says how far it got. The
ledger only saves work; without it everything is sent again and nothing is doubled.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from model import contract, storage
from model.contract import Step
from orchestrator import progress, report

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_A_CALL = 1000  # MLflow's own limits
PARAMS_A_CALL = 100
PARAM_LENGTH = 6000
_REFUSED = re.compile(r"[^\w. :/-]", re.ASCII)  # what MLflow does not take in a metric's name
RUN_TAG = "dinoctl.run_id"
PHASE_TAG = "dinoctl.phase"


@dataclass(frozen=True)
class Phase:
    """A phase, or the evaluation, that has begun. `status` is one of MLflow's."""

    name: str
    attempts: list[int]
    status: str


@dataclass(frozen=True)
class Facts:
    """What a pass needs to know of a run, from its log. `over`: nothing is running and nothing will start by itself."""

    run_dir: str
    run: str
    run_id: str
    spec: dict[str, Any]
    spec_digest: str
    code_digest: str
    phases: list[Phase]
    status: str
    over: bool


class Ledger(msgspec.Struct):
    """How far the last pass got, for one MLflow store (`uri`)."""

    uri: str
    parent: str = ""
    children: dict[str, str] = {}  # phase -> MLflow run
    chunks: dict[int, int] = {}  # attempt -> its last chunk that was sent
    statuses: dict[str, str] = {}  # MLflow run -> status that was set
    spec_digest: str = ""
    report_digest: str = ""


@dataclass(frozen=True)
class Shipment:
    """A pass under way. `save` makes the ledger durable; it is called after each thing that was sent."""

    client: MlflowClient
    facts: Facts
    ledger: Ledger
    experiment: str
    save: Callable[[Ledger], None]


def ship(client: MlflowClient, facts: Facts, ledger: Ledger, experiment: str, save: Callable[[Ledger], None]) -> int:
    """Send what is new; returns the number of steps sent. Raises what MLflow raises: the next pass goes on."""
    shipment = Shipment(client, facts, ledger, experiment, save)
    _forget_if_gone(shipment)
    _parent(shipment)
    sent = sum(_phase(shipment, phase) for phase in facts.phases)
    _report(shipment)
    for phase in facts.phases:
        _status(shipment, ledger.children[phase.name], phase.status)
    _status(shipment, ledger.parent, facts.status)
    return sent


def open_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The id of the experiment of that name, made if it is not there, with its artifacts at `artifacts` or where the
    server likes."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifacts))


# --- runs -------------------------------------------------------------------------------------------------------------


def _forget_if_gone(shipment: Shipment) -> None:
    """Begin afresh if what the ledger speaks of was deleted over there."""
    ledger = shipment.ledger
    if ledger.parent and _find(shipment, phase="") != ledger.parent:
        fresh = Ledger(uri=ledger.uri)
        for field in fresh.__struct_fields__:
            setattr(ledger, field, getattr(fresh, field))


def _find(shipment: Shipment, phase: str) -> str | None:
    where = f"tags.`{RUN_TAG}` = '{shipment.facts.run_id}' AND tags.`{PHASE_TAG}` = '{phase}'"
    runs = shipment.client.search_runs([shipment.experiment], where, max_results=1, order_by=["attributes.start_time"])
    return str(runs[0].info.run_id) if runs else None


def _find_or_create(shipment: Shipment, phase: str, name: str, start_ms: int | None) -> str:
    """An empty `phase` is the parent. Found by tags, so that a lost answer to a creation makes no second run."""
    found = _find(shipment, phase)
    if found:
        return found
    facts = shipment.facts
    tags = {RUN_TAG: facts.run_id, PHASE_TAG: phase, "dinoctl.code_digest": facts.code_digest}
    if phase:
        tags["mlflow.parentRunId"] = shipment.ledger.parent
    created = shipment.client.create_run(shipment.experiment, start_time=start_ms, tags=tags, run_name=name)
    return str(created.info.run_id)


def _parent(shipment: Shipment) -> None:
    facts, ledger = shipment.facts, shipment.ledger
    if not ledger.parent:
        ledger.parent = _find_or_create(shipment, "", facts.run, None)
        shipment.save(ledger)
    if ledger.spec_digest == facts.spec_digest:
        return
    _params(shipment, ledger.parent, {key: value for key, value in facts.spec.items() if key != "phases"})
    shipment.client.set_tag(ledger.parent, "dinoctl.code_digest", facts.code_digest)
    shipment.client.set_tag(ledger.parent, "dinoctl.spec_digest", facts.spec_digest)
    text = msgspec.yaml.encode(facts.spec).decode()
    shipment.client.log_text(ledger.parent, text, f"spec-{facts.spec_digest[:8]}.yaml")
    ledger.spec_digest = facts.spec_digest
    shipment.save(ledger)


def _params(shipment: Shipment, run: str, values: Mapping[str, Any]) -> None:
    """Those that are not there: MLflow refuses to change one, and an amended spec is in the artifact of its digest."""
    from mlflow.entities import Param

    there = shipment.client.get_run(run).data.params
    flat = [(key, value) for key, value in flatten(values) if key not in there]
    for start in range(0, len(flat), PARAMS_A_CALL):
        params = [Param(key, value[:PARAM_LENGTH]) for key, value in flat[start : start + PARAMS_A_CALL]]
        shipment.client.log_batch(run, params=params, synchronous=True)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(a.b.c, text) for every leaf; a list is a leaf, as JSON."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value if isinstance(value, str) else json.dumps(value)


def _status(shipment: Shipment, run: str, status: str) -> None:
    ledger = shipment.ledger
    if ledger.statuses.get(run) == status:
        return
    if status in ("FINISHED", "FAILED", "KILLED"):
        shipment.client.set_terminated(run, status)
    else:
        shipment.client.update_run(run, status)
    ledger.statuses[run] = status
    shipment.save(ledger)


# --- metrics ----------------------------------------------------------------------------------------------------------


def _phase(shipment: Shipment, phase: Phase) -> int:
    ledger = shipment.ledger
    if phase.name not in ledger.children:
        first = progress.first(shipment.facts.run_dir, phase.attempts)
        start_ms = int(first.time * 1000) if first else None
        run = _find_or_create(shipment, phase.name, f"{shipment.facts.run}/{phase.name}", start_ms)
        _params(shipment, run, _settings(shipment.facts.spec, phase.name))
        ledger.children[phase.name] = run
        shipment.save(ledger)
    earlier: list[int] = []
    sent = 0
    for attempt in phase.attempts:
        sent += _attempt(shipment, ledger.children[phase.name], attempt, earlier)
        earlier.append(attempt)
    return sent


def _settings(spec: Mapping[str, Any], phase: str) -> Mapping[str, Any]:
    """The part of the resolved spec that speaks of one phase, or of the evaluation."""
    settings: Mapping[str, Any] = spec["phases"].get(phase) or spec.get(phase) or {}
    return settings


def _attempt(shipment: Shipment, run: str, attempt: int, earlier: Sequence[int]) -> int:
    """Send the new chunks of one attempt; returns the number of steps."""
    facts, ledger = shipment.facts, shipment.ledger
    repeated: dict[int, Step] | None = None
    sent = 0
    for chunk, steps in progress.since(facts.run_dir, attempt, ledger.chunks.get(attempt, -1)):
        if repeated is None:
            repeated = _repeated(facts.run_dir, steps[0].step, earlier)
        metrics = [point for step in steps for point in _points(step, repeated.get(step.step))]
        for start in range(0, len(metrics), METRICS_A_CALL):
            shipment.client.log_batch(run, metrics=metrics[start : start + METRICS_A_CALL], synchronous=True)
        ledger.chunks[attempt] = chunk
        shipment.save(ledger)
        sent += len(steps)
    return sent


def _repeated(run_dir: str, first: int, earlier: Sequence[int]) -> dict[int, Step]:
    """What earlier attempts recorded of the steps from `first` on, by step. Mostly none got that far, and then
    only their newest chunks are read."""
    newest = [progress.latest(run_dir, attempt) for attempt in earlier]
    if all(step is None or step.step < first for step in newest):
        return {}
    return {owned.step.step: owned.step for owned in progress.history(run_dir, earlier) if owned.step.step >= first}


def _points(step: Step, before: Step | None) -> list[Any]:
    """MLflow cannot take a point back. A step trained again by an exact resume has the metrics of the first time, and
    they are not sent twice; where they differ (other code), both stay and the later one is the one that counts."""
    from mlflow.entities import Metric

    if before is not None and before.metrics == step.metrics:
        return []
    values = {**step.metrics, "images_per_second": step.images_per_second} if step.metrics else {}
    return [Metric(key, value, int(step.time * 1000), step.step) for key, value in values.items()]


# --- the report -------------------------------------------------------------------------------------------------------


def _report(shipment: Shipment) -> None:
    """Table and pictures as artifacts of the parent, scores as its metrics."""
    from mlflow.entities import Metric

    facts, ledger = shipment.facts, shipment.ledger
    table = report.read(facts.run_dir)
    if table is None:
        return
    data = storage.read(f"{facts.run_dir}/{contract.REPORT_FILE}")
    digest = hashlib.sha256(data).hexdigest()
    if digest == ledger.report_digest:
        return
    for name in ("report.json", *(picture.removeprefix(f"{contract.REPORT_DIR}/") for picture in table.pictures)):
        _artifact(shipment, name)
    shipment.client.log_text(ledger.parent, _as_text(table), f"{contract.REPORT_DIR}/report.txt")
    at = int(storage.modified(f"{facts.run_dir}/{contract.REPORT_FILE}") * 1000)
    points = [
        Metric(f"{_REFUSED.sub('-', row.score)}/{name}", value, at, 0)
        for row in table.rows
        for name, value in (("trained", row.trained), ("untrained", row.untrained), ("difference", row.difference))
    ]
    shipment.client.log_batch(ledger.parent, metrics=points, synchronous=True)
    ledger.report_digest = digest
    shipment.save(ledger)


def _artifact(shipment: Shipment, name: str) -> None:
    """A file of the report's folder; MLflow takes it from this machine's disk."""
    data = storage.read(f"{shipment.facts.run_dir}/{contract.REPORT_DIR}/{name}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(data)
        shipment.client.log_artifact(shipment.ledger.parent, str(file), contract.REPORT_DIR)


def _as_text(table: report.Report) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=160).print(report.render(table))
    return out.getvalue()
