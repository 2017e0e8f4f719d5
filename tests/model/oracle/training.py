"""A step of student, teacher, optimizer and EMA again, over the global batch. Imports nothing of model/."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.model.oracle import formulas
from tests.model.oracle.formulas import ramp
from tests.model.oracle.network import Disturbed, Weights, backbone, head

CROPS = 2


@dataclass(frozen=True)
class Seen:
    """Views of the global batch: crop-major, as lists of crops of all images."""

    global_crops: Tensor  # [2, B, 3, G, G]
    local_crops: Tensor
    gram_crops: Tensor
    masks: Tensor  # [2, B, N]
    of_global: dict[tuple[int, int], Disturbed]  # by (crop, image)
    of_local: dict[tuple[int, int], Disturbed]


@dataclass
class State:
    """Weights by network and name."""

    student: dict[str, Weights]  # backbone, dino_head, ibot_head
    teacher: dict[str, Weights]
    gram_teacher: Weights
    first: dict[str, Weights] = field(default_factory=dict)  # AdamW's moments
    second: dict[str, Weights] = field(default_factory=dict)
    centers: Weights = field(default_factory=dict)  # by head; without any, Sinkhorn-Knopp makes the targets


def train_step(state: State, seen: Seen, settings: dict, step: int, steps: int) -> dict[str, Tensor]:
    """One update, in place; the terms of the loss before it."""
    student = {
        network: {name: tensor.clone().requires_grad_(_learns(name)) for name, tensor in weights.items()}
        for network, weights in state.student.items()
    }
    means: Weights = {}
    terms = losses(student, state, means, seen, settings, step, steps)
    terms["total"].backward()
    for network, weights in student.items():
        learnt = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
        gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in learnt.items()}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).square().sum().sqrt()
        clipped = {
            name: gradient * min(1.0, settings["clip"] / (float(norm) + 1e-6)) for name, gradient in gradients.items()
        }
        _adamw(state, network, clipped, settings, step, steps)
    momentum = ramp(settings["ema"], step, steps)
    for network, weights in state.teacher.items():
        for name in weights:
            if _learns(name):
                weights[name] = momentum * weights[name] + (1 - momentum) * state.student[network][name]
    for name, center in state.centers.items():
        state.centers[name] = settings["center_momentum"] * center + (1 - settings["center_momentum"]) * means[name]
    if (step + 1) % settings["refresh_every"] == 0:
        state.gram_teacher = dict(state.teacher["backbone"])
    return {name: term.detach() for name, term in terms.items()}


def losses(
    student: dict[str, Weights], state: State, means: Weights, seen: Seen, settings: dict, step: int, steps: int
) -> dict[str, Tensor]:
    """The terms; `means` is filled with the teacher's mean scores by head."""
    teacher = state.teacher
    images, grid = range(seen.masks.shape[1]), int(seen.masks.shape[2] ** 0.5)
    keys = [(crop, image) for crop in range(CROPS) for image in images]
    hidden = [(key, patch) for key in keys for patch in range(grid * grid) if seen.masks[key][patch]]

    said = {key: backbone(teacher["backbone"], seen.global_crops[key]) for key in keys}
    temperature = ramp(settings["teacher_temp"], step, steps)
    scores = torch.stack([head(teacher["dino_head"], said[key][0]) for key in keys])
    means["dino_head"] = scores.mean(dim=0)
    targets = _targets(scores, state.centers.get("dino_head"), temperature).unflatten(0, (CROPS, -1))
    scores = torch.stack([head(teacher["ibot_head"], said[key][1][patch]) for key, patch in hidden])
    means["ibot_head"] = scores.mean(dim=0)
    patch_targets = _targets(scores, state.centers.get("ibot_head"), temperature)
    size = seen.gram_crops.shape[-1] // (seen.global_crops.shape[-1] // grid)
    anchors = torch.stack(
        [
            formulas.bicubic(backbone(state.gram_teacher, seen.gram_crops[key])[1], (size, size), (grid, grid))
            for key in keys
        ]
    )

    own = {
        key: backbone(student["backbone"], seen.global_crops[key], seen.masks[key], seen.of_global[key]) for key in keys
    }
    local_keys = [(crop, image) for crop in range(len(seen.local_crops)) for image in images]
    small = [
        backbone(student["backbone"], seen.local_crops[key], how=seen.of_local[key], local=True)[0]
        for key in local_keys
    ]
    of_global = torch.stack([head(student["dino_head"], own[key][0]) for key in keys]).unflatten(0, (CROPS, -1))
    of_local = torch.stack([head(student["dino_head"], cls) for cls in small]).unflatten(0, (-1, len(images)))
    of_patches = torch.stack([head(student["ibot_head"], own[key][1][patch]) for key, patch in hidden])
    masks = seen.masks.flatten(0, 1)
    by_crop = [torch.stack([own[crop, image][0] for image in images]) for crop in range(CROPS)]
    terms = {
        "dino_global": formulas.dino(of_global, targets, settings["student_temp"], skip_same=True),
        "dino_local": formulas.dino(of_local, targets, settings["student_temp"], skip_same=False),
        "ibot": formulas.ibot(of_patches, patch_targets, masks, settings["student_temp"]),
        "koleo": torch.stack([formulas.koleo(features, settings["group"]) for features in by_crop]).mean(),
        "gram": formulas.gram(torch.stack([own[key][1] for key in keys]), anchors),
    }
    pairs_global, pairs_local = 2, 2 * len(seen.local_crops)
    pairs = pairs_global + pairs_local
    weights = {
        "dino_global": pairs_global / pairs,
        "dino_local": pairs_local / pairs * ramp(settings["local_weight"], step, steps),
        "ibot": 1.0,
        "koleo": settings["koleo"] * CROPS,
        "gram": ramp(settings["gram_weight"], step, steps),
    }
    return {**terms, "total": torch.stack([weights[name] * term for name, term in terms.items()]).sum()}


