"""The plan of the 7B, checked against the published numbers, and the disk arithmetic against retention's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import read_cluster
from orchestrator.plan import Plan, as_text, kept_steps, make_plan
from orchestrator.spec import read_job

ROOT = Path(__file__).parents[2]


def plan(file: str, *overrides: str) -> Plan:
    job = read_job(str(ROOT / file), overrides, check_data=False)
    return make_plan(job, read_cluster(str(ROOT / "clusters" / f"{job.cluster}.yaml")))


@pytest.fixture(scope="module")
def v3_7b() -> Plan:
    return plan("jobs/v3_7b.yaml")


def test_the_7b_in_order_with_its_inputs(v3_7b: Plan) -> None:
    assert [(phase.name, phase.kind) for phase in v3_7b.phases] == [
        ("pretrain", "pretrain"),
        ("gram", "gram"),
        ("highres", "highres"),
        ("text", "text"),
    ]
    assert [{given.name: given.reference for given in phase.inputs} for phase in v3_7b.phases] == [
        {},
        {"init": "pretrain@final", "gram_teacher": "pretrain@200000"},
        {"weights": "gram@final", "gram_teacher": "gram@final"},
        {"vision_tower": "highres@final"},
    ]


def test_the_7bs_layout_is_the_published_one(v3_7b: Plan) -> None:
    assert v3_7b.backbone_parameters == 6_716_043_264
    assert [(p.steps, p.batch_size, p.processes, p.images_per_process) for p in v3_7b.phases] == [
        (1_000_000, 4096, 256, 16),
        (40_000, 4096, 256, 16),
        (10_000, 2048, 256, 8),
        (50_000, 8192, 32, 256),
    ]
    assert v3_7b.phases[0].trained_parameters == 6_716_043_264 + 239_092_224 + 72_884_608
    assert v3_7b.phases[0].views == ("2 x 256 + 8 x 112 px",)
    assert v3_7b.phases[1].views == ("2 x 256 + 8 x 112 px, Gram teacher 512",)
    assert v3_7b.phases[2].views[0] == "2 x 512 + 8 x 112 px, Gram teacher 768 (30%)"


def test_hours_are_derived_from_the_profile_and_said_to_be(v3_7b: Plan) -> None:
    assert v3_7b.phases[0].process_hours == pytest.approx(61_440, rel=0.01)  # the profile's speed is derived from it
    assert "Hours are derived" in v3_7b.notes[-1]
    local = plan("tests/jobs/tiny.yaml")
    assert all(phase.process_hours is None for phase in local.phases)
    assert "none is guessed" in local.notes[-1]


def test_what_stays_of_the_7bs_pretraining(v3_7b: Plan) -> None:
    disk = v3_7b.phases[0].disk
    assert 200_000 in disk.kept
    assert disk.kept[:2] == (50_000, 100_000)
    assert disk.kept[-3:] == (998_000, 999_000, 1_000_000)
    assert disk.left == len(disk.kept) * disk.checkpoint
    assert disk.most == disk.left + disk.checkpoint
    assert disk.checkpoint / 1e9 == pytest.approx(112.4, abs=0.1)


def spec(steps: int, pinned: list[int], **checkpoints: Any) -> dict[str, Any]:
    first = {"kind": "pretrain", "steps": steps, "checkpoints": {"keep_last": 2, "keep_every": None, **checkpoints}}
    rest = {f"p{step}": {"kind": "pretrain", "steps": 1, "init": f"first@{step}"} for step in pinned}
    return {"phases": {"first": first, **rest}}


@pytest.mark.parametrize(
    ("job", "kept"),
    [
        (spec(100, [], every=20), (80, 100)),
        (spec(105, [], every=20), (100, 105)),
        (spec(100, [40], every=20), (40, 80, 100)),
        (spec(100, [], every=10, keep_every=30), (30, 60, 90, 100)),
        (spec(5, [], every=20), (5,)),
        (spec(100, [], every=20, keep_last=1), (100,)),
        (spec(100, [], every="auto"), (100,)),
        (spec(100, [33], every="auto", keep_every=40), (33, 40, 80, 100)),
    ],
)
def test_which_checkpoints_stay(job: dict[str, Any], kept: tuple[int, ...]) -> None:
    assert kept_steps(job, "first") == kept


def test_what_keeps_the_7bs_checkpoints(v3_7b: Plan) -> None:
    assert v3_7b.disk_most / 1e12 == pytest.approx(3.34, abs=0.01)
    assert v3_7b.disk_left / 1e12 == pytest.approx(3.26, abs=0.01)
    by = [{keeps.rule: len(keeps.steps) for keeps in phase.disk.kept_by} for phase in v3_7b.phases]
    assert by == [
        {"keep_every 50000": 19, "keep_last 3": 2, "final": 1},
        {"keep_last 3": 2, "final": 1},
        {"keep_last 3": 2, "final": 1},
        {"keep_last 3": 2, "final": 1},
    ]
    for phase in v3_7b.phases:
        assert sum(keeps.bytes for keeps in phase.disk.kept_by) == phase.disk.left


def test_of_a_gram_candidate_the_teachers_backbone_stays() -> None:
    disk = plan("jobs/v3_7b.yaml", "checkpoints.keep_every=null").phases[0].disk
    candidate = next(keeps for keeps in disk.kept_by if keeps.rule == "a later phase")
    assert (candidate.steps, candidate.bytes) == ((200_000,), 4 * 6_716_043_264)
    assert disk.left == 3 * disk.checkpoint + candidate.bytes
    assert disk.most == disk.left + disk.checkpoint
    young = plan("tests/jobs/tiny.yaml", "phases.gram.gram_teacher=pretrain@12").phases[0].disk
    assert young.kept == (12, 18, 20)
    assert young.most == 3 * young.checkpoint, "it still has all parts when the last one is sealed"


def test_a_gram_teacher_is_stored_once_unless_it_is_refreshed() -> None:
    once = plan("tests/jobs/tiny.yaml", "phases.gram.losses.gram.refresh_every=0").phases[1].disk
    each = plan("tests/jobs/tiny.yaml").phases[1].disk
    assert once.checkpoint == each.checkpoint
    teacher = 4 * plan("tests/jobs/tiny.yaml").backbone_parameters
    assert each.left - once.left == len(once.kept) * teacher  # pretrain's own checkpoint holds it


def test_saves_at_steps_that_nobody_knows_yet() -> None:
    auto = "phases.pretrain.checkpoints={every: auto, node_mtbf_hours: 6000, keep_last: 3}"
    tiny = plan("tests/jobs/tiny.yaml", auto, "phases.gram.gram_teacher=pretrain@7")
    disk = tiny.phases[0].disk
    assert disk.kept == (7, 20)
    teacher = 4 * tiny.backbone_parameters
    assert disk.left == 3 * disk.checkpoint + teacher
    assert disk.most == 4 * disk.checkpoint + teacher
    assert "a failure every 6,000 h (6,000 h a node, 1 of them)" in tiny.notes[-1]


def test_the_fullest_moment_counts_what_earlier_phases_left() -> None:
    tiny = plan("tests/jobs/tiny.yaml")
    before = [sum(phase.disk.left for phase in tiny.phases[:index]) for index in range(4)]
    assert tiny.disk_most == max(left + phase.disk.most for left, phase in zip(before, tiny.phases, strict=True))


def test_as_text_and_as_json(v3_7b: Plan) -> None:
    text = as_text(v3_7b)
    kept = "2.47 TB: 2.14 TB keep_every 50000 (19), 225 GB keep_last 3 (2), 112 GB final"
    teacher = "gram_teacher: pretrain@200000 (teacher_backbone)"
    for said in ("1. pretrain", teacher, "32 nodes, 256 processes", kept):
        assert said in text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert json.loads(json.dumps(v3_7b.as_mapping()))["phases"][1]["steps"] == 40_000
    assert "5. evaluate" in as_text(plan("tests/jobs/tiny.yaml"))
