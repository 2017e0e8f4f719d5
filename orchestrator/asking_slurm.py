"""Asking Slurm: its commands, bounded in time, and deaf to what a surrounding job or shell says to them."""

from __future__ import annotations

import os
import re
import subprocess

ASK_SECONDS = 20.0
"""How long one question may take. A controller that is too busy for it does not answer; Slurm itself waits minutes."""

KEPT = ("SLURM_CONF", "SLURM_JWT")
SAID_TO_SLURM = re.compile("(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SACCT|SCANCEL|SINFO|SUBMITIT|PMI)_")


class NoAnswerError(RuntimeError):
    """Slurm did not answer, or refused; in its own words."""


def surroundings() -> list[str]:
    """Variables that would count for more than options or a script's own lines (SBATCH_PARTITION), or be taken for a
    new job's (SLURM_NODEID)."""
    return sorted(name for name in os.environ if SAID_TO_SLURM.match(name) and name not in KEPT)


def without_surroundings() -> list[str]:
    """A command before a command that somebody else starts: env(1) without those."""
    return ["env", *(word for name in surroundings() for word in ("-u", name))]


def environment() -> dict[str, str]:
    """This process's without those."""
    left_out = surroundings()
    return {name: value for name, value in os.environ.items() if name not in left_out}


def ask(*words: str, given: str = "", seconds: float = ASK_SECONDS) -> str:
    """What a command of Slurm's prints, times as seconds since the epoch. `given` is its standard input. Raises
    NoAnswerError."""
    times = {} if words[0] == "sbatch" else {"SLURM_TIME_FORMAT": "%s"}  # sbatch would hand it on to the job
    try:
        done = subprocess.run(
            words, input=given, capture_output=True, text=True, errors="replace", timeout=seconds,
            env={**environment(), **times}, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise NoAnswerError(f"{words[0]} is not on this machine; ask from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{words[0]} has not answered for {seconds:g} s") from None
    if done.returncode:
        raise NoAnswerError(" ".join((done.stderr or done.stdout).split()) or f"{words[0]} exited {done.returncode}")
    return done.stdout
