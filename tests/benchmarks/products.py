"""What the machine's matrix products can do: a large cube, and the very products of a step, each alone."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
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
class Timer:
    """The clock on the wall, or of the CPU: that one does not run while others have the core."""

    device: torch.device
    of_cpu: bool = False

    def now(self) -> float:
        """Seconds, once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.of_cpu else time.perf_counter()

    def seconds(self, run: Callable[[], object]) -> float:
        """How long one call takes, the mean of as many as it takes to tell."""
        times = 1
        while True:
            began = self.now()
            for _ in range(times):
                run()
            if (lasted := self.now() - began) >= LEAST_SECONDS:
                return lasted / times
            times *= 4


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

    def seconds(self, timer: Timer, repeats: int = 1) -> float:
        """Of one, after the first: the median of so many."""
        made = [value.make(timer.device) if isinstance(value, Layout) else value for value in self.arguments]
        self.function(*made)
        return statistics.median(timer.seconds(lambda: self.function(*made)) for _ in range(repeats))


def cube_flops_per_second(dtype: torch.dtype, timer: Timer) -> float:
    """Of a product of two square matrices, the median of a few."""
    side = Layout((CUBE, CUBE), (CUBE, 1), dtype)
    return 2 * CUBE**3 / Product(aten.mm.default, (side, side)).seconds(timer, REPEATS)


class Recorder(TorchDispatchMode):
    """Counts every product of matrices in its block, forward and backward, and how long they take where they stand."""

    def __init__(self, timer: Timer) -> None:
        super().__init__()
        self.timer = timer
        self.products: Counter[Product] = Counter()
        self.seconds = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _product(function, args)
        if product is None:
            return function(*args, **(kwargs or {}))
        self.products[product] += 1
        began = self.timer.now()
        result = function(*args, **(kwargs or {}))
        self.seconds += self.timer.now() - began
        return result


def _product(function: Any, args: Any) -> Product | None:
    if function in PLAIN:
        plain, first = PLAIN[function]
        return Product(plain, tuple(map(_layout, args[first : first + 2])))
    return Product(function, tuple(map(_layout, args))) if any(name in function.name() for name in WHOLE) else None


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Layout(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value
