"""The teacher: an exponential moving average of the student's parameters.

    teacher = momentum * teacher + (1 - momentum) * student        (Caron et al. 2021, section 3.1)

Buffers are left alone: none is learnt, and student and teacher are built with the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model import cut


@torch.no_grad()
def update(student: nn.Module, teacher: nn.Module, momentum: float, finite: Tensor) -> None:
    """Move `teacher` in place, if `finite` (bool, on the device, so that nobody waits for it); each process its rows.

    Raises ValueError if the two have different parameters.
    """
    targets, sources = _paired(student, teacher)
    if targets:
        way = finite.to(targets[0].dtype) * (1 - momentum)
        torch._foreach_lerp_(targets, sources, [way] * len(targets))


@torch.no_grad()
def copy(student: nn.Module, teacher: nn.Module) -> None:
    """Make `teacher`'s parameters equal to `student`'s. Raises ValueError if the two have different parameters."""
    torch._foreach_copy_(*_paired(student, teacher))


def _paired(student: nn.Module, teacher: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    sources, targets = dict(student.named_parameters()), dict(teacher.named_parameters())
    if sources.keys() != targets.keys():
        raise ValueError(f"student and teacher differ in parameters: {sorted(sources.keys() ^ targets.keys())}")
    return (
        [cut.local(targets[name].detach()) for name in sources],
        [cut.local(source.detach()) for source in sources.values()],
    )
