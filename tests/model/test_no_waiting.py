"""On a GPU the host never waits for the device in the middle of a step: torch raises where it would."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch

from model import config, optim, sharding
from model.networks.init import Make, create
from model.objectives.build import build
from tests.model.test_ssl_objective import BATCH, MODEL, MOMENT, batch, settings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_step_waits_for_nothing(compute: str) -> None:
    device = torch.device("cuda")
    phase: Any = settings("gram", precision={"compute": compute})
    prepare = sharding.Prepare(config.Parallel(), phase.precision, device)
    own = build(phase, MODEL, 0, "pretrain", cast(Make, partial(create, prepare=prepare, device=device)))
    optimizer = optim.build(own.networks().trained, phase.optim)
    trained = own.networks().trained

    def step() -> torch.Tensor:
        one = batch().to(device)
        targets = own.targets(one, MOMENT)
        own.loss(one.slice(0, BATCH), targets.slice(0, BATCH), MOMENT)["total"].backward()
        norms = optim.clip(trained, 3.0)
        finite = torch.stack(list(norms.values())).isfinite().all()
        optim.set_step(optimizer, phase.optim, MOMENT.step, MOMENT.steps)
        optim.update(optimizer, finite)
        own.after_step(MOMENT, finite)
        optimizer.zero_grad()
        return finite

    step()  # allocations and kernels of the first one may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        finite = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finite.item()
