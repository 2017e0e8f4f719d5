"""What the API server says of our objects: one list of Jobs and one of pods for everybody, then only what changes.

All objects of dinoctl in a namespace are listed by their label, once; each later look is a short watch from where the
last one ended, at most every `poll_seconds`, so that a thousand attempts cost what changes of them. A watch that the
server cannot take up again (410: it has forgotten where we were) becomes a list.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from orchestrator.asking_kubernetes import Api, NoAnswerError, RefusedError, connect
from orchestrator.launchers import kubernetes_records as records
from orchestrator.launchers.kubernetes_records import Job, Pod
from orchestrator.launchers.kubernetes_words import Event

T = TypeVar("T", Job, Pod)

PAGE = 500
"""Objects an answer; a server may have to read them all from its store."""

WATCH_SECONDS = 1
"""How long the changes are listened for; the shortest that the server knows."""

EVENT_SECONDS = 10.0
"""How long the events of an object are not asked for again."""

MOST_EVENTS = 10
"""Objects whose events are asked for in one look; the others' come with the next."""


@dataclass(frozen=True)
class Where:
    """A place to look: a namespace, and what attempts are in it (`scheduler` and `pod_group_api` of the section)."""

    context: str | None
    namespace: str
    scheduler: str
    pod_group_api: str = records.POD_GROUP_API

    @property
    def jobs(self) -> str:
        return records.KINDS[self.scheduler].format(namespace=self.namespace)

    @property
    def pods(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    @property
    def services(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/services"

    @property
    def kinds(self) -> list[str]:
        """All that an attempt is made of, its pods not."""
        group = f"/apis/scheduling.k8s.io/{self.pod_group_api}/namespaces/{self.namespace}/podgroups"
        return [self.jobs, self.services, *([group] if self.scheduler == "pod-group" else [])]

    @property
    def api(self) -> Api:
        return connect(self.context)


class _ExpiredError(RuntimeError):
    """The server has forgotten where a watch or a list was."""


@dataclass
class _Kept(Generic[T]):
    """The objects of one kind, as of `version`; by uid. gone: the last that was seen of those that are deleted."""

    path: str
    read: Callable[[Mapping[str, Any]], T]
    version: str = ""
    there: dict[str, T] = field(default_factory=dict)
    gone: dict[str, T] = field(default_factory=dict)

    def refresh(self, api: Api) -> None:
        """Raises NoAnswerError, RefusedError."""
        if self.version:
            try:
                return self._watch(api)
            except _ExpiredError:
                self.version = ""
        for _ in range(2):
            try:
                return self._list(api)
            except _ExpiredError:  # between two pages
                continue
        raise NoAnswerError(f"{api.name} forgets what it lists faster than it can be read")

    def _list(self, api: Api) -> None:
        there: dict[str, T] = {}
        following: str | None = None
        while True:
            with _expiring():
                page = api.get(self.path, labelSelector=records.OURS, limit=PAGE, **{"continue": following})
            there |= {item["metadata"]["uid"]: self.read(item) for item in page.get("items") or ()}
            following = page["metadata"].get("continue")
            if not following:
                break
        self.gone |= {uid: thing for uid, thing in self.there.items() if uid not in there}
        self.there, self.version = there, page["metadata"]["resourceVersion"]

    def _watch(self, api: Api) -> None:
        with _expiring():
            changes = api.watch(
                self.path, WATCH_SECONDS, labelSelector=records.OURS, resourceVersion=self.version,
                allowWatchBookmarks=True,
            )  # fmt: skip
            for change in changes:
                if change["type"] == "ERROR":
                    raise _ExpiredError(str(change["object"].get("message")))
                self._take(change["type"], change["object"])

    def _take(self, what: str, item: Mapping[str, Any]) -> None:
        self.version = item["metadata"]["resourceVersion"]
        if what == "BOOKMARK":
            return
        thing, uid = self.read(item), item["metadata"]["uid"]
        if what == "DELETED":
            self.there.pop(uid, None)
            self.gone[uid] = thing
        else:
            self.there[uid] = thing


@contextmanager
def _expiring() -> Iterator[None]:
    """410 is an _ExpiredError."""
    try:
        yield
    except RefusedError as error:
        if error.status != 410:
            raise
        raise _ExpiredError(str(error)) from error


@dataclass
class _View:
    """All that is known of one place. asked_at: wall clock; asked: the monotonic clock; error: instead of an answer."""

    jobs: _Kept[Job]
    pods: _Kept[Pod]
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked_at: float = 0.0
    asked: float = float("-inf")
    error: NoAnswerError | None = None
    events: dict[str, tuple[float, list[Event]]] = field(default_factory=dict)

    def refresh(self, api: Api) -> None:
        listing = not (self.jobs.version and self.pods.version)
        if listing:  # in this order: no pod is older than its job
            self.jobs.refresh(api)
            self.pods.refresh(api)
        else:
            with ThreadPoolExecutor(2) as both:
                for done in [both.submit(kept.refresh, api) for kept in (self.jobs, self.pods)]:
                    done.result()
        self.jobs.gone.clear()
        self.pods.gone = {uid: pod for uid, pod in self.pods.gone.items() if pod.owner in self.jobs.there}


_views: dict[tuple[str, Where], _View] = {}


def forget() -> None:
    """What was answered is out of date: something was just submitted or cancelled from here."""
    for view in _views.values():
        view.asked = float("-inf")


def forget_all() -> None:
    """As a new process that has asked nothing yet."""
    _views.clear()


@dataclass(frozen=True)
class Seen:
    """One look. Pods that are gone are among those of a job that is there, as they were last seen, and over."""

    where: Where
    jobs: Mapping[str, Job]
    pods: Mapping[str, Sequence[Pod]]  # by owner
    asked_at: float


def look(where: Where, poll: float = 0.0, newer_than: float = 0.0) -> Seen:
    """All our jobs and pods in that place. poll: a look that is no older is good enough, unless it is older than
    `newer_than` (wall clock). Raises NoAnswerError, also for a refusal."""
    view = _view(where)
    with view.lock:
        stale = time.monotonic() - view.asked >= poll or view.asked_at < min(newer_than, time.time())
        if stale:
            at, asked = time.time(), time.monotonic()
            try:
                view.refresh(where.api)
                view.error = None
            except NoAnswerError as error:
                view.error = error
            except RefusedError as error:
                view.error = NoAnswerError(f"{error}; {_advice(where, error)}", error.status)
            view.asked_at, view.asked = at, asked
        if view.error is not None:
            raise NoAnswerError(str(view.error), view.error.status)
        over = [pod if pod.is_over else replace(pod, phase="Failed") for pod in view.pods.gone.values()]
        return Seen(where, dict(view.jobs.there), _by_owner([*view.pods.there.values(), *over]), view.asked_at)


def _view(where: Where) -> _View:
    key = (os.environ.get("KUBECONFIG", ""), where)
    if key not in _views:
        _views[key] = _View(_Kept(where.jobs, records.job), _Kept(where.pods, records.pod))
    return _views[key]


def _by_owner(pods: Iterable[Pod]) -> dict[str, list[Pod]]:
    found: dict[str, list[Pod]] = {}
    for pod in pods:
        found.setdefault(pod.owner, []).append(pod)
    return found


def _advice(where: Where, error: RefusedError) -> str:
    if error.status == 404:
        return (
            f"kubernetes.scheduler is {where.scheduler}, which is not installed on this cluster; indexed-job always is"
        )
    return "this is not known to dinoctl"


# --- events -----------------------------------------------------------------------------------------------------------


def events(where: Where, names: Sequence[str]) -> list[Event]:
    """What the cluster said of these objects, each asked for at most every EVENT_SECONDS, and MOST_EVENTS at once;
    nothing where it does not answer, or we may not ask."""
    view, now = _view(where), time.monotonic()
    with view.lock:
        due = [name for name in names if now - view.events.get(name, (float("-inf"), []))[0] > EVENT_SECONDS]
        for name in due[:MOST_EVENTS]:
            view.events[name] = (now, _ask_events(where, name))
        for old in [name for name, (at, _) in view.events.items() if now - at > 100 * EVENT_SECONDS]:
            del view.events[old]
        return [event for name in names for event in view.events.get(name, (now, []))[1]]


def _ask_events(where: Where, name: str) -> list[Event]:
    path = f"/api/v1/namespaces/{where.namespace}/events"
    try:
        items = where.api.get(path, fieldSelector=f"involvedObject.name={name}", limit=PAGE).get("items") or ()
    except (NoAnswerError, RefusedError):
        return []
    return [_event(item) for item in items]


def _event(item: Mapping[str, Any]) -> Event:
    at = item.get("lastTimestamp") or item.get("eventTime") or item["metadata"]["creationTimestamp"]
    message = " ".join((item.get("message") or "").split())
    return Event(item["involvedObject"].get("name", ""), item.get("reason") or "", message, records.seconds(at))


# --- one attempt's, now -----------------------------------------------------------------------------------------------


def named(where: Where, path: str, name: str) -> list[dict[str, Any]]:
    """The objects that carry that launch name, as JSON, asked for now. Raises NoAnswerError, RefusedError."""
    return _labelled(where, path, f"{records.NAME}={name}")


def of_run(where: Where, path: str, run_id: str) -> list[dict[str, Any]]:
    """The same for those of a run."""
    return _labelled(where, path, f"{records.RUN_ID}={run_id}")


def _labelled(where: Where, path: str, label: str) -> list[dict[str, Any]]:
    selector = f"{records.OURS},{label}"
    items: list[dict[str, Any]] = where.api.get(path, labelSelector=selector).get("items") or []
    return items
