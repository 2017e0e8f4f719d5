"""The objective as versions 1 and 2 have it: centering, tied heads, no iBOT; gathered KoLeo, Gram's options, quirks."""

from dataclasses import replace

import pytest
import torch
from torch import multiprocessing

from model import config, health, parallel
from model.networks.rope import RopeEmbedding
from model.objectives.base import Moment
from tests.model.test_ssl_objective import (
    BATCH,
    FINITE,
    GROUP,
    MODEL,
    MOMENT,
    batch,
    disturb,
    gradients,
    objective,
    same,
    shares,
)

CENTERING = {"centering": "centering"}
NO_IBOT = {"ibot": {"weight": 0.0}}

V1 = config.read(
    config.Model,
    {
        "backbone": {
            "arch": "dino_vits16", "dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "position_grid": 4,
            "drop_path": 0.5,
        },
        "dino_head": {"prototypes": 24, "hidden": 16, "bottleneck": 8, "weight_norm": "frozen"},
    },
)  # fmt: skip
TIED = MODEL.model_copy(update={"ibot_head": "tied"})


def v1(**changes):
    return objective("pretrain", model=V1, losses={**CENTERING, **NO_IBOT, "koleo": {"weight": 0.0}}, **changes)


def test_v1_has_one_head_and_one_term_beside_the_locals():
    own = v1()
    assert set(own.networks().trained) == {"backbone", "dino_head"}
    terms = shares(own, batch(gram_size=0), [0, BATCH])
    assert set(terms) == {"dino_global", "dino_local", "total"}
    without = {name for name, gradient in gradients(own).items() if gradient is None}
    assert without == {"dino_head.last_layer.weight_g"}


def test_without_ibot_nothing_is_masked():
    own = v1()
    assert torch.equal(
        shares(own, batch(gram_size=0), [0, BATCH])["total"],
        shares(own, batch(gram_size=0, masked=False), [0, BATCH])["total"],
    )


def test_the_centre_follows_after_the_step_and_targets_use_the_one_before():
    own, whole = v1(), batch(gram_size=0)
    center = own.teacher.dino_center.center
    targets = own.targets(whole, MOMENT)
    assert not center.any()
    torch.testing.assert_close(targets.cls, (targets.logits / 0.07).softmax(dim=-1))
    own.after_step(MOMENT, FINITE)
    torch.testing.assert_close(center, 0.1 * targets.logits.flatten(0, 1).mean(dim=0, keepdim=True))
    second = own.targets(whole, MOMENT)
    torch.testing.assert_close(second.cls, ((second.logits - center) / 0.07).softmax(dim=-1))
    assert torch.equal(own.observe(second).assignments, second.cls.flatten(0, 1))


def test_centres_go_round_with_the_teachers_heads_and_not_to_the_student():
    trained, fresh = objective("pretrain", losses=CENTERING), objective("pretrain", losses=CENTERING)
    trained.targets(batch(), MOMENT)
    trained.after_step(MOMENT, FINITE)
    assert trained.state()["teacher_heads"]["ibot_center.center"].any()
    fresh.take("weights", trained.state().__getitem__)
    assert same(fresh.state()["teacher_heads"], trained.state()["teacher_heads"])
    assert not any("center" in name for name in fresh.state()["student"])


def test_without_centering_targets_are_the_tempered_softmax():
    own = objective("pretrain", losses={"centering": "none"})
    targets = own.targets(batch(), MOMENT)
    torch.testing.assert_close(targets.cls, (targets.logits / 0.07).softmax(dim=-1))


def test_a_tied_head_is_there_once():
    own = objective("pretrain", model=TIED)
    assert set(own.networks().trained) == {"backbone", "dino_head"}
    assert own.teacher.ibot_head is own.teacher.dino_head
    assert own.targets(batch(), MOMENT).patches.shape[1] == 24
    terms = shares(own, batch(), [0, BATCH])
    assert terms["ibot"] > 0
    assert not any(name.startswith("ibot_head") for name in own.state()["teacher_heads"])


def test_ibot_without_a_head_says_what_is_missing():
    with pytest.raises(ValueError, match=r"model\.ibot_head is not there"):
        objective("pretrain", model=MODEL.model_copy(update={"ibot_head": None})).targets(batch(), MOMENT)


