"""What Slurm is sent: submitit's executor, told all that a cluster's profile and a job say. Takes submitit to import.

Every job of an attempt finds its task under one name (`task.pkl`), which is there before sbatch is called: whoever
submits may die at any moment, and a job that was taken runs all the same. submitit looks for the pickle under the
job's id, so the script makes a link of that name.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.core.core import Job
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmExecutor

from model import contract, storage
from model.config import read
from model.contract import Attempt
from orchestrator import asking_slurm, sections
from orchestrator.cluster import Slurm
from orchestrator.launchers import slurm_queue
from orchestrator.launchers.base import LaunchError

TASK = "task.pkl"
SBATCH_SECONDS = 30
"""How long sbatch may take, and lives on when whoever called it is killed: less than the controller's settling time."""


class AttemptExecutor(SlurmExecutor):
    """submitit's executor for one attempt. It submits and does nothing else: no job of submitit's is ever asked."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # a dry run needs no srun; what is missing here is told when sbatch is called

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Job[Any]]:
        (task,) = delayed_submissions
        fresh = self.folder / f"{contract.new_nonce()}.pkl"
        task.dump(fresh)
        fresh.rename(self.folder / TASK)
        return [self._submit_command(self._submitit_command_str)]

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        bounded = ["timeout", "--kill-after=5", str(SBATCH_SECONDS)]
        return [*bounded, *asking_slurm.without_surroundings(), "sbatch", str(submission_file_path)]


def options(cluster: Mapping[str, Any], attempt: Attempt) -> Slurm:
    """The profile's section with what the job has other than it. Both were checked when the job was."""
    return read(Slurm, sections.merged("slurm", cluster, _resources(attempt)))


def _resources(attempt: Attempt) -> Mapping[str, Any]:
    resources: Mapping[str, Any] = attempt.settings.get("resources", {})
    return resources


def folder(attempt: Attempt) -> Path:
    """Where submitit keeps script and pickle: in the run directory, or for runs in a bucket in the user's cache, which
    nodes must see too."""
    if storage.is_uri(attempt.run_dir):
        return contract.cache_dir() / "slurm" / attempt.launch_name
    return Path(attempt.run_dir) / contract.attempt_dir(attempt.attempt) / "slurm"


def job_log(attempt: Attempt) -> Path:
    """Where the script's and srun's own words go: to the agent's log of node 0, if that is not in a bucket."""
    if storage.is_uri(attempt.run_dir):
        return folder(attempt) / "job.log"
    return Path(attempt.run_dir) / contract.agent_log(attempt.attempt)


def script(cluster: Mapping[str, Any], attempt: Attempt, digest: str) -> str:
    """The batch script, byte for byte. Pure."""
    made = executor(cluster, attempt, digest)
    return made._make_submission_file_text(made._submitit_command_str, "")


def executor(cluster: Mapping[str, Any], attempt: Attempt, digest: str) -> AttemptExecutor:
    """submitit's executor for that attempt. Raises LaunchError for a run directory whose name Slurm cannot write."""
    slurm, where = options(cluster, attempt), folder(attempt)
    if bad := next((text for text in ("%", "\\", "\n") if text in str(where)), None):
        raise LaunchError(
            f"Slurm cannot write logs below {str(where)!r}: it takes {bad!r} in a file's name for something else; "
            "choose another folder of runs (`runs:`, or --runs)"
        )
    python = slurm.python or shlex.quote(sys.executable)
    made = AttemptExecutor(where, python=f"{python} -P")  # no `model.py` of a working directory comes before ours
    made.update_parameters(
        job_name=attempt.launch_name,
        comment=slurm_queue.label(attempt.run_id, digest),
        nodes=attempt.nodes,
        ntasks_per_node=1,
        cpus_per_task=_cpus(slurm, attempt),
        gpus_per_node=attempt.processes_per_node if slurm.gpus else None,
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint,
        exclude=",".join(dict.fromkeys([*slurm.exclude, *attempt.exclude])) or None,
        time=_resources(attempt).get("time_limit_minutes"),
        wckey=None,  # submitit's default is one that no site knows
        stderr_to_stdout=True,
        setup=[*_task(where, attempt), *slurm.setup],
        srun_args=_srun(slurm, attempt),
        additional_parameters=_additional(slurm, attempt),
    )
    return made


def _cpus(slurm: Slurm, attempt: Attempt) -> int:
    """CPUs of a node's one task, as Slurm binds a task that does not ask to a single one: the threads and the loader
    workers of all its processes, which the task starts. A site that deals CPUs out by GPU says `cpus_per_task`."""
    workers = int(attempt.settings.get("data", {}).get("workers", 0))
    return slurm.cpus_per_task or attempt.processes_per_node * (attempt.threads + workers)


def _task(where: Path, attempt: Attempt) -> list[str]:
    """What each node will run, for whoever reads the script; and the link, as only the script knows the job's id."""
    name = JobPaths(where, job_id="$JOB").submitted_pickle.name.replace("$JOB", '"$SLURM_JOB_ID"')
    return [
        f"# {TASK} becomes: python -P -m model.agent {attempt.run_dir}/{contract.attempt_yaml(attempt.attempt)}",
        f"ln -sf {TASK} {shlex.quote(str(where))}/{name}",
    ]


def _srun(slurm: Slurm, attempt: Attempt) -> Sequence[str]:
    """Options after submitit's own, so that this --output counts. As of 22.05 srun takes over no --cpus-per-task."""
    cpus = f"--cpus-per-task={_cpus(slurm, attempt)}"
    return ["--kill-on-bad-exit=1", cpus, "--output", str(job_log(attempt)), *slurm.srun]


def _additional(slurm: Slurm, attempt: Attempt) -> dict[str, Any]:
    own = {
        "signal": f"{slurm.signal}@{slurm.notice_seconds}",  # to the tasks, not to the script
        "no-requeue": True,
        "output": str(job_log(attempt)),
        "chdir": str(folder(attempt)),
        **({"reservation": slurm.reservation} if slurm.reservation else {}),
    }
    return own | {name: value or True for name, value in slurm.extra.items()}
