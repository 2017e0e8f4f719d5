"""The code that a run's attempts execute: a read-only copy of model/ in the run directory, named by its digest; where
workers are pods the code that their image brings, named by the image's.

A `git pull`, an upgrade or a new image never changes a run under way; going on with other code is an event of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import model.contract
from model import storage


class CodeError(RuntimeError):
    """The copy that the log names is not there or is not what it was; the message says what to do."""


def installed() -> Path:
    """The folder of the `model` package that this process would run."""
    return Path(model.contract.__file__).parent


def digest(folder: Path | str) -> str:
    return storage.digest(storage.contents(str(folder)))


def in_image(cluster: Mapping[str, Any]) -> bool:
    """Whether the workers of a resolved cluster profile bring their code with them."""
    return bool(cluster["launcher"] == "kubernetes")


IMAGE_DIGEST = re.compile("@sha256:([0-9a-f]{64})$")


def image_digest(image: str) -> str:
    """What stands for an image's code: its digest. Of one that is named without, as on a cluster of one's own, that of
    its name, which says nothing of what is in it."""
    named = IMAGE_DIGEST.search(image)
    return named[1] if named else hashlib.sha256(image.encode()).hexdigest()


def settle(run_dir: str, cluster: Mapping[str, Any]) -> str:
    """The digest of the code that is there now for a run's attempts: the image's or, pinned to the run, this
    process's."""
    return image_digest(cluster["kubernetes"]["image"]) if in_image(cluster) else pin(run_dir)


def there_now(cluster: Mapping[str, Any]) -> str:
    """As `settle`, with nothing pinned."""
    return image_digest(cluster["kubernetes"]["image"]) if in_image(cluster) else digest(installed())


def for_attempt(run_dir: str, cluster: Mapping[str, Any], code_digest: str, *, dry: bool = False) -> str:
    """Where the code of that digest is for an attempt: a folder, or nowhere (empty) if the image has it. dry: a copy
    need not be there. Raises CodeError if it is not the run's code any more."""
    if not in_image(cluster):
        return code_dir(run_dir, code_digest) if dry else verify(run_dir, code_digest)
    image = cluster["kubernetes"]["image"]
    if image_digest(image) != code_digest:
        raise CodeError(
            f"the workers' image is {image}, and the code that this run goes on with is {code_digest[:16]}...: "
            "another image's, or a copy of model/. Go on with the image's code, no longer claimed bit-exact: "
            "`dinoctl resume RUN --code new`; or amend the cluster's profile back"
        )
    return ""


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
    if not storage.names(f"{folder}/model"):
        raise CodeError(
            f"{folder}/model is not there: somebody removed it, or the run's attempts had their code from an image so "
            "far. Go on with the installed code, no longer claimed bit-exact: `dinoctl resume RUN --code new`"
        )
    found = digest(f"{folder}/model")
    if found != code_digest:
        raise CodeError(
            f"{folder}/model is not the code that this run began with (sha256 {found[:16]}..., not "
            f"{code_digest[:16]}...): somebody changed or removed files there. Restore them, or go on with the "
            "installed code: `dinoctl resume RUN --code new`"
        )
    return folder
