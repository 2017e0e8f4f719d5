"""The objective of a phase, by its kind."""

from __future__ import annotations

from typing import Any

from model import config
from model.networks.init import Make, create
from model.objectives.base import Objective
from model.objectives.ssl import SslObjective
from model.objectives.text import TextObjective


def build(
    settings: config.AnyPhase, model: config.Model, seed: int, origin: str, make: Make = create
) -> Objective[Any, Any]:
    """The objective, its networks freshly initialised from `seed` by `make`; `origin` names the streams of draws."""
    if isinstance(settings, config.TextPhase):
        return TextObjective(settings, model, seed, origin, make)
    return SslObjective(settings, model, seed, origin, make)
