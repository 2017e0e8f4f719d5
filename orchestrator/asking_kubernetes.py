"""Asking a Kubernetes API server: plain JSON in and out, bounded in time, and what is made of its refusals.

The `kubernetes` package knows how to read a kubeconfig, renews tokens and speaks TLS; its thousand classes play no
part: objects are the mappings that the server sends. It takes half a second to import, and only `connect` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 5.0
ASK_SECONDS = 20.0
"""How long a connection, and the answer to one question, may take."""

IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
"""What Kubernetes sets in every pod, of a controller that lives in the cluster too."""


class NoAnswerError(RuntimeError):
    """It is not known what is on the cluster, or whether it has done what it was asked to; in the server's words.
    status: of HTTP; 0: the server was not reached, or its answer was lost."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class NotConfiguredError(NoAnswerError):
    """No kubeconfig says how to reach a cluster, and there is none around this process."""


class RefusedError(RuntimeError):
    """The server understood and will not do it. reason: its word (NotFound, AlreadyExists, Invalid ...)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Api:
    """One API server, as one user. client: a kubernetes.client.ApiClient; name: how a person knows the server."""

    client: Any
    name: str

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Raises NoAnswerError, RefusedError; as all of these."""
        return self._asked("GET", path, params)

    def text(self, path: str, **params: Any) -> str:
        """What is no JSON: what a pod printed."""
        with answering(self.name):
            said: bytes = self._call("GET", path, params).data
            return said.decode(errors="replace")

    def post(self, path: str, body: Mapping[str, Any], **params: Any) -> dict[str, Any]:
        return self._asked("POST", path, params, body)

    def delete(self, path: str, body: Mapping[str, Any] | None = None, **params: Any) -> dict[str, Any]:
        return self._asked("DELETE", path, params, body)

    def patch(
        self, path: str, body: Mapping[str, Any], kind: str = "application/merge-patch+json", **params: Any
    ) -> dict[str, Any]:
        return self._asked("PATCH", path, params, body, kind)

    def watch(self, path: str, seconds: int, **params: Any) -> Iterator[dict[str, Any]]:
        """The changes of a list since `resourceVersion`, until the server ends the watch after so many seconds."""
        params = {"watch": True, "timeoutSeconds": seconds, **params}
        with answering(self.name):
            answer = self._call("GET", path, params)
            try:
                rest = b""
                for chunk in answer.stream(decode_content=True):
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from (json.loads(line) for line in lines if line.strip())
            finally:
                answer.release_conn()

    def _asked(
        self, method: str, path: str, params: Mapping[str, Any], body: Any = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        with answering(self.name):
            answer: dict[str, Any] = json.loads(self._call(method, path, params, body, kind).data)
            return answer

    def _call(
        self, method: str, path: str, params: Mapping[str, Any], body: Any = None, kind: str = "application/json"
    ) -> Any:
        return self.client.call_api(
            path,
            method,
            query_params=[(name, _text(value)) for name, value in params.items() if value is not None],
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(CONNECT_SECONDS, ASK_SECONDS),
        )


_known: dict[tuple[str, str | None], Api] = {}
"""Connections by kubeconfig and context: a tick every second is not to read certificates every second."""


def connect(context: str | None = None) -> Api:
    """The API server of that context of the kubeconfig; None: of its current one, or of the cluster around this
    process where there is no kubeconfig. Raises NotConfiguredError."""
    key = (os.environ.get("KUBECONFIG", ""), context)
    if key not in _known:
        _known[key] = _connected(key[0], context)
    return _known[key]


def forget() -> None:
    """Connections are made anew, as with credentials that have been renewed since."""
    _known.clear()


def _connected(kubeconfig: str, context: str | None) -> Api:
    import urllib3
    from kubernetes import client, config

    settings = client.Configuration()
    settings.retries = urllib3.Retry(0)  # who asks decides whether to ask again
    in_a_pod = context is None and not _there(kubeconfig) and IN_CLUSTER in os.environ
    try:
        if in_a_pod:
            config.load_incluster_config(settings)
        else:
            config.load_kube_config(kubeconfig or None, context, settings, persist_config=False)
    except (config.ConfigException, OSError, TypeError, ValueError) as error:
        if in_a_pod:
            raise NotConfiguredError(
                f"this pod cannot ask the cluster around it: {_plain(error)}; it needs a service account's token "
                "(automountServiceAccountToken: true, as in clusters/kubernetes/controller.yaml), or KUBECONFIG"
            ) from error
        file = kubeconfig or "~/.kube/config"
        raise NotConfiguredError(
            f"{file} does not say how to reach a cluster{f' named {context}' if context else ''}: {_plain(error)}; "
            "set KUBECONFIG to a kubeconfig, and kubernetes.context of the profile to one of `kubectl config "
            "get-contexts`"
        ) from error
    _mend_token(settings)
    return Api(client.ApiClient(settings), settings.host)


def _mend_token(settings: Any) -> None:
    """kubernetes 36.0.0 sends no token: its loaders keep it under another name than its client looks for."""
    renew = settings.refresh_api_key_hook

    def copy(of: Any) -> None:
        if renew is not None:
            renew(of)  # which puts itself in our place
            of.refresh_api_key_hook = copy
        of.api_key["BearerToken"] = of.api_key["authorization"]

    if "authorization" in settings.api_key:
        copy(settings)


def _there(kubeconfig: str) -> bool:
    files = kubeconfig.split(os.pathsep) if kubeconfig else [str(Path.home() / ".kube" / "config")]
    return any(Path(file).exists() for file in files)


# --- refusals ---------------------------------------------------------------------------------------------------------


@contextmanager
def answering(name: str = "the API server") -> Iterator[None]:
    """Whatever is raised within by the `kubernetes` package becomes a NoAnswerError or a RefusedError."""
    import urllib3
    from kubernetes.client.exceptions import ApiException

    try:
        yield
    except ApiException as error:
        if error.status == 401:
            forget()
        raise _refusal(name, int(error.status or 0), error.reason, error.body) from error
    except urllib3.exceptions.HTTPError as error:
        raise NoAnswerError(f"{name} does not answer: {_plain(error)}") from error
    except (OSError, json.JSONDecodeError) as error:
        raise NoAnswerError(f"the answer of {name} was lost: {_plain(error)}") from error


UNKNOWN_AFTER = (0, 401, 403, 408, 429)
"""Statuses after which nothing is known of the cluster; so is every 5xx, and a conflict (409) that is no
AlreadyExists."""


def _refusal(name: str, status: int, reason: str, body: bytes | str | None) -> NoAnswerError | RefusedError:
    said = _said(body)
    word = str(said.get("reason") or reason or "")
    message = " ".join(str(said.get("message") or _text_of(body) or reason or "").split()) or f"HTTP {status}"
    if status in UNKNOWN_AFTER or status >= 500 or (status == 409 and word != "AlreadyExists"):
        return NoAnswerError(f"{name} answers {status}: {message}", status)
    return RefusedError(status, word, message)


def _said(body: bytes | str | None) -> dict[str, Any]:
    """The server's Status object; a proxy in between sends something else."""
    try:
        said = json.loads(body or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _text_of(body: bytes | str | None) -> str:
    """The beginning of an answer that is no Status, but words."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    return "" if text.lstrip().startswith(("<", "{")) else text[:200]


def _plain(error: BaseException) -> str:
    """The innermost reason, in one line: urllib3 wraps it twice, with the addresses of objects."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):
        return _plain(inner)
    words = " ".join(str(error).split())
    return words.rsplit(">: ", 1)[-1] or type(error).__name__


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
