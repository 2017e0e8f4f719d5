"""The JSON Schema of a job file as a user writes it, for editors: `dinoctl schema > job.schema.json`.

Pydantic describes the resolved job. In the file the sections of `layers.SHARED` may stand at the top and a phase may
leave out what it inherits, so nothing that can be inherited is required here: `dinoctl validate` finds what is missing.
"""

from __future__ import annotations

from typing import Any

from model.config import PHASES
from orchestrator.cluster import Slurm
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.layers import SHARED
from orchestrator.spec import Job

_WRITTEN_WHOLE = ("Model", "Head", "Resolution")
"""Sections that are never merged: what they require must stand in them."""


def job_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12."""
    schema = Job.model_json_schema()
    definitions, properties = schema["$defs"], schema["properties"]
    for name, definition in definitions.items():
        if name not in _WRITTEN_WHOLE:
            definition.pop("required", None)
    for kind in PHASES.values():
        definitions[kind.__name__]["required"] = ["kind"]
    definitions["Backbone"] |= _backbone_required()
    definitions["Schedule"] = _schedule(definitions["Schedule"])
    for told, own in (("slurm", Slurm.model_json_schema()), ("kubernetes", Kubernetes.model_json_schema())):
        own.pop("required", None)  # the rest stands in the cluster's profile
        definitions |= own.pop("$defs", {}) | {own["title"]: own}
        definitions["Resources"]["properties"][told] = {"$ref": f"#/$defs/{own['title']}"}
    properties["phases"] |= {"additionalProperties": False, "minProperties": 1}
    for section in SHARED:
        phase = next(kind.__name__ for kind in PHASES.values() if section in kind.model_fields)
        properties[section] = definitions[phase]["properties"][section]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dinoctl job"}


def _backbone_required() -> dict[str, Any]:
    """A released architecture says the rest; a custom one does not."""
    custom = {"properties": {"arch": {"const": "custom"}}}
    return {"required": ["arch"], "if": custom, "then": {"required": ["dim", "depth", "heads"]}}


def _schedule(section: dict[str, Any]) -> dict[str, Any]:
    """A plain number stands for a schedule that stays the same."""
    return {"title": "Schedule", "anyOf": [{"type": "number"}, section]}
