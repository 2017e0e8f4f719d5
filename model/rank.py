"""What each rank runs in, before anything of torch: `python -P -m model.rank MODULE ATTEMPT_YAML`.

Started by torchrun (or, for one process, by the agent). It ties the rank's life to its parent's, gives it a log file
and stack dumps on DUMP_SIGNAL, all before the trainer's imports (which may hang or fail too), then runs MODULE as
`__main__` in this same process. A failure that the trainer could not report itself is noted for the agent.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from model import contract, storage
from model.contract import Attempt, Cause, RankEnd
from model.link import log_to
from model.signals import DUMP_SIGNAL, be_deaf
from model.tied import die_with


def main(module: str, attempt_yaml: str) -> None:
    """Run `module` as this rank. Leaves as the module leaves."""
    be_deaf()
    die_with(os.getppid())
    attempt = contract.read_attempt(storage.read(attempt_yaml), attempt_yaml)
    rank = int(os.environ.get("RANK", "0"))
    log_to(storage.local_file(f"{attempt.run_dir}/{contract.rank_log(attempt.attempt, rank)}"))
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    _whole(contract.pid_file(attempt.launch_name, rank), str(os.getpid()).encode())
    sys.argv = [module, attempt_yaml]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            note(attempt, rank, _exited(leaving.code))
        raise
    except BaseException as error:
        note(attempt, rank, _raised(error))
        raise


def _exited(code: int | str | None) -> RankEnd:
    """What an exit code of the contract says; anything else, such as `sys.exit("message")`, is a crash."""
    if isinstance(code, int) and code in contract.CAUSES:
        return RankEnd(cause=contract.CAUSES[code], message=f"exit code {code}, no further word", step=None)
    return RankEnd(cause=Cause.CRASHED, message=f"exited with {code!r}", step=None)


def _raised(error: BaseException) -> RankEnd:
    detail = "".join(traceback.format_exception(error))
    return RankEnd(cause=Cause.CRASHED, message=f"{type(error).__name__}: {error}", step=None, detail=detail)


def note(attempt: Attempt, rank: int, end: RankEnd) -> None:
    """How this rank ended, for the agent, which is on this machine and may be the only one that can be told. The first
    word counts: what an exception says is more than the exit code that follows it."""
    file = contract.end_file(attempt.launch_name, rank)
    if not file.exists():
        with suppress(OSError):  # the temporary folder may be full too
            _whole(file, contract.encode(end))


def _whole(path: Path, data: bytes) -> None:
    """Write so that the agent, which may look at any moment, never sees half of it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
