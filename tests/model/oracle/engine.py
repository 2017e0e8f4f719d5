"""The engine, driven through the same steps as the oracle: one case says to both what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import config, optim, parallel
from model.data.batch import SslBatch
from model.data.masks import group_masks
from model.objectives.base import Moment
from model.objectives.build import build
from tests.model.oracle import formulas
from tests.model.oracle.network import EPS, HEADS, PATCH, Disturbed
from tests.model.oracle.training import CROPS, Seen, State, train_step

BATCH, LOCALS, DEPTH = 8, 2, 2
SEED, ORIGIN, CLOCK = 7, "pretrain", 30
TERMS = {"dino_global", "dino_local", "ibot", "koleo", "gram", "total"}


@dataclass(frozen=True)
class Case:
    model: dict[str, Any]  # of the spec, without what `backbone` below adds
    phase: dict[str, Any]  # of the spec
    oracle: dict[str, Any]  # the oracle's settings, and how crops are disturbed
    uneven: bool = False  # whether the first group has more hidden patches than the others, and the last has none

    @property
    def group(self) -> int:
        return int(self.phase["optim"]["group_size"])

    @property
    def steps(self) -> int:
        return int(self.phase["steps"])


ORACLE: dict[str, Any] = {
    "batch": BATCH, "student_temp": 0.1, "local_weight": {"peak": 1.0}, "gram_weight": {"peak": 2.0}, "ibot": 1.0,
    "koleo": 0.1, "clip": 3.0, "clip_each": "network", "betas": (0.9, 0.999), "layer_decay": 1.0, "patch_lr": 1.0,
    "frozen_steps": 0, "fixed": (), "center_momentum": 0.9, "clamp": "none", "gram_group": 0,
    "rates": [0.0] * DEPTH, "shift": 0.0, "jitter": 1.0, "rescale": 1.0, "bend_per_block": False,
}  # fmt: skip
"""What a case's `oracle` may leave out."""


def backbone(**values: Any) -> dict[str, Any]:
    size = {"dim": 16, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH, "norm_eps": EPS}
    return {"arch": "custom", **size, **values}


