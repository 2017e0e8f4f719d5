"""The code that a run's attempts execute: a read-only copy of model/ in the run directory, named by its digest.

A `git pull` or an upgrade never changes a run under way; going on with other code is an event of its own.
"""

from __future__ import annotations

from pathlib import Path

import model.contract
from model import storage


class CodeError(RuntimeError):
    """The copy that the log names is not there or is not what it was; the message says what to do."""


def installed() -> Path:
    """The folder of the `model` package that this process would run."""
    return Path(model.contract.__file__).parent


def digest(folder: Path | str) -> str:
    return storage.digest(storage.contents(str(folder)))


def code_dir(run_dir: str, code_digest: str) -> str:
    """What PYTHONPATH of an attempt is: the folder that holds `model/`."""
    return f"{run_dir}/code/{code_digest[:16]}"


def pin(run_dir: str, folder: Path | None = None) -> str:
    """Copy `folder` (the installed model/) into the run directory and return its digest.

    A copy that was broken off is completed by the next call. Files are read-only; folders are not, so that the run can
    be removed and Python can keep its bytecode there.
    """
    files = storage.contents(str(folder or installed()))
    code_digest = storage.digest(files)
    copies = {f"{code_dir(run_dir, code_digest)}/model/{name}": data for name, data in files.items()}
    storage.publish_many(copies)
    if not storage.is_uri(run_dir):
        for copy in copies:
            Path(copy).chmod(0o444)
    verify(run_dir, code_digest)
    return code_digest


def verify(run_dir: str, code_digest: str) -> str:
    """The run's copy, checked file by file against the digest. Raises CodeError."""
    folder = code_dir(run_dir, code_digest)
    found = digest(f"{folder}/model")
    if found != code_digest:
        raise CodeError(
            f"{folder}/model is not the code that this run began with (sha256 {found[:16]}..., not "
            f"{code_digest[:16]}...): somebody changed or removed files there. Restore them, or go on with the "
            "installed code: `dinoctl resume RUN --code new`"
        )
    return folder
