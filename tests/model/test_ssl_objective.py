"""A tiny SSL objective: sums over micro-batches and processes, teachers, hand-offs, state."""

import itertools

import pytest
import torch
from torch import multiprocessing, nn

from model import config, parallel
from model.data.batch import SslBatch
from model.health import measure
from model.objectives.base import Moment
from model.objectives.build import build
from model.schedules import value

BATCH, GROUP, PATCH = 8, 2, 4
MOMENT = Moment(step=3, steps=10, clock=13)
FINITE = torch.tensor(True)

MODEL = config.read(
    config.Model,
    {
        "backbone": {
            "arch": "custom", "dim": 16, "depth": 2, "heads": 2, "patch_size": PATCH, "registers": 2,
            "drop_path": 0.3, "rope_rescale": 2.0, "layer_scale": 0.5, "untie_local_cls_norm": True,
        },
        "dino_head": {"prototypes": 24, "hidden": 16, "bottleneck": 8},
        "ibot_head": {"prototypes": 12, "hidden": 16, "bottleneck": 8},
    },
)  # fmt: skip
PLAIN = MODEL.model_copy(
    update={"backbone": MODEL.backbone.model_copy(update={"drop_path": 0.0, "rope_rescale": None})}
)


def settings(kind="gram", gram_size=32, **changes):
    values = {
        "kind": kind,
        "steps": 10,
        "data": {"path": "images"},
        "optim": {"batch_size": BATCH, "group_size": GROUP, "lr": 1e-3},
        "checkpoints": {"every": 5},
        "crops": {"resolutions": [{"global_size": 16, "local_size": 8, "gram_size": gram_size}], "local_count": 3},
        **({} if kind == "pretrain" else {"gram_teacher": "pretrain@4"}),
        **changes,
    }
    return config.read(config.PHASES[kind], values)


def objective(kind="gram", model=MODEL, seed=0, **changes):
    return build(settings(kind, **changes), model, seed, "pretrain")


