"""A step of student, teacher, optimizer and EMA again, over the global batch. Imports nothing of model/."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.model.oracle import formulas
from tests.model.oracle.formulas import ramp
from tests.model.oracle.network import Disturbed, Weights, backbone, head

Key = tuple[int, int]  # (crop, image)

CROPS = 2


@dataclass(frozen=True)
class Seen:
    """Views of the global batch: crop-major, as lists of crops of all images."""

    global_crops: Tensor  # [2, B, 3, G, G]
    local_crops: Tensor
    gram_crops: Tensor
    masks: Tensor  # [2, B, N]
    of_global: dict[Key, Disturbed]  # by (crop, image)
    of_local: dict[Key, Disturbed]


@dataclass
class State:
    """Weights by network and name."""

    student: dict[str, Weights]  # backbone, dino_head, ibot_head; without the last, the DINO head sees patches too
    teacher: dict[str, Weights]
    gram_teacher: Weights  # empty: there is none
    first: dict[str, Weights] = field(default_factory=dict)  # AdamW's moments
    second: dict[str, Weights] = field(default_factory=dict)
    centers: Weights = field(default_factory=dict)  # by use; without any, Sinkhorn-Knopp makes the targets


def train_step(state: State, seen: Seen, settings: dict, step: int, steps: int) -> dict[str, Tensor]:
    """One update, in place; the terms of the loss before it."""
    student = {
        network: {name: tensor.clone().requires_grad_(_learns(name, settings)) for name, tensor in weights.items()}
        for network, weights in state.student.items()
    }
    means: Weights = {}
    terms = losses(student, state, means, seen, settings, step, steps)
    terms["total"].backward()
    for network, weights in student.items():
        learnt = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
        gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in learnt.items()}
        _adamw(state, network, _clipped(gradients, settings), settings, step, steps)
    momentum = ramp(settings["ema"], step, steps)
    for network, weights in state.teacher.items():
        for name in weights:
            if _learns(name, settings):
                weights[name] = momentum * weights[name] + (1 - momentum) * state.student[network][name]
    for name, center in state.centers.items():
        state.centers[name] = settings["center_momentum"] * center + (1 - settings["center_momentum"]) * means[name]
    if state.gram_teacher and (step + 1) % settings["refresh_every"] == 0:
        state.gram_teacher = dict(state.teacher["backbone"])
    return {name: term.detach() for name, term in terms.items()}


def losses(
    student: dict[str, Weights], state: State, means: Weights, seen: Seen, settings: dict, step: int, steps: int
) -> dict[str, Tensor]:
    """The terms; `means` is filled with the teacher's mean scores by use."""
    images = range(seen.masks.shape[1])
    keys = [(crop, image) for crop in range(CROPS) for image in images]
    hidden = [(key, patch) for key in keys for patch, hides in enumerate(seen.masks[key]) if hides]
    with_ibot, temperature = settings["ibot"] > 0, settings["student_temp"]
    targets, patch_targets = _teach(state, means, seen, keys, hidden if with_ibot else [], settings, step, steps)

    masks = {key: seen.masks[key] if with_ibot else None for key in keys}
    own = {key: backbone(student["backbone"], seen.global_crops[key], masks[key], seen.of_global[key]) for key in keys}
    local_keys = [(crop, image) for crop in range(len(seen.local_crops)) for image in images]
    small = [
        backbone(student["backbone"], seen.local_crops[key], how=seen.of_local[key], local=True)[0]
        for key in local_keys
    ]
    of_global = torch.stack([head(student["dino_head"], own[key][0]) for key in keys]).unflatten(0, (CROPS, -1))
    of_local = torch.stack([head(student["dino_head"], cls) for cls in small]).unflatten(0, (-1, len(images)))
    terms = {
        "dino_global": formulas.dino(of_global, targets, temperature, skip_same=True),
        "dino_local": formulas.dino(of_local, targets, temperature, skip_same=False),
    }
    if with_ibot:
        of_patches = torch.stack([head(_of_patches(student), own[key][1][patch]) for key, patch in hidden])
        terms["ibot"] = formulas.ibot(of_patches, patch_targets, seen.masks.flatten(0, 1), temperature)
    if settings["koleo"]:
        by_crop = [torch.stack([own[crop, image][0] for image in images]) for crop in range(CROPS)]
        terms["koleo"] = torch.stack([formulas.koleo(cls, settings["koleo_group"]) for cls in by_crop]).mean()
    if state.gram_teacher:
        terms["gram"] = _gram(state, {key: patches for key, (_, patches) in own.items()}, seen, settings)
    return {**terms, "total": _total(terms, len(seen.local_crops), settings, step, steps)}


