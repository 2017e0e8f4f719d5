"""How fast one core makes the views of an image: `python -P -m tests.benchmarks.augment [--parts] [--json]`.

Two crops of 224 pixels and eight of 96, from JPEGs of 256 and of 512 pixels (shorter side), decoding included and not,
beside torchvision's v2 transforms put together as DINOv3's users do, with the same probabilities: on Pillow images, as
there, and on tensors from torchvision's own decoder. All take turns, a round each; the figures are medians, of the
CPU time that the process took (one thread), so that other work on the machine weighs little.

The JPEGs are scikit-learn's two photographs, resized and saved at quality 90, or those of `--images FOLDER`.
`--parts` times the candidates for each part instead.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import sklearn.datasets
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from model import config
from model.contract import IMAGE_SUFFIXES
from model.data import colours, resize
from model.data.augment import Recipe, ssl_views
from model.data.images import decode
from model.data.views import SslViews
from tests.benchmarks import options as ask

SIDES = (256, 512)
GLOBAL, LOCAL, LOCALS = 224, 96, 8
SIZES = config.Resolution(global_size=GLOBAL, local_size=LOCAL)
QUALITY = 90
ENDINGS = sorted(IMAGE_SUFFIXES)

RECIPE = Recipe(
    config.Data(path="photographs"), config.Augment(), config.Crops(resolutions=[SIZES], local_count=LOCALS), 0, "bench"
)

Work = Callable[[], object]


def main() -> None:
    parser = ask.parser(__doc__)
    parser.add_argument("--images", type=ask.folder, help="a folder of photographs, instead of scikit-learn's two")
    parser.add_argument("--rounds", type=ask.positive, default=15)
    parser.add_argument("--batch", type=ask.positive, default=8, help="images of a round")
    parser.add_argument("--parts", action="store_true", help="the candidates for each part")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources = photographs(options.images, options.batch)
    if not sources:
        parser.error(f"--images {options.images}: no photographs there, of names that end in {', '.join(ENDINGS)}")
    told = parts(sources[0], options.rounds) if options.parts else cells(sources, options.batch, options.rounds)
    if options.json:
        print(json.dumps(told, indent=1))
        return
    for name, row in told.items():
        print(name, *(f"\n    {what:<52}{value:>9.2f}" for what, value in row.items()))


def photographs(folder: Path | None, most: int) -> list[Image.Image]:
    if folder is None:
        return [Image.fromarray(image) for image in sklearn.datasets.load_sample_images().images]
    there = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    return [Image.open(path).convert("RGB") for path in there[:most]]


def jpeg(photograph: Image.Image, side: int) -> bytes:
    """Its shorter side `side` pixels long."""
    scale, out = side / min(photograph.size), io.BytesIO()
    size = (round(photograph.width * scale), round(photograph.height * scale))
    photograph.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


# --- the whole --------------------------------------------------------------------------------------------------------


def cells(sources: list[Image.Image], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Images a second and core, and how many times as many as torchvision's."""
    told = {}
    for side in SIDES:
        files = [jpeg(sources[place % len(sources)], side) for place in range(batch)]
        for decoding in (True, False):
            seconds = timed(contenders(files, decoding), rounds)
            rates = {name: len(files) / value for name, value in seconds.items()}
            ours, *others = rates.values()
            told[f"{side} pixels, {'decoded each time' if decoding else 'decoded before'}"] = rates | {
                f"times {name}": ours / other for name, other in zip(list(rates)[1:], others, strict=True)
            }
    return told


def contenders(files: list[bytes], decoding: bool) -> dict[str, Work]:
    ways: dict[str, tuple[Callable[[bytes], Any], Callable[[list[Any]], object]]] = {
        "dinoctl": (partial(decode, data=RECIPE.data), dinoctls),
        "torchvision v2 on Pillow images": (opened, torchvisions()),
        "torchvision v2 on tensors": (on_tensor, torchvisions()),
    }
    return {name: batches(files, *way, decoding) for name, way in ways.items()}


def batches(
    files: list[bytes], read: Callable[[bytes], Any], views: Callable[[list[Any]], object], decoding: bool
) -> Work:
    images = [read(file) for file in files]
    return (lambda: views([read(file) for file in files])) if decoding else (lambda: views(images))


def dinoctls(images: list[Any]) -> object:
    return ssl_views(RECIPE, images, range(len(images)), SslViews(SIZES, patch_size=16))


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def on_tensor(file: bytes) -> torch.Tensor:
    image: torch.Tensor = decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8))
    return image