def test_without_momentum_the_teacher_is_the_student_of_the_step_before():
    own = v1(ema=0.0)
    disturb(own.student.backbone)
    own.after_step(MOMENT, FINITE)
    student = own.state()["student"]
    assert all(torch.equal(t, student[f"backbone.{name}"]) for name, t in own.state()["teacher_backbone"].items())


def test_gram_over_groups_and_clamped():
    own = objective()
    disturb(own.networks().frozen["gram_teacher"])
    plain = shares(own, batch(), [0, BATCH])["gram"]
    for changes in ({"img_level": False}, {"remove_neg": True}, {"remove_only_teacher_neg": True}):
        other = objective(losses={"gram": changes})
        disturb(other.networks().frozen["gram_teacher"])
        whole, parts = (shares(other, batch(), cuts)["gram"] for cuts in ([0, BATCH], [0, 2, 4, 8]))
        assert whole != plain
        torch.testing.assert_close(parts, whole)
    with pytest.raises(ValueError, match="exclude each other"):
        config.Gram(remove_neg=True, remove_only_teacher_neg=True)


def test_koleo_groups_must_fit():
    with pytest.raises(ValueError, match=r"must be a multiple of optim\.group_size 2"):
        objective(losses={"koleo": {"group_size": 3}})
    settings = objective(losses={"koleo": {"group_size": 2 * GROUP}}).settings
    assert [settings.koleo_fits(processes) for processes in (1, 2, 4)] == [True, True, True]


def test_quirks_turn_in_bf16_and_draw_in_every_block():
    plain, quirky = objective("pretrain"), objective("pretrain", official_quirks=True)
    assert isinstance(quirky.student.backbone.rope_embed, RopeEmbedding)
    assert quirky.student.backbone.rope_embed.dtype == torch.bfloat16
    draws = quirky.draws(batch(), MOMENT).of_global
    assert draws.rope.scale.shape == (2, 2 * BATCH, 2)
    expected = shares(plain, batch(), [0, BATCH])["total"]
    found = shares(quirky, batch(), [0, BATCH])["total"]
    assert 0 < (found - expected).abs() < 0.5


def _run_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = _gathered()
    start, stop = ((0, 4), (4, 8))[rank]
    terms = shares(own, _double_batch().slice(start, stop), [0, stop - start])
    parallel.reduce_gradients(p for network in own.networks().trained.values() for p in network.parameters())
    own.after_step(MOMENT, FINITE)
    total = {name: parallel.all_reduce_sum(term) for name, term in terms.items()}
    torch.save((total, gradients(own), own.state()["teacher_heads"]), f"{store}.{rank}")
    parallel.leave()


def _double_batch():
    one = batch(gram_size=0)
    return replace(one, global_crops=one.global_crops.double(), local_crops=one.local_crops.double())


def _gathered():
    """Centering, and KoLeo over all 8 images."""
    own = objective("pretrain", losses={**CENTERING, "koleo": {"group_size": BATCH}})
    for network in own.networks().trained.values():
        network.double()
    for network in own.networks().frozen.values():
        network.double()
    return own


@pytest.mark.jobs
def test_two_processes_equal_one(tmp_path):
    store = tmp_path / "store"
    multiprocessing.spawn(_run_rank, args=(store,), nprocs=2)
    own = _gathered()
    alone = shares(own, _double_batch(), [0, BATCH])
    own.after_step(MOMENT, FINITE)
    for rank in range(2):
        total, summed, heads = torch.load(f"{store}.{rank}")
        for name, term in alone.items():
            torch.testing.assert_close(total[name], term, rtol=1e-9, atol=1e-12, msg=name)
        for name, gradient in gradients(own).items():
            torch.testing.assert_close(summed[name], gradient, rtol=1e-6, atol=1e-10, msg=name)
        for name, tensor in own.state()["teacher_heads"].items():
            torch.testing.assert_close(heads[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_a_sinkhorn_run_collapsed_by_hand_is_seen_and_named():
    own = objective("pretrain")
    with torch.no_grad():
        own.teacher.backbone.norm.weight.zero_()  # every image gets the same features
        own.teacher.backbone.norm.bias.normal_(generator=torch.Generator().manual_seed(0))
    targets = own.targets(batch(), Moment(9, 10, 9))
    found = health.collapse(health.measure(own, targets, 1.0))
    assert "prototypes" in found or "took over" in found or "flat" in found
    assert "one direction" in found
