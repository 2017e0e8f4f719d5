"""Two nodes of two processes train bit for bit like one node of four, stopped by a notice to one of them or not."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model import contract, sealed, storage
from model.contract import Attempt, Cause
from orchestrator import progress
from tests.model.standin.attempts import Case
from tests.model.standin.nodes import Nodes
from tests.model.test_train import (
    ROOT,
    assert_same_state,
    describe,
    images,
    phase_settings,
    ref_of,
    train,
    wait_for,
)

__all__ = ["images"]

STEPS = 30


def attempt_of(folder: Path, images: Path, number: int = 1, **changes: Any) -> Attempt:
    settings = phase_settings(
        images, steps=STEPS, checkpoints={"every": 10},
        optim={"batch_size": 32, "group_size": 4, "accumulate": 2, "lr": 0.001},
    )  # fmt: skip
    return describe(folder, images, number, settings=settings, code_dir=str(ROOT), **changes)


def on_two_nodes(attempt: Attempt) -> Nodes:
    storage.publish(f"{attempt.run_dir}/{contract.attempt_yaml(attempt.attempt)}", msgspec.yaml.encode(attempt))
    two = Nodes(Case(attempt, ""), job=str(attempt.attempt))
    two.start()
    return two


@pytest.mark.jobs
def test_two_nodes_of_two_are_one_of_four(tmp_path: Path, images: Path) -> None:
    one = train(attempt_of(tmp_path / "one", images, processes_per_node=4), 4)
    assert one.end().cause is Cause.DONE, one.log()

    first = attempt_of(tmp_path / "two", images, nodes=2)
    two = on_two_nodes(first)
    wait_for(lambda: (last := progress.latest(first.run_dir, 1)) is not None and last.step >= 4, 300)
    two.agents[1].send_signal(signal.SIGUSR2)
    stopped = contract.EXIT_CODES[Cause.STOPPED]
    assert two.wait(300) == [stopped, stopped], two.log(0) + two.log(1)
    outcome = two.case.outcome
    assert outcome.step is not None
    assert 4 < outcome.step < STEPS
    assert sealed.read_manifest(ref_of(first, outcome.step)).world == {"nodes": 2, "processes": 4}

    second = attempt_of(tmp_path / "two", images, 2, nodes=2, resume=[ref_of(first, outcome.step)])
    assert on_two_nodes(second).wait(300) == [0, 0]
    assert_same_state(ref_of(one.attempt, STEPS), ref_of(second, STEPS))
