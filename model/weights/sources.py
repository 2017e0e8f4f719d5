"""Weights as they lie on a disk, whoever wrote them: found out what they are, and given under our names.

    <run>/checkpoints/<phase>/<attempt>/<step>    a checkpoint of ours, each file's checksum verified
    FOLDER with config.json and *.safetensors     Hugging Face's DINOv3ViTModel, or timm's local-dir
    FOLDER with .metadata                         torch.distributed.checkpoint, as official training writes it
    FILE.safetensors                              our names (which are the official ones), Hugging Face's or timm's
    FILE.pth and others                           official, by torch.load(weights_only=True)

Of a file with several networks, one is taken: the teacher, unless told otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec

from model import config, contract, sealed, storage
from model.config import Backbone
from model.contract import CheckpointRef, File, Manifest
from model.weights import names, networks, outside, stream
from model.weights.entries import Entries, Entry, WeightsError, compare, joined, shapes
from model.weights.outside import Prepared

NETWORKS = ("teacher", "student", "gram_teacher")

OURS_KEY = "dinoctl.backbone"
"""In the header of a safetensors file of ours: the backbone's settings, JSON."""

IMAGES_KEY = "dinoctl.images"
"""In the header of a safetensors file of ours: what its images are and how they are normalised, JSON."""


@dataclass(frozen=True)
class Source:
    """One network, with its heads if there are any."""

    where: str
    format: str  # ours, official, huggingface, timm
    backbone: Backbone
    own: Entries  # under our names: the backbone's bare, and `dino_head.*`, `ibot_head.*`
    stated: bool  # the settings stand in the source: else they are told from the shapes
    made: tuple[str, ...] = ()  # names that the source has not and that its kind implies
    left: tuple[str, ...] = ()  # names of other networks and of what is no network
    images: Prepared | None = None  # how the images were prepared that it saw, where that is told


def open_source(where: str, like: Backbone | None = None, network: str = "teacher") -> Source:
    """What lies at `where`, a path or a URI, read no further than names and shapes.

    like: the backbone that it is to be, channels apart, where the source itself does not tell. Raises WeightsError,
    CheckpointError, StoreError.
    """
    if storage.is_uri(where) and _CHECKPOINT.fullmatch(where):
        source = _checkpoint(where, network)
    elif not (path := local_copy(where)).exists():
        raise WeightsError(f"no such file or folder: {where}")
    elif path.is_dir():
        source = _folder(path, like, network)
    else:
        tensors, header = _file(path)
        source = _tell(where, tensors, header, like, network)
    mistakes = compare(
        {name: shape for name, shape in shapes(source.own).items() if not networks.is_head(name)},
        networks.expected(source.backbone),
    )
    if mistakes:
        raise WeightsError(f"{where} is not a {source.backbone.arch}: {'; '.join(mistakes)}")
    return replace(source, where=where)


def local_copy(where: str) -> Path:
    """The file itself; of a URI a copy in the cache, fetched the first time."""
    if not storage.is_uri(where):
        return Path(os.path.expanduser(where))
    key = hashlib.sha256(where.encode()).hexdigest()[:16]
    target = contract.cache_dir() / "weights" / key / where.rsplit("/", 1)[-1]
    storage.fetch(where, target)
    return target


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder(path: Path, like: Backbone | None, network: str) -> Source:
    if (path / "manifest.json").exists():
        return _checkpoint(str(path.absolute()), network)
    from model.weights import pickled  # here: torch.distributed.checkpoint takes seconds to import

    if (path / pickled.INDEX).exists():
        return _tell(str(path), pickled.open_folder(path), {}, like, network)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            f"{path} is no folder of weights: it has no manifest.json (a checkpoint of dinoctl), no *.safetensors "
            f"(Hugging Face, timm) and no {pickled.INDEX} (torch.distributed.checkpoint)"
        )
    tensors: dict[str, Entry] = {}
    for file in files:
        tensors |= stream.open_file(file)[0]
    settings = path / "config.json"
    described = json.loads(settings.read_bytes()) if settings.exists() else {}
    source = _tell(str(path), tensors, {}, like, network, described)
    return replace(source, images=outside.prepared(path / "preprocessor_config.json", described))


