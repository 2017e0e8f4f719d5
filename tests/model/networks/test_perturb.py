"""Drop path and RoPE draws: counts, expectation, and that neither layout nor switches show in them."""

import math

import numpy as np
import pytest
import torch

from model import config
from model.networks.perturb import Layout, drop_path, perturbation, rope_draws


def backbone(**changes):
    return config.Backbone(**{"arch": "vits16", "depth": 3, "drop_path": 0.3, **changes})


@pytest.mark.parametrize(("rate", "crops", "kept"), [(0.3, 10, 7), (0.4, 32, 19), (0.99, 8, 1), (0.5, 3, 1)])
def test_keeps_so_many_of_each_group(rate, crops, kept):
    indices, scale = drop_path(rate, 2, Layout("local", [0, 1], crops, 1), 0, "pretrain", 0)
    assert indices.shape == (2, 2, 2 * kept)
    assert scale == crops / kept
    for block in indices.flatten(0, 1):
        assert len(set(block.tolist())) == 2 * kept
        assert (block // crops).bincount().tolist() == [kept, kept]


def test_no_drop_path_is_no_indices():
    assert drop_path(0.0, 2, Layout("global", [0], 4, 2), 0, "pretrain", 0) == (None, 1.0)
    assert drop_path(0.1, 2, Layout("image", [0], 1, 1), 0, "pretrain", 0) == (None, 1.0)  # one is always kept


def test_indices_are_crop_major():
    """Two groups of 3 images, 2 crops each: a group's crops are at its images' places, in both halves."""
    indices, _ = drop_path(0.2, 1, Layout("global", [8, 9], 3, 2), 0, "pretrain", 0)
    first, second = indices[0, 0].split(4)
    assert set(first.tolist()) < {0, 1, 2, 6, 7, 8}
    assert set(second.tolist()) < {3, 4, 5, 9, 10, 11}


def test_every_crop_is_kept_as_often():
    counts = torch.zeros(8)
    for clock in range(400):
        indices, scale = drop_path(0.25, 1, Layout("global", [0], 4, 2), 0, "pretrain", clock)
        counts[indices[0, 1]] += scale
    torch.testing.assert_close(counts / 400, torch.ones(8), rtol=0, atol=0.13)  # the mean of the residual's factor


def test_blocks_branches_steps_kinds_groups_and_seeds_differ():
    def draw(seed=0, origin="pretrain", kind="global", group=0, clock=0):
        return drop_path(0.5, 2, Layout(kind, [group], 16, 2), seed, origin, clock)[0]

    subsets = [*draw().flatten(0, 1)]
    changed = ({"seed": 1}, {"origin": "highres"}, {"kind": "local"}, {"group": 1}, {"clock": 1})
    subsets += [draw(**change)[0, 0] for change in changed]
    assert len({tuple(sorted(subset.tolist())) for subset in subsets}) == len(subsets)


def test_the_layout_does_not_show():
    settings = backbone(rope_rescale=2.0, rope_shift=0.1, rope_jitter=1.1)
    whole = perturbation(settings, Layout("global", [2, 3], 4, 2), 0, "pretrain", 5)
    alone = perturbation(settings, Layout("global", [3], 4, 2), 0, "pretrain", 5)
    kept = alone.indices.shape[-1]
    copy, image = np.divmod(alone.indices.numpy(), 4)
    assert np.array_equal(whole.indices[..., kept:].numpy(), copy * 8 + 4 + image)
    assert torch.equal(whole.rope.scale.reshape(2, 8, 2)[:, 4:].reshape(8, 2), alone.rope.scale)
    assert torch.equal(whole.rope.shift.reshape(2, 8, 2)[:, 4:].reshape(8, 2), alone.rope.shift)


def test_rope_draws_lie_where_they_should():
    settings = backbone(rope_rescale=2.0, rope_shift=0.25, rope_jitter=1.5)
    draws = rope_draws(settings, Layout("global", range(500), 2, 2), 0, "pretrain", 0)
    assert draws.shift.shape == draws.scale.shape == (2000, 2)
    assert draws.shift.dtype == torch.float32
    assert 0.24 < draws.shift.abs().max() <= 0.25
    assert 2.5 < draws.scale.max() <= 3.0
    assert abs(draws.scale.log().mean()) < 0.05
    assert torch.equal(draws.scale[0], draws.scale[1])  # the images of a group share them
    assert not torch.equal(draws.scale[0], draws.scale[2])
    per_axis = (draws.scale[:, 0] / draws.scale[:, 1]).log().abs()
    assert 1.5 * math.log(1.5) < per_axis.max() <= 2 * math.log(1.5) + 1e-5  # rescale is common to both axes


def test_one_augmentation_does_not_shift_another():
    layout = Layout("global", [0, 1], 2, 2)
    both = rope_draws(backbone(rope_rescale=2.0, rope_shift=0.1), layout, 0, "pretrain", 0)
    shift = rope_draws(backbone(rope_shift=0.1), layout, 0, "pretrain", 0)
    rescale = rope_draws(backbone(rope_rescale=2.0), layout, 0, "pretrain", 0)
    assert torch.equal(both.shift, shift.shift)
    assert torch.equal(both.scale, rescale.scale)
    assert torch.equal(shift.scale, torch.ones(8, 2))
    assert rope_draws(backbone(), layout, 0, "pretrain", 0) is None


def test_a_linear_ramp_keeps_fewer_in_every_block():
    settings = backbone(depth=4, drop_path=0.6, drop_path_depth="linear")
    noise = perturbation(settings, Layout("global", [3, 4], 5, 2), 0, "pretrain", 1)
    uniform, _ = drop_path(0.6, 4, Layout("global", [3, 4], 5, 2), 0, "pretrain", 1)
    for block, keep in enumerate((10, 8, 6, 4)):  # of the 10 crops of a group, at rates 0, 0.2, 0.4, 0.6
        kept = noise.kept(block)
        for branch in (kept.attention, kept.ffn):
            assert len(set(branch.tolist())) == len(branch) == 2 * keep
        assert kept.scale == pytest.approx(10 / keep)
    assert torch.equal(noise.kept(3).attention, uniform[3, 0])


def test_a_draw_a_block_where_asked():
    layout = Layout("local", [0, 1], 2, 3)
    once = rope_draws(backbone(rope_rescale=2.0), layout, 0, "pretrain", 0)
    anew = rope_draws(backbone(rope_rescale=2.0, rope_per_block=True), layout, 0, "pretrain", 0)
    assert anew.scale.shape == (3, 12, 2)
    assert torch.equal(anew.at(0).scale, once.scale)
    assert torch.equal(once.at(2).scale, once.scale)
    assert not torch.equal(anew.at(1).scale, anew.at(2).scale)