def torchvisions() -> Callable[[list[Any]], object]:
    """Crop, flip, jitter, grayscale, blur, solarize, normalise: DINOv3's order, `config.Augment`'s probabilities."""
    a, data, crops = RECIPE.augment, RECIPE.data, RECIPE.crops

    def view(side: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        bicubic = InterpolationMode.BICUBIC
        steps = [
            v2.RandomResizedCrop(side, scale=scale, ratio=crops.aspect, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(a.horizontal_flip),
            v2.RandomApply([v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], p=a.jitter),
            v2.RandomGrayscale(a.grayscale),
            v2.RandomApply([v2.GaussianBlur(colours.BLUR_TAPS, colours.BLUR_SIGMA)], p=blur),
            *([v2.RandomSolarize(128, p=solarize)] if solarize else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean, data.std),
        ]
        return v2.Compose(steps)

    views = [
        view(GLOBAL, crops.global_scale, a.blur_global_1, 0.0),
        view(GLOBAL, crops.global_scale, a.blur_global_2, a.solarize_global_2),
        *[view(LOCAL, crops.local_scale, a.blur_local, 0.0)] * LOCALS,
    ]
    return lambda images: [make(image) for image in images for make in views]


# --- its parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """One crop as each library likes it."""

    pillow: Image.Image
    floats: np.ndarray[Any, np.dtype[np.float32]]  # [H, W, 3]
    tensor: torch.Tensor  # float32 [3, H, W]


def parts(photograph: Image.Image, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each candidate."""
    told = {}
    for side in (*SIDES, 1024, 2048):
        told[f"decode {side} pixels, ms"] = decoders(jpeg(photograph, side))
    for side in SIDES:
        picture = decode(jpeg(photograph, side), RECIPE.data)[: side * 3 // 4, : side * 3 // 4]
        told[f"{len(picture)} pixels to {GLOBAL}, ms"] = resizers(picture)
    small = photograph.resize((GLOBAL, GLOBAL))
    floats = resize.unit(np.array(small))
    crop = Crop(small, floats, torch.from_numpy(floats).permute(2, 0, 1).contiguous())
    told |= {f"{name} of {GLOBAL} pixels, ms": ways for name, ways in operations(crop).items()}
    return {name: {way: 1e3 * value for way, value in timed(ways, rounds).items()} for name, ways in told.items()}


def decoders(file: bytes) -> dict[str, Work]:
    buffer = np.frombuffer(file, np.uint8)

    def drafted(scale: int) -> Image.Image:
        image = Image.open(io.BytesIO(file))
        image.draft("RGB", (image.width // scale, image.height // scale))
        return image.convert("RGB")

    return {
        "Pillow, into an array (taken)": lambda: decode(file, RECIPE.data),
        "Pillow": lambda: opened(file),
        "Pillow, draft at 1/2": lambda: drafted(2),
        "Pillow, draft at 1/4": lambda: drafted(4),
        "OpenCV": lambda: cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB),
        "torchvision": lambda: on_tensor(file),
    }


def resizers(picture: np.ndarray[Any, Any]) -> dict[str, Work]:
    image, size, bicubic = Image.fromarray(picture), (GLOBAL, GLOBAL), Image.Resampling.BICUBIC
    planes = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]
    return {
        "torch, 8 bits (taken)": lambda: resize.square(picture, GLOBAL),
        "torch, float32": lambda: torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True),
        "Pillow": lambda: image.resize(size, bicubic),
        "Pillow, reducing_gap=2": lambda: image.resize(size, bicubic, reducing_gap=2.0),
        "OpenCV, area": lambda: cv2.resize(picture, size, interpolation=cv2.INTER_AREA),
        "OpenCV, bicubic, not antialiased": lambda: cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC),
    }


def operations(crop: Crop) -> dict[str, dict[str, Work]]:
    """Each operation, at a factor of 0.4, by ours and by torchvision's."""
    told: dict[str, dict[str, Work]] = {}
    theirs = {
        "torchvision on Pillow": crop.pillow,
        "torchvision on bytes": tv.to_image(crop.pillow),
        "torchvision on float32": crop.tensor,
    }
    for name, operation in colours.JITTER.items():
        told[name] = {way: partial(getattr(tv, f"adjust_{name}"), x, 0.4) for way, x in theirs.items()}
        told[name]["OpenCV, float32 (taken)"] = partial(operation, crop.floats, 0.4)
    taps = [colours.BLUR_TAPS] * 2
    told["blur"] = {way: partial(tv.gaussian_blur, x, taps, [0.4, 0.4]) for way, x in theirs.items()}
    told["blur"]["OpenCV, float32 (taken)"] = partial(colours.blur, crop.floats, 0.4)
    return told


def timed(works: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """The median CPU time of each, in seconds, all taking turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
