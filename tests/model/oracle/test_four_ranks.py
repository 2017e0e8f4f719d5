"""Four gloo processes against the oracle, which knows only the global batch: self-distillation and text alignment.

Float64. The groups have masked patches in unequal numbers, and the last rank none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.nn import functional as F

from model import parallel
from model.losses.contrastive import contrastive
from tests.model.oracle import formulas, test_versions as versions
from tests.model.oracle.engine import BATCH, Case, assert_same_steps, batch
from tests.model.oracle.test_text import aligned, assert_same_tensors, expected_alignment

RANKS = 4
SHARE = BATCH // RANKS


def centred() -> Case:
    """Version 1's centres, for the masked patches too, a Gram loss over groups, and KoLeo among all images."""
    losses = {
        **versions.V3_PHASE["losses"], "centering": "centering", "center_momentum": 0.8, "gram": {"img_level": False},
        "koleo": {"group_size": BATCH},
    }  # fmt: skip
    said = {"center_momentum": 0.8, "gram_group": 2, "koleo_group": BATCH}
    return Case(versions.V3_MODEL, {**versions.V3_PHASE, "losses": losses}, {**versions.V3_ORACLE, **said}, uneven=True)


CASES = ((replace(versions.V2, uneven=True), 1), (centred(), 2))
"""And for how many steps. Version 2: Sinkhorn-Knopp, tied heads of learnt lengths, KoLeo among two ranks' images."""


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    images, texts = torch.randn(2, BATCH, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return images.requires_grad_(), texts.requires_grad_(), torch.tensor(9.0).double().requires_grad_()


def gathered_negatives(first: int, stop: int) -> list[Tensor]:
    """The contrastive loss of some rows, the others gathered, and the gradients of all, summed over the ranks."""
    leaves = embeddings()
    x, y = (F.normalize(rows[first:stop], dim=-1) for rows in leaves[:2])
    loss = contrastive(x, y, leaves[2], parallel.all_gather(x), parallel.all_gather(y), first)
    return [parallel.all_reduce_sum(tensor) for tensor in (loss, *torch.autograd.grad(loss, leaves))]


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for case, steps in CASES:
        assert_same_steps(case, steps)
    images = rank * SHARE, (rank + 1) * SHARE
    torch.save((aligned(*images), gathered_negatives(*images)), folder / f"{rank}.pt")
    parallel.leave()


@pytest.mark.jobs
def test_four_ranks_are_the_oracle(tmp_path: Path) -> None:
    for case, _ in CASES:
        hidden = batch(case, 0).masks.sum(dim=(0, 2)).view(RANKS, SHARE).sum(dim=1).tolist()
        assert len(set(hidden)) > 2
        assert hidden[-1] == 0
    multiprocessing.spawn(_rank, args=(tmp_path,), nprocs=RANKS)
    alignment, leaves = expected_alignment(), embeddings()
    x, y = (F.normalize(rows, dim=-1) for rows in leaves[:2])
    loss = formulas.contrastive(x, y, leaves[2])
    expected = [loss, *torch.autograd.grad(loss, leaves)]
    for rank in range(RANKS):
        text, plain = torch.load(tmp_path / f"{rank}.pt")
        assert_same_tensors(text, alignment)
        torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-12)
