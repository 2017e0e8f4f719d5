"""What a worker process does around its work, be it training or an evaluation: set torch up, tell how it ended.

How it ended is published as `attempts/<n>/ranks/<rank>.json`, and the exit code is the contract's.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable

import torch

from model import checkpoint, contract, sealed, storage
from model.contract import Attempt, Cause, RankEnd
from model.data.errors import BadDataError, DataError, StalledDataError
from model.rank import note
from model.stopping import TooLateError

log = logging.getLogger(__name__)


class UserError(Exception):
    """The attempt asks for something impossible."""


class DivergedError(Exception):
    """Too many steps in a row had a loss or a gradient that was not finite."""


CAUSES: tuple[tuple[type[Exception], Cause], ...] = (
    (UserError, Cause.USER_ERROR),
    (DataError, Cause.USER_ERROR),
    (DivergedError, Cause.DIVERGED),
    (BadDataError, Cause.BAD_DATA),
    (sealed.CheckpointError, Cause.BAD_CHECKPOINT),
    (checkpoint.ClosedError, Cause.SUPERSEDED),
    (TooLateError, Cause.UNSEALED),
    (storage.DiskFullError, Cause.DISK_FULL),
    (storage.AlreadyPublished, Cause.SUPERSEDED),  # somebody else writes this attempt's files
    (storage.UnknownStoreError, Cause.USER_ERROR),
    (StalledDataError, Cause.DATA_STALLED),
    (storage.StoreError, Cause.STORE_LOST),
)
"""What an exception that ends the work is to the controller; any other is a crash."""


def main(attempt_yaml: str, work: Callable[[Attempt], RankEnd]) -> int:
    """Do the work of `attempt_yaml` and publish how it ended. Returns the exit code of the contract."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank}: %(message)s", stream=sys.stderr)
    attempt = contract.read_attempt(storage.read(attempt_yaml), attempt_yaml)
    torch.set_num_threads(attempt.threads)
    be_deterministic()
    end = work(attempt)
    note(attempt, rank, end)
    try:
        storage.publish(f"{attempt.run_dir}/{contract.rank_file(attempt.attempt, rank)}", contract.encode(end))
    except storage.StoreError as error:
        log.error("%s; and that could not be published: %s", end.message, error)
    return contract.EXIT_CODES[end.cause]


def be_deterministic() -> None:
    """What has no deterministic form is an error from here on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    # The two together are torch.use_deterministic_algorithms, which imports the whole compiler to tell it so: 2 s and
    # 150 MiB of every process.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.set_deterministic_debug_mode("error")
    # Filling every new tensor with NaN shows reads of memory never written; it costs a twentieth of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def failed(error: Exception, step: int | None) -> RankEnd:
    """The end that an exception is."""
    log.error("the work ends", exc_info=error)
    cause = next((cause for kind, cause in CAUSES if isinstance(error, kind)), Cause.CRASHED)
    text = str(error) if cause is not Cause.CRASHED else f"{type(error).__name__}: {error}"
    first, *rest = text.splitlines() or [type(error).__name__]
    detail = "".join(traceback.format_exception(error)) if cause is Cause.CRASHED else "\n".join(rest)
    return RankEnd(cause=cause, message=first, step=step, detail=detail)
