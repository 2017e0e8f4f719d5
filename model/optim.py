"""AdamW over the trained networks: parameter groups, learning rate and weight decay at a step, clipping, state by name.

The groups are DINOv3's (released code, `param_groups`): learning rates fall by `layer_decay` a block from the output
down, biases, norms and LayerScale are not decayed, tokens are, and the prototypes stand still at first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from model import config, cut, schedules
from model.objectives.base import State, copy_strictly
from model.sealed import Stored

BACKBONE = "backbone"
"""The trained network whose blocks have decaying learning rates; heads and towers of other names train at 1.0."""

ENTRIES = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter."""


@dataclass
class Group:
    """Parameters, by name, that one update takes alike. `set_step` sets `lr` and `weight_decay` for the next one."""

    parameters: dict[str, nn.Parameter]
    moments: dict[str, dict[str, Tensor]]  # entry -> parameter -> tensor
    lr_multiplier: float
    decays: bool
    prototypes: bool
    lr: float = 0.0
    weight_decay: float = 0.0


@dataclass
class Optimizer:
    """AdamW with eps 1e-8. The arithmetic is torch's own functional form: its class would import the whole of
    torch.compile with its first group, a second and 116 MiB of each process."""

    groups: list[Group]
    beta1: float
    beta2: float

    def zero_grad(self) -> None:
        for group in self.groups:
            for parameter in group.parameters.values():
                parameter.grad = None


def build(networks: Mapping[str, nn.Module], settings: config.Optim) -> Optimizer:
    """AdamW over the parameters of `networks` that ask for gradients, on the device where they are.

    Parameters are named `<network>.<name>`. The learning rate is 0 until `set_step`. The state is there from the
    start, zeros, so that a checkpoint always has all of it. Raises ValueError if there is nothing to train.
    """
    groups: dict[tuple[float, bool, bool, bool], dict[str, nn.Parameter]] = {}
    for network, module in networks.items():
        depth = _depth(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                key = (
                    _lr_multiplier(network, name, depth, settings),
                    _decays(name, parameter),
                    _is_prototypes(name),
                    cut.is_cut(parameter),  # one fused update takes tensors that lie alike
                )
                groups.setdefault(key, {})[f"{network}.{name}"] = parameter
    if not groups:
        raise ValueError(f"nothing to train: no parameter of {sorted(networks)} asks for gradients")
    return Optimizer(
        [
            Group(parameters, _no_moments(parameters), multiplier, decays, prototypes)
            for (multiplier, decays, prototypes, _), parameters in groups.items()
        ],
        settings.beta1,
        settings.beta2,
    )


def _no_moments(parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    steps = {n: torch.zeros((), dtype=torch.float32, device=p.device) for n, p in parameters.items()}
    zeros = {
        entry: {n: torch.zeros_like(p, requires_grad=False) for n, p in parameters.items()} for entry in ENTRIES[1:]
    }
    return {"step": steps, **zeros}


def set_step(optimizer: Optimizer, settings: config.Optim, step: int, steps: int) -> dict[str, float]:
    """Set what the update after `step` updates of a phase of `steps` uses; returns `lr` and `weight_decay` to report.

    Prototypes have a learning rate of 0 while frozen, so that neither gradient nor decay moves them, as in DINOv3;
    their moments are updated all the same.
    """
    lr = schedules.learning_rate(settings, step, steps)
    weight_decay = schedules.value(settings.weight_decay, step, steps)
    for group in optimizer.groups:
        frozen = group.prototypes and step < settings.freeze_last_layer_steps
        group.lr = 0.0 if frozen else lr * group.lr_multiplier
        group.weight_decay = weight_decay if group.decays else 0.0
    return {"lr": lr, "weight_decay": weight_decay}


@torch.no_grad()
def update(optimizer: Optimizer, finite: Tensor) -> None:
    """Make the update, if `finite` (bool, on the device): else weights, moments and counts stay as they are.

    The fused kernels look at the flag themselves, as they do for torch's GradScaler, so nobody waits for it.
    """
    not_finite = 1 - finite.float()
    for group in optimizer.groups:
        names = [name for name, parameter in group.parameters.items() if parameter.grad is not None]
        if not names:
            continue
        adamw(
            [group.parameters[name] for name in names],
            [gradient for name in names if (gradient := group.parameters[name].grad) is not None],
            [group.moments["exp_avg"][name] for name in names],
            [group.moments["exp_avg_sq"][name] for name in names],
            [],
            [group.moments["step"][name] for name in names],
            fused=True, foreach=False, amsgrad=False, maximize=False, found_inf=not_finite,
            beta1=optimizer.beta1, beta2=optimizer.beta2, lr=group.lr, weight_decay=group.weight_decay, eps=1e-8,
        )  # fmt: skip


def clip(networks: Mapping[str, nn.Module], limit: float | None, each: str = "network") -> dict[str, Tensor]:
    """Scale the gradients of each network, apart, to a norm of at most `limit`; returns the norms before, by network.

    With `each` "parameter" every tensor's gradient apart, as DINO does (`clip_gradients` in its code). To be called
    once the gradients are summed over the ranks. Without a limit it only measures.
    """
    most = math.inf if limit is None or each == "parameter" else limit
    norms = {
        name: cut.whole(nn.utils.clip_grad_norm_(network.parameters(), most)) for name, network in networks.items()
    }
    if limit is not None and each == "parameter":
        for network in networks.values():
            for parameter in network.parameters():
                nn.utils.clip_grad_norm_(parameter, limit)
    return norms


def state(optimizer: Optimizer) -> State:
    """The moments and update counts by name, `exp_avg/<network>.<parameter>` and so on. Not copied."""
    return {
        f"{entry}/{name}": group.moments[entry][name]
        for group in optimizer.groups
        for name in group.parameters
        for entry in ENTRIES
    }


def load(optimizer: Optimizer, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Restore what `state` gave, in place. Raises ValueError that lists names and shapes that do not fit; nothing is
    changed then."""
    copy_strictly(state(optimizer), tensors, "optimizer")


def _depth(module: nn.Module) -> int:
    """Blocks of a transformer, by its parameters' names; 0 for other networks."""
    blocks = [_block(name) for name, _ in module.named_parameters()]
    return 1 + max((block for block in blocks if block is not None), default=-1)


def _block(name: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def _lr_multiplier(network: str, name: str, depth: int, settings: config.Optim) -> float:
    """layer_decay ** (layers above): none above the final norms, one a block, depth + 1 above the tokens' embedding."""
    if network != BACKBONE:
        return 1.0
    block = _block(name)
    if block is not None:
        return settings.layer_decay ** (depth - block)
    if name.startswith("patch_embed."):
        return settings.layer_decay ** (depth + 1) * settings.patch_embed_lr
    if name.endswith(("_token", "_tokens")) or name == "pos_embed":
        return settings.layer_decay ** (depth + 1)
    return 1.0


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Not for biases, norms, LayerScale and single numbers (a logit scale). Tokens are decayed, as in DINOv3's code."""
    segments = name.split(".")
    return segments[-1] not in ("bias", "gamma") and not any("norm" in part for part in segments) and parameter.ndim > 0


def _is_prototypes(name: str) -> bool:
    return name.split(".")[0] == "last_layer"
