"""On a package of our own making, unpacked as dpkg would, and stamps of our own; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from model import contract
from model.data import index, openclipart, package, stamps
from model.data.images import load
from model.data.package import PackageError


def drawing(seed: int, side: int = 40) -> Image.Image:
    """5 x 5 fields of colour, unlike those of another seed."""
    fields = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize((side, side), Image.Resampling.NEAREST).convert("RGBA")


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stamp = stamps.PACKAGE.folder / "animals/owl.png"
    stamp.parent.mkdir(parents=True)
    drawing(1).save(stamp)
    package.write_sums(stamps.PACKAGE.folder)
    root = tmp_path / "unpacked"
    folder = root / "usr/share/openclipart/png"
    (folder / "birds").mkdir(parents=True)
    margin = Image.new("RGBA", (500, 500), (0, 0, 0, 0))
    margin.paste(drawing(1, 320).transpose(Image.Transpose.FLIP_LEFT_RIGHT), (100, 50))
    margin.save(folder / "birds/a_stamp_mirrored.png")
    drawing(2).save(folder / "birds/kite.png")
    drawing(2, 80).save(folder / "birds/kite_again.png")
    drawing(3, 320).save(folder / "birds/wren.png")
    (folder / "birds/wren_linked.png").symlink_to("wren.png")
    Image.new("RGBA", (9, 9)).save(folder / "nothing.png")
    return root


def test_what_is_like_a_stamp_or_another_drawing_is_left_out(unpacked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    assert openclipart.prepare(unpacked, folder, Console(quiet=True)) == 2
    assert index.list_images(folder) == ["birds/kite.png", "birds/wren.png"]
    with Image.open(folder / "birds/wren.png") as wren:
        assert (wren.mode, wren.size) == ("RGBA", (160, 160))
    assert (folder / openclipart.LEFT_OUT).read_text().splitlines() == [
        "birds/a_stamp_mirrored.png\tlike stamp animals/owl.png",
        "birds/kite_again.png\tlike birds/kite.png",
        "nothing.png\tall of it is transparent",
    ]


def test_without_the_stamps_nothing_is_prepared(unpacked: Path, tmp_path: Path) -> None:
    (stamps.PACKAGE.folder / "animals/owl.png").unlink()
    with pytest.raises(PackageError, match=r"not there or not whole.\nFetch them first: make data"):
        openclipart.prepare(unpacked, tmp_path / "prepared", Console(quiet=True))


def test_the_digest_is_of_what_is_seen(unpacked: Path) -> None:
    before = openclipart.contents_digest(unpacked)
    wren = unpacked / "usr/share/openclipart/png/birds/wren.png"
    drawing(3, 320).save(wren, compress_level=1)
    assert openclipart.contents_digest(unpacked) == before
    drawing(4, 320).save(wren)
    assert openclipart.contents_digest(unpacked) != before


@pytest.mark.jobs  # it looks at 5,000 images
@pytest.mark.requires("drawings")
def test_no_drawing_is_a_form_of_a_stamp() -> None:
    """The index's own grouping, over the stamps and the drawings as they were prepared."""
    names = {"stamp": contract.data_folder("cache:tuxpaint-stamps"), "drawing": openclipart.PACKAGE.folder}
    found = {kind: {name: load(root / name) for name in index.list_images(root)}
             for kind, root in names.items()}  # fmt: skip
    like = openclipart.alike(found["stamp"], found["drawing"])
    assert [name for name, other in like.items() if other.startswith("like stamp ")] == []
