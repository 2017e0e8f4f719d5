"""Images that Pillow cannot hold: every value is kept, and what is of another kind says why it cannot be read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model import config
from model.data import index
from model.data.arrays import load_array
from model.data.batch import SslBatch
from model.data.errors import UnreadableImageError
from model.data.images import decode, decode_with_alpha
from model.data.pack import pack
from model.data.threads import untold
from tests.model.data.conftest import PHOTOGRAPHS, picture, save
from tests.model.data.loading import batches

FIVE: NDArray[np.uint16] = np.random.default_rng(0).integers(0, 65536, (40, 48, 5), dtype=np.uint16)
FIRST = np.ascontiguousarray(np.moveaxis(FIVE, -1, 0))
GREY, RGB16, RGBA16 = (np.ascontiguousarray(FIVE[..., part]) for part in (0, slice(3), slice(4)))
CONTIGUOUS: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}


def tiff(pixels: NDArray[Any], **settings: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **settings)
    return buffer.getvalue()


def npy(pixels: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def pillow(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def kind(channels: int, bits: int, **settings: Any) -> config.Data:
    return config.read(config.Data, {"path": ".", "channels": channels, "bits": bits, "normalise": "none", **settings})


FORMS = {
    "samples": tiff(FIVE, **CONTIGUOUS),
    "planes": tiff(FIRST, photometric="minisblack", planarconfig="separate"),
    "pages": tiff(FIRST, photometric="minisblack", metadata=None),
    "as numpy has it": tiff(FIVE),
    "ImageJ": tiff(FIRST, imagej=True),
    "OME": tiff(FIRST, ome=True, metadata={"axes": "CYX"}),
    "big-endian": tiff(FIVE.astype(">u2"), byteorder=">", **CONTIGUOUS),
    "BigTIFF": tiff(FIVE, bigtiff=True, **CONTIGUOUS),
    "LZW": tiff(FIVE, compression="lzw", predictor=True, **CONTIGUOUS),
    "deflated tiles": tiff(FIVE, compression="deflate", tile=(16, 16), **CONTIGUOUS),
    "zstd": tiff(FIVE, compression="zstd", **CONTIGUOUS),
    "JPEG 2000": imagecodecs.jpeg2k_encode(FIVE, level=0, reversible=True),
    "npy": npy(FIVE),
    "npy, channels first": npy(FIRST),
    "npy, column by column": npy(np.asfortranarray(FIVE)),
    "npy, big-endian": npy(FIVE.astype(">u2")),
}


@pytest.mark.parametrize("form", FORMS)
def test_five_channels_of_16_bits_are_kept(form: str) -> None:
    found = decode(FORMS[form], kind(5, 16))
    assert found.dtype == np.dtype(np.uint16)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert np.array_equal(found, FIVE)


def test_16_bit_png_keeps_what_pillow_would_drop(tmp_path: Path) -> None:
    file = tmp_path / "colour.png"
    file.write_bytes(imagecodecs.png_encode(RGB16))
    assert np.asarray(Image.open(file)).dtype == np.uint8  # the reason why another library reads it
    assert np.array_equal(decode(file, kind(3, 16)), RGB16)
    assert np.array_equal(decode(pillow(Image.fromarray(GREY), "PNG"), kind(1, 16))[..., 0], GREY)
    assert np.array_equal(decode(imagecodecs.png_encode(RGBA16), kind(4, 16)), RGBA16)


def test_eight_bits_of_any_number_of_channels() -> None:
    eight = (FIVE >> 8).astype(np.uint8)
    assert np.array_equal(decode(tiff(eight, **CONTIGUOUS), kind(5, 8)), eight)
    assert np.array_equal(decode(pillow(Image.fromarray(eight[..., 0]), "PNG"), kind(1, 8))[..., 0], eight[..., 0])
    cmyk = Image.fromarray(eight[..., :4], "CMYK")
    assert np.array_equal(decode(pillow(cmyk, "TIFF"), kind(4, 8)), eight[..., :4])
    jpeg = pillow(Image.fromarray(eight[..., 0]), "JPEG")
    assert np.array_equal(decode(jpeg, kind(1, 8))[..., 0], np.asarray(Image.open(io.BytesIO(jpeg))))


PALETTE = Image.fromarray((GREY >> 8).astype(np.uint8)).convert("P")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (tiff(RGB16, photometric="rgb"), "3 channels, and data.channels is 5"),
        (pillow(Image.fromarray(GREY), "PNG"), "1 channel, and data.channels is 5"),
        (npy(FIVE.astype(np.uint8)), "8 bits a channel, and data.bits is 16"),
        (npy(FIVE.astype(np.int32)), "int32 pixels: save it as uint8 or uint16"),
        (tiff(FIVE.astype(np.float32), **CONTIGUOUS), "floating-point pixels have no known range"),
        (tiff(FIRST, ome=True, metadata={"axes": "ZYX"}), "a stack of images, Z 5 x Y 40 x X 48: save one"),
        (tiff(np.stack([FIRST] * 2), ome=True, metadata={"axes": "TCYX"}), "a stack of images, T 2 x C 5 x"),
        (npy(np.zeros((7, 8, 6, 5), np.uint16)), r"an array \[7, 8, 6, 5\] of uint16"),
        (npy(np.array([{}], object)), "an array .* of object"),
        (pillow(PALETTE, "PNG"), "a palette, whose numbers are no values"),
        (pillow(PALETTE, "TIFF"), "a palette, whose numbers are no values"),
        (pillow(PALETTE, "AVIF"), "AVIF of mode RGB: read for 8-bit RGB alone"),
        (b"", "empty file"),
        (b"no image at all", "not an image of a known format"),
        (FORMS["deflated tiles"][:-500], "."),
        (FORMS["samples"][:2000], "failed to read"),
        (FORMS["npy"][:2000], "EOF"),
        (imagecodecs.png_encode(RGB16)[:20], "torn"),
        (imagecodecs.png_encode(RGB16)[:2000], "too small"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x10\x02\0\0\0\0\0\0\0", "255 MiB"),
    ],
)  # fmt: skip
def test_an_image_of_another_kind_is_unreadable_and_says_why(content: bytes, why: str) -> None:
    with pytest.raises(UnreadableImageError, match=why):
        load_array(content, 5, 16)


def test_without_channels_in_the_spec_the_reason_says_what_to_set() -> None:
    with pytest.raises(UnreadableImageError, match=r"^5 channels of 16 bits, and data\.channels is 3, data\.bits 8"):
        decode(FORMS["samples"], PHOTOGRAPHS)
    with pytest.raises(UnreadableImageError, match=r"^not an image of a known format$"):
        decode(b"no image at all", PHOTOGRAPHS)
    with pytest.raises(UnreadableImageError, match="in a form that Pillow does not know"):
        decode(npy((RGB16 >> 8).astype(np.uint8)), PHOTOGRAPHS)


def test_a_large_array_is_refused_before_it_is_read(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "large.npy", mode="w+", dtype=np.uint16, shape=(20000, 20000, 5))  # sparse
    with (tmp_path / "large.npy").open("rb") as file:
        begins = file.read(4096)
    with pytest.raises(UnreadableImageError, match="20000 x 20000 x 5 values of 16 bits, more than 255 MiB"):
        load_array(begins, 5, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_turned_images_are_upright_as_by_pillow(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    content = pillow(picture(1).convert("L").resize((14, 9)), form, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(load_array(content, 1, 8)[..., 0], upright)


def test_rgb_of_16_bits_is_made_of_the_same_kinds_as_rgb_of_8() -> None:
    wide = kind(3, 16, background=[0.0, 1.0, 0.0])
    assert np.array_equal(decode(pillow(Image.fromarray(GREY), "PNG"), wide), np.repeat(GREY[..., None], 3, axis=2))
    photograph = picture(3)
    narrow = decode(pillow(photograph, "PNG"), PHOTOGRAPHS.model_copy(update={"background": wide.background}))
    assert np.array_equal(decode(pillow(photograph, "PNG"), wide), narrow.astype(np.uint16) * 257)
    clear = RGBA16.copy()
    clear[:20, :, 3], clear[20:, :, 3] = 0, 65535
    shown, opacity = decode_with_alpha(imagecodecs.png_encode(clear), wide)
    assert (shown[:20] == (0, 65535, 0)).all()
    assert np.array_equal(shown[20:], RGB16[20:])
    assert opacity is not None
    assert (opacity[:20] == 0).all()
    assert (opacity[20:] == 1).all()
    clear[..., 3] = 65535
    assert decode_with_alpha(imagecodecs.png_encode(clear), wide)[1] is None
    white_is_zero = tiff(GREY, photometric="miniswhite")
    assert np.array_equal(decode(white_is_zero, wide)[..., 0], 65535 - GREY)
    with pytest.raises(UnreadableImageError, match=r"5 channels, and data\.channels is 3"):
        decode(FORMS["samples"], wide)


def test_crops_are_of_all_channels_and_normalised_each_by_its_own(tmp_path: Path) -> None:
    """Of a folder as of shards. Images of one value a channel, which no crop, blur or contrast changes."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(8):
        np.save(folder / f"{number}.npy", np.full((20, 30, 5), (0, 1, 4095, 40000, 65535), np.uint16))
    pack(str(folder), str(tmp_path / "tars"), "x", 3, 0, lambda done, total: None, kind(5, 16).suffixes)
    numbers = {"normalise": None, "mean": [0.0, 0.5, 0.25, 0.5, 0.5], "std": [1.0, 2.0, 0.01, 0.5, 0.25]}
    values = (np.array([0, 1, 4095, 40000, 65535]) / 65535 - numbers["mean"]) / numbers["std"]
    off = {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "brightness": 0.0, "solarize_global_2": 0.0}
    for path in (str(folder), str(tmp_path / "tars/*.tar")):
        data = {"path": path, "channels": 5, "bits": 16, "workers": 0, **numbers}
        (batch,) = batches(data, tmp_path / "run", clocks=(0, 1), augment=off)
        assert isinstance(batch, SslBatch)
        for crops in (batch.global_crops, batch.local_crops):
            flat = crops.permute(2, 0, 1, 3, 4).flatten(1).numpy()
            assert flat.shape[0] == 5
            assert np.abs(flat - values[:, None]).max() < 1e-4
            assert np.ptp(flat, axis=1).max() < 1e-4


def test_npy_is_an_image_where_images_are_no_photographs_and_copies_are_found(tmp_path: Path) -> None:
    root = tmp_path / "images"
    save(picture(1), root / "a.png")
    np.save(root / "a.npy", np.zeros((4, 4), np.float32))  # features, say
    assert [entry.path for entry in index.build(root, PHOTOGRAPHS, untold).entries] == ["a.png"]
    many = tmp_path / "many"
    many.mkdir()
    dim = np.random.default_rng(1).integers(0, 2048, (6, 8, 8, 5)).repeat(8, 1).repeat(8, 2)  # 11 bits of 16
    dim[5] = dim[0, :, ::-1] + 100
    for number, pixels in enumerate(dim.astype(np.uint16)):
        np.save(many / f"{number}.npy", pixels)
    (many / "rgb.tif").write_bytes(tiff(RGB16, photometric="rgb"))
    found = index.build(many, kind(5, 16), untold)
    assert [entry.group for entry in found.entries] == [0, 1, 2, 3, 4, 0]
    assert [(one.path, one.reason) for one in found.skipped] == [("rgb.tif", "3 channels, and data.channels is 5")]
