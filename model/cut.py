"""This process's part of a tensor: all of it, or some rows of one that is cut over the processes (`model.sharding`).

A process that cuts nothing never imports DTensor, which takes two seconds and 45 MiB.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

REPLICATE, SHARD = "replicate", "shard"
"""The dimensions of a mesh: over the first the same rows lie several times, over the second each lies once."""


def is_cut(tensor: Tensor) -> TypeGuard[DTensor]:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, sharing memory; the tensor itself where it is whole."""
    return tensor.to_local() if is_cut(tensor) else tensor


def rows(tensor: Tensor) -> range:
    """Which rows of the first dimension `local` has. A single number is one row."""
    total = tensor.shape[0] if tensor.ndim else 1
    if not is_cut(tensor):
        return range(total)
    place, processes = tensor.device_mesh.get_local_rank(SHARD), tensor.device_mesh[SHARD].size()
    each = -(-total // processes)  # as torch.chunk deals them: the last may have fewer, or none
    return range(min(place * each, total), min((place + 1) * each, total))


def whole(tensor: Tensor) -> Tensor:
    """All rows, a collective where the tensor is cut."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def shard_of(tensor: Tensor) -> tuple[int, int]:
    """Which of how many shards this process has. A copy's is -1: another process writes the same rows."""
    if not is_cut(tensor):
        return 0, 1
    assert any(placement.is_shard(0) for placement in tensor.placements)
    names = tensor.device_mesh.mesh_dim_names or ()
    if REPLICATE in names and tensor.device_mesh.get_local_rank(REPLICATE):
        return -1, tensor.device_mesh[SHARD].size()
    return tensor.device_mesh.get_local_rank(SHARD), tensor.device_mesh[SHARD].size()
