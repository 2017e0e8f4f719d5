"""Bad and odd images of every kind among good ones, in a folder and in tar shards.

What cannot be read is replaced by a function of its position, counted and named; what is merely odd is read; everything
else is as it would be without.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.data.batch import Batch, SslBatch
from model.data.errors import Skipped
from model.data.loader import Loader
from model.data.skips import MOST_NAMES, Skips
from tests.model.data import loading
from tests.model.data.conftest import picture
from tests.model.data.loading import assert_equal
from tests.model.data.tars import write_tar
from tests.model.data.test_images import bomb, png

GOOD, CLOCKS = 20, (0, 12)
BAD = {
    "empty.png": b"",
    "text.jpg": b"not an image",
    "truncated.png": png()[:1500],
    "corrupt.png": png()[:700] + b"\xff" * 40 + png()[740:],
    "huge.png": bomb(50_000, 50_000),
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd() -> dict[str, bytes]:
    rgb = picture(100).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "jpeg"),
        "16-bit.png": encoded(Image.fromarray(np.full((40, 40), 30_000, np.uint16)), "png"),
        "palette.png": encoded(rgb.quantize(16), "png", transparency=3),
        "animated.gif": encoded(rgb, "gif", save_all=True, append_images=[picture(101).convert("RGB")]),
        "rotated.jpg": encoded(rgb, "jpeg", exif=exif),
    }


def everything(planted: bool) -> dict[str, bytes]:
    """Name -> bytes; not `planted`: a good picture in the place of each bad one."""
    good = {f"good-{number:02d}.png": encoded(picture(number), "png") for number in range(GOOD)}
    bad = {name: data if planted else encoded(picture(50 + at), "png") for at, (name, data) in enumerate(BAD.items())}
    return {**good, **odd(), **bad}


def in_a_folder(tmp_path: Path, planted: bool, workers: int) -> Loader:
    """They go bad once the run knows them: what is bad from the beginning is not in its index."""
    for name, data in everything(planted=False).items():
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    made = loading.loader(settings(str(tmp_path / "images"), workers), tmp_path / "run", clocks=CLOCKS)
    for name, data in BAD.items() if planted else ():
        (tmp_path / "images" / name).write_bytes(data)
    return made


def in_shards(tmp_path: Path, planted: bool, workers: int) -> Loader:
    items = list(everything(planted).items())
    for shard in range(3):
        write_tar(tmp_path / f"{planted}/x-{shard}.tar", items[10 * shard : 10 * shard + 10])
    return loading.loader(settings(f"{tmp_path}/{planted}/x-*.tar", workers), tmp_path / f"{planted}", clocks=CLOCKS)


def settings(path: str, workers: int) -> dict[str, Any]:
    return {"path": path, "workers": workers, "max_skip_rate": 0.5, "lanes": 3, "window": 4}


def images_of(batch: Batch) -> torch.Tensor:
    """[b, everything]"""
    assert isinstance(batch, SslBatch)
    crops = [batch.global_crops.movedim(1, 0).flatten(1), batch.local_crops.movedim(1, 0).flatten(1)]
    return torch.cat(crops, dim=1)


@pytest.mark.parametrize("where", [in_a_folder, in_shards])
def test_what_cannot_be_read_is_replaced_and_nothing_else_changes(
    where: Callable[[Path, bool, int], Loader], tmp_path: Path
) -> None:
    clean = list(where(tmp_path, False, 0))
    loader = where(tmp_path, True, 0)
    planted = list(loader)
    order, (source,) = loader._make.order, loader._sources
    due: set[str] = set()
    for before, after in zip(clean, planted, strict=True):
        assert torch.equal(before.positions, after.positions)
        changed = (images_of(before) != images_of(after)).any(1)
        for position, is_changed in zip(after.positions.tolist(), changed.tolist(), strict=True):
            name = source.name(order.number(position)).split(": ")[-1]
            bad = next((one for one in BAD if one.startswith(name.split(".")[0])), None)
            assert is_changed == (bad is not None), name
            due |= {bad} if bad else set()
    assert due == set(BAD)
    assert loader.skipped.count == len(BAD)
    assert loader.skipped.replaced >= CLOCKS[1] * 8 // 30 * len(BAD)
    assert {one.path.split(": ")[-1].split(".")[0] for one in loader.skipped.last} == {n.split(".")[0] for n in BAD}
    assert_equal(planted, list(where(tmp_path, True, 3)))


def test_names_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.data.skips.MOST_REMEMBERED", 20)
    skips = Skips()
    for number in (*range(30), *range(30)):
        skips.add([Skipped(path=str(number), reason="torn")])
    # The 20 that are remembered once each, the other 10 at each of their two turns: no rate is missed.
    assert (skips.replaced, skips.count, len(skips.last)) == (60, 40, MOST_NAMES)
    assert skips.last[-1].path == "29"
