"""The jobs that come with dinoctl are right, and what versions 1 to 3 need of each other is checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import PretrainPhase
from orchestrator.problems import Problem, SpecError
from orchestrator.spec import read_job

JOBS = Path(__file__).parents[2] / "jobs"
FULL = JOBS / "ablations" / "v2-full.yaml"


@pytest.mark.parametrize("job", sorted(JOBS.rglob("*.yaml")), ids=lambda job: str(job.relative_to(JOBS)))
def test_every_job_is_valid(job: Path) -> None:
    assert read_job(str(job), check_data=False).phases


def only(*overrides: str) -> Problem:
    with pytest.raises(SpecError) as caught:
        read_job(str(FULL), overrides, check_data=False)
    (problem,) = caught.value.problems
    return problem


def test_ibot_needs_a_head_and_a_mask_token() -> None:
    assert only("model.ibot_head=null").message == "the iBOT loss needs model.ibot_head"
    assert only("model.backbone.mask_token=false").message == "the iBOT loss needs model.backbone.mask_token"
    job = read_job(str(FULL), ["model.ibot_head=null", "phases.pretrain.losses.ibot.weight=0.0"], check_data=False)
    assert job.model.ibot_head is None
    assert read_job(str(FULL), ["model.ibot_head=tied"], check_data=False).model.ibot_head == "tied"


def test_koleo_groups_may_span_processes_and_not_parts_of_their_shares() -> None:
    koleo = "phases.pretrain.losses.koleo.group_size"
    assert read_job(str(FULL), [f"{koleo}=32"], check_data=False).phases["pretrain"].resources.processes_per_node == 2
    cut = only(f"{koleo}=32", "phases.pretrain.optim.group_size=4", "phases.pretrain.optim.accumulate=2")
    assert cut.message == "does not fit the 2 processes of phase pretrain"
    assert cut.allowed == "numbers of processes that fit: none" or "fit" in cut.allowed
    assert "must be a multiple of optim.group_size 16" in str(only(f"{koleo}=8"))


def test_quirks_at_the_top_are_every_phases() -> None:
    job = read_job(str(FULL), ["official_quirks=true"], check_data=False)
    phase = job.phases["pretrain"]
    assert isinstance(phase, PretrainPhase)
    assert phase.official_quirks
