"""Data at any URI: what is the user's mistake is told at once, and a store that fails is no file that is not there."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from model import storage, worker
from model.contract import Cause
from model.data import patience
from model.data.__main__ import main
from orchestrator import mistakes

fsspec.register_implementation("needy", "no_such_package.FileSystem", clobber=True, errtxt="Please install needyfs")

MISTAKES = {"nosuch://b/x-0.tar": "Protocol not known: nosuch", "needy://b/x-0.tar": "Please install needyfs"}


class Answers(BaseHTTPRequestHandler):
    """The status that the path names."""

    def do_GET(self) -> None:
        self.send_error(int(self.path.strip("/").partition(".")[0]))

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("uri", "says"), MISTAKES.items())
def test_what_nothing_installed_can_read_is_told_at_once(
    uri: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "WAITS", (600.0,))
    with pytest.raises(storage.UnknownStoreError, match=says) as caught:
        patience.patiently(partial(storage.size, uri))
    assert worker.failed(caught.value, None).cause is Cause.USER_ERROR
    explained = mistakes.explain(caught.value)
    assert explained is not None
    assert explained.exit_code == 2
    for pattern in (uri, uri.replace("0", "{0..3}"), uri.replace("0", "*")):
        assert main(["check", pattern]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"dinoctl: {pattern.replace('{0..3}', '0')}: {says}. What can be read is a path, s3://")
        assert said.count("\n") == 1


def test_a_refused_connection_is_a_store_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    with socket.socket() as taken:  # bound and not listening: it refuses
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}/x-0.tar"
        for ask in (partial(storage.size, uri), partial(storage.read_range, uri, 0, 1)):
            with pytest.raises(storage.StoreError, match=r"x-0\.tar: .*Connect call failed.*, after 3 tries"):
                patience.patiently(ask)


@pytest.mark.parametrize(("status", "number"), [(503, errno.EIO), (429, errno.EIO), (401, errno.EACCES)])
def test_what_a_web_server_refuses_is_not_gone(web: str, status: int, number: int) -> None:
    for ask in (storage.size, partial(storage.read_range, start=0, length=1)):
        with pytest.raises(storage.StoreError) as caught:
            ask(f"{web}/{status}.tar")
        assert caught.value.errno == number


def test_what_a_web_server_does_not_know_is_not_there(web: str) -> None:
    for ask in (storage.size, partial(storage.read_range, start=0, length=1)):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*404\.tar"):
            ask(f"{web}/404.tar")
