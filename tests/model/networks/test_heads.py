"""The projection heads: both kinds of last layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from model import accounting, config
from model.networks.heads import ProjectionHead, WeightNormLinear
from model.networks.init import create


def head(kind):
    settings = config.Head(prototypes=12, hidden=8, bottleneck=5, weight_norm=kind)
    return create(lambda: ProjectionHead(settings, 6), 0, "dino_head")


def test_weight_norm_is_torchs():
    theirs = weight_norm(nn.Linear(5, 12, bias=False))
    ours = WeightNormLinear(5, 12, learned=True)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.uniform_(0.5, 2.0)
        ours.weight_g.copy_(theirs.parametrizations.weight.original0)
        ours.weight_v.copy_(theirs.parametrizations.weight.original1)
    x = torch.randn(7, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["none", "frozen", "learned"])
def test_parameters_are_counted(kind):
    made = head(kind)
    settings = config.Head(prototypes=12, hidden=8, bottleneck=5, weight_norm=kind)
    assert sum(p.numel() for p in made.parameters()) == accounting.head_parameters(settings, 6)


def test_frozen_lengths_are_1_and_stay():
    made = head("frozen")
    assert not made.last_layer.weight_g.requires_grad
    assert made.last_layer.weight_g.eq(1).all()
    assert made(torch.randn(4, 6)).abs().max() <= 1 + 1e-6  # cosines
    made(torch.randn(4, 6)).sum().backward()
    assert made.last_layer.weight_g.grad is None
    assert made.last_layer.weight_v.grad.abs().sum() > 0


def test_learnt_lengths_scale_the_scores():
    made, x = head("learned"), torch.randn(4, 6)
    before = made(x)
    with torch.no_grad():
        made.last_layer.weight_g[3] *= 2
    after = made(x)
    torch.testing.assert_close(after[:, 3], 2 * before[:, 3])
    torch.testing.assert_close(after[:, 4:], before[:, 4:])
