"""The `data:` section: where the images are and what an image is. `orchestrator` comes here through `model.config`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from model.contract import IMAGE_SUFFIXES
from model.sections import Count, Fraction, Positive, Rgb, Section

SHARD_SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

DATASET = re.compile(r"[A-Z]\w*:(split|root|extra)=")
"""How a dataset string of the released DINOv3 code begins: `ImageNet:split=TRAIN:root=/data/in1k:extra=/data/extra`."""

DATASETS: dict[str, dict[str | None, str]] = {
    "ImageNet": {"TRAIN": "train", "VAL": "val", "TEST": "test"},
    "ImageNet22k": {None: "*.tar"},  # a tar a class, not compressed
    "ADE20K": {"TRAIN": "images/training", "VAL": "images/validation"},
}
"""What of the root a dataset string means, by its split (None: it has none)."""


def _dataset_path(path: Any) -> Any:
    """What a dataset string means; anything else as it is. `extra` holds lists that are not needed."""
    if not isinstance(path, str) or not DATASET.match(path):
        return path
    name, *words = path.split(":")
    given = dict(word.partition("=")[::2] for word in words)
    if name == "CocoCaptions":
        raise ValueError(f"{path}: its captions lie in one JSON file: write each as a .txt beside its image, and name "
                         "the folder of images")  # fmt: skip
    if name not in DATASETS:
        raise ValueError(f"{path}: of these dataset strings {', '.join(DATASETS)} are read; name the folder of images")
    splits = DATASETS[name]
    if set(given) - {"split", "root", "extra"} or not given.get("root") or given.get("split") not in splits:
        split = "" if None in splits else f":split={next(iter(splits))}"
        allowed = "it has no split" if None in splits else f"split one of {', '.join(map(str, splits))}"
        raise ValueError(f"{path}: write {name}{split}:root=FOLDER, {allowed}")
    return os.path.abspath(os.path.join(os.path.expanduser(given["root"]), splits[given.get("split")]))


def _is_shards(path: str) -> bool:
    return path.endswith(SHARD_SUFFIX)


def _not_empty(path: Any) -> Any:
    if path == "" or (isinstance(path, list) and "" in path):
        raise ValueError("an empty path: write the folder of images, or . for the one that dinoctl is called in")
    return path


BRACES = re.compile(r"\{([^{}]*)\}")
COUNT = re.compile(r"(\d+)\.\.(\d+)")
MOST_NAMES = 10_000_000


def check_braces(pattern: str) -> None:
    """Raises ValueError for braces of a pattern of shards that say nothing, or stand for too many names."""
    names, end = 1, 0
    for found in BRACES.finditer(pattern):
        inside, end = found[1], found.end()
        if counted := COUNT.fullmatch(inside):
            first, last = map(int, counted.groups())
            if first > last:
                raise ValueError(f"{pattern}: {{{inside}}} counts down; the smaller number comes first")
            names *= last - first + 1
        elif "," in inside:
            names *= inside.count(",") + 1
        else:
            raise ValueError(f"{pattern}: {{{inside}}} is neither a count ({{000..123}}) nor a list ({{a,b}})")
    if "{" in pattern[end:] or "}" in pattern[end:]:
        raise ValueError(f"{pattern}: a brace without its other; write x-{{000000..000123}}.tar")
    if names > MOST_NAMES:
        raise ValueError(f"{pattern} stands for more than {MOST_NAMES:,} names")


def _expandable(path: str | list[str]) -> str | list[str]:
    for one in [path] if isinstance(path, str) else path:
        if _is_shards(one):
            check_braces(one)
    return path


_OnePath = Annotated[str, Field(min_length=1)]
DataPath = Annotated[
    _OnePath | Annotated[list[_OnePath], Field(min_length=1)],
    BeforeValidator(_dataset_path),
    BeforeValidator(_not_empty),
    AfterValidator(_expandable),
]


PER_THOUSAND = 1000
"""Shares are dealt exactly in every thousand, so they are whole thousandths."""


def _thousandths(share: float) -> float:
    if abs(share * PER_THOUSAND - round(share * PER_THOUSAND)) > 1e-6:
        raise ValueError(f"{share:g} is not a multiple of 0.001")
    return share


Share = Annotated[float, Field(gt=0.0, lt=1.0), AfterValidator(_thousandths)]


def _are_shards(path: str | list[str]) -> bool:
    return isinstance(path, list) or _is_shards(path)


def _check_paths(paths: str | list[str]) -> None:
    for path in [paths] if isinstance(paths, str) else paths:
        if path.endswith(COMPRESSED):
            raise ValueError(f"path: {path} is compressed, so no image in it can be read alone; unpack it")
        if isinstance(paths, list) and not _is_shards(path):
            raise ValueError(f"path: {path} in a list: only tar shards can be listed, and they end in .tar")


HoldOut = Literal["none", "validation", "test"]

# --- what an image is -------------------------------------------------------------------------------------------------

ARRAY_SUFFIXES = frozenset({".npy"})
"""What counts as an image too, where images are no photographs."""

RGB = 3
WHITE = (1.0, 1.0, 1.0)
MOST_CHANNELS = 1024
"""Hyperspectral cameras have some hundreds."""

# A list is fine for a tuple: past a validator in mode "before", strict pydantic no longer knows that it came from JSON.
PerChannel = Annotated[tuple[float, ...], Field(min_length=1, strict=False)]
PerChannelPositive = Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)]

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
}
"""`data.normalise` by name -> mean and std; a single number is every channel's."""

