"""A little client of the API server, for what brings the cluster up: nothing beyond Python itself."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Object = dict[str, Any]


class ApiError(Exception):
    """The API server refused; `status` is its HTTP status."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Api:
    """As the certificate's user. Every method raises ApiError for a refusal and OSError without an answer."""

    port: int
    ca: Path
    certificate: Path
    key: Path

    def get(self, path: str) -> Object:
        return self._object("GET", path)

    def items(self, path: str) -> list[Object]:
        """Those of a list."""
        found: list[Object] = self.get(path)["items"]
        return found

    def create(self, path: str, body: Object) -> Object:
        return self._object("POST", path, json.dumps(body), "application/json")

    def apply(self, path: str, body: Object | str) -> Object:
        """Create it or make it so. body: an object, or one as YAML."""
        text = body if isinstance(body, str) else json.dumps(body)
        return self._object("PATCH", f"{path}?fieldManager=dev&force=true", text, "application/apply-patch+yaml")

    def merge(self, path: str, changes: Object) -> Object:
        return self._object("PATCH", path, json.dumps(changes), "application/merge-patch+json")

    def delete(self, path: str, *, grace: int | None = None) -> bool:
        """Whether it was there. grace: seconds; 0 takes it away at once, whatever its kubelet does."""
        try:
            self._object("DELETE", path + ("" if grace is None else f"?gracePeriodSeconds={grace}"))
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def ready(self) -> bool:
        try:
            return self.text("GET", "/readyz") == "ok"
        except (OSError, http.client.HTTPException, ApiError):
            return False

    def text(self, method: str, path: str, body: str | None = None, kind: str = "") -> str:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.certificate, self.key)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=context)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            said = answer.read().decode(errors="replace")
        finally:
            connection.close()
        if answer.status >= 300:
            raise ApiError(answer.status, f"{method} {path}: {answer.status}: {said[:1000]}")
        return said

    def _object(self, method: str, path: str, body: str | None = None, kind: str = "") -> Object:
        found: Object = json.loads(self.text(method, path, body, kind))
        return found
