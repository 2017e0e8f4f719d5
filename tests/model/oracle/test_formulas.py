"""Every loss, the schedules, masks and draws against the oracle's loops, in float64; gradients; closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import config, draws, schedules
from model.data.masks import block_mask, group_masks, masked_counts
from model.losses.centering import centered
from model.losses.contrastive import contrastive
from model.losses.dino import crop_scales, dino_cross_entropy
from model.losses.gram import Clamp, as_groups, gram, resize_features
from model.losses.ibot import ibot_cross_entropy, mask_weights
from model.losses.koleo import koleo, koleo_gathered
from model.losses.sinkhorn import sinkhorn
from model.networks.perturb import Layout, Perturbation, perturbation, rope_draws
from tests.model.oracle import formulas


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def live(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def same(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Equal values to 1e-9, and equal gradients of `inputs`."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    if inputs:
        ours, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("students", "skip_same"), [(2, True), (2, False), (5, False)])
def test_dino(students: int, skip_same: bool) -> None:
    z, p = live(students, 4, 6), randn(2, 4, 6, seed=1).softmax(dim=-1)
    same(dino_cross_entropy(z, p, 0.1, 4, skip_same=skip_same), formulas.dino(z, p, 0.1, skip_same=skip_same), z)
    assert torch.autograd.gradcheck(lambda x: dino_cross_entropy(x, p, 0.5, 4, skip_same=skip_same), (z,))


def test_dino_of_a_student_that_says_nothing_is_log_k() -> None:
    p = randn(2, 3, 6).softmax(dim=-1)
    assert float(dino_cross_entropy(torch.zeros_like(p), p, 0.1, 3)) == pytest.approx(math.log(6), rel=1e-12)


def test_all_pairs_at_once() -> None:
    """Version 1 has one mean over the teacher's two crops and all of the student's: the two terms, weighed, are it."""
    z, p = live(2 + 3, 4, 6), randn(2, 4, 6, seed=1).softmax(dim=-1)
    among_globals, with_locals = crop_scales(2, 3)
    found = among_globals * dino_cross_entropy(z[:2], p, 0.1, 4, skip_same=True)
    same(found + with_locals * dino_cross_entropy(z[2:], p, 0.1, 4), formulas.dino(z, p, 0.1, skip_same=True), z)


def test_the_scales_of_eight_local_crops() -> None:
    assert crop_scales(2, 8) == (2 / 18, 16 / 18)


@pytest.mark.parametrize("rows", [1, 7])
def test_sinkhorn(rows: int) -> None:
    z = randn(rows, 5)
    same(sinkhorn(z, 0.07), formulas.sinkhorn(z, 0.07))


def test_targets_have_no_gradient() -> None:
    z = live(6, 5)
    assert not sinkhorn(z, 0.07).requires_grad
    assert not centered(z, z[:1], 0.07).requires_grad


def test_sinkhorn_where_the_plain_formula_overflows() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    assert sinkhorn(z, 0.07).isfinite().all()
    torch.testing.assert_close(sinkhorn(z, 0.07).sum(dim=1), torch.ones(3))


def test_centering() -> None:
    z, c = randn(6, 5), randn(1, 5, seed=1)
    same(centered(z, c, 0.04), formulas.centered(z, c[0], 0.04))
    same(centered(z, z[:1], 0.04)[:1], torch.full((1, 5), 0.2, dtype=torch.float64))  # at the centre: uniform


def test_ibot() -> None:
    masks = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[2] = False
    z, p = live(int(masks.sum()), 5), randn(int(masks.sum()), 5, seed=1).softmax(dim=-1)
    weights = mask_weights(masks, torch.float64)
    same(ibot_cross_entropy(z, p, weights, 0.1, 6), formulas.ibot(z, p, masks, 0.1), z)
    assert torch.autograd.gradcheck(lambda x: ibot_cross_entropy(x, p, weights, 0.5, 6), (z,))


def test_koleo() -> None:
    x = live(8, 5)
    for group in (2, 4, 8):
        same(koleo(x, group, 8), formulas.koleo(x, group), x)
    assert torch.autograd.gradcheck(lambda y: koleo(y, 4, 8), (x,))


@pytest.mark.parametrize("group", [4, 8])
def test_koleo_gathered(group: int) -> None:
    """Ranks of two images: their shares and gradients, each with its own rows live, are those of all at once."""
    x, together = live(8, 5), []
    for first in range(0, 8, 2):
        together.append(koleo_gathered(x[first : first + 2], x.detach(), first, group, 8))
    same(torch.stack(together).sum(), formulas.koleo(x, group), x)


def test_koleo_of_opposite_pairs_is_minus_log_2() -> None:
    x = randn(1, 5)
    assert float(koleo(torch.cat([x, -x]), 2, 2)) == pytest.approx(-math.log(2), abs=1e-7)


def test_gram() -> None:
    x, y = live(3, 6, 4), randn(3, 6, 4, seed=1)
    same(gram(x, y, 3), formulas.gram(x, y), x)
    assert torch.autograd.gradcheck(lambda z: gram(z, y, 3), (x,))
    turn = torch.linalg.qr(randn(4, 4, seed=2)).Q
    assert float(gram(y, 3 * y @ turn, 3)) == pytest.approx(0, abs=1e-24)  # sees neither lengths nor rotations


@pytest.mark.parametrize(("clamp", "student", "name"), [
    ("both", True, "both"), ("teacher", True, "teacher"), ("teacher", False, "teacher alone"),
])  # fmt: skip
def test_gram_without_negative_similarities(clamp: Clamp, student: bool, name: str) -> None:
    x, y = live(3, 6, 4), randn(3, 6, 4, seed=1)
    found = gram(x, y, 3, clamp=clamp, clamped_student=student)
    same(found, formulas.gram(x, y, name), x)
    others = [formulas.gram(x, y, other) for other in ("none", "both", "teacher", "teacher alone") if other != name]
    assert not any(torch.allclose(found, other) for other in others)
    assert torch.autograd.gradcheck(lambda z: gram(z, y, 3, clamp=clamp, clamped_student=student), (x,))


def test_gram_of_a_batch() -> None:
    """All patches of two images' two crops meet in one matrix."""
    x, y = live(8, 6, 4), randn(8, 6, 4, seed=1)  # crop-major: crop 0 of four images, then crop 1
    groups = [[0, 1, 4, 5], [2, 3, 6, 7]]
    found = gram(as_groups(x, 2, 2), as_groups(y, 2, 2), 2)
    expected = [formulas.gram(x[group].flatten(0, 1)[None], y[group].flatten(0, 1)[None]) for group in groups]
    same(found, torch.stack(expected).mean(), x)