def engine(case: Case, **losses: Any) -> Any:
    """The objective in float64, every parameter of every network moved."""
    phase = {**case.phase, "losses": {**case.phase["losses"], **losses}}
    own = build(config.read_phase(phase), config.read(config.Model, case.model), SEED, ORIGIN)
    generator = torch.Generator().manual_seed(3)
    networks = own.networks()
    for module in (*networks.trained.values(), *networks.frozen.values()):
        module.double()
        for name, parameter in module.named_parameters():
            if not name.endswith(case.oracle.get("fixed") or "nothing is"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.add_(noise, alpha=0.1)
    return own


def batch(case: Case, step: int) -> SslBatch:
    """The global batch. Crops differ in how many of their patches are hidden."""
    generator = torch.Generator().manual_seed(step)

    def crops(count: int, side: int) -> Tensor:
        return torch.randn(count, BATCH, 3, side, side, generator=generator, dtype=torch.float64)

    rng, groups = np.random.default_rng(step), BATCH // case.group
    masks = [group_masks(rng, CROPS * case.group, 4, 0.5, (0.1, 0.5)) for _ in range(groups)]
    if case.uneven:
        masks[0][:, ::2], masks[-1][:] = True, False
    by_crop = np.concatenate([mask.reshape(CROPS, case.group, 16) for mask in masks], axis=1)
    views = crops(2, 16), crops(LOCALS, 8), crops(2, 24)
    return SslBatch(torch.arange(BATCH), torch.arange(groups), *views, torch.from_numpy(by_crop))


def disturbed(case: Case, kind: str, copies: int, clock: int) -> dict[tuple[int, int], Disturbed]:
    """The oracle's own draws for every crop, by (crop, image)."""
    o, size, groups = {**ORACLE, **case.oracle}, case.group, list(range(BATCH // case.group))
    residuals = formulas.residuals(o["rates"], kind, groups, size, copies, SEED, ORIGIN, clock)
    bends = []
    for group in groups:
        drawn = formulas.bends(DEPTH, o["shift"], o["jitter"], o["rescale"], kind, group, SEED, ORIGIN, clock)
        bends.append(drawn if o["bend_per_block"] else [drawn[0]] * DEPTH)
    return {key: Disturbed(bends[key[1] // size], factors) for key, factors in residuals.items()}


def seen(case: Case, step: int) -> Seen:
    one, clock = batch(case, step), CLOCK + step
    assert one.gram_crops is not None
    draws = disturbed(case, "global", CROPS, clock), disturbed(case, "local", LOCALS, clock)
    return Seen(one.global_crops, one.local_crops, one.gram_crops, one.masks, *draws)


def oracle_step(case: Case, state: State, step: int, **changes: Any) -> dict[str, Tensor]:
    return train_step(state, seen(case, step), {**ORACLE, **case.oracle, **changes}, step, case.steps)


def copied(own: Any) -> State:
    networks = own.networks()

    def weights(module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    student = {name: weights(module) for name, module in networks.trained.items()}
    teacher = {name: weights(networks.frozen[f"teacher_{name}"]) for name in student}
    gram_teacher = networks.frozen.get("gram_teacher")
    return State(student, teacher, {} if gram_teacher is None else weights(gram_teacher))


def engine_step(own: Any, optimizer: optim.Optimizer, case: Case, step: int) -> dict[str, Tensor]:
    """What the training loop does with a step, on this process's part of the batch; the terms of the whole batch."""
    moment, optimizing = Moment(step, case.steps, CLOCK + step), own.settings.optim
    share = BATCH // parallel.world()
    one = batch(case, step).slice(parallel.rank() * share, (parallel.rank() + 1) * share)
    targets, sums, size = own.targets(one, moment), dict[str, Tensor](), share // optimizing.accumulate
    for start in range(0, share, size):
        terms = own.loss(one.slice(start, start + size), targets.slice(start, start + size), moment)
        terms["total"].backward()
        sums = {name: term.detach() + sums.get(name, 0) for name, term in terms.items()}
    trained = own.networks().trained
    parallel.reduce_gradients(p for network in trained.values() for p in network.parameters() if p.requires_grad)
    optim.clip(trained, optimizing.clip, optimizing.clip_each)
    optim.set_step(optimizer, optimizing, moment.step, moment.steps)
    finite = torch.tensor(True)
    optim.update(optimizer, finite)
    own.after_step(moment, finite)
    optimizer.zero_grad()
    return {name: parallel.all_reduce_sum(term) for name, term in sums.items()}


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.dtype == torch.float64, name
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


def assert_same_terms(found: dict[str, Tensor], expected: dict[str, Tensor], step: int) -> None:
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        assert_close(found[name], term, f"step {step}, {name}")


def assert_same_state(own: Any, optimizer: optim.Optimizer, state: State, step: int) -> None:
    now, moments = copied(own), optim.state(optimizer)
    assert now.student.keys() == state.student.keys()
    for network, weights in state.student.items():
        for name, tensor in weights.items():
            assert_close(now.student[network][name], tensor, f"step {step}, student {network}.{name}")
            assert_close(now.teacher[network][name], state.teacher[network][name], f"step {step}, teacher {name}")
        for name, tensor in state.first[network].items():
            assert_close(moments[f"exp_avg/{network}.{name}"], tensor, f"step {step}, first moment of {name}")
            assert_close(moments[f"exp_avg_sq/{network}.{name}"], state.second[network][name], f"second of {name}")
    for name, tensor in state.gram_teacher.items():
        assert_close(now.gram_teacher[name], tensor, f"step {step}, Gram teacher {name}")
    for use, center in state.centers.items():
        assert_close(own.state()["teacher_heads"][f"{use}_center.center"][0], center, f"step {step}, centre of {use}")


def assert_same_steps(case: Case, steps: int) -> None:
    """So many updates of the engine and of the oracle: every term, and then every weight, moment and centre.

    Of several processes, each of which must call it, the first asks the oracle."""
    own = engine(case)
    state, optimizer = copied(own), optim.build(own.networks().trained, own.settings.optim)
    state.centers = centers(own)
    for step in range(steps):
        found = engine_step(own, optimizer, case, step)
        if parallel.rank() == 0:
            assert_same_terms(found, oracle_step(case, state, step), step)
            assert_same_state(own, optimizer, state, step)


def centers(own: Any) -> dict[str, Tensor]:
    """Of zeros, by use, where the objective centres."""
    if own.settings.losses.centering != "centering":
        return {}
    ends = ".center"
    heads = own.state()["teacher_heads"]
    return {name.split("_")[0]: torch.zeros_like(tensor[0]) for name, tensor in heads.items() if name.endswith(ends)}
