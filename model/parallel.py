"""What the processes of an attempt say to each other: sums, gathers, gradients.

Every function is a no-op of the same meaning in a process that joined no group, so that losses and tests need no
special case. Nothing here carries a gradient: losses are written so that micro-batches and ranks sum to the global
loss, and the gradients are summed once, at the end of a step.

What the sums, maxima and gathers answered can be written down (`recorded`) and given again (`answered`), so that one
rank of many can be replayed alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from model import cut


def join(backend: str) -> Store:
    """Join the group that torchrun's environment describes and return the rendezvous store (for `model.stopping`).

    The ranks' collectives use a name space of their own within that store.
    """
    store: Store
    store, own_rank, size = next(rendezvous("env://"))
    group_store = PrefixStore("group", store)
    distributed.init_process_group(backend, store=group_store, rank=own_rank, world_size=size)
    return store


def leave() -> None:
    """Leave the group, if this process is in one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


P = ParamSpec("P")

_written: ContextVar[list[Tensor] | None] = ContextVar("written", default=None)
_given: ContextVar[Iterator[Tensor] | None] = ContextVar("given", default=None)


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """In this block every collective's answer is added to the list that the block gets."""
    answers: list[Tensor] = []
    token = _written.set(answers)
    try:
        yield answers
    finally:
        _written.reset(token)


@contextmanager
def answered(answers: Sequence[Tensor]) -> Iterator[None]:
    """In this block the collectives ask nobody: they give `answers`, in order, in dtype and place of what is asked.

    Raises ValueError if there are too few or too many, or one has not the shape that such an answer has.
    """
    left = iter(answers)
    token = _given.set(left)
    try:
        yield
    finally:
        _given.reset(token)
    if unused := len(list(left)):
        raise ValueError(f"{unused} of {len(answers)} recorded answers of collectives were not asked for")


def _taped(collective: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator of a collective, whose first argument is this rank's tensor."""

    @functools.wraps(collective)
    def taped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if (given := _given.get()) is not None:
            asked = args[0]
            assert isinstance(asked, Tensor)
            return _next(given, asked, same_shape=collective.__name__ != "all_gather")
        answer = collective(*args, **kwargs)
        if (written := _written.get()) is not None:
            written.append(answer)
        return answer

    return taped


def _next(given: Iterator[Tensor], asked: Tensor, *, same_shape: bool) -> Tensor:
    answer = next(given, None)
    if answer is None:
        raise ValueError("there are fewer recorded answers of collectives than are asked for")
    if same_shape and answer.shape != asked.shape:
        raise ValueError(f"a recorded answer is {list(answer.shape)}, where {list(asked.shape)} was asked for")
    return answer.to(asked)


@_taped
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of every rank's `tensor` (same shape and dtype on all), as a new tensor without gradient."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total


@_taped
def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest of every rank's `tensor`, entry by entry, as a new tensor without gradient."""
    largest = tensor.detach().clone(memory_format=torch.contiguous_format)
    if distributed.is_initialized():
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return largest


@_taped
def all_gather(tensor: Tensor, dim: int = 0) -> Tensor:
    """Every rank's `tensor` (same shape and dtype on all), joined along `dim` in rank order, without gradient."""
    own = tensor.detach().contiguous()
    if not distributed.is_initialized():
        return own.clone()
    parts = [torch.empty_like(own) for _ in range(world())]
    distributed.all_gather(parts, own)
    return torch.cat(parts, dim)


def gather_text(text: str) -> list[str]:
    """Every rank's `text`, in rank order. As bytes: torch's own gather of objects would unpickle what it receives."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = all_gather(torch.tensor([len(own)])).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    rows = all_gather(padded[None])
    return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]


def reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over all ranks, in place; every rank names the same parameters in the same order.

    One flat buffer for each dtype, so that the order of the additions depends on the layout alone. A parameter
    without a gradient gets zeros: it may have one on another rank, and the optimizer must do the same in any layout.
    Those of cut networks (`model.sharding`) were summed as they arose.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if not cut.is_cut(parameter):
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    if not distributed.is_initialized():
        return
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
