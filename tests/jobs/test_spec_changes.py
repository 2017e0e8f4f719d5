"""A run goes on with what it began with: changed specs, amendments, forks, changed code."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from model import contract
from tests.jobs.harness import PATIENCE, ROOT, Job, hold, part_of_tiny, same_weights, wait_until

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1800)]

MakeJob = Callable[..., Job]
ONE = ("pretrain",)
MARK = "this code came with a git pull"


def stop(job: Job, dinoctl: subprocess.Popen[str], step: int) -> None:
    moment = hold(job, "pretrain", step)
    dinoctl.send_signal(signal.SIGTERM)
    wait_until(moment.asked, "the agent to ask the ranks to stop")
    moment.let_go()
    assert dinoctl.wait(PATIENCE) == 130, job.output()
    job.no_process_is_left()


def refuse(job: Job, *words: str) -> str:
    before = job.events()
    refused = job.dinoctl(job.submit(*words))
    assert refused.returncode == 2, refused.stdout
    assert job.events() == before
    return refused.stdout


def test_a_changed_spec_and_changed_code(reference: Job, make_job: MakeJob, tmp_path: Path) -> None:
    # An installation of its own, so that its code can change.
    source = tmp_path / "installed"
    for house in ("model", "orchestrator", "clusters"):
        shutil.copytree(ROOT / house, source / house, ignore=shutil.ignore_patterns("__pycache__"))
    file = part_of_tiny(tmp_path / "one.yaml", ONE)
    job = make_job(file=file, environment={"PYTHONPATH": str(source)})
    keep = "checkpoints.keep_last=9"
    stop(job, job.start(job.submit(keep)), 6)

    # Another spec is told, not taken up.
    said = refuse(job, keep, "seed=4", "checkpoints.every=3")
    assert "seed: 3 -> 4" in said
    assert "new run" in said
    said = refuse(job, keep, "checkpoints.every=3")
    assert "phases.pretrain.checkpoints.every: 6 -> 3" in said
    assert "--amend" in said
    said = refuse(job, keep, "--amend", "phases.pretrain.optim.lr.peak=0.5", "checkpoints.every=3")
    assert "phases.pretrain.optim.lr.peak: 0.001 -> 0.5" in said
    assert "begun" in said

    # A git pull, then an amendment of what is only operational: the next attempt uses the new cadence and the old code.
    trainer = source / "model" / "train.py"
    edited = trainer.read_text().replace("log = logging", f"print({MARK!r})\nlog = logging", 1)
    trainer.write_text(edited)
    stop(job, job.start(job.submit("--amend", keep, "checkpoints.every=3")), 12)
    assert "amended: phases.pretrain.checkpoints.every: 6 -> 3" in job.output()
    first, second = job.attempt(1), job.attempt(2)
    assert second.settings["checkpoints"]["every"] == 3
    assert (second.code_dir, second.code_digest) == (first.code_dir, first.code_digest)
    assert Path(second.code_dir).is_relative_to(job.run_dir)
    assert MARK not in job.log(1) + job.log(2)

    # Only `--code new` goes on with other code; here it computes the same.
    assert job.start(job.on_the_run("resume", "--code", "new")).wait(PATIENCE) == 0, job.output()
    assert MARK in job.log(3)
    assert job.attempt(3).code_digest != first.code_digest
    assert [event["code_digest"] for event in job.events("Resumed")][-1] == job.attempt(3).code_digest
    assert 15 in (*job.end(2)["steps"], *job.end(3)["steps"])
    same_weights(job, reference, ONE)


def test_a_fork_begins_with_the_checkpoint_that_it_names_and_pins_it(
    reference: Job, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(file=part_of_tiny(tmp_path / "one.yaml", ONE), name="forked")
    fork = f"{reference.run_dir}#pretrain@18"
    assert job.start(job.submit("--fork", fork)).wait(PATIENCE) == 0, job.output()
    (ref,) = job.attempt(1).resume
    assert (ref.run, ref.phase, ref.step) == (str(reference.run_dir), "pretrain", 18)
    assert job.steps(1) == [19, 20]
    same_weights(job, reference, ONE)
    pins = [
        json.loads(pin.read_bytes()) for pin in (reference.run_dir / contract.PINS_DIR).glob("pretrain-1-18-*.json")
    ]
    assert [(pin["run"], set(pin["parts"])) for pin in pins] == [(str(job.run_dir), set(contract.PARTS))]

    # What was pruned, or of which only the Gram candidate's part is left, cannot be forked.
    nowhere = make_job(file=job.file, name="nowhere")
    for step in (12, 6):
        refused = nowhere.dinoctl(nowhere.submit("--fork", f"{reference.run_dir}#pretrain@{step}"))
        assert refused.returncode == 2, refused.stdout
        assert not nowhere.events()
