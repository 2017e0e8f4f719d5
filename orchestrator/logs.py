"""Reads the logs of an attempt: files of a run directory on a disk; in a bucket, which knows no append, folders of
numbered chunks that the attempt's agent brings every few seconds (`model.link`)."""

from __future__ import annotations

from dataclasses import dataclass

from model import storage


@dataclass
class Reader:
    """One log, from its beginning. Nothing is read twice."""

    path: str
    done: int = 0  # bytes of a file, or chunks

    def new(self) -> bytes:
        """What has come since the last call; nothing while there is no such log."""
        if not storage.is_uri(self.path):
            data = storage.read(self.path, self.done) if storage.exists(self.path) else b""
            self.done += len(data)
            return data
        chunks = storage.names(self.path)[self.done :]
        self.done += len(chunks)
        return b"".join(storage.read_many([f"{self.path}/{chunk}" for chunk in chunks]))


def exists(path: str) -> bool:
    return bool(storage.names(path)) if storage.is_uri(path) else storage.exists(path)


def read(path: str) -> bytes:
    """All of it. Raises FileNotFoundError."""
    if not exists(path):
        raise FileNotFoundError(f"no such log: {path}")
    return Reader(path).new()
