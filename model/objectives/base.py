"""What a phase optimises, as the training loop sees it: one protocol for every kind of phase.

The loop asks no objective what kind it is. One step is

    targets = objective.targets(batch, moment)                          no grad, whole local batch
    for micro-batch [a, b):
        terms = objective.loss(batch.slice(a, b), targets.slice(a, b), moment)
        terms["total"].backward()
    sum the gradients over the ranks, clip, optimizer step
    objective.after_step(moment, finite)

A loss of a micro-batch is its share of the global loss: micro-batches and ranks *sum* to it, so the number of either
changes nothing (Sinkhorn or a contrastive loss on each micro-batch alone would).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model import cut
from model.objectives.pure import Inputs, Slices, StepNetworks
from model.sealed import Stored

if TYPE_CHECKING:
    from model.data.views import Views

State = dict[str, Tensor]
"""Tensors by name: one part of a checkpoint.

`teacher_backbone` and `gram_teacher` hold one network under its own names (`blocks.0.norm1.weight`); `student` and
`teacher_heads` several, each name led by its network's (`backbone.blocks.0.norm1.weight`, `dino_head.mlp.0.weight`).
"""

ReadPart = Callable[[str], Mapping[str, Tensor | Stored]]
"""Gives a part (a name of contract.PARTS) of the checkpoint that is handed over."""


@dataclass(frozen=True)
class Moment:
    """When a step happens. Schedules run on `step` of `steps`, draws on `clock`."""

    step: int  # updates of this phase done before this one
    steps: int  # updates of the whole phase
    clock: int  # updates since the origin, the phase in which the chain of `init` hand-offs began


@dataclass(frozen=True)
class Networks:
    """The networks of an objective by what happens to them. None is in two of `trained` and `frozen`."""

    trained: dict[str, nn.Module]  # by name: gradients are clipped for each apart
    ema: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)  # (student, teacher); empty without a teacher
    frozen: dict[str, nn.Module] = field(default_factory=dict)  # teachers included: moved to the device, never trained


B_contra = TypeVar("B_contra", bound=Slices, contravariant=True)
T = TypeVar("T", bound=Slices)


class Objective(Protocol[B_contra, T]):
    """What a kind of phase optimises, over batches B that its `views` make and targets T of its own."""

    def networks(self) -> Networks:
        """The same modules at every call; the caller moves them to the device, in place."""
        ...

    def views(self, clock: int) -> Views:
        """What the loader makes of each image at that step."""
        ...

    def targets(self, batch: B_contra, moment: Moment) -> T:
        """What the losses need of the whole local batch, without gradients. Collectives belong here; `loss` has
        KoLeo's alone, of groups larger than a micro-batch (`step._koleo`)."""
        ...

    def loss(self, batch: B_contra, targets: T, moment: Moment) -> dict[str, Tensor]:
        """fp32 scalars by name, and their weighted sum `total`, for one micro-batch: its share of the global loss."""
        ...

    def step_networks(self) -> StepNetworks:
        """For `model.recording`, as `step_inputs` is: the networks of the step as a pure function."""
        ...

    def step_inputs(self, batch: B_contra, moment: Moment, micro_batches: int) -> Inputs[Any, Any, Any]:
        """All that this rank's part of the step depends on, beside the networks and what other ranks answer."""
        ...

    def after_step(self, moment: Moment, finite: Tensor) -> None:
        """What follows the optimizer's update: EMA, Gram refresh. `moment` is the one that the step began with;
        `finite`, a bool on the device: whether the update was made, else nothing learns from this step."""
        ...

    def state(self) -> dict[str, State]:
        """The networks' tensors by part (names of contract.PARTS, without `optimizer` and `loop`), not copied."""
        ...

    def load(self, part: str, tensors: Mapping[str, Tensor | Stored]) -> None:
        """Restore one part. Raises ValueError that lists the missing and the unexpected names, if there are any."""
        ...

    def frozen_parts(self) -> set[str]:
        """Parts that have not changed since the phase began: a checkpoint stores them once."""
        ...

    def take(self, name: str, read: ReadPart) -> None:
        """Hand-off at the phase's first step: `name` is init, weights, gram_teacher or vision_tower, as in the spec.
        Raises ValueError for a name that this kind of phase does not take."""
        ...


def network_state(networks: dict[str, nn.Module]) -> State:
    """The networks' state_dicts as one part, each name led by its network's. The tensors share the networks' memory."""
    return {
        f"{network}.{name}": tensor.detach()
        for network, module in networks.items()
        for name, tensor in module.state_dict().items()
    }


def copy_strictly(own: State, tensors: Mapping[str, Tensor | Stored], part: str) -> None:
    """Copy `tensors` into `own` (a state_dict or network_state), in place; each process its rows, and no more is read.

    Raises ValueError that lists every missing or unexpected name and every wrong shape; nothing is changed then.
    """
    mistakes = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    mistakes += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    mistakes += [
        f"{name} is {list(tensors[name].shape)} and not {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if mistakes:
        for tensor in tensors.values():
            if isinstance(tensor, Stored):
                tensor.verify()  # a damaged header would look like another network
        raise ValueError(
            f"{part} does not fit these networks: {'; '.join(mistakes)}. "
            "The checkpoint was made with another `model` section than this phase's"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            cut.local(tensor).copy_(_rows_for(tensor, tensors[name]))


def _rows_for(own: Tensor, source: Tensor | Stored) -> Tensor:
    """The rows of `source` that this process holds of `own`."""
    if isinstance(source, Stored):
        return source.read(cut.rows(own))
    if cut.is_cut(source):  # of a network that is laid out alike
        return cut.local(source)
    rows = cut.rows(own)
    return source[rows.start : rows.stop] if source.ndim else source
