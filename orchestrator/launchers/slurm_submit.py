"""One sbatch through submitit, and what is made of its answer or of none. Takes submitit to import."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError

from model.contract import Attempt
from orchestrator.launchers import slurm_queue, slurm_script, slurm_words
from orchestrator.launchers.base import LaunchError
from orchestrator.launchers.slurm_queue import Job, NoAnswerError
from orchestrator.launchers.slurm_script import AttemptExecutor
from orchestrator.launchers.slurm_task import become_agent

UNSURE_SECONDS = 10.0
"""How long a job is looked for whose sbatch gave no answer: the controller may have taken it all the same."""


def submit(executor: AttemptExecutor, attempt: Attempt, look: Callable[[], Sequence[Job]]) -> dict[str, Any]:
    """The handle of the job. look: this attempt's jobs in the queue now. Raises LaunchError with sbatch's own words."""
    _make_folders(attempt)
    if shutil.which("sbatch") is None:
        raise LaunchError(f"sbatch is not on this machine's PATH; {slurm_words.advice('not on this machine')}")
    begun = time.time()
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises, too
            job = str(executor.submit(become_agent, attempt.run_dir, attempt.attempt).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        words = " ".join(str(error).split()) or f"no answer in {slurm_script.SBATCH_SECONDS} s"
        job = _taken_all_the_same(look, words)
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


def _taken_all_the_same(look: Callable[[], Sequence[Job]], words: str) -> str:
    """The job's id if an answer was lost and the job was not; raises LaunchError if it is not there."""
    deadline = time.monotonic() + (UNSURE_SECONDS if _unsure(words) else 0.0)
    while True:
        try:
            if jobs := look():
                return jobs[0].id
        except NoAnswerError:
            pass
        if time.monotonic() >= deadline:
            advice = slurm_words.advice(words)
            raise LaunchError(f"sbatch: {words}" + (f"; {advice}" if advice else ""))
        time.sleep(1.0)


LOST = ("timed out", "no answer", "communication", "unexpected", "could not make sense")


def _unsure(words: str) -> bool:
    """Whether that may have been said of a job that was taken."""
    return any(sign in words.lower() for sign in LOST)
