"""Tensors that are not read yet. Files of any size are converted with one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor


class WeightsError(ValueError):
    """Weights that cannot be read, do not fit, or have no place where they should go; the message names them."""


@dataclass(frozen=True)
class Entry:
    """A tensor by its shape and dtype; `read` brings it, as often as it is asked."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


Entries = Mapping[str, Entry]


def of(tensor: Tensor) -> Entry:
    """Of a tensor that is in memory."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def in_file(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Entry:
    """Of the contiguous tensor that begins `offset` bytes into a file.

    Read, not mapped: torch and safetensors map privately, which a machine with less memory than the file refuses.
    """
    return Entry(tuple(shape), dtype, partial(_read, path, offset, tuple(shape), dtype))


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        with path.open("rb") as file:
            file.seek(offset)
            wanted = tensor.reshape(-1).view(torch.uint8).numpy().data
            if file.readinto(wanted) != wanted.nbytes:
                raise WeightsError(f"{path} ends within a tensor: the file is torn")
    return tensor


def filled(shape: Sequence[int], dtype: torch.dtype, value: float) -> Entry:
    return Entry(tuple(shape), dtype, lambda: torch.full(tuple(shape), value, dtype=dtype))


def reshaped(entry: Entry, shape: Sequence[int]) -> Entry:
    return Entry(tuple(shape), entry.dtype, lambda: entry.read().reshape(tuple(shape)))


def third(entry: Entry, index: int) -> Entry:
    """Rows [index, index + 1) thirds of the first dimension: queries, keys or values of a packed layer."""
    rows = entry.shape[0] // 3
    shape = (rows, *entry.shape[1:])
    return Entry(shape, entry.dtype, lambda: entry.read()[index * rows : (index + 1) * rows])


def joined(parts: Sequence[Entry]) -> Entry:
    """One after the other along the first dimension."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def compare(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every name that is missing or unexpected, and every shape that is another."""
    mistakes = [f"missing {name} {list(wanted[name])}" for name in wanted if name not in found]
    mistakes += [f"unexpected {name} {list(found[name])}" for name in found if name not in wanted]
    return mistakes + [
        f"{name} is {list(found[name])} and not {list(wanted[name])}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]


def shapes(entries: Entries) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in entries.items()}