def _teach(state: State, means: Weights, seen: Seen, keys: list[Key], hidden: list[tuple[Key, int]], settings: dict,
           step: int, steps: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Targets [2, B, K] of the CLS tokens and [m, K] of the hidden patches."""
    teacher = state.teacher
    said = {key: backbone(teacher["backbone"], seen.global_crops[key]) for key in keys}
    temperature = ramp(settings["teacher_temp"], step, steps)
    scores = torch.stack([head(teacher["dino_head"], said[key][0]) for key in keys])
    means["dino"] = scores.mean(dim=0)
    targets = _targets(scores, state.centers.get("dino"), temperature).unflatten(0, (CROPS, -1))
    if not hidden:
        return targets, torch.empty(0)
    scores = torch.stack([head(_of_patches(teacher), said[key][1][patch]) for key, patch in hidden])
    means["ibot"] = scores.mean(dim=0)
    return targets, _targets(scores, state.centers.get("ibot"), temperature)


def _gram(state: State, own: dict[Key, Tensor], seen: Seen, settings: dict) -> Tensor:
    """Of the student's patches by (crop, image). gram_group: images whose patches meet in one matrix; 0: none do."""
    grid, images = int(seen.masks.shape[2] ** 0.5), seen.masks.shape[1]
    size = seen.gram_crops.shape[-1] // (seen.global_crops.shape[-1] // grid)
    anchors = {
        key: formulas.bicubic(backbone(state.gram_teacher, seen.gram_crops[key])[1], (size, size), (grid, grid))
        for key in own
    }
    group = settings["gram_group"]
    meet = [[key] for key in own]
    if group:
        meet = [[key for key in own if key[1] // group == number] for number in range(images // group)]
    matrices = []
    for keys in meet:
        ours, theirs = (torch.cat([patches[key] for key in keys])[None] for patches in (own, anchors))
        matrices.append(formulas.gram(ours, theirs, settings["clamp"]))
    return torch.stack(matrices).mean()


def _total(terms: Weights, local_crops: int, settings: dict, step: int, steps: int) -> Tensor:
    pairs_global, pairs_local = 2, 2 * local_crops
    pairs = pairs_global + pairs_local
    weights = {
        "dino_global": pairs_global / pairs,
        "dino_local": pairs_local / pairs * ramp(settings["local_weight"], step, steps),
        "ibot": settings["ibot"],
        "koleo": settings["koleo"] * CROPS,
        "gram": ramp(settings["gram_weight"], step, steps),
    }
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def _of_patches(networks: dict[str, Weights]) -> Weights:
    return networks.get("ibot_head", networks["dino_head"])


def _targets(scores: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    return formulas.sinkhorn(scores, temperature) if center is None else formulas.centered(scores, center, temperature)


def _learns(name: str, settings: dict) -> bool:
    return not name.endswith(("periods", "bias_mask", *settings["fixed"]))


def _clipped(gradients: Weights, settings: dict) -> Weights:
    """Scaled to a norm of at most `clip`: a network's together or, as version 1, each tensor's apart."""

    def factor(some: list[Tensor]) -> float:
        norm = torch.cat([gradient.flatten() for gradient in some]).square().sum().sqrt()
        return min(1.0, settings["clip"] / (float(norm) + 1e-6))

    together = factor(list(gradients.values()))
    apart = settings["clip_each"] == "parameter"
    return {name: gradient * (factor([gradient]) if apart else together) for name, gradient in gradients.items()}


def _adamw(state: State, network: str, gradients: Weights, settings: dict, step: int, steps: int) -> None:
    """arXiv 1711.05101, algorithm 2, with DINOv3's multipliers."""
    beta1, beta2 = settings["betas"]
    depth = 1 + max((int(name.split(".")[1]) for name in gradients if name.startswith("blocks.")), default=0)
    for name, gradient in gradients.items():
        lr = formulas.learning_rate(settings["lr"], step, steps, settings["batch"])
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
    return settings["layer_decay"] ** (depth + 1) if "token" in name or name == "pos_embed" else 1.0
