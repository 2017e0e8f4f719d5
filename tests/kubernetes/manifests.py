"""The manifests of clusters/kubernetes, in the namespace of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from orchestrator.asking_kubernetes import Api

MANIFESTS = Path(__file__).parents[2] / "clusters" / "kubernetes"
NAME = "dinoctl-controller"
"""Of all that controller.yaml makes."""


def documents(file: str, namespace: str) -> list[dict[str, Any]]:
    """A manifest's objects in another namespace; those of no namespace under a name of its own."""
    found = [*yaml.safe_load_all((MANIFESTS / file).read_text())]
    for document in found:
        if "namespace" in document["metadata"]:
            document["metadata"]["namespace"] = namespace
        else:
            document["metadata"]["name"] = f"{NAME}-{namespace}"
            if "roleRef" in document:
                document["roleRef"]["name"] = f"{NAME}-{namespace}"
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace
    return found


def post(admin: Api, document: dict[str, Any], **options: str) -> dict[str, Any]:
    """Create it as it stands: a field that the server does not know is an error."""
    return admin.post(collection(document), document, fieldValidation="Strict", **options)


def collection(document: dict[str, Any]) -> str:
    """The API server's path of what is of its kind and namespace."""
    version, metadata = document["apiVersion"], document["metadata"]
    where = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
    return f"/{'apis' if '/' in version else 'api'}/{version}{where}/{document['kind'].lower()}s"
