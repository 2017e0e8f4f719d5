"""Activations that backward computes again instead of keeping them: cheap functions of what is kept anyway.

    y = then(function(*inputs))          norms, GELU, short attention and the like before a linear layer

The layer would keep function(*inputs) for its weight's gradient, and the function its inputs for its own gradient.
Without the former a block keeps half as much. Computing them again takes 5 % of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def again(function: Callable[..., Tensor], inputs: Sequence[Tensor], then: Callable[[Tensor], Tensor]) -> Tensor:
    """then(function(*inputs)); what `then` would keep of the function's result is computed again in backward.

    Under activation checkpointing and torch.compile, which choose for themselves what is kept, it is just that.
    """
    y = function(*inputs)
    dtype = product_dtype(y)
    y = y.to(dtype)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _others_choose():
        return then(y)

    def restored(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else function(*inputs).to(dtype).view(kept)

    with saved_tensors_hooks(_Forget(y.data_ptr(), y.numel()), restored):
        return then(y)


@dataclass(frozen=True)
class _Forget:
    """Keeps the shape alone of the tensor at this address, and every other as it is."""

    address: int
    numel: int

    def __call__(self, tensor: Tensor) -> Tensor | torch.Size:
        mine = tensor.data_ptr() == self.address and tensor.numel() == self.numel
        return tensor.shape if mine else tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast computes products of `x` in: cast here, so that the layer keeps nothing that is not `y`."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _others_choose() -> bool:
    """Whether somebody else decides what is kept here: hooks do not stack, the innermost alone are asked."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not isinstance(hooks[0], _Forget)
