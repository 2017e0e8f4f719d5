"""`resources.min_nodes`: with how few nodes a phase may go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import layouts
from orchestrator.problems import SpecError
from orchestrator.spec import read_job

VALID = str(Path(__file__).parent / "valid.yaml")


def read(*overrides: str) -> None:
    """The valid job, of which pretrain has 4 groups of 4 images, on nodes of one process."""
    read_job(VALID, ["phases.pretrain.resources.processes_per_node=1", *overrides], check_data=False)


def at(**resources: int) -> list[str]:
    return [f"phases.pretrain.resources.{name}={value}" for name, value in resources.items()]


@pytest.mark.parametrize("resources", [at(nodes=4, min_nodes=1), at(nodes=4, min_nodes=2), at(nodes=2, min_nodes=2)])
def test_what_may_be_said(resources: list[str]) -> None:
    read(*resources)


def test_more_than_there_are() -> None:
    with pytest.raises(SpecError) as error:
        read(*at(nodes=2, min_nodes=3))
    (problem,) = error.value.problems
    assert problem.path == "phases.pretrain.resources.min_nodes"
    assert (problem.found, problem.allowed) == ("3", "1 to nodes (2)")


def test_a_number_below_which_no_layout_fits() -> None:
    with pytest.raises(SpecError) as error:
        read(*at(nodes=4, min_nodes=3))
    (problem,) = error.value.problems
    assert problem.message == "no number of nodes from 3 to 3 can share the batch"
    assert problem.allowed == "at most 2, so that there is one: 1, 2"


def test_copies_of_hsdp_stay_whole() -> None:
    overrides = [*at(nodes=4), "phases.pretrain.parallel.shard=hsdp", "phases.pretrain.parallel.shard_size=2"]
    job = read_job(VALID, ["phases.pretrain.resources.processes_per_node=1", *overrides], check_data=False)
    assert layouts.fitting_nodes(job.phases["pretrain"], 1, 4) == [2, 4]
