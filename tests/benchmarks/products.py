"""What the machine's matrix products can do: a large cube, and the very products of a step, each alone."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUBE = 4096
REPEATS = 3
LEAST_SECONDS = 0.02  # a product is repeated for so long: clocks are coarse, and on a GPU starting one takes time

aten = torch.ops.aten

PLAIN = {
    aten.mm.default: (aten.mm.default, 0),
    aten.mm.out: (aten.mm.default, 0),
    aten.addmm.default: (aten.mm.default, 1),
    aten.bmm.default: (aten.bmm.default, 0),
    aten.bmm.out: (aten.bmm.default, 0),
    aten.baddbmm.default: (aten.bmm.default, 1),
    aten.baddbmm_.default: (aten.bmm.default, 1),
}
"""Products, and where their factors stand: what is added to them is not theirs."""

WHOLE = ("convolution", "_scaled_mm", "attention")
"""Parts of the names of what cannot be told apart from its products, and is timed as it is."""


@dataclass(frozen=True)
class Layout:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        return tensor.copy_(torch.randn(self.shape, device=device)) if self.dtype.is_floating_point else tensor.zero_()


@dataclass(frozen=True)
class Product:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # a Layout for each tensor

    def seconds(self, device: torch.device) -> float:
        """Of one, after the first."""
        made = [value.make(device) if isinstance(value, Layout) else value for value in self.arguments]
        return seconds(lambda: self.function(*made), device)


def cube_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """The median of a few products of two square matrices."""
    side = Layout((CUBE, CUBE), (CUBE, 1), dtype)
    cube = Product(aten.mm.default, (side, side))
    return 2 * CUBE**3 / statistics.median(cube.seconds(device) for _ in range(REPEATS))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, once it has been called."""

    def taken(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    times = 1
    taken(times)
    while (lasted := taken(times)) < LEAST_SECONDS:
        times *= 4
    return lasted / times


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PLAIN:
            plain, first = PLAIN[function]
            self.products[Product(plain, tuple(map(_layout, args[first : first + 2])))] += 1
        elif any(name in function.name() for name in WHOLE):
            self.products[Product(function, tuple(map(_layout, args)))] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Any:
    """In this block every product of matrices is counted, forward and backward."""
    with _Recorder() as recorder:
        yield recorder.products


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Layout(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value
