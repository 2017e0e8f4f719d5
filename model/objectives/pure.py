"""A step as a pure function of what it sees: what the steps of all kinds of phases have in common.

Training runs a kind's `teach` and `learn` with what its schedules and draws say; `model.recording` and `model.replay`
run its `step`, which is made of the same two, with what stands in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from model import parallel

Compute = Literal["fp32", "bf16"]


class Slices(Protocol):
    """A record of per-image tensors that can be cut into micro-batches."""

    def slice(self, start: int, stop: int) -> Self:
        """The images [start, stop) of the local batch, which must begin and end with a group."""
        ...


class Images(Slices, Protocol):
    """A batch of whatever kind."""

    @property
    def positions(self) -> Tensor: ...


B = TypeVar("B", bound=Images)
D = TypeVar("D")
S = TypeVar("S")
T = TypeVar("T", bound=Slices)


@dataclass(frozen=True)
class Inputs(Generic[B, D, S]):
    """What one rank's part of a step is made of, beside the networks."""

    batch: B
    draws: tuple[D, ...]  # one a micro-batch: the batch is cut into as many equal parts, in order
    scalars: S
    answers: tuple[Tensor, ...] | None = None
    """What the collectives gave this rank, in order. None: ask the other ranks, or there are none."""

    def micro_batches(self) -> Iterator[tuple[int, int, D]]:
        """First image, the one after the last, and draws of each."""
        images = len(self.batch.positions) // len(self.draws)
        for number, draws in enumerate(self.draws):
            yield number * images, (number + 1) * images, draws

    def collectives(self) -> AbstractContextManager[None]:
        """In this block they give `answers`, where there are any."""
        return nullcontext() if self.answers is None else parallel.answered(self.answers)


def cut(batch: B, parts: int) -> list[B]:
    """The micro-batches of a rank's part of the batch, in order."""
    size = len(batch.positions) // parts
    return [batch.slice(number * size, (number + 1) * size) for number in range(parts)]


class StepNetworks(Protocol):
    """All networks that have a say in a step."""

    def named(self) -> dict[str, nn.Module]:
        """Each once, under the names of a recorded file: `student.backbone`, `teacher.dino_head`, ..."""
        ...


@dataclass(frozen=True)
class Outputs:
    """A rank's share: summed over the ranks, both are those of the global batch."""

    terms: dict[str, Tensor]  # each loss term by name, unweighted, and `total`
    gradients: dict[str, Tensor]  # of `total`, by parameter: `backbone.blocks.0.norm1.weight`, `dino_head.mlp.0.bias`


def add_up(
    trained: Mapping[str, nn.Module],
    inputs: Inputs[B, D, Any],
    targets: T,
    learn: Callable[[B, D, T], dict[str, Tensor]],
) -> Outputs:
    """The terms of all micro-batches and the gradients of their totals, none where autograd is off. The networks stay
    as they are."""
    parameters = dict(_parameters(trained))
    terms: dict[str, Tensor] = {}
    gradients: Sequence[Tensor] = []
    for start, stop, draws in inputs.micro_batches():
        micro = learn(inputs.batch.slice(start, stop), draws, targets.slice(start, stop))
        if torch.is_grad_enabled():
            more = torch.autograd.grad(micro["total"], list(parameters.values()), materialize_grads=True)
            gradients = [one + other for one, other in zip(gradients, more, strict=True)] if gradients else more
        terms = {name: term.detach() + terms.get(name, 0) for name, term in micro.items()}
    return Outputs(terms, dict(zip(parameters, gradients, strict=True)) if gradients else {})


def _parameters(trained: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for network, module in trained.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{network}.{name}", parameter