MEASURE = "`dinoctl data stats PATH --channels {0} --bits {1} --to FILE` measures them; data.normalise: FILE takes them"


class Statistics(Section):
    """What `dinoctl data stats --to FILE` writes and `data.normalise: FILE` reads. Of channels in [0, 1]."""

    channels: PositiveInt
    bits: Literal[8, 16]
    mean: PerChannel
    std: PerChannel
    images: PositiveInt = Field(description="that were measured, every image weighing the same")
    unreadable: Count = 0
    of: str = Field("", description="where they lie; for people")


def _named(values: Any) -> Any:
    """`normalise` by name as the numbers that it means: a resolved section holds numbers alone, which no file and no
    table of a later version can change."""
    if not isinstance(values, Mapping) or not isinstance(values.get("normalise"), str):
        return values
    name, channels = values["normalise"], values.get("channels", RGB)
    if not isinstance(channels, int) or not 0 < channels <= MOST_CHANNELS:
        return {key: value for key, value in values.items() if key != "normalise"}  # the channels are the mistake
    if given := [key for key in ("mean", "std") if key in values]:
        raise ValueError(f"normalise and {' and '.join(given)} exclude each other: it says both")
    if name not in NORMALISATIONS:
        raise ValueError(f"normalise: {name!r}: no such name; allowed: {', '.join(NORMALISATIONS)}, or a file of "
                         "`dinoctl data stats --to FILE`")  # fmt: skip
    mean, std = NORMALISATIONS[name]
    if len(mean) not in (1, channels):
        raise ValueError(f"normalise: {name} is for {len(mean)} channels and not for {channels}; "
                         + MEASURE.format(channels, values.get("bits", 8)))  # fmt: skip
    mean, std = (one * channels if len(one) == 1 else one for one in (mean, std))
    return {**values, "normalise": None, "mean": mean, "std": std}


class Part(Section):
    """Images that are mixed in."""

    path: DataPath = Field(description="as data.path")
    share: Share = Field(description="of the images; with `batches: whole` of the batches. The rest is data.path's")
    batches: Literal["mixed", "whole"] = Field(
        "mixed", description="whole: batches of these images alone, as DINOv3's of ImageNet"
    )
    hold_out: HoldOut | None = Field(
        None, description="as data.hold_out, which it is where nothing is said; tar shards beside a folder: none"
    )


class Jump(Section):
    """Data that a phase jumps over."""

    at: Count = Field(description="updates of the phase before the jump")
    steps: PositiveInt = Field(description="of data that nobody sees")