_CHECKPOINT = re.compile(r"(?P<run>.+)/checkpoints/(?P<phase>[^/]+)/(?P<attempt>\d+)/(?P<step>\d+)/?")
"""The folder of a checkpoint, and of its run."""


def _checkpoint(where: str, network: str) -> Source:
    manifest, run = _manifest(where)
    parts = {"teacher_backbone" if network == "teacher" else network}
    if network == "teacher":  # what is kept of a checkpoint may be its backbone alone
        parts |= {"teacher_heads"} & manifest.parts.keys()
    tensors: dict[str, Entry] = {}
    for part in sorted(parts):
        tensors |= _part(where, run, manifest, part)
    centres = sorted(name for name in tensors if networks.is_center(name))
    backbone, images = _told(manifest)
    return Source(
        where=where,
        format="ours",
        backbone=backbone,
        own={name.removeprefix("backbone."): value for name, value in tensors.items() if name not in centres},
        stated=True,
        left=(*(f"part {part}" for part in sorted(manifest.parts.keys() - parts)), *centres),
        images=images,
    )


def _told(manifest: Manifest) -> tuple[Backbone, Prepared]:
    """The backbone's settings, and how the images were prepared that it saw."""
    data = config.read(config.Data, manifest.model["phase"]["data"])
    backbone = config.read(config.Model, manifest.model["networks"]).backbone
    return backbone, Prepared(data.bits, data.mean, data.std)


def open_part(where: str, part: str) -> tuple[Entries, dict[str, str]]:
    """The tensors of one part of a checkpoint of ours, its files verified, and what a header is to say of them.

    Raises WeightsError, CheckpointError.
    """
    absolute = where if storage.is_uri(where) else str(Path(where).absolute())
    manifest, run = _manifest(absolute)
    tensors = _part(where, run, manifest, part)
    has_backbone = any(name.split(".")[-1] == "cls_token" for name in tensors)
    return tensors, header(*_told(manifest)) if has_backbone else {}


def header(backbone: Backbone | None, images: Prepared | None) -> dict[str, str]:
    """What `_tell` reads again: the settings and the images, as far as they are to be said."""
    settings = {} if backbone is None else {OURS_KEY: backbone.model_dump_json()}
    return settings if images is None else {**settings, IMAGES_KEY: msgspec.json.encode(images).decode()}


def _manifest(where: str) -> tuple[Manifest, str]:
    """Of the checkpoint in a folder, and its run."""
    found = _CHECKPOINT.fullmatch(where)
    if found is None:
        raise WeightsError(f"{where} is no checkpoint: one lies in RUN/checkpoints/<phase>/<attempt>/<step>")
    ref = CheckpointRef(found["run"], found["phase"], int(found["attempt"]), int(found["step"]))
    return sealed.read_manifest(ref), ref.run


def _part(where: str, run: str, manifest: Manifest, part: str) -> Entries:
    """Those that were cut over processes are put together again from the rows in each file."""
    if part not in manifest.parts:
        raise WeightsError(f"{where} has no {part}, only {', '.join(sorted(manifest.parts))}")
    pieces: dict[str, list[tuple[int, Entry]]] = {}
    for file in manifest.parts[part]:
        entries, header = stream.open_file(_verified(f"{run}/{file.path}", file))
        cut = json.loads(header.get(sealed.ROWS, "{}"))
        for name, entry in entries.items():
            pieces.setdefault(name, []).append((cut.get(name, (0,))[0], entry))
    return {
        name: found[0][1] if len(found) == 1 else joined([entry for _, entry in sorted(found, key=itemgetter(0))])
        for name, found in pieces.items()
    }


def _verified(where: str, file: File) -> Path:
    """The file, of a URI a copy in the cache, once size and checksum are those of the manifest; read in pieces."""
    path = local_copy(where)
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise WeightsError(f"{where} is not there, though the manifest names it") from error
    if (path.stat().st_size, digest) != (file.bytes, file.sha256):
        if storage.is_uri(where):
            path.unlink()  # it may be repaired there, and is then fetched again
        raise WeightsError(f"{where} is not what its manifest says: torn or altered")
    return path


