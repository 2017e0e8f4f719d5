"""Losses are computed in fp32 or better, whatever precision the networks ran in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def promote(tensor: Tensor) -> Tensor:
    """`tensor` in fp32 if it is of a smaller floating type; fp32, fp64 and integers stay as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def at_least_fp32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: tensor arguments are promoted and autocast, which would take the products back to bf16, is off."""

    @functools.wraps(function)
    def promoted(*args: P.args, **kwargs: P.kwargs) -> R:
        values: list[Any] = [promote(value) if isinstance(value, Tensor) else value for value in args]
        named: dict[str, Any] = {
            key: promote(value) if isinstance(value, Tensor) else value for key, value in kwargs.items()
        }
        device = next(value.device.type for value in [*values, *named.values()] if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*values, **named)

    return promoted
