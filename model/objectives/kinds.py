"""The kinds of step that can be written down (`model.recording`) and computed again (`model.replay`).

A new kind is a row here, and a word in `of`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from model import config
from model.data.batch import Batch, PairBatch, SslBatch
from model.objectives import ssl, step, text, text_step
from model.objectives.pure import Outputs, StepNetworks


@dataclass(frozen=True)
class Kind:
    """What its step is a function of, and the function."""

    batch: type[Batch]
    draws: type[step.Draws] | type[text_step.TextDraws]  # a Perturbation by view, named `of_<view>`
    scalars: type[step.Scalars] | type[text_step.TextScalars]
    step: Callable[[Any, Any], Outputs]  # of networks and Inputs of these types
    create: Callable[[config.Model, Mapping[str, Any], Any, Collection[str]], StepNetworks]
    """Networks of any weights: from the model, `added`, the scalars and the names of the weights that they are for."""


def of(added: Mapping[str, Any]) -> Kind:
    """The kind of a step by what `added` says of its networks beyond the model."""
    return TEXT if added else SSL


def added(settings: config.AnyPhase) -> dict[str, Any]:
    """What a phase's networks are made of beyond the model that all phases share."""
    if not isinstance(settings, config.TextPhase):
        return {}
    return settings.model_dump(mode="json", include=set(text_step.Towers.model_fields))


def _ssl(model: config.Model, added: Mapping[str, Any], scalars: step.Scalars, names: Collection[str]) -> StepNetworks:
    return ssl.create_networks(
        model,
        seed=0,
        gram_teacher=any(name.startswith("gram_teacher.") for name in names),
        centering=scalars.centering,
        official_quirks=scalars.official_quirks,
    )


def _text(model: config.Model, added: Mapping[str, Any], scalars: Any, names: Collection[str]) -> StepNetworks:
    return text.create_networks(model, config.read(text_step.Towers, added), seed=0)


SSL = Kind(SslBatch, step.Draws, step.Scalars, step.step, _ssl)
TEXT = Kind(PairBatch, text_step.TextDraws, text_step.TextScalars, text_step.step, _text)
