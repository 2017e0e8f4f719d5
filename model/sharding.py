"""How a network lies in the processes: whole in each, or cut by rows over all of them (FSDP2) or over some (HSDP).

    Prepare(settings, precision)(network)      on the meta device, before it has weights: `model.networks.init.create`

A network that is cut keeps its names and shapes: its parameters are DTensors whose first dimension is dealt to the
processes (`model.cut`). Each block is gathered while it computes and let go afterwards, so no process ever holds a
whole network. The ranks' losses sum to the global one, so gradients are summed, not averaged.
"""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils import checkpoint as recompute

from model import config, cut, parallel
from model.cut import REPLICATE, SHARD
from model.networks import fp8

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""What selective checkpointing does not compute again: the dear operations, which most of the FLOPs are in."""


# --- what a machine can do --------------------------------------------------------------------------------------------


def check(settings: config.AnyPhase, world: int) -> None:
    """Raises ValueError for what these processes on this machine cannot do."""
    ways = settings.parallel
    if ways.shard == "hsdp" and world % _shard_size(ways):
        raise ValueError(
            f"parallel.shard_size: {world} processes cannot be cut into copies of {_shard_size(ways)}: take a divisor"
        )
    if ways.compile and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            "parallel.compile: torch.compile needs a C++ compiler on a CPU: install g++, or set it to false"
        )
    if settings.precision.fp8 != "none" and (reason := fp8.missing()):
        raise ValueError(f"precision.fp8: {reason}; set it to none")


def _shard_size(ways: config.Parallel) -> int:
    return ways.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# --- laying a network out ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepare:
    """Lays out networks as a phase asks. `device`: where they will be."""

    ways: config.Parallel
    precision: config.Precision
    device: torch.device

    def __call__(self, network: nn.Module) -> None:
        """To be called while the network is on the meta device."""
        blocks = list(getattr(network, "blocks", ()))
        for block in blocks:
            if self.precision.fp8 == "blocks":
                fp8.convert(block)
            if self.ways.activation_checkpointing != "none":
                block.forward = _recomputed(block.forward, selective=self.ways.activation_checkpointing == "selective")
            if self.ways.compile:
                block.forward = torch.compile(block.forward)
        if self.ways.shard != "none" and any(parameter.ndim for parameter in network.parameters()):
            for module in (*blocks, network):
                self._cut(module)

    def _cut(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here, see model.cut

        half = torch.bfloat16 if self.precision.products == "bf16" else None
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
        )
        # Always let go after the forward pass: a teacher has no backward pass that would, and would go stale.
        sharded = fully_shard(
            module, mesh=mesh(self.ways, self.device.type), mp_policy=policy, reshard_after_forward=True
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


@functools.cache
def mesh(ways: config.Parallel, device: str) -> DeviceMesh:
    """All processes as [shard], or as [replicate, shard]. The same object for the same settings."""
    from torch.distributed.device_mesh import init_device_mesh  # here, see model.cut

    if ways.shard == "fsdp":
        return init_device_mesh(device, (parallel.world(),), mesh_dim_names=(SHARD,))
    size = _shard_size(ways)
    return init_device_mesh(device, (parallel.world() // size, size), mesh_dim_names=(REPLICATE, SHARD))


def _recomputed(forward: Any, *, selective: bool) -> Any:
    """`forward` with its activations computed again in the backward pass. Nothing is drawn there."""
    contexts = {}
    if selective:
        policy = functools.partial(recompute.create_selective_checkpoint_contexts, list(KEPT))
        contexts = {"context_fn": policy}
    return functools.partial(recompute.checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def last_micro_batch(networks: dict[str, nn.Module], last: bool) -> None:
    """To be said before each backward pass: copies of shards sum their gradients with each other at the last only."""
    for network in networks.values():
        parameter = next(network.parameters(), None)
        if parameter is not None and cut.is_cut(parameter):
            cast("FSDPModule", network).set_requires_all_reduce(last)
