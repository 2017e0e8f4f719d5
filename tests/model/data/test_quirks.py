"""docs/parity.md, trap 2: with `official_quirks` the loader blurs as often as the released code was measured to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model import config, draws
from model.data import sources
from model.data.augment import as_released
from model.data.batch import SslBatch
from model.data.colours import draw_colours
from model.data.loader import Loader, Stream
from model.data.views import SslViews

SIZES = config.Resolution(global_size=16, local_size=16)


def first_batch(images: Path, run_dir: Path, *, quirks: bool, **augment: float) -> SslBatch:
    values: dict[str, Any] = {
        "kind": "pretrain", "steps": 1, "data": {"path": str(images), "workers": 0}, "augment": augment,
        "optim": {"batch_size": 8, "group_size": 2, "lr": 1e-3}, "checkpoints": {"every": 1},
        "crops": {"resolutions": [SIZES.model_dump()], "local_count": 2}, "official_quirks": quirks,
    }  # fmt: skip
    settings = config.read_phase(values)
    built = sources.build_or_read(settings.data, str(run_dir), lambda *_: None)
    views = SslViews(SIZES, patch_size=4, gram=False)
    batch = next(iter(Loader(settings, Stream(0, "pretrain", range(1)), built, str(run_dir), lambda _: views)))
    assert isinstance(batch, SslBatch)
    return batch


def test_the_loader_blurs_with_one_minus_the_probability(images: Path, tmp_path: Path) -> None:
    said = {"blur_global_1": 0.75, "blur_global_2": 0.25, "blur_local": 0.875}
    meant = {"blur_global_1": 0.25, "blur_global_2": 0.75, "blur_local": 0.125}
    quirky = first_batch(images, tmp_path, quirks=True, **said)
    plain = first_batch(images, tmp_path, quirks=False, **meant)
    assert torch.equal(quirky.global_crops, plain.global_crops)
    assert torch.equal(quirky.local_crops, plain.local_crops)
    other = first_batch(images, tmp_path, quirks=False, **said)
    assert not torch.equal(quirky.global_crops, other.global_crops)
    assert not torch.equal(quirky.local_crops, other.local_crops)


@pytest.mark.parametrize(("view", "share"), [("global_1", 0.0), ("global_2", 0.9), ("local", 0.5)])
def test_how_often_the_released_configuration_blurs(view: str, share: float) -> None:
    augment = as_released(config.Augment(blur_global_1=1.0, blur_global_2=0.1, blur_local=0.5))
    probability = getattr(augment, f"blur_{view}")
    drawn = [draw_colours(draws.generator(0, "blur", n), augment, probability, 0.0) for n in range(2000)]
    blurred = sum(one.blur_sigma is not None for one in drawn) / len(drawn)
    assert blurred == pytest.approx(share, abs=0.03)
    assert share > 0 or blurred == 0
