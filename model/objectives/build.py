"""The objective of a phase, by its kind."""

from __future__ import annotations

from typing import Any

from model import config
from model.objectives.base import Objective
from model.objectives.ssl import SslObjective
from model.objectives.text import TextObjective


def build(settings: config.AnyPhase, model: config.Model, seed: int, origin: str) -> Objective[Any, Any]:
    """The objective, its networks freshly initialised from `seed`; `origin` names the streams of draws."""
    if isinstance(settings, config.TextPhase):
        return TextObjective(settings, model, seed, origin)
    return SslObjective(settings, model, seed, origin)
