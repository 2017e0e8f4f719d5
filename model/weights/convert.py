"""Weights from one form into another, one tensor in memory at a time.

ours           FILE.safetensors    our names, the heads too if there are any, the backbone's settings in the header
official       FILE.safetensors    the released names: a backbone alone
huggingface    FOLDER              for transformers' AutoModel and AutoImageProcessor
timm           FOLDER              for timm.create_model("local-dir:FOLDER", pretrained=True)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import RGB
from model.contract import new_nonce
from model.weights import names, networks, outside, sources, stream
from model.weights.entries import Entries, WeightsError
from model.weights.outside import Prepared
from model.weights.sources import Source, open_part


@dataclass(frozen=True)
class Converted:
    """What lies at the target now, and what became of the rest."""

    target: str
    tensors: int
    bytes: int
    dropped: tuple[str, ...]  # names of the source that have no place in the target, with the reason
    made: tuple[str, ...]  # names of the target that the source has not
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Out:
    entries: Entries
    metadata: Mapping[str, str]
    beside: Mapping[str, Any]  # JSON files of a folder, by name; a single file has none
    dropped: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def convert(source: Source, target: str, to: str) -> Converted:
    """Write `source` to `target`, whole or not at all. Raises WeightsError, also if `target` is there already."""
    path = Path(os.path.expanduser(target))
    if path.exists():
        raise WeightsError(f"{target} is there already; name another, or remove it")
    out = FORMS[to](source)
    if not out.beside and path.suffix != ".safetensors":
        raise WeightsError(f"{target}: {to} is one file; give it a name that ends in .safetensors")
    size = _write_folder(path, out) if out.beside else _write_file(path, out)
    made = (*source.made, *out.made)
    return Converted(target, len(out.entries), size, (*source.left, *out.dropped), made, out.notes)


def export(where: str, target: str, part: str) -> int:
    """Write one part of a checkpoint of ours to one safetensors file, under its own names, whole or not at all.

    Of a backbone the header says the settings and how its images are normalised. Returns the file's bytes. Raises
    WeightsError, also if `target` is there already, CheckpointError.
    """
    path = Path(os.path.expanduser(target))
    if path.exists():
        raise WeightsError(f"{target} is there already; name another, or remove it")
    tensors, header = open_part(where, part)
    return _write_file(path, _Out(tensors, {**_TORCH, **header}, {}))


def _write_file(path: Path, out: _Out) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.parent / f".{path.name}.{new_nonce()}.tmp"
    try:
        size = stream.write(half, out.entries, out.metadata)
        os.link(half, path)  # which, unlike a rename, replaces nothing
    finally:
        half.unlink(missing_ok=True)
    return size


def _write_folder(path: Path, out: _Out) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.parent / f".{path.name}.{new_nonce()}.tmp"
    try:
        half.mkdir()
        size = stream.write(half / "model.safetensors", out.entries, out.metadata)
        for name, values in out.beside.items():
            (half / name).write_text(json.dumps(values, indent=2) + "\n")
        half.rename(path)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return size


# --- the forms --------------------------------------------------------------------------------------------------------

_TORCH = {"format": "pt"}
"""What transformers and timm look for in the header."""


def _ours(source: Source) -> _Out:
    return _Out(source.own, _header(source, stated=True), {}, notes=_assumed(source))


def _official(source: Source) -> _Out:
    own = {name: value for name, value in source.own.items() if not networks.is_head(name)}
    dropped = tuple(f"{name} (a head)" for name in source.own if name not in own)
    return _Out(own, _header(source, stated=False), {}, dropped)


def _header(source: Source, *, stated: bool) -> dict[str, str]:
    """`stated`: the backbone's settings too."""
    return {**_TORCH, **sources.header(source.backbone if stated else None, source.images)}


def _huggingface(source: Source) -> _Out:
    entries, dropped, made = names.translate(source.own, source.backbone, names.huggingface(source.backbone))
    size = 14 * source.backbone.patch_size
    beside = {
        "config.json": outside.to_huggingface(source.backbone),
        "preprocessor_config.json": outside.preprocessor(_images(source), size),
    }
    return _Out(entries, _TORCH, beside, tuple(dropped), tuple(made), _assumed(source))


def _timm(source: Source) -> _Out:
    entries, dropped, made = names.translate(source.own, source.backbone, names.timm(source.backbone))
    beside = {"config.json": outside.to_timm(source.backbone, _images(source))}
    notes = _assumed(source)
    if (eps := source.backbone.norm_eps) != outside.TIMM_EPS:
        notes += (
            f"norm_eps is {eps:g} and timm's {outside.TIMM_EPS:g}: build it with norm_layer=LayerNorm(eps={eps:g})",
        )
    return _Out(entries, _TORCH, beside, tuple(dropped), tuple(made), notes)


FORMS: dict[str, Callable[[Source], _Out]] = {
    "ours": _ours, "official": _official, "huggingface": _huggingface, "timm": _timm,
}  # fmt: skip


def _images(source: Source) -> Prepared:
    """As the source says, or as the released models were trained. Raises WeightsError for other channels than RGB's."""
    if source.images is None and source.backbone.channels != RGB:
        raise WeightsError(
            f"{source.where} does not say how images of {source.backbone.channels} channels are normalised, which "
            "this form has to: convert the checkpoint itself, or a file that `weights convert` made of one"
        )
    return source.images or outside.IMAGENET


def _assumed(source: Source) -> tuple[str, ...]:
    images = () if source.images or source.backbone.channels != RGB else (
        "images: normalised as ImageNet's, as the source does not say",)  # fmt: skip
    if source.stated:
        return images
    backbone = source.backbone
    return (
        *images,
        f"told from the shapes: {backbone.arch}, {backbone.heads} heads, RoPE base {backbone.rope_base:g}; "
        f"norm_eps {backbone.norm_eps:g} stands in no such file",
    )
