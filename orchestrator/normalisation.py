"""`data.normalise: FILE` as the numbers in that file: the resolved job holds those, so that a file which changes later
changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from model import contract, storage
from model.config import NORMALISATIONS, Data, Statistics
from orchestrator.problems import Path, Problem, listed, shown
from orchestrator.validation import validate

MAKES_ONE = "`dinoctl data stats PATH --to FILE` makes one"


def resolve(merged: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The merged job with every such file read, and what is wrong with them."""
    job, problems = dict(merged), list[Problem]()
    if isinstance(job.get("phases"), dict):
        job["phases"] = {n: _section(phase, ("phases", n), problems) for n, phase in job["phases"].items()}
    job["evaluate"] = _section(job.get("evaluate"), ("evaluate",), problems)
    return {key: value for key, value in job.items() if key in merged}, problems


def _section(section: Any, at: Path, problems: list[Problem]) -> Any:
    data = section.get("data") if isinstance(section, dict) else None
    if not isinstance(data, dict):
        return section
    text = data.get("normalise")
    if not isinstance(text, str) or text in NORMALISATIONS or "mean" in data or "std" in data:
        return section
    found, mistakes = _read(text, data, (*at, "data", "normalise"))
    problems += mistakes
    numbers = {"mean": found.mean, "std": found.std} if found else {"normalise": "none"}  # so that the rest is checked
    return {**section, "data": {**{k: v for k, v in data.items() if k != "normalise"}, **numbers}}


def _read(text: str, data: Mapping[str, Any], at: Path) -> tuple[Statistics | None, list[Problem]]:
    try:
        values = json.loads(storage.read(text if storage.is_uri(text) else str(contract.data_folder(text).absolute())))
    except FileNotFoundError:
        return None, [Problem("no such file", at, found=shown(text), hint=MAKES_ONE,
                              allowed=f"{listed(list(NORMALISATIONS))}, or a file")]  # fmt: skip
    except (ValueError, storage.StoreError) as error:
        return None, [Problem("cannot be read", at, found=f"{text}: {error}")]
    found, mistakes = validate(Statistics, values, at)
    if mistakes or found is None:
        return None, [Problem("not a file of measured numbers", at, found=f"{text}: {mistakes[0].message}",
                              hint=MAKES_ONE)]  # fmt: skip
    other = _other(found, text, data, at)
    return None if other else found, other


def _other(found: Statistics, text: str, data: Mapping[str, Any], at: Path) -> list[Problem]:
    """It was measured of images of another kind."""
    kind = {"channels": found.channels, "bits": found.bits}
    wrong = [
        f"{name} {value}" for name, value in kind.items() if data.get(name, Data.model_fields[name].default) != value
    ]
    if not wrong:
        return []
    return [Problem("measured of images of another kind", at, found=f"{text}: {' and '.join(wrong)}")]
