"""LayerScale (arXiv 2103.17239, equation 4): a learnt factor for each channel of a residual branch.

    y = (x W^T + b) gamma = x (gamma W)^T + gamma b

The factor goes into the weights of the branch's last layer: on the activations it would have them kept for its own
gradient, and pass over all tokens once in forward and three times in backward. With g the gradient of y, G = g^T x:

    dx = g (gamma W)     dW = gamma G     db = gamma sum_t g_t     dgamma_j = sum_k G_jk W_jk + b_j sum_t g_tj
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.networks import fp8
from model.networks.again import product_dtype
from model.networks.init import Rule


class LayerScale(nn.Module):
    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))

    def initial(self) -> dict[str, Rule]:
        return {"gamma": self.value}

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """layer(x) times the factor. The compiler fuses the plain formula, and fp8 has scales of its own."""
        if torch.compiler.is_compiling() or fp8.is_converted(layer):
            return layer(x) * self.gamma  # type: ignore[no-any-return]
        scaled: Tensor = _ScaledLinear.apply(x.to(product_dtype(x)), layer.weight, layer.bias, self.gamma)
        return scaled


class _ScaledLinear(torch.autograd.Function):
    """x [..., k], weight [n, k], bias [n] or None, gamma [n]: [..., n] in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gamma)
        return F.linear(x, _rows(gamma, weight).to(x.dtype), None if bias is None else (gamma * bias).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        (g,) = grads
        x, weight, bias, gamma = ctx.saved_tensors
        dx = g @ _rows(gamma, weight).to(g.dtype)
        flat = g.flatten(0, -2)
        of_product = (flat.T @ x.flatten(0, -2)).to(weight.dtype)
        dgamma = torch.linalg.vecdot(of_product, weight)
        dweight = of_product.mul_(gamma[:, None])
        if bias is None:
            return dx, dweight, None, dgamma
        of_sum = flat.sum(0).to(bias.dtype)
        return dx, dweight, gamma * of_sum, dgamma + bias * of_sum


def _rows(gamma: Tensor, weight: Tensor) -> Tensor:
    return gamma[:, None] * weight
