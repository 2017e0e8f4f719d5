"""Opening images that Pillow cannot hold: any number of channels, 8 or 16 bits each, every value kept.

16-bit PNG and JPEG 2000 by imagecodecs, TIFF by tifffile (pages, planes, tiles, the usual compressions, BigTIFF, OME
and ImageJ), .npy by numpy, and the 8-bit formats by Pillow. Nothing is converted: an image of other channels or bits
than `data` says is unreadable, and the reason says what it has.
"""

from __future__ import annotations

import io
import logging
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import imagecodecs
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from model.config import RGB
from model.data.errors import UnreadableImageError

if TYPE_CHECKING:
    from tifffile import TiffFile

Array = NDArray[np.uint8] | NDArray[np.uint16]
"""[H, W, channels]"""

MAX_BYTES = 3 * 89_478_485
"""Of one image in memory: a quarter GiB, as of the largest RGB image."""

HEAD = 4096
"""Bytes in which a format says what the image is."""
TORN = "torn: it ends before the image"

PNG, TIFF, JP2, NPY = "PNG", "TIFF", "JPEG 2000", ".npy"
MAGIC = {
    b"\x89PNG\r\n\x1a\n": PNG,
    b"II*\0": TIFF, b"MM\0*": TIFF, b"II+\0": TIFF, b"MM\0+": TIFF,
    b"\0\0\0\x0cjP  ": JP2, b"\xff\x4f\xff\x51": JP2,
    b"\x93NUMPY": NPY,
}  # fmt: skip
"""How a file of a format begins. What it is called does not matter: in tar shards only its bytes are at hand."""

WHITE_IS_ZERO, PALETTE, CMYK = 0, 3, 5
"""TIFF's PhotometricInterpretation."""
ORIENTATION = 274
"""The tag that says how an image is turned, in TIFF as in EXIF."""
PNG_PALETTE = 3
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""By PNG's colour type."""

NO_VALUES = "a palette, whose numbers are no values: save it as grey or colour"

CHANNEL_AXES, UNNAMED_AXES = ("", "S", "C"), ("Q", "I")
"""tifffile's letters for samples and channels (none: one channel), and for pages that nothing says the meaning of."""

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it tells of damaged files is our reason's, not a log's


def load_array(content: bytes, channels: int, bits: int) -> Array:
    """The image in a file's bytes, upright, its values as they are stored.

    Raises UnreadableImageError for another number of channels or bits, and whatever else is wrong.
    """
    with _opened(content) as file:
        pixels = _unsigned(decode(file, channels))
    if pixels.shape[2] != channels:
        raise UnreadableImageError(f"{_channels(pixels.shape[2])}, and data.channels is {channels}")
    found = 8 * pixels.dtype.itemsize
    if found != bits:
        raise UnreadableImageError(f"{found} bits a channel, and data.bits is {bits}")
    return pixels


def load_wide(content: bytes) -> NDArray[np.uint16] | None:
    """A 16-bit image as RGB, or RGBA if it has an alpha channel; grey becomes RGB of equal channels. None for an image
    of 8 bits, which Pillow reads whole. Raises UnreadableImageError."""
    with _opened(content) as file:
        if stored_bits(file) <= 8:
            return None
        pixels = _unsigned(decode(file, RGB))
    count = pixels.shape[2]
    if count > 4:
        raise UnreadableImageError(f"{_channels(count)}, and data.channels is {RGB}")
    return np.ascontiguousarray(pixels if count > 2 else pixels[..., [0, 0, 0, *([1] if count == 2 else [])]])


def unlike_photographs(content: bytes) -> str:
    """What a file that Pillow does not know is, if it is an image at all; "" if not."""
    try:
        with _opened(content) as file:
            pixels = _unsigned(decode(file, RGB))
    except UnreadableImageError:
        return ""
    channels, bits = pixels.shape[2], 8 * pixels.dtype.itemsize
    if (channels, bits) == (RGB, 8):
        return "8-bit RGB in a form that Pillow does not know: save it as PNG"
    return f"{_channels(channels)} of {bits} bits, and data.channels is {RGB}, data.bits 8: they say which are read"


