"""Over how many processes and nodes a phase can be trained: whole groups, dealt evenly, the same global batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import ValidationError

from model.config import PHASES, AnyPhase, Resources, SslPhase, read
from orchestrator.draft import Draft
from orchestrator.handoff import HandoffError
from orchestrator.problems import Path, Problem, listed


def world(resources: Resources) -> int:
    return resources.nodes * resources.processes_per_node


def fitting_worlds(phase: AnyPhase) -> list[int]:
    """The numbers of processes among which whole groups can be dealt evenly."""
    fitting = phase.optim.worlds()
    return [count for count in fitting if phase.koleo_fits(count)] if isinstance(phase, SslPhase) else fitting


def fitting_nodes(phase: AnyPhase, least: int, most: int) -> list[int]:
    """The numbers of nodes from `least` to `most` on which the phase can be trained, with the same global batch."""
    each, worlds = phase.resources.processes_per_node, set(fitting_worlds(phase))
    whole = (phase.parallel.shard_size or each) if phase.parallel.shard == "hsdp" else 1
    counts = range(least, most + 1)
    return [nodes for nodes in counts if nodes * each in worlds and nodes * each % whole == 0]


def recorded_phase(settings: Mapping[str, Any]) -> AnyPhase:
    """A phase as the log has it. Raises HandoffError if this version reads it otherwise than that which wrote it."""
    try:
        return cast(AnyPhase, read(PHASES[settings["kind"]], settings))
    except (KeyError, ValidationError) as error:
        raise HandoffError(
            f"resources.min_nodes: how many nodes can share the batch cannot be told, as this dinoctl does not know "
            f"the recorded phase: {error}. Go on with the dinoctl that submitted it, or amend min_nodes to null"
        ) from error


def all_problems(draft: Draft) -> Iterator[Problem]:
    """Batches that do not divide among the processes, and nodes that cannot hold them."""
    for name, phase in draft.phases.items():
        optim, processes, at = phase.optim, world(phase.resources), ("phases", name, "optim", "batch_size")
        unit = optim.group_size * optim.accumulate * processes
        if optim.batch_size % unit:
            yield Problem(
                f"does not divide among the {processes} processes of phase {name}", at,
                found=f"batch_size {optim.batch_size}, {unit} = group_size {optim.group_size} x accumulate "
                      f"{optim.accumulate} x {processes} processes",
                allowed=f"numbers of processes that fit: {listed(fitting_worlds(phase))}",
            )  # fmt: skip
        elif isinstance(phase, SslPhase) and not phase.koleo_fits(processes):
            yield Problem(
                f"does not fit the {processes} processes of phase {name}", (*at[:2], "losses", "koleo", "group_size"),
                found=f"{phase.koleo_group} images; a process has {optim.batch_size // processes} "
                      f"in {optim.micro_batches(processes)} micro-batches",
                allowed=f"numbers of processes that fit: {listed(fitting_worlds(phase))}",
            )  # fmt: skip
        size = phase.parallel.shard_size or phase.resources.processes_per_node
        if phase.parallel.shard == "hsdp" and processes % size:
            yield Problem(
                f"the {processes} processes of phase {name} are not whole copies of {size}",
                ("phases", name, "parallel", "shard_size"), found=str(size), allowed=f"divisors of {processes}",
            )  # fmt: skip
        yield from _on_nodes(draft, phase.resources, ("phases", name, "resources"))
        yield from _on_fewer_nodes(phase, ("phases", name, "resources", "min_nodes"))
    if draft.evaluate is not None and world(draft.evaluate.resources) != 1:
        yield Problem("the evaluation runs in one process", ("evaluate", "resources"),
                      found=f"{world(draft.evaluate.resources)} processes")  # fmt: skip


def _on_nodes(draft: Draft, resources: Resources, at: Path) -> Iterator[Problem]:
    most = draft.cluster.gpus_per_node if draft.cluster else None
    if most and resources.processes_per_node > most:
        assert draft.cluster is not None
        yield Problem(f"more than a node of {draft.cluster.name} has GPUs", (*at, "processes_per_node"),
                      found=str(resources.processes_per_node), allowed=f"at most {most}")  # fmt: skip


def _on_fewer_nodes(phase: AnyPhase, at: Path) -> Iterator[Problem]:
    least, nodes = phase.resources.min_nodes, phase.resources.nodes
    if least is None:
        return
    if least > nodes:
        yield Problem("more than the phase has nodes", at, found=str(least), allowed=f"1 to nodes ({nodes})")
    elif least < nodes and not fitting_nodes(phase, least, nodes - 1):
        fewer = fitting_nodes(phase, 1, nodes - 1)
        yield Problem(
            f"no number of nodes from {least} to {nodes - 1} can share the batch", at, found=str(least),
            allowed=f"at most {fewer[-1]}, so that there is one: {listed(fewer)}" if fewer else f"{nodes}, or nothing",
        )  # fmt: skip
