"""Opening one image safely: whatever a folder holds becomes a picture, an alpha mask, or an error.

Greyscale, palette, CMYK, 16-bit, animated (first frame), EXIF-rotated and transparent images are told apart here and
nowhere else; what Pillow cannot hold is opened by `model.data.arrays`. What trains on images calls `decode`; `load` is
for those who want Pillow's 8-bit view of any image.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from model.config import RGB, Data, Rgb
from model.data import files
from model.data.arrays import load_array, load_wide, unlike_photographs
from model.data.errors import UnreadableImageError

Picture = NDArray[np.uint8 | np.uint16 | np.float32]
"""A decoded image, [H, W, C], contiguous and writable: whole numbers over their type's whole range (255 or 65535 is
full), or float32 in [0, 1]. Three channels of 8 bits are RGB."""

FULL_8, FULL_16 = 255, 65535

MAX_PIXELS = 89_478_485
"""Pillow's own guess at a decompression bomb (a quarter GiB as RGB); Pillow itself only warns at this size."""


def load(source: Path | bytes) -> Image.Image:
    """The image in a file, or in a file's bytes, as mode RGB, or RGBA if it says which pixels are transparent; upright,
    first frame, 8 bits a channel.

    Raises UnreadableImageError, whatever is wrong with the file; StoreError where it cannot be read off its disk.
    """
    content = _content(source)
    try:
        with Image.open(io.BytesIO(content)) as image:
            _refuse_bomb(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_8_bit_colour(image)
    except UnreadableImageError:
        raise
    except MemoryError as error:
        raise UnreadableImageError("not enough memory to decode it") from error
    except Exception as error:  # decoders raise what they like on damaged bytes: struct.error, IndexError, SyntaxError
        raise UnreadableImageError(_reason(error, content)) from error


def _content(source: Path | bytes) -> bytes:
    """Read before it is decoded, so that a disk that fails is never taken for a damaged image."""
    return source if isinstance(source, bytes) else files.read(source, source.parent)


def _refuse_bomb(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}: make it smaller")


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {MAX_PIXELS:,} pixels: make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return unlike_photographs(content) or "not an image of a known format" if content else "empty file"
    return str(error) or type(error).__name__


def _to_8_bit_colour(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no known range: save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_high_byte(np.asarray(image))).convert("RGB")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)  # which copies even if there is nothing to convert


def _high_byte(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    """16-bit greyscale to 8 bits, so that 65535 becomes 255."""
    if values.min() < 0 or values.max() > FULL_16:
        raise UnreadableImageError("greyscale values outside 0 to 65535: save it with 8 or 16 bits a channel")
    return ((values.astype(np.int64) * FULL_8 + FULL_16 // 2) // FULL_16).astype(np.uint8)


def over(image: Image.Image, background: Rgb) -> Image.Image:
    """The image as RGB, `background` (RGB in [0, 1]) showing through where it is transparent."""
    if image.mode != "RGBA":
        return image
    colour = tuple(round(255 * value) for value in background)
    return Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image).convert("RGB")


def decode(source: Path | bytes, data: Data) -> Picture:
    """The image as `data` says that images are, [H, W, channels]. Raises as `load`."""
    return np.array(over(load(source), data.background)) if data.photographs else decode_with_alpha(source, data)[0]


def decode_with_alpha(source: Path | bytes, data: Data) -> tuple[Picture, NDArray[np.float32] | None]:
    """`decode`, and the image's opacity [H, W] in [0, 1]; None if it has no transparent pixels, or is not RGB.

    For the evaluation, which takes opacity as foreground mask. Raises as `load`.
    """
    content = _content(source)
    if data.channels != RGB:
        return load_array(content, data.channels, data.bits), None
    wide = load_wide(content) if data.bits == 16 else None
    if wide is not None:
        return _wide_over(wide, data.background), _opacity(wide[..., 3]) if wide.shape[2] > RGB else None
    image = load(content)
    picture = np.array(over(image, data.background))
    return picture if data.bits == 8 else picture * np.uint16(FULL_16 // FULL_8), alpha(image)


def _wide_over(picture: NDArray[np.uint16], background: Rgb) -> NDArray[np.uint16]:
    """[H, W, 3] of [H, W, 3 or 4]: `over`, of 16 bits."""
    if picture.shape[2] == RGB:
        return picture
    colour, opacity = picture[..., :RGB].astype(np.int64), picture[..., RGB:].astype(np.int64)
    behind = np.array([round(FULL_16 * value) for value in background])
    return ((colour * opacity + behind * (FULL_16 - opacity) + FULL_16 // 2) // FULL_16).astype(np.uint16)


def alpha(image: Image.Image) -> NDArray[np.float32] | None:
    """Opacity [H, W] in [0, 1], or None if every pixel is opaque or the image has no alpha channel."""
    return _opacity(np.asarray(image.getchannel("A"))) if image.mode == "RGBA" else None


def _opacity(values: NDArray[np.integer]) -> NDArray[np.float32] | None:
    full = np.iinfo(values.dtype).max
    return None if values.min() == full else values.astype(np.float32) / np.float32(full)
