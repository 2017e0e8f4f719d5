"""One sbatch through submitit, and what is made of its answer or of none. Takes submitit to import."""

from __future__ import annotations

import io
import os
import shutil
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError

from model.contract import Attempt
from orchestrator.launchers import slurm_queue, slurm_script, slurm_words
from orchestrator.launchers.base import LaunchError, UnansweredError
from orchestrator.launchers.slurm_script import AttemptExecutor
from orchestrator.launchers.slurm_task import become_agent


def submit(executor: AttemptExecutor, attempt: Attempt) -> dict[str, Any]:
    """The handle of the job. Raises LaunchError with sbatch's own words and what to do about them, UnansweredError if
    they leave open whether the job was taken."""
    _make_folders(attempt)
    if shutil.which("sbatch") is None:
        raise LaunchError(f"sbatch is not on this machine's PATH; {slurm_words.advice('not on this machine')}")
    begun = time.time()
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises, too
            job = str(executor.submit(become_agent, attempt.run_dir, attempt.attempt).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise _refusal(" ".join(str(error).split())) from error
    return slurm_queue.handle(job, begun)


def _make_folders(attempt: Attempt) -> None:
    """The folder of script and pickle, for this user alone, as nodes run what is in it; and that of the log."""
    folder = slurm_script.folder(attempt)
    try:
        slurm_script.job_log(attempt).parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        _own(folder)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be made: {error.strerror or error}") from error


def _own(folder: Path) -> None:
    if folder.stat().st_uid != os.getuid():
        raise LaunchError(f"{folder} belongs to another user, and nodes would run what lies there; remove it")
    folder.chmod(0o700)


LOST = ("timed out", "communication", "unexpected message", "could not make sense")
"""What sbatch says where the controller may have taken the job although its answer did not arrive."""


def _refusal(words: str) -> LaunchError:
    if not words:  # ended by `timeout`
        return UnansweredError(f"sbatch: no answer in {slurm_script.SBATCH_SECONDS} s")
    if any(sign in words.lower() for sign in LOST):
        return UnansweredError(f"sbatch: {words}")
    advice = slurm_words.advice(words)
    return LaunchError(f"sbatch: {words}" + (f"; {advice}" if advice else ""))
