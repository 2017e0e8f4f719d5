"""References: what they mean, and what happens when they cannot be met."""

from __future__ import annotations

from typing import Any

import pytest

from model.contract import CheckpointRef
from orchestrator.handoff import (
    HandoffError,
    Reference,
    inputs,
    is_saved,
    keep_steps,
    nearest_saved,
    parse,
    references,
)


def spec() -> dict[str, Any]:
    every = {"every": 20}
    return {
        "phases": {
            "pretrain": {"kind": "pretrain", "steps": 100, "checkpoints": every, "init": None, "weights": None},
            "gram": {
                "kind": "gram",
                "steps": 30,
                "checkpoints": every,
                "init": "pretrain@final",
                "gram_teacher": "pretrain@40",
            },
            "text": {"kind": "text", "steps": 10, "checkpoints": every, "vision_tower": "gram@final"},
        }
    }


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("pretrain@200", Reference("pretrain", 200)),
        ("pretrain@final", Reference("pretrain")),
        ("gram@best(knn)", Reference("gram", best="knn")),
        ("s3://bucket/runs/a#pretrain@5", Reference("pretrain", 5, run="s3://bucket/runs/a")),
        ("old-run#gram@final", Reference("gram", run="old-run")),
    ],
)
def test_a_reference_reads_and_prints_the_same(text: str, reference: Reference) -> None:
    assert parse(text) == reference
    assert str(reference) == text


@pytest.mark.parametrize(
    "text", ["", "pretrain", "pretrain@", "@5", "pretrain@-1", "pretrain@last", "a#b#c@1", "p@1.5"]
)
def test_what_is_no_reference_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(HandoffError, match="<phase>@<step>"):
        parse(text)


def test_a_phase_takes_what_its_kind_takes() -> None:
    assert references(spec(), "pretrain") == {}
    assert references(spec(), "gram") == {"init": Reference("pretrain"), "gram_teacher": Reference("pretrain", 40)}
    assert references(spec(), "evaluate") == {"backbone": Reference("gram"), "text": Reference("text")}


def test_the_last_step_and_every_step_that_is_referred_to_are_kept() -> None:
    assert keep_steps(spec(), "pretrain") == [40, 100]
    assert keep_steps(spec(), "gram") == [30]
    assert keep_steps(spec(), "text") == [10]


def test_steps_that_are_saved() -> None:
    assert [step for step in range(-20, 50) if is_saved(spec(), "gram", step)] == [20, 30]
    assert nearest_saved(spec(), "gram", 25) == [20, 30]
    assert nearest_saved(spec(), "gram", 7) == [20]
    assert nearest_saved(spec(), "gram", 90) == [20, 30]


def test_inputs_are_those_of_the_newest_attempt_that_sealed_the_step() -> None:
    accepted = {"pretrain": [(1, 20), (1, 40), (2, 40), (2, 100), (3, 60)]}
    assert inputs(spec(), "gram", accepted, run="/r") == {
        "init": CheckpointRef(run="/r", phase="pretrain", attempt=2, step=100),
        "gram_teacher": CheckpointRef(run="/r", phase="pretrain", attempt=2, step=40),
    }


def test_an_input_that_is_not_there_is_an_error_that_says_what_is() -> None:
    with pytest.raises(HandoffError, match=r"pretrain@final: no such checkpoint.*20, 40"):
        inputs(spec(), "gram", {"pretrain": [(1, 20), (1, 40)]}, run="/r")


def test_another_run_is_read_through_the_callable() -> None:
    job = spec()
    job["phases"]["text"]["vision_tower"] = "old#gram@20"
    there = CheckpointRef(run="/old", phase="gram", attempt=7, step=20)
    asked: list[Reference] = []

    def other(reference: Reference) -> CheckpointRef:
        asked.append(reference)
        return there

    assert inputs(job, "text", {}, run="/r", other=other) == {"vision_tower": there}
    assert asked == [Reference("gram", 20, run="old")]
    with pytest.raises(HandoffError, match="another run"):
        inputs(job, "text", {}, run="/r")


def test_best_is_refused_for_now() -> None:
    job = spec()
    job["phases"]["text"]["vision_tower"] = "gram@best(knn)"
    with pytest.raises(HandoffError, match="not there yet"):
        inputs(job, "text", {"gram": [(1, 30)]}, run="/r")