def batch(gram_size=32, locals_=3, masked=True):
    """A global batch; half of the crops are masked, the last group's not at all."""
    generator = torch.Generator().manual_seed(0)
    images = lambda copies, size: torch.randn(copies, BATCH, 3, size, size, generator=generator)  # noqa: E731
    masks = torch.rand(2, BATCH, 16, generator=generator) < 0.4
    masks[0, ::2] = False
    masks[:, -GROUP:] = False
    return SslBatch(
        positions=torch.arange(BATCH),
        groups=torch.arange(BATCH // GROUP),
        global_crops=images(2, 16),
        local_crops=images(locals_, 8),
        gram_crops=images(2, gram_size) if gram_size else None,
        masks=masks & masked,
    )


def shares(own, whole, cuts, moment=MOMENT):
    """Terms summed over the micro-batches between `cuts`, their gradients left in the networks."""
    targets = own.targets(whole, moment)
    sums = {}
    for start, stop in itertools.pairwise(cuts):
        terms = own.loss(whole.slice(start, stop), targets.slice(start, stop), moment)
        terms["total"].backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
    return sums


def gradients(own):
    return {
        f"{network}.{name}": parameter.grad
        for network, module in own.networks().trained.items()
        for name, parameter in module.named_parameters()
    }


def disturb(network, seed=1):
    """Move a network's parameters, so that it differs from those that it was copied from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_terms_and_their_weights():
    own = objective(losses={"dino": {"weight": 0.5, "local_weight": 0.25}, "koleo": {"weight": 0.1}})
    disturb(own.networks().frozen["gram_teacher"])
    terms = shares(own, batch(), [0, BATCH])
    assert set(terms) == {"dino_global", "dino_local", "ibot", "koleo", "gram", "total"}
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    expected = (
        0.5 * 2 / 8 * terms["dino_global"]  # 2 pairs of global crops, 6 with a local one
        + 0.5 * 6 / 8 * 0.25 * terms["dino_local"]
        + terms["ibot"]
        + 0.1 * 2 * terms["koleo"]
        + 2.0 * terms["gram"]
    )
    torch.testing.assert_close(terms["total"], expected)
    assert terms["gram"] > 0


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one():
    own = objective()
    shares(own, batch(), [0, BATCH])
    assert [name for name, gradient in gradients(own).items() if gradient is None] == []
    for network in own.networks().frozen.values():
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("cuts", [[0, 4, 8], [0, 2, 4, 6, 8]])
def test_micro_batches_sum_to_the_whole(cuts):
    whole, parts = objective(), objective()
    for own in (whole, parts):
        disturb(own.networks().frozen["gram_teacher"])
    expected, found = shares(whole, batch(), [0, BATCH]), shares(parts, batch(), cuts)
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term, msg=name)
    theirs = gradients(parts)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def _run_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = objective()
    disturb(own.networks().frozen["gram_teacher"])
    start, stop = ((0, 6), (6, 8))[rank]  # unequal, and the second rank has no masked patch
    terms = shares(own, batch().slice(start, stop), [0, stop - start])
    parallel.reduce_gradients(p for network in own.networks().trained.values() for p in network.parameters())
    total = {name: parallel.all_reduce_sum(term) for name, term in terms.items()}
    torch.save((total, gradients(own)), f"{store}.{rank}")
    parallel.leave()


@pytest.mark.jobs
def test_two_processes_equal_one(tmp_path):
    store = tmp_path / "store"
    multiprocessing.spawn(_run_rank, args=(store,), nprocs=2)
    own = objective()
    disturb(own.networks().frozen["gram_teacher"])
    alone = shares(own, batch(), [0, BATCH])
    for rank in range(2):
        total, summed = torch.load(f"{store}.{rank}")
        for name, term in alone.items():
            torch.testing.assert_close(total[name], term, msg=name)
        for name, gradient in gradients(own).items():
            torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_pretrain_has_no_gram_teacher():
    own = objective("pretrain")
    assert "gram_teacher" not in own.networks().frozen
    assert not own.views(0).gram
    assert set(own.state()) == {"student", "teacher_backbone", "teacher_heads"}
    assert "gram" not in shares(own, batch(gram_size=0), [0, BATCH])
    with pytest.raises(ValueError, match="a pretrain phase takes no gram_teacher"):
        own.take("gram_teacher", lambda part: {})


def test_gram_is_not_run_while_its_weight_is_0():
    own = objective(losses={"gram": {"weight": {"start": 0.0, "peak": 2.0, "warmup_steps": 5}}})
    own.gram_teacher.features = None  # would be called
    assert own.targets(batch(), Moment(0, 10, 10)).gram is None
    assert "gram" not in shares(own, batch(), [0, BATCH], Moment(0, 10, 10))
    with pytest.raises(TypeError):
        own.targets(batch(), Moment(1, 10, 11))


def test_the_gram_teacher_may_be_rougher_than_the_rest():
    exact, rough = objective(), objective(losses={"gram": {"compute": "bf16"}})
    for own in (exact, rough):
        disturb(own.gram_teacher)
    one, other = (own.targets(batch(), MOMENT) for own in (exact, rough))
    assert one.cls.equal(other.cls)
    assert 0 < (one.gram - other.gram).norm() < 0.02 * one.gram.norm()
    assert not other.gram.requires_grad


def test_gram_is_0_where_student_and_gram_teacher_agree():
    own = objective(model=PLAIN, gram_size=None)
    seen = batch(gram_size=0, masked=False)
    seen = SslBatch(**{**vars(seen), "gram_crops": seen.global_crops})
    assert shares(own, seen, [0, BATCH])["gram"].item() == pytest.approx(0, abs=1e-12)
    disturb(own.networks().frozen["gram_teacher"])
    assert shares(own, seen, [0, BATCH])["gram"] > 1e-4


def test_without_local_crops():
    crops = {"resolutions": [{"global_size": 16, "local_size": 8}], "local_count": 0}
    terms = shares(objective("pretrain", crops=crops), batch(gram_size=0, locals_=0), [0, BATCH])
    assert "dino_local" not in terms
    torch.testing.assert_close(terms["total"], terms["dino_global"] + terms["ibot"] + 0.2 * terms["koleo"])


def test_targets_are_distributions_over_the_prototypes():
    own, whole = objective(), batch()
    targets = own.targets(whole, MOMENT)
    assert targets.cls.shape == (2, BATCH, 24)
    assert targets.patches.shape == (int(whole.masks.sum()), 12)
    torch.testing.assert_close(targets.cls.sum(dim=-1), torch.ones(2, BATCH))
    torch.testing.assert_close(targets.patches.sum(dim=-1), torch.ones(len(targets.patches)))


def test_what_health_looks_at_is_the_teacher_before_sinkhorn():
    own, whole = objective(), batch()
    seen = own.observe(own.targets(whole, MOMENT))
    said = own.teacher.backbone.features(whole.global_crops.flatten(0, 1)).cls
    torch.testing.assert_close(seen.features, said)
    torch.testing.assert_close(seen.assignments, (own.teacher.dino_head(said) / 0.07).softmax(dim=-1))
    assert set(measure(own, own.targets(whole, MOMENT))) == {
        "health/effective_rank", "health/entropy", "health/prototypes_used", "health/information",
        "health/cls_patch_cosine",
    }  # fmt: skip


def test_bf16_products_and_fp32_losses():
    own = objective(precision={"compute": "bf16"})
    exact = shares(objective(), batch(), [0, BATCH])
    for name, term in shares(own, batch(), [0, BATCH]).items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, exact[name], rtol=0.05, atol=1e-3, msg=name)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(own).values())


def test_draws_depend_on_the_clock_and_on_nothing_else():
    own = objective()
    first = shares(own, batch(), [0, BATCH])["total"]
    assert torch.equal(shares(own, batch(), [0, BATCH])["total"], first)
    assert not torch.equal(shares(own, batch(), [0, BATCH], Moment(3, 10, 14))["total"], first)


def test_after_a_step_the_teacher_follows():
    own = objective("pretrain", ema={"peak": 0.9, "end": 1.0, "decay": "linear"})
    before = {name: tensor.clone() for name, tensor in own.state()["teacher_heads"].items()}
    for network in own.networks().trained.values():
        disturb(network)
    own.after_step(MOMENT, FINITE)
    momentum = value(own.settings.ema, MOMENT.step, MOMENT.steps)
    student, teacher = own.state()["student"], own.state()["teacher_heads"]
    assert 0.9 < momentum < 1.0
    for name, tensor in teacher.items():
        torch.testing.assert_close(tensor, momentum * before[name] + (1 - momentum) * student[name])


def test_the_gram_teacher_is_refreshed_when_due():
    own = objective(ema=0.5, losses={"gram": {"refresh_every": 3, "refresh_most": 2}})
    refreshed = []
    for step in range(10):
        disturb(own.networks().trained["backbone"], seed=step)
        own.after_step(Moment(step, 10, step), FINITE)
        state = own.state()
        if all(torch.equal(tensor, state["gram_teacher"][name]) for name, tensor in state["teacher_backbone"].items()):
            refreshed.append(step + 1)
    assert refreshed == [3, 6]
    assert own.frozen_parts() == set()


def test_without_refreshes_the_gram_teacher_is_a_frozen_part():
    own = objective()
    before = {name: tensor.clone() for name, tensor in own.state()["gram_teacher"].items()}
    disturb(own.networks().trained["backbone"])
    own.after_step(MOMENT, FINITE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state()["gram_teacher"].items())
    assert own.frozen_parts() == {"gram_teacher"}
    assert objective("pretrain").frozen_parts() == set()


def moved(kind="gram"):
    """An objective none of whose networks equals another, as after some training."""
    own = objective(kind)
    networks = own.networks()
    modules: list[nn.Module] = [*networks.trained.values(), *networks.frozen.values()]
    for seed, network in enumerate(modules):
        disturb(network, seed)
    return own


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_state_goes_round():
    trained, fresh = moved(), objective()
    for part, tensors in trained.state().items():
        fresh.load(part, tensors)
    for part, tensors in trained.state().items():
        assert same(tensors, fresh.state()[part]), part
    expected = shares(trained, batch(), [0, BATCH])
    assert same(shares(fresh, batch(), [0, BATCH]), expected)


def test_init_takes_student_and_teachers_and_leaves_the_gram_teacher():
    trained, fresh = moved("pretrain"), objective()
    before = {name: tensor.clone() for name, tensor in fresh.state()["gram_teacher"].items()}
    fresh.take("init", trained.state().__getitem__)
    for part, tensors in trained.state().items():
        assert same(fresh.state()[part], tensors), part
    assert same(fresh.state()["gram_teacher"], before)


def test_weights_takes_the_teacher_for_both():
    trained, fresh = moved(), objective("highres")
    fresh.take("weights", trained.state().__getitem__)
    state = fresh.state()
    for part in ("teacher_backbone", "teacher_heads"):
        assert same(state[part], trained.state()[part])
    backbone = {name.removeprefix("backbone."): t for name, t in state["student"].items() if "backbone." in name}
    assert same(backbone, state["teacher_backbone"])
    assert same({name: t for name, t in state["student"].items() if "head." in name}, state["teacher_heads"])


def test_the_gram_teacher_is_taken_from_that_checkpoints_teacher():
    trained, fresh = moved("pretrain"), objective()
    fresh.take("gram_teacher", trained.state().__getitem__)
    assert same(fresh.state()["gram_teacher"], trained.state()["teacher_backbone"])


def test_parts_that_do_not_fit_are_refused():
    own = objective("pretrain")
    tensors = dict(own.state()["teacher_heads"])
    del tensors["dino_head.last_layer.weight"]
    with pytest.raises(ValueError, match=r"teacher_heads does not fit .* missing dino_head\.last_layer\.weight"):
        own.load("teacher_heads", tensors)
    with pytest.raises(ValueError, match="has no part gram_teacher; it has student, teacher_backbone, teacher_heads"):
        own.load("gram_teacher", {})
    with pytest.raises(ValueError, match="takes no vision_tower"):
        own.take("vision_tower", lambda part: {})
