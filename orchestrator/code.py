"""The code that a run's attempts execute: a read-only copy of model/ in the run directory, named by its digest.

A `git pull` or an upgrade never changes a run under way; going on with other code is an event of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import model.contract
from model import storage

_LEFT_OUT = {"__pycache__"}


class CodeError(RuntimeError):
    """The copy that the log names is not there or is not what it was; the message says what to do."""


def installed() -> Path:
    """The folder of the `model` package that this process would run."""
    return Path(model.contract.__file__).parent


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Relative POSIX path and content of each file that belongs to the package, in the order of the paths."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    for name in sorted(named):
        parts = name.split("/")
        if _LEFT_OUT.isdisjoint(parts) and not parts[-1].startswith("."):
            yield name, named[name].read_bytes()


def digest(folder: Path) -> str:
    """sha256 over names and contents: the same code anywhere has the same digest, whatever its times and modes."""
    total = hashlib.sha256()
    for name, data in files(folder):
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def code_dir(run_dir: str, code_digest: str) -> str:
    """What PYTHONPATH of an attempt is: the folder that holds `model/`."""
    return f"{run_dir}/code/{code_digest[:16]}"


def pin(run_dir: str, folder: Path | None = None) -> str:
    """Copy `folder` (the installed model/) into the run directory and return its digest.

    A copy that was broken off is completed by the next call. Files are read-only; folders are not, so that the run can
    be removed and Python can keep its bytecode there.
    """
    source = folder or installed()
    code_digest = digest(source)
    target = f"{code_dir(run_dir, code_digest)}/model"
    for name, data in files(source):
        storage.publish(f"{target}/{name}", data)
        storage.local(f"{target}/{name}").chmod(0o444)
    verify(run_dir, code_digest)
    return code_digest


def verify(run_dir: str, code_digest: str) -> str:
    """The run's copy, checked file by file against the digest. Raises CodeError."""
    folder = code_dir(run_dir, code_digest)
    found = digest(storage.local(folder) / "model")
    if found != code_digest:
        raise CodeError(
            f"{folder}/model is not the code that this run began with (sha256 {found[:16]}..., not "
            f"{code_digest[:16]}...): somebody changed or removed files there. Restore them, or go on with the "
            "installed code: `dinoctl resume RUN --code new`"
        )
    return folder