class Data(Section):
    """Where the images are and what an image is."""

    path: DataPath = Field(
        description="folder of images (`cache:NAME`: one that `make data` fetched), or tar shards: paths, globs or "
        "URIs ending in .tar, {000000..000123} counts; one or a list; or a dataset string of dinov3's, as "
        "ImageNet:split=TRAIN:root=FOLDER"
    )
    also: list[Part] = Field([], description="other images that training sees in given shares; evaluations do not")
    index: str | None = Field(
        None, description="folder of the tar shards' index (`dinoctl data index`); null: in the run, at the first use"
    )
    lanes: PositiveInt = Field(64, description="tar shards: sequences that are read side by side; part of the order")
    window: PositiveInt = Field(4096, description="tar shards: images of a lane that are shuffled among themselves")
    hold_out: HoldOut = Field(
        "none",
        description="what training must not see: nothing, the test third, or test and validation. In a folder "
        "near-duplicates stay together; in tar shards a hash of the key decides, and they are not looked for",
    )
    channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS)] = Field(
        RGB, description="of an image; 3 is RGB, to which grey, palette and CMYK are made"
    )
    bits: Literal[8, 16] = Field(8, description="of a channel; 16 keeps all of 16-bit PNG, TIFF, JPEG 2000 and .npy")
    background: Rgb = Field(WHITE, strict=False, description="what shows through transparent pixels, RGB in [0, 1]")
    normalise: str | None = Field(
        None, description="imagenet, half, none, or a file of `dinoctl data stats --to FILE`; resolved to mean and std"
    )
    mean: PerChannel = Field(NORMALISATIONS["imagenet"][0], description="of each channel in [0, 1]; ImageNet's for RGB")
    std: PerChannelPositive = NORMALISATIONS["imagenet"][1]
    max_skip_rate: Fraction = Field(0.01, description="share of unreadable images past which the run stops")
    skip: list[Jump] = Field([], description="data to jump over; `resume --skip-data` adds to it where a run diverged")
    workers: Count = Field(2, description="loader threads a process")
    read_ahead_mib: PositiveInt = Field(256, description="tar shards: memory a process fills with what comes next")

    @property
    def parts(self) -> list[tuple[tuple[str | int, ...], Data]]:
        """Every place that images come from as a section of its own, and where its path stands in this one."""
        alone = self.model_copy(update={"also": []})
        hold_outs = [
            part.hold_out or ("none" if _are_shards(part.path) and not self.shards else self.hold_out)
            for part in self.also
        ]
        return [(("path",), alone)] + [
            (("also", number, "path"), alone.model_copy(update={"path": part.path, "hold_out": hold_out}))
            for number, (part, hold_out) in enumerate(zip(self.also, hold_outs, strict=True))
        ]

    @property
    def shards(self) -> tuple[str, ...]:
        """The tar shards that `path` names, globs and counts not expanded; none if it is a folder of images."""
        if isinstance(self.path, list):
            return tuple(self.path)
        return (self.path,) if _is_shards(self.path) else ()

    @property
    def shown(self) -> str:
        """`path` for a person."""
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    @property
    def suffixes(self) -> frozenset[str]:
        """How files of images end. Beside photographs a .npy is something else: features, say."""
        return IMAGE_SUFFIXES if self.photographs else IMAGE_SUFFIXES | ARRAY_SUFFIXES

    @property
    def photographs(self) -> bool:
        """8-bit RGB: what Pillow reads whole, and what other images are made into."""
        return (self.channels, self.bits) == (RGB, 8)

    @model_validator(mode="before")
    @classmethod
    def _normalised(cls, values: Any) -> Any:
        return _named(values)

    @model_validator(mode="after")
    def _fitting(self) -> Data:
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) == self.channels:
                continue
            if name not in self.model_fields_set:
                raise ValueError(f"{name}: missing: {self.channels} channels have no usual one, as RGB has; "
                                 + MEASURE.format(self.channels, self.bits))  # fmt: skip
            raise ValueError(f"{name}: {len(numbers)} numbers for channels: {self.channels}; one for each channel")
        if self.channels != RGB and self.background != WHITE:
            raise ValueError(f"background: a colour, which {self.channels} channels have not; it goes with channels: 3")
        return self

    @model_validator(mode="after")
    def _readable(self) -> Data:
        for paths in (self.path, *(part.path for part in self.also)):
            _check_paths(paths)
        if self.index is not None and "://" in self.index:
            raise ValueError(f"index: {self.index}: a folder that every process of the run sees, not a bucket")
        for batches in ("mixed", "whole"):
            if sum(part.share for part in self.also if part.batches == batches) > 1 - 1 / PER_THOUSAND:
                raise ValueError(f"also: the shares of {batches} batches leave nothing for data.path")
        return self