@pytest.mark.parametrize(("size", "to"), [((6, 6), (4, 4)), ((5, 7), (4, 3)), ((3, 3), (4, 4))])
def test_bicubic(size: tuple[int, int], to: tuple[int, int]) -> None:
    x = randn(1, size[0] * size[1], 3)
    same(resize_features(x, size, to)[0], formulas.bicubic(x[0], size, to))


def test_contrastive() -> None:
    x, y, scale = live(5, 4), live(5, 4, seed=1), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    u, v = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    found = contrastive(u, v, scale, u.detach(), v.detach(), 0)
    same(found, formulas.contrastive(u, v, scale), x, y, scale)
    assert torch.autograd.gradcheck(lambda a, b, s: contrastive(a, b, s, a.detach(), b.detach(), 0), (x, y, scale))


def test_contrastive_of_what_cannot_be_told_apart_is_log_b() -> None:
    x = torch.ones(5, 4, dtype=torch.float64) / 2
    assert float(contrastive(x, x, torch.tensor(9.0), x, x, 0)) == pytest.approx(math.log(5), rel=1e-12)


# --- schedules, masks, draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"peak": 0.3},
        {"start": 0.0, "peak": 1.0, "warmup_steps": 4},
        {"start": 0.1, "peak": 1.0, "end": 0.01, "warmup_steps": 4},
        {"start": 1.0, "peak": 0.5, "warmup_steps": 10, "warmup": "cosine"},
        {"peak": 0.9, "end": 1.0, "decay": "linear"},
        {"peak": 1.0, "end": 0.1, "form": "v1"},
        {"start": 0.0, "peak": 1.0, "end": 0.1, "warmup_steps": 1, "form": "v1"},
        {"start": 0.0, "peak": 1.0, "end": 0.1, "warmup_steps": 4, "form": "v1"},
        {"start": 0.04, "peak": 0.07, "warmup_steps": 9, "hold_steps": 3, "form": "v1"},
        {"peak": 0.04, "end": 0.4, "hold_steps": 4, "form": "v1"},
    ],
)
def test_schedules(values: dict[str, Any]) -> None:
    schedule = config.read(config.Schedule, values)
    for step in range(13):
        assert schedules.value(schedule, step, 13) == pytest.approx(formulas.ramp(values, step, 13), rel=1e-12)
    if schedule.form == "v2":
        assert schedules.value(schedule, 12, 13) == values.get("end", values["peak"])


