from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import config
from model.data.errors import UnreadableImageError
from model.data.images import alpha, decode, decode_with_alpha, load
from tests.model.data.conftest import PHOTOGRAPHS

GREEN = config.read(config.Data, {"path": ".", "background": [0.0, 1.0, 0.0]})
RED = (255, 0, 0)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def colour(path: Path) -> tuple[int, ...]:
    """The first pixel over white."""
    return tuple(decode(path, PHOTOGRAPHS)[0, 0].tolist())


def test_transparent_pixels_show_the_background_and_half_transparent_ones_mix(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (*RED, 128))
    shown, opacity = decode_with_alpha(saved(image, tmp_path / "x.png"), GREEN)
    assert shown[0].tolist() == [[255, 0, 0], [0, 255, 0], [128, 127, 0]]
    assert opacity is not None
    np.testing.assert_allclose(opacity, [[1, 0, 128 / 255]])


def test_an_opaque_image_has_no_alpha(tmp_path: Path) -> None:
    assert alpha(load(saved(Image.new("RGB", (2, 2), RED), tmp_path / "a.png"))) is None
    assert alpha(load(saved(Image.new("RGBA", (2, 2), (*RED, 255)), tmp_path / "b.png"))) is None


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    shown, opacity = decode_with_alpha(saved(image, tmp_path / "p.png", transparency=1), PHOTOGRAPHS)
    assert shown[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert opacity is not None
    assert opacity.tolist() == [[1, 0]]


@pytest.mark.parametrize(("mode", "fill", "shown"), [("L", 90, 90), ("LA", (90, 255), 90), ("1", 1, 255)])
def test_greyscale(tmp_path: Path, mode: str, fill: int | tuple[int, int], shown: int) -> None:
    assert colour(saved(Image.new(mode, (4, 4), fill), tmp_path / "g.png")) == (shown, shown, shown)


def test_cmyk(tmp_path: Path) -> None:
    red, green, blue = colour(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "c.jpg", quality=95))
    assert red > 240
    assert max(green, blue) < 20


@pytest.mark.parametrize(("value", "shown"), [(0, 0), (65535, 255), (257 * 100, 100)])
def test_16_bit_greyscale_keeps_its_range(tmp_path: Path, value: int, shown: int) -> None:
    image = Image.fromarray(np.full((4, 4), value, np.uint16))
    assert colour(saved(image, tmp_path / "x.png")) == (shown, shown, shown)
    assert colour(saved(image, tmp_path / "x.tif")) == (shown, shown, shown)


def test_animated_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), fill) for fill in (RED, (0, 0, 255))]
    assert colour(saved(frames[0], tmp_path / "x.gif", save_all=True, append_images=frames[1:])) == RED


def test_exif_rotation_is_undone(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert load(saved(image, tmp_path / "x.jpg", exif=exif)).size == (4, 8)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"not an image", "not an image of a known format"),
        (png()[:1500], "trunc"),
        (png()[:700] + b"\xff" * 40 + png()[740:], "data stream"),
        (bomb(10_000, 10_000), "more than 89,478,485"),
        (bomb(50_000, 50_000), "more than 89,478,485"),
    ],
    ids=["empty", "text", "truncated", "damaged", "bomb", "huge bomb"],
)
def test_what_cannot_be_read_is_one_error_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        load(tmp_path / "x.png")
    assert str(caught.value)


def test_a_missing_file_and_floating_point_pixels_are_unreadable(tmp_path: Path) -> None:
    saved(Image.new("RGB", (2, 2), RED), tmp_path / "something.png")
    with pytest.raises(UnreadableImageError, match="No such file"):
        load(tmp_path / "nothing.png")
    with pytest.raises(UnreadableImageError, match="no known range"):
        load(saved(Image.new("F", (2, 2), 0.5), tmp_path / "f.tif"))