@contextmanager
def _opened(content: bytes) -> Iterator[BinaryIO]:
    """Whatever is raised within becomes UnreadableImageError."""
    try:
        with io.BytesIO(content) as file:
            yield file
    except UnreadableImageError:
        raise
    except MemoryError as error:
        raise UnreadableImageError("not enough memory to decode it") from error
    except Exception as error:  # decoders raise what they like on damaged bytes
        raise UnreadableImageError(_reason(error)) from error


def kind_of(file: BinaryIO) -> str:
    """Of MAGIC; "" for another. The file is at its beginning before and after."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise UnreadableImageError("empty file")
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "")


def stored_bits(file: BinaryIO) -> int:
    """Bits of a channel as the file says, before it is decoded; 8 for formats that have no others."""
    kind = kind_of(file)
    bits = BITS[kind](file) if kind else 8
    file.seek(0)
    return bits


def decode(file: BinaryIO, channels: int) -> NDArray[Any]:
    """Whatever is stored, [H, W, any number of channels] of any dtype. `channels`: those expected, which decide where
    a file does not say which of its axes is the channels'."""
    return DECODERS.get(kind_of(file), _pillow)(file, channels)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return str(error) or type(error).__name__


def _unsigned(pixels: NDArray[Any]) -> Array:
    """Contiguous, writable and in this machine's byte order."""
    if pixels.dtype.kind == "f":
        raise UnreadableImageError("floating-point pixels have no known range: save it with 8 or 16 bits a channel")
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
        raise UnreadableImageError(f"{pixels.dtype} pixels: save it as uint8 or uint16")
    return np.array(pixels, dtype=pixels.dtype.newbyteorder("="), order="C")


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"


def refuse_large(shape: Sequence[int], itemsize: int) -> None:
    """Before it is decoded. Raises UnreadableImageError."""
    if math.prod(shape) * itemsize > MAX_BYTES:
        what = " x ".join(str(length) for length in shape)
        raise UnreadableImageError(f"{what} values of {8 * itemsize} bits, more than {MAX_BYTES >> 20} MiB: cut it "
                                   "into tiles")  # fmt: skip


# --- formats ----------------------------------------------------------------------------------------------------------


