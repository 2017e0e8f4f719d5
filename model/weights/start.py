"""A phase's `weights:` may name a file, a folder or a URI instead of a phase: what training begins with then.

Public backbones have no heads; those begin fresh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import config
from model.networks.heads import ProjectionHead
from model.weights import networks, stem
from model.weights.entries import WeightsError, compare, shapes
from model.weights.outside import Prepared
from model.weights.sources import Source, open_source

Shapes = dict[str, tuple[int, ...]]

SEEN = ("heads", "norm_eps", "rope_base")
"""Settings that no shape shows, and that change what the weights compute."""


def mistakes(source: Source, model: config.Model) -> list[str]:
    """Every reason why `source` does not fit the networks of `model`; none if it does, channels of images apart: the
    patch embedding is adapted to those (`weights.stem`)."""
    backbone = {name: shape for name, shape in shapes(source.own).items() if not networks.is_head(name)}
    found = compare(backbone, networks.expected(networks.with_channels(model.backbone, source.own)))
    if source.stated:
        found += [
            f"{name} is {getattr(source.backbone, name)} there and {getattr(model.backbone, name)} in model.backbone"
            for name in SEEN
            if getattr(source.backbone, name) != getattr(model.backbone, name)
        ]
    for head, wanted in heads(model).items():
        there = {name: shape for name, shape in shapes(source.own).items() if name.startswith(f"{head}.")}
        found += compare(there, wanted) if there else []
    return found


def heads(model: config.Model) -> dict[str, Shapes]:
    """Names and shapes of each head."""
    with torch.device("meta"):
        built = {name: ProjectionHead(head, model.backbone.dim) for name, head in model.heads.items()}
    return {
        head: {f"{head}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        for head, module in built.items()
    }


def open_fitting(where: str, model: config.Model) -> Source:
    """The weights at `where`. Raises WeightsError with every mistake if they do not fit `model`."""
    source = open_source(where, model.backbone)
    if found := mistakes(source, model):
        raise WeightsError(f"{where} ({source.format}) does not fit the job's model: {'; '.join(found)}")
    return source


def read(source: Source, model: config.Model) -> dict[str, Tensor]:
    """The tensors of a source that fits, for the channels of `model`; heads that it has not are left out."""
    left = _heads_of(source) - model.heads.keys()
    taken = {name: entry.read() for name, entry in source.own.items() if name.split(".", 1)[0] not in left}
    return stem.fit(taken, model.backbone.channels)


def told(source: Source, model: config.Model, data: config.Data) -> str:
    """What a person should know of how training begins with it: heads that begin fresh or are not taken, an adapted
    embedding, images that are normalised otherwise; "" for nothing."""
    without, left = fresh_heads(source, model), sorted(_heads_of(source) - model.heads.keys())
    heads = f"; it has no {' and no '.join(without)}: fresh ones" if without else ""
    heads += f"; its {' and '.join(left)} is not taken: the model has none" if left else ""
    before, now = source.backbone.channels, model.backbone.channels
    other = before == now and source.images not in (None, Prepared(data.bits, data.mean, data.std))
    return heads + stem.told(before, now) + ("; it was trained on images normalised otherwise" if other else "")


def fresh_heads(source: Source, model: config.Model) -> list[str]:
    """The heads of the model that the source has not."""
    return [head for head in model.heads if head not in _heads_of(source)]


def _heads_of(source: Source) -> set[str]:
    return {name.split(".", 1)[0] for name in source.own if networks.is_head(name)}