def _targets(scores: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    return formulas.sinkhorn(scores, temperature) if center is None else formulas.centered(scores, center, temperature)


def _learns(name: str) -> bool:
    return not name.endswith(("periods", "bias_mask"))


def _adamw(state: State, network: str, gradients: Weights, settings: dict, step: int, steps: int) -> None:
    """arXiv 1711.05101, algorithm 2, with DINOv3's multipliers."""
    beta1, beta2 = settings["betas"]
    depth = 1 + max((int(name.split(".")[1]) for name in gradients if name.startswith("blocks.")), default=0)
    for name, gradient in gradients.items():
        lr = ramp(settings["lr"], step, steps) * 4 * (settings["batch"] / 1024) ** 0.5
        lr *= _lr_multiplier(network, name, depth, settings)
        if name.startswith("last_layer") and step < settings["frozen_steps"]:
            lr = 0.0
        decays = not (name.endswith(("bias", "gamma")) or "norm" in name)
        decay = ramp(settings["weight_decay"], step, steps) if decays else 0.0
        m = state.first.setdefault(network, {}).get(name, torch.zeros_like(gradient))
        v = state.second.setdefault(network, {}).get(name, torch.zeros_like(gradient))
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient * gradient
        state.first[network][name], state.second[network][name] = m, v
        step_size = (m / (1 - beta1 ** (step + 1))) / ((v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
        old = state.student[network][name]
        state.student[network][name] = old - lr * decay * old - lr * step_size


def _lr_multiplier(network: str, name: str, depth: int, settings: dict) -> float:
    if network != "backbone":
        return 1.0
    if name.startswith("blocks."):
        return settings["layer_decay"] ** (depth - int(name.split(".")[1]))
    if name.startswith("patch_embed"):
        return settings["layer_decay"] ** (depth + 1) * settings["patch_lr"]
    return settings["layer_decay"] ** (depth + 1) if "token" in name else 1.0