def _png_header(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, bits and colour type."""
    if len(data) < 33:
        raise UnreadableImageError(TORN)
    return struct.unpack_from(">IIBB", data, 16)


def _png(file: BinaryIO, _: int) -> NDArray[Any]:
    data = file.read()
    width, height, bits, colour = _png_header(data)
    if colour == PNG_PALETTE:
        raise UnreadableImageError(NO_VALUES)
    refuse_large((height, width, PNG_CHANNELS.get(colour, 4)), 2 if bits == 16 else 1)
    orientation = Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1) if b"eXIf" in data else 1
    return _upright(_three(imagecodecs.png_decode(data)), orientation)


def _jpeg_2000_header(data: bytes) -> tuple[int, int, int, int]:
    """Height, width, channels and bits, from the SIZ segment that opens every codestream."""
    start = data.find(b"\xff\x4f\xff\x51")
    if not 0 <= start < len(data) - 44:
        raise UnreadableImageError(TORN)
    right, lower, left, upper = struct.unpack_from(">4I", data, start + 8)
    count, depth = struct.unpack_from(">HB", data, start + 40)
    return lower - upper, right - left, count, (depth & 127) + 1


def _jpeg_2000(file: BinaryIO, _: int) -> NDArray[Any]:
    data = file.read()
    *shape, bits = _jpeg_2000_header(data)
    refuse_large(shape, 2 if bits > 8 else 1)
    return _three(imagecodecs.jpeg2k_decode(data))


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(file))
    if read is None:
        raise UnreadableImageError("a .npy of a version that is not read")
    shape, _, dtype = read(file)
    return shape, dtype


def _npy(file: BinaryIO, channels: int) -> NDArray[Any]:
    shape, dtype = _npy_header(file)
    if len(shape) not in (2, 3) or dtype.hasobject:
        raise UnreadableImageError(f"an array {list(shape)} of {dtype}; an image is [height, width, channels]")
    refuse_large(shape, dtype.itemsize)
    file.seek(0)
    return _last(np.load(file, allow_pickle=False), channels)


def _open_tiff(file: BinaryIO) -> TiffFile:
    from tifffile import TiffFile  # here: a third of a second of every process, and few read a TIFF

    return TiffFile(file)


def _tiff(file: BinaryIO, channels: int) -> NDArray[Any]:
    with _open_tiff(file) as opened:
        series, page = opened.series[0], opened.pages.first
        if page.photometric == PALETTE:
            raise UnreadableImageError(NO_VALUES)
        if page.photometric == CMYK and channels == RGB:
            raise UnreadableImageError("CMYK of 16 bits: save it as RGB")
        lengths = {axis: n for axis, n in zip(series.axes, series.shape, strict=True) if n > 1 or axis in "YX"}
        other = "".join(axis for axis in lengths if axis not in "YX")
        if not {"Y", "X"} <= lengths.keys() or other not in CHANNEL_AXES + UNNAMED_AXES:
            axes = " x ".join(f"{axis} {length}" for axis, length in lengths.items())
            raise UnreadableImageError(f"a stack of images, {axes}: save one plane a file")
        refuse_large(tuple(lengths.values()), series.dtype.itemsize)
        pixels = series.asarray(maxworkers=1).reshape(tuple(lengths.values()))
        if page.photometric == WHITE_IS_ZERO and pixels.dtype.kind == "u":
            pixels = ~pixels
        orientation = page.tags.valueof(ORIENTATION, 1)
    if other in CHANNEL_AXES:
        pixels = pixels.transpose(["".join(lengths).index(axis) for axis in f"YX{other}"])
    return _upright(_three(pixels) if other in CHANNEL_AXES else _last(pixels, channels), orientation)


def _pillow(file: BinaryIO, _: int) -> NDArray[Any]:
    """JPEG, WebP, BMP and other formats of 8 bits."""
    with Image.open(file) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK") or image.format == "AVIF":
            raise UnreadableImageError(f"{image.format} of mode {image.mode}: read for 8-bit RGB alone (data.channels: "
                                       "3, data.bits: 8); save it as PNG or TIFF")  # fmt: skip
        refuse_large((image.height, image.width, len(image.getbands())), 1)
        return _three(np.asarray(ImageOps.exif_transpose(image)))


DECODERS: dict[str, Callable[[BinaryIO, int], NDArray[Any]]] = {
    PNG: _png, TIFF: _tiff, JP2: _jpeg_2000, NPY: _npy,
}  # fmt: skip

BITS: dict[str, Callable[[BinaryIO], int]] = {
    PNG: lambda file: _png_header(file.read(HEAD))[2],
    TIFF: lambda file: 8 * int(_open_tiff(file).series[0].dtype.itemsize),
    JP2: lambda file: _jpeg_2000_header(file.read(HEAD))[3],
    NPY: lambda file: 8 * _npy_header(file)[1].itemsize,
}


# --- axes -------------------------------------------------------------------------------------------------------------


def _three(pixels: NDArray[Any]) -> NDArray[Any]:
    """[H, W] as [H, W, 1]"""
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _last(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """Channels last, where nothing says which axis is theirs: the last if it is as long as expected, else the first if
    that is, else the shorter one of both."""
    if pixels.ndim == 2:
        return _three(pixels)
    first, _, last = pixels.shape
    is_last = last == channels or (first != channels and last <= first)
    return pixels if is_last else np.moveaxis(pixels, 0, -1)


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """As EXIF's number says: 5 to 8 are turned over the diagonal, and then mirrored as 1, 4, 2 and 3 would be."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::down, ::across]