# --- files ------------------------------------------------------------------------------------------------------------


def _file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if path.suffix == ".safetensors":
        return stream.open_file(path)
    from model.weights import pickled  # here, as above

    return pickled.open_file(path), {}


# --- what are these tensors? ------------------------------------------------------------------------------------------


_OF_TIMM = (".gamma_1", ".q_bias", "reg_token", ".fc1_g.weight")


def _tell(
    where: str,
    tensors: Entries,
    header: Mapping[str, str],
    like: Backbone | None,
    network: str,
    described: Mapping[str, Any] | None = None,
) -> Source:
    """The network of these names, in whichever of the namings they are."""
    described = described or {}
    if any(name.endswith("embeddings.cls_token") for name in tensors):
        return _huggingface(where, tensors, described)
    if "architecture" in described or any(name.endswith(_OF_TIMM) for name in tensors):
        return _timm(where, tensors, described, like)
    own, left = _choose(where, tensors, network)
    stated = OURS_KEY in header
    if stated:
        backbone = config.read(Backbone, json.loads(header[OURS_KEY]))
    else:
        backbone = networks.with_channels(like, own) if like else networks.recognise(own)
    images = msgspec.json.decode(header[IMAGES_KEY], type=Prepared) if IMAGES_KEY in header else None
    return Source(where, "ours" if stated else "official", backbone, own, stated, left=left, images=images)


def _choose(where: str, tensors: Entries, network: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """One backbone and its heads under bare names, and what is left out.

    A backbone is where there is a cls_token. In official training files it is `teacher.backbone.*` (or
    `model.teacher.backbone.*`, or `model_ema` for teacher); in the released ones it has no prefix.
    """
    prefixes = sorted(name.removesuffix("cls_token") for name in tensors if name.split(".")[-1] == "cls_token")
    aliases = {"teacher": ("teacher", "model_ema")}.get(network, (network,))
    chosen = [prefix for alias in aliases for prefix in prefixes if alias in prefix.split(".")]
    if not chosen and network == "teacher":
        other = {"student", "gram_teacher", "gram"}
        chosen = [prefix for prefix in prefixes if not other & set(prefix.split("."))]
    if not chosen:
        there = ", ".join(prefix or "one backbone without a prefix" for prefix in prefixes) or "no cls_token at all"
        raise WeightsError(f"{where} has no {network}: there is {there}")
    backbone = chosen[0]
    root = backbone.removesuffix("backbone.")
    own = {}
    for name, value in tensors.items():
        bare = name.removeprefix(root)
        if name.startswith(backbone) and not (backbone == root and networks.is_head(bare)):
            own[name.removeprefix(backbone)] = value
        elif name.startswith(root) and networks.is_head(bare):
            own[bare] = value
    taken = (backbone, *(f"{root}{head}." for head in networks.HEADS))
    return own, tuple(name for name in tensors if not name.startswith(taken))


def _huggingface(where: str, tensors: Entries, described: Mapping[str, Any]) -> Source:
    """The encoder's layers are `layer.*` in files and `model.layer.*` in the model of transformers 5."""
    if not described:
        raise WeightsError(f"{where} has Hugging Face's names: name the folder that has its config.json too")
    backbone = outside.from_huggingface(described)
    theirs = {name.replace("model.layer.", "layer.", 1): value for name, value in tensors.items()}
    own, made = names.translate_back(theirs, backbone, names.huggingface(backbone))
    return Source(where, "huggingface", backbone, own, stated=True, made=tuple(made))


def _timm(where: str, tensors: Entries, described: Mapping[str, Any], like: Backbone | None) -> Source:
    backbone = outside.from_timm(shapes(tensors), described, like)
    own, made = names.translate_back(tensors, backbone, names.timm(backbone))
    return Source(where, "timm", backbone, own, stated=bool(described), made=tuple(made))
