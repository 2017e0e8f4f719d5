"""The projection heads of DINO and iBOT (arXiv 2104.14294 appendix C): v1 and v2 have weight norm in the last layer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Head
from model.networks.init import STD, Normal, Rule


class WeightNormLinear(nn.Module):
    """Bias-free, each row of the weight of a length of its own: g * v / ||v||. Without `learned` the lengths stay 1.

    Under the names of torch's `weight_norm`, which the released weights have.
    """

    def __init__(self, width: int, rows: int, *, learned: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(rows, 1), requires_grad=learned)
        self.weight_v = nn.Parameter(torch.empty(rows, width))

    def initial(self) -> dict[str, Rule]:
        return {"weight_g": 1.0, "weight_v": Normal(STD)}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x, self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True))
        )


class ProjectionHead(nn.Module):
    """An MLP to a narrow bottleneck, L2 normalised, then a score for each prototype."""

    def __init__(self, settings: Head, dim: int) -> None:
        super().__init__()
        self.prototypes = settings.prototypes
        widths = [dim, *[settings.hidden] * (settings.layers - 1), settings.bottleneck]
        layers: list[nn.Module] = []
        for width, after in itertools.pairwise(widths):
            layers += [nn.Linear(width, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer: nn.Module
        if settings.weight_norm == "none":
            self.last_layer = nn.Linear(settings.bottleneck, settings.prototypes, bias=False)
        else:
            learned = settings.weight_norm == "learned"
            self.last_layer = WeightNormLinear(settings.bottleneck, settings.prototypes, learned=learned)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> scores [..., prototypes], before any temperature."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-12))  # type: ignore[no-any-return]
