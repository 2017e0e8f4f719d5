"""Batches of small images as a pretrain phase sees them, and when they are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model import config
from model.data import sources
from model.data.batch import Batch
from model.data.loader import Loader, Stream
from model.data.views import SslViews

VIEWS = SslViews(config.Resolution(global_size=16, local_size=8), patch_size=4)


def loader(
    data: Mapping[str, Any],
    run: Path,
    rank: int = 0,
    world: int = 1,
    clocks: tuple[int, int] = (0, 7),
    augment: Mapping[str, float] | None = None,
) -> Loader:
    """A rank's loader of a phase with this `data:` and `augment:` section."""
    values = {
        "kind": "pretrain", "steps": 100, "data": data, "augment": augment or {}, "checkpoints": {"every": 10},
        "optim": {"batch_size": 8, "group_size": 2, "lr": 1e-3},
        "crops": {"resolutions": [{"global_size": 16, "local_size": 8}], "local_count": 1},
    }  # fmt: skip
    settings = config.read_phase(values)
    found = sources.build_or_read(settings.data, str(run), lambda *_: None)
    return Loader(settings, Stream(0, "pretrain", range(*clocks), rank, world), found, str(run), lambda _: VIEWS)


def batches(data: Mapping[str, Any], run: Path, *rank_and_world: int, **changes: Any) -> list[Batch]:
    """A rank's batches of such a phase, clock by clock."""
    return list(loader(data, run, *rank_and_world, **changes))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if value is not None}


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert tensors(one).keys() == tensors(other).keys()
        for name, value in tensors(one).items():
            assert torch.equal(value, tensors(other)[name]), name
