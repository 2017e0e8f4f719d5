"""A small folder of images, made on the spot: two categories, captions, alpha, a mirrored and a recoloured copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import config

SIDE = 40
PHOTOGRAPHS = config.read(config.Data, {"path": "."})


def picture(number: int) -> Image.Image:
    """A picture of its own for each number: coarse coloured blocks, one corner transparent."""
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    rgba = np.full((SIDE, SIDE, 4), 255, np.uint8)
    rgba[..., :3] = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    rgba[:8, :8, 3] = 0
    return Image.fromarray(rgba)


def save(image: Image.Image, path: Path, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    if caption:
        path.with_suffix(".txt").write_text(f"{caption}\nfr.utf8=Rien\n")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """40 images that can be read, `a/mirrored.png` and `b/brighter.png` near-duplicates of `a/00.png`."""
    root = tmp_path / "images"
    for number in range(38):
        category = "a" if number % 2 == 0 else "b"
        save(picture(number), root / category / f"{number:02d}.png", f"A picture of number {number}.")
    save(picture(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT), root / "a/mirrored.png", "Mirrored.")
    save(picture(0).point(lambda value: 40 + value * 4 // 5), root / "b/brighter.png", "Brighter.")
    return root
