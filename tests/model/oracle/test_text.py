"""Text alignment against the oracle: the loss and every gradient, 1e-9 in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model import config, parallel
from model.data.batch import PairBatch
from model.objectives.base import Moment
from model.objectives.build import build
from tests.model.oracle import formulas, test_versions as versions
from tests.model.oracle.engine import BATCH, assert_close
from tests.model.oracle.network import Disturbed, tokens
from tests.model.oracle.text import text_tower, vision_head

MOMENT = Moment(3, 10, 3)


def text_objective() -> Any:
    phase = {
        "kind": "text", "steps": 10, "data": {"path": "images"}, "vision_tower": "pretrain@final",
        "optim": {"batch_size": BATCH, "group_size": 2, "lr": 1e-3}, "checkpoints": {"every": 5},
        "image_size": 16, "embed_dim": 24, "text": {"dim": 16, "depth": 1, "heads": 2, "context": 6, "vocabulary": 20},
        "head": {"blocks": 2, "drop_path": 0.5},
    }  # fmt: skip
    own = build(config.read_phase(phase), config.read(config.Model, versions.V3_MODEL), 0, "text")
    networks = own.networks()
    generator = torch.Generator().manual_seed(0)
    for module in (*networks.trained.values(), *networks.frozen.values()):
        module.double()
        for parameter in module.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return own


def pairs() -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 19, (BATCH, 6), generator=generator)
    ids[:, 4] = 19  # the end token
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    return PairBatch(torch.arange(BATCH), torch.arange(BATCH // 2), images, ids)


def aligned(first: int, stop: int) -> dict[str, Tensor]:
    """The loss and the gradients of the images [first, stop) of the global batch, summed over the ranks."""
    own, one = text_objective(), pairs().slice(first, stop)
    terms = own.loss(one, own.targets(one, MOMENT), MOMENT)
    terms["total"].backward()
    named = [(f"{network}.{name}", p) for network, module in own.networks().trained.items()
             for name, p in module.named_parameters()]  # fmt: skip
    parallel.reduce_gradients(parameter for _, parameter in named)
    gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    return {"loss": parallel.all_reduce_sum(terms["contrastive"]), **gradients}


def expected_alignment() -> dict[str, Tensor]:
    """The oracle's."""
    networks, one = text_objective().networks(), pairs()
    tower = {name: tensor.detach() for name, tensor in networks.frozen["vision_tower"].state_dict().items()}
    trained = {network: {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
               for network, module in networks.trained.items()}  # fmt: skip
    kept = formulas.residuals([0.5] * 2, "image", list(range(BATCH // 2)), 2, 1, 0, "text", MOMENT.clock)
    images = [
        vision_head(trained["vision_head"], *tokens(tower, image), Disturbed(residuals=kept[0, number]))
        for number, image in enumerate(one.images)
    ]
    texts = [text_tower(trained["text_tower"], ids.tolist()) for ids in one.tokens]
    x, y = (torch.stack([formulas.unit(row, 1e-12) for row in rows]) for rows in (images, texts))
    loss = formulas.contrastive(x, y, trained["logit_scale"]["log"].exp())
    named = {f"{network}.{name}": p for network, weights in trained.items() for name, p in weights.items()}
    return {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.any(), name
        assert_close(found[name], tensor, name)


def test_text_alignment() -> None:
    assert_same_tensors(aligned(0, BATCH), expected_alignment())
