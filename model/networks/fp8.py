"""Linear layers whose products run in fp8 (e4m3), as DINOv3's 7B was trained (`precision.fp8: blocks`).

With x [m, k] the activations and W [n, k] the weight, each row of the left and each output channel of the right factor
scaled by its own largest entry over 448:

    y  = x W^T     fp8        dx = dy W     fp8        dW = dy^T x     bf16

The weight gradient stays in bf16: it is the sum over all tokens, where rounding adds up. Names and shapes of the
parameters are those of the plain layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.engine_section import FP8_MULTIPLE

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
LEAST_CAPABILITY = (9, 0)


def missing() -> str:
    """Why this machine cannot do it; empty if it can."""
    if not torch.cuda.is_available():
        return "fp8 needs a GPU of compute capability 9.0 or newer (H100), and there is none here"
    if (found := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
        return f"fp8 needs compute capability 9.0 or newer (H100), and {torch.cuda.get_device_name()} has {found}"
    return ""


def convert(module: nn.Module) -> None:
    """Have every linear layer in `module` multiply in fp8. Raises ValueError for widths that cannot."""
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if layer.in_features % FP8_MULTIPLE or layer.out_features % FP8_MULTIPLE:
            raise ValueError(
                f"precision.fp8: {name} is {layer.in_features} x {layer.out_features} wide, and fp8 needs multiples "
                f"of {FP8_MULTIPLE}; set it to none"
            )
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def is_converted(layer: nn.Linear) -> bool:
    return "forward" in vars(layer)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = layer.bias
    if (mask := getattr(layer, "bias_mask", None)) is not None:
        bias = bias * mask
    y: Tensor = Fp8Product.apply(x.flatten(0, -2).bfloat16(), layer.weight.bfloat16())
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.bfloat16()


class Fp8Product(torch.autograd.Function):
    """x W^T of bf16 [m, k] and [n, k], in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dx = product(dy.contiguous(), weight.T) if ctx.needs_input_grad[0] else None
        dw = dy.T @ x if ctx.needs_input_grad[1] else None
        return dx, dw


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] times right^T, right being [n, k], both rounded to fp8: bf16 [m, n]."""
    a, a_scale = quantise(left)
    b, b_scale = quantise(right)
    return scaled_mm(a, b.T, a_scale, b_scale.T)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[m, k] as e4m3 and an fp32 scale a row [m, 1]: x is about their product. A row of zeros has the scale 1."""
    peak = x.abs().amax(dim=1, keepdim=True).float()
    scale = torch.where(peak > 0, peak / LARGEST, 1.0)
    return (x.float() / scale).to(E4M3).contiguous(), scale


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """a [m, k] times b [k, n], which lies column by column; scales [m, 1] and [1, n]."""
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=torch.bfloat16)
