"""The projection heads of DINO and iBOT (arXiv 2104.14294 appendix C; DINOv3 has no weight norm in the last layer)."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Head


class ProjectionHead(nn.Module):
    """An MLP to a narrow bottleneck, L2 normalised, then a score for each prototype."""

    def __init__(self, settings: Head, dim: int) -> None:
        super().__init__()
        widths = [dim, *[settings.hidden] * (settings.layers - 1), settings.bottleneck]
        layers: list[nn.Module] = []
        for width, after in itertools.pairwise(widths):
            layers += [nn.Linear(width, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = nn.Linear(settings.bottleneck, settings.prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> scores [..., prototypes], before any temperature."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-12))  # type: ignore[no-any-return]
