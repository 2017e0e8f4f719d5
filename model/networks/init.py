"""Initial weights, by counter: a row of a parameter depends on (seed, the parameter's name, the row's number) alone.

So they are the same whatever is built before, on however many processes, and a shard can be filled without the rest.
No generator of torch is involved: a network is built on the meta device, then allocated and filled here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model import cut, draws

STD = 0.02
"""Of linear layers and learnt tokens (DINOv3 cuts the normal at +-2, a hundred standard deviations: never)."""


@dataclass(frozen=True)
class Normal:
    std: float


@dataclass(frozen=True)
class Uniform:
    bound: float  # drawn from [-bound, bound)


FloatArray = npt.NDArray[np.float32]

Rule = Normal | Uniform | float | Tensor
"""How a tensor begins: drawn, all the same number, or these values (buffers; computed on the CPU)."""


@runtime_checkable
class HasInitial(Protocol):
    """A module that holds parameters or buffers of its own, or wants its children's to begin otherwise than usual."""

    def initial(self) -> dict[str, Rule]:
        """Rules by name, relative to the module. An outer module's rule wins over an inner one's."""
        ...


M = TypeVar("M", bound=nn.Module)


class Make(Protocol):
    """`create`, or one that lays the networks out as a phase asks (`model.job`)."""

    def __call__(self, kind: Callable[[], M], seed: int, name: str) -> M: ...


def create(
    kind: Callable[[], M],
    seed: int,
    name: str,
    prepare: Callable[[nn.Module], None] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> M:
    """The module that `kind` builds with its initial weights, drawn in fp32; parameters are named `<name>.*`.

    Where `prepare` cuts it over processes (`model.sharding`), each fills its own rows and never has the others.
    """
    with torch.device("meta"):
        module = kind()
    if prepare is not None:
        prepare(module)
    _allocate(module, device)
    rules = initial_rules(module)
    with torch.no_grad():
        for key, tensor in module.state_dict(keep_vars=True).items():
            own = cut.local(tensor.data)
            fill(own, rules[key], seed, f"{name}.{key}", cut.rows(tensor).start)
    return module.to(dtype)


def _allocate(module: nn.Module, device: torch.device | str) -> None:
    """Memory for a module on the meta device, where it is cut for this process's rows alone."""
    if any(cut.is_cut(parameter) for parameter in module.parameters()):
        module.to_empty(device=device)
        return
    # Of whole tensors to_empty does no more than this, in a way that imports sympy: 0.4 s of each process.
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            setattr(part, name, nn.Parameter(empty, tensor.requires_grad) if parameter else empty)


def initial_rules(module: nn.Module) -> dict[str, Rule]:
    """A rule for each entry of the module's state_dict. Raises TypeError naming the entries that have none."""
    rules: dict[str, Rule] = {}
    for prefix, part in module.named_modules():  # from the outside in, so that the outermost rule is set first
        for key, rule in _own_rules(part).items():
            rules.setdefault(f"{prefix}.{key}" if prefix else key, rule)
    without = [key for key in module.state_dict() if key not in rules]
    if without:
        raise TypeError(f"{type(module).__name__}: no initial value for {', '.join(without)}; add it to initial()")
    return rules


def _own_rules(module: nn.Module) -> dict[str, Rule]:
    own: dict[str, Rule] = {}
    if isinstance(module, nn.Linear):
        own = {"weight": Normal(STD), "bias": 0.0}
    elif isinstance(module, nn.Embedding):
        own = {"weight": Normal(STD)}
    elif isinstance(module, nn.LayerNorm):
        own = {"weight": 1.0, "bias": 0.0}
    elif isinstance(module, nn.Conv2d):
        bound = module.weight[0].numel() ** -0.5  # fan-in, for the bias too
        own = {"weight": Uniform(bound), "bias": Uniform(bound)}
    return {**own, **module.initial()} if isinstance(module, HasInitial) else own


def fill(tensor: Tensor, rule: Rule, seed: int, name: str, first_row: int = 0) -> None:
    """Fill `tensor` in place with rows [first_row, first_row + len) of the parameter `name`.

    A row is an index of the first dimension. What is drawn is drawn in fp32 on the CPU, wherever the tensor is.
    """
    if isinstance(rule, float):
        tensor.fill_(rule)
    elif isinstance(rule, Tensor):
        tensor.copy_(rule[first_row : first_row + len(tensor)])
    elif tensor.numel():
        drawn = tensor if tensor.device.type == "cpu" else torch.empty(tensor.shape, device="cpu")
        rows = drawn.numpy().reshape(len(tensor), -1)
        generator = draws.generator(seed, "init", name)
        for number, row in enumerate(rows, first_row):
            _seek(generator, number)
            _draw(generator, rule, row)
        rows *= rule.std if isinstance(rule, Normal) else rule.bound
        if drawn is not tensor:
            tensor.copy_(drawn)


def _seek(generator: np.random.Generator, row: int) -> None:
    """Begin the row's own stretch of Philox's 256-bit counter. Ten times as fast as a generator for each row."""
    state: Any = generator.bit_generator.state
    state["state"]["counter"][:] = (0, 0, row, 0)
    generator.bit_generator.state = {**state, "buffer_pos": 4, "has_uint32": 0}  # 4: nothing is left in the buffer


def _draw(generator: np.random.Generator, rule: Normal | Uniform, row: FloatArray) -> None:
    """Unit normal or U[-1, 1) numbers into `row`."""
    if isinstance(rule, Normal):
        generator.standard_normal(out=row, dtype=np.float32)
    else:
        generator.random(out=row, dtype=np.float32)
        row *= 2
        row -= 1