@pytest.mark.parametrize(("form", "scaling"), [("v1", "linear_256"), ("v2", "sqrt_wrt_1024")])
def test_learning_rates(form: str, scaling: str) -> None:
    lr = {"start": 0.0, "peak": 1e-3, "end": 1e-6, "warmup_steps": 3, "form": form}
    optim = config.read(config.Optim, {"batch_size": 768, "group_size": 8, "lr": lr, "lr_scaling": scaling})
    for step in range(13):
        expected = formulas.learning_rate(lr, step, 13, 768)
        assert schedules.learning_rate(optim, step, 13) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("side", "total"), [(6, 174), (14, 974), (16, 1274), (32, 5114)])
def test_how_many_patches_are_masked(side: int, total: int) -> None:
    """The totals of the released collate function for 16 images of 96, 224, 256 and 512 pixels."""
    counts = masked_counts(32, side * side, 0.5, (0.1, 0.5))
    assert counts == formulas.masked_counts(32, side * side, 0.5, 0.1, 0.5)
    assert sum(counts) == total


@pytest.mark.parametrize("seed", range(20))
def test_block_masks(seed: int) -> None:
    for side, count in ((4, 3), (7, 24), (14, 90)):
        found = block_mask(np.random.default_rng(seed), side, count)
        assert found.tolist() == formulas.block_mask(np.random.default_rng(seed), side, count)
        assert found.sum() == count


def test_masks_of_a_group() -> None:
    masks = group_masks(np.random.default_rng(0), 8, 6, 0.5, (0.1, 0.5))
    assert sorted(masks.sum(axis=1))[-4:] == formulas.masked_counts(8, 36, 0.5, 0.1, 0.5)
    assert sorted(masks.sum(axis=1))[:4] == [0] * 4


def test_draws_by_name() -> None:
    ours = draws.generator(3, "a/b", 4, "c").random(8)
    assert ours.tolist() == formulas.generator(3, "a/b", 4, "c").random(8).tolist()


def crops_factors(noise: Perturbation, layout: Layout, blocks: int) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """By (crop, image): what each block multiplies the residual of attention and of FFN with."""
    images = len(layout.groups) * layout.group_size
    found = {divmod(crop, images): [(1.0, 1.0)] * blocks for crop in range(layout.copies * images)}
    for block in range(blocks):
        kept = noise.kept(block)
        if kept is not None:
            assert len(set(kept.attention.tolist())) == len(kept.attention) == len(kept.ffn)
            for (crop, image), factors in found.items():
                at = crop * images + image
                factors[block] = (kept.scale * (at in kept.attention), kept.scale * (at in kept.ffn))
    return found


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("depth", ["uniform", "linear"])
def test_drop_path(rate: float, depth: str) -> None:
    """Uniform over depth (v3), and rising from 0 in the first block to `rate` in the last (v1)."""
    settings = config.Backbone.model_validate(
        {"arch": "vits16", "depth": 4, "drop_path": rate, "drop_path_depth": depth}
    )
    layout = Layout("local", [3, 4], 4, 3)
    rates = [rate] * 4 if depth == "uniform" else [0.0, rate / 3, 2 * rate / 3, rate]
    expected = formulas.residuals(rates, "local", [3, 4], 4, 3, 1, "pretrain", 5)
    found = crops_factors(perturbation(settings, layout, 1, "pretrain", 5), layout, 4)
    assert found.keys() == expected.keys()
    for key, factors in expected.items():
        np.testing.assert_allclose(found[key], factors, rtol=1e-12, err_msg=str(key))
    for block, share in enumerate(rates):  # 24 crops; of each group's 12 int(12 (1 - rate)) are kept, one at least
        kept = sum(factors[block][0] > 0 for factors in found.values())
        assert kept == 2 * max(math.floor(12 * (1 - share)), 1)


@pytest.mark.parametrize("per_block", [False, True])
def test_rope_draws(per_block: bool) -> None:
    values = {"rope_shift": 0.1, "rope_jitter": 1.2, "rope_rescale": 2.0, "rope_per_block": per_block}
    settings = config.Backbone.model_validate({"arch": "vits16", "depth": 3, **values})
    found = rope_draws(settings, Layout("global", [3, 4], 2, 2), 1, "pretrain", 5)
    assert found is not None
    for slot, group in enumerate((3, 4)):
        drawn = formulas.bends(3, 0.1, 1.2, 2.0, "global", group, 1, "pretrain", 5)
        for block in range(3):
            shift, scale = drawn[block if per_block else 0]
            for crop in (slot * 2, slot * 2 + 1, 4 + slot * 2, 5 + slot * 2):
                assert found.at(block).shift[crop].tolist() == pytest.approx(shift, rel=1e-6)
                assert found.at(block).scale[crop].tolist() == pytest.approx(scale, rel=1e-6)
