"""A run directory written as the controller, the agents and the trainers write it, without running any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from model import contract, storage
from model.contract import Attempt, Cause, CheckpointRef, Outcome, Step, Watcher
from orchestrator import events, store

SPEC: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "phases": {
        "pretrain": {
            "kind": "pretrain", "steps": 6, "optim": {"lr": {"peak": 0.001}}, "checkpoints": {"every": 2},
        },
        "gram": {"kind": "gram", "steps": 4, "checkpoints": {"every": 2}},
    },
    "evaluate": {"split": "test"},
    "tracking": {"enabled": True, "uri": None, "experiment": "tests"},
}  # fmt: skip


def row(score: str = "linear probe accuracy", **changes: Any) -> dict[str, Any]:
    """A row of the report in which trained is better by far; `changes` make it otherwise."""
    better = {
        "score": score, "unit": "%", "trained": 52.4, "untrained": 44.7, "difference": 7.7, "interval": [3.1, 12.0],
        "trained_interval": [47.0, 57.0], "untrained_interval": [40.0, 49.0], "baselines": {"majority": 25.8},
        "beats_untrained": True, "note": "",
    }  # fmt: skip
    return {**better, **changes}


class Run:
    """`created` is when its first event says that it began; `inputs`: what gram takes."""

    def __init__(
        self,
        folder: Path | str,
        created: float = 1000.0,
        checkpoints: dict[str, int] | None = None,
        launcher: str = "local",
        inputs: dict[str, str] | None = None,
        **tracking: Any,
    ) -> None:
        self.path = str(folder)
        self.count = 0
        self.at = created
        spec = {**SPEC, "tracking": {**SPEC["tracking"], **tracking}}
        if checkpoints:
            spec["phases"] = {name: {**phase, "checkpoints": checkpoints} for name, phase in SPEC["phases"].items()}
        if inputs:
            spec["phases"] = {**spec["phases"], "gram": {**spec["phases"]["gram"], **inputs}}
        self.add(
            events.RunCreated, format=contract.FORMAT, run=str(folder).rsplit("/", 1)[-1], run_id="ab" * 16, spec=spec,
            cluster={"launcher": launcher}, spec_digest="d" * 64, code_digest="c" * 64, version="0",
        )  # fmt: skip

    def add(self, kind: Any, **fields: Any) -> None:
        self.count += 1
        store.append(self.path, self.count, kind(at=self.at, nonce=contract.new_nonce(), **fields))

    def launch(self, attempt: int, phase: str, nodes: int | None = None, **handle: Any) -> None:
        intent = {"attempt": attempt, "phase": phase, "launch_name": "n", "digest": "", "owner": "me", "lease_until": 0}
        self.add(events.AttemptIntended, nodes=nodes, **intent)
        self.add(events.AttemptLaunched, attempt=attempt, handle=handle or {"pid": 1})

    def told(self, attempt: int, phase: str, resume: list[CheckpointRef]) -> None:
        """The attempt's YAML."""
        told = Attempt(
            format=contract.FORMAT, run="tiny", run_id="ab" * 16, run_dir=self.path, attempt=attempt, phase=phase,
            launch_name="n", seed=0, model={}, settings={}, inputs={}, resume=resume, keep_steps=[], nodes=1,
            processes_per_node=1, threads=1, code_dir="", on_end=[], spec_digest="", code_digest="",
        )  # fmt: skip
        storage.publish(f"{self.path}/{contract.attempt_yaml(attempt)}", msgspec.yaml.encode(told))

    def end(self, attempt: int, cause: Cause, steps: list[int], message: str = "", detail: str = "") -> None:
        outcome = Outcome(cause=cause, message=message, step=None, detail=detail)
        storage.publish(f"{self.path}/{contract.outcome_file(attempt)}", contract.encode(outcome))
        self.add(events.AttemptEnded, attempt=attempt, cause=cause, message=message, steps=steps, reached=None)

    def done(self) -> None:
        """All phases and the evaluation, each at the first try."""
        for attempt, (phase, steps) in enumerate({"pretrain": [4, 6], "gram": [2, 4], "evaluate": []}.items(), 1):
            self.launch(attempt, phase)
            self.end(attempt, Cause.DONE, steps)

    def record(self, attempt: int, chunk: int, steps: dict[int, float], note: str = "") -> None:
        """A chunk of steps with their losses; the note is on the last one."""
        records = [
            Step(
                step=step, steps=6, time=1e9 + 100 * attempt + step, images_per_second=20.0 + attempt,
                metrics={"loss": loss}, note=note if step == max(steps) else "",
            )
            for step, loss in steps.items()
        ]  # fmt: skip
        data = b"".join(contract.encode(record) + b"\n" for record in records)
        storage.publish(f"{self.path}/{contract.progress_chunk(attempt, chunk)}", data)

    def looked(self, attempt: int, words: str) -> None:
        storage.replace(f"{self.path}/{contract.looked_file(attempt)}", words.encode())

    def log(self, attempt: int, text: str) -> None:
        storage.publish(f"{self.path}/{contract.agent_log(attempt)}", text.encode())

    def report(self, *rows: dict[str, Any], **changes: Any) -> None:
        report = {
            "run": "tiny", "split": "test", "seed": 0, "n_images": 5, "n_groups": 4, "rows": rows or [row()],
            "left_out": [], "pictures": ["report/pca.png"], **changes,
        }  # fmt: skip
        storage.publish(f"{self.path}/{contract.REPORT_FILE}", msgspec.json.encode(report))
        storage.publish(f"{self.path}/report/pca.png", b"a picture")

    def watched(self, **changes: Any) -> None:
        """By a process of another machine, which nobody can look at from here."""
        watcher = Watcher(
            host="elsewhere", boot_id="b", pid=7, started=900.0, command="submit", seen_at=1000.0, every=1.0
        )
        store.heartbeat(self.path, msgspec.structs.replace(watcher, **changes))
