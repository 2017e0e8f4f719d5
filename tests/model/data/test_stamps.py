"""On a package of our own making, unpacked as dpkg would; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from model.data import stamps

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="100pt" height="50pt">'
    '<rect x="10" y="10" width="60" height="20" fill="red"/></svg>'
)


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    root = tmp_path / "unpacked"
    birds = root / "usr/share/tuxpaint/stamps/animals/birds"
    birds.mkdir(parents=True)
    image = Image.new("RGBA", (400, 300), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (50, 50, 350, 150))
    for name in ("owl", "wren", "owl_mirror"):
        image.save(birds / f"{name}.png")
    Image.new("RGBA", (9, 9)).save(birds / "nothing.png")
    for name in ("owl", "kite"):
        (birds / f"{name}.svg").write_text(SVG)
    (birds / "torn.svg").write_text(SVG[:60])
    for name in ("owl", "wren", "kite", "torn", "nothing"):
        (birds / f"{name}.txt").write_text(f"A {name}.\nfr.utf8=Un oiseau\n", encoding="utf-8")
    return root


def test_prepare(unpacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "prepared"
    assert stamps.prepare(unpacked, folder, Console()) == 3
    birds = folder / "animals/birds"
    assert sorted(path.name for path in birds.glob("*.png")) == ["kite.png", "owl.png", "wren.png"]
    assert (birds / "owl.txt").read_text() == "A owl.\n"
    with Image.open(birds / "owl.png") as owl:  # the PNG, not the SVG; cut to what is opaque and made smaller
        assert (owl.mode, owl.size) == ("RGBA", (160, 53))
        assert owl.getpixel((80, 20)) == (0, 0, 255, 255)
    with Image.open(birds / "kite.png") as kite:
        assert kite.getpixel((kite.width // 2, kite.height // 2)) == (255, 0, 0, 255)
        assert kite.width == pytest.approx(3 * kite.height, abs=3)
    said = capsys.readouterr().out
    assert "left out torn.svg: " in said
    assert "left out nothing.png: all of it is transparent" in said


def test_the_digest_is_of_what_is_seen(unpacked: Path) -> None:
    before = stamps.contents_digest(unpacked)
    owl = unpacked / "usr/share/tuxpaint/stamps/animals/birds/owl.png"
    with Image.open(owl) as image:
        image.load()
    image.save(owl, optimize=True, compress_level=1)
    assert stamps.contents_digest(unpacked) == before
    image.putpixel((100, 100), (1, 2, 3, 255))
    image.save(owl)
    assert stamps.contents_digest(unpacked) != before
