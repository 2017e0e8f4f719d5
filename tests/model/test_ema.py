"""The teacher moves as the formula says, and its buffers stay."""

import pytest
import torch
from torch import nn

from model import ema

FINITE = torch.tensor(True)


def pair():
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        for number, parameter in enumerate([*student.parameters(), *teacher.parameters()]):
            parameter.copy_(torch.arange(3.0) + number)
        student.running_mean.fill_(7.0)
    return student, teacher


def test_moves_parameters_and_no_buffers():
    student, teacher = pair()
    expected = [
        0.9 * t.detach() + 0.1 * s.detach() for s, t in zip(student.parameters(), teacher.parameters(), strict=True)
    ]
    ema.update(student, teacher, 0.9, FINITE)
    for parameter, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    assert teacher.running_mean.eq(0).all()


@pytest.mark.parametrize("momentum", [1.0, 0.0])
def test_the_ends_are_exact(momentum):
    student, teacher = pair()
    expected = [p.detach().clone() for p in (teacher if momentum else student).parameters()]
    ema.update(student, teacher, momentum, FINITE)
    assert all(torch.equal(p.detach(), value) for p, value in zip(teacher.parameters(), expected, strict=True))


def test_a_step_that_was_not_finite_moves_nothing():
    student, teacher = pair()
    expected = [p.detach().clone() for p in teacher.parameters()]
    ema.update(student, teacher, 0.9, torch.tensor(False))
    assert all(torch.equal(p.detach(), value) for p, value in zip(teacher.parameters(), expected, strict=True))


def test_copy():
    student, teacher = pair()
    ema.copy(student, teacher)
    assert all(torch.equal(s, t) for s, t in zip(student.parameters(), teacher.parameters(), strict=True))
    assert teacher.running_mean.eq(0).all()


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"differ in parameters: \['bias'\]"):
        ema.update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9, FINITE)
