"""The first look at a run's images: what the log says, and what the agents of all nodes see of it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from model import config, contract, job, looking
from model.data import index
from tests.model.test_begin import begun
from tests.model.test_train import describe, images

__all__ = ["images"]

RANKS = 2


def test_the_log_and_the_agent_are_told(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "SAY_SECONDS", 0.0)
    attempt = describe(tmp_path / "run", images)
    with caplog.at_level(logging.INFO), begun(attempt):
        pass
    said = [line for line in caplog.messages if "images" in line]
    assert "looked at 7 of 40 images" in said
    assert said[-1] == "looked at 40 of 40 images"
    assert (tmp_path / "run" / contract.looked_file(attempt.attempt)).read_text() == said[-1]
    assert contract.looking_file(attempt.launch_name, 0).exists()
    assert not contract.pulse_file(attempt.launch_name, 0).exists()  # no step was made: a stop has nothing to seal
    shutil.rmtree(contract.scratch_dir(attempt.launch_name))


def test_a_line_now_and_then_and_the_last_one(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempt = describe(tmp_path / "run", images)
    tell = looking.Looking(attempt, rank=1)
    with caplog.at_level(logging.INFO):
        for done in range(3001):
            tell(index.LOOKED_AT, done, 3000)
    assert caplog.messages == ["looked at 3,000 of 3,000 images"]
    assert not (tmp_path / "run" / contract.looked_file(attempt.attempt)).exists()  # rank 0 tells it
    shutil.rmtree(contract.scratch_dir(attempt.launch_name))


def _rank(rank: int, folder: Path, pictures: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    looking.ROUND_SECONDS = 0.0
    attempt = describe(folder / "run", pictures, launch_name=f"looking-{folder.parent.name}-{folder.name}")
    (found,) = job._index(attempt, config.read_phase(attempt.settings))
    assert isinstance(found, index.Index)
    assert len(found.entries) == 40
    torch.distributed.destroy_process_group()


def test_every_rank_is_seen_to_go_on_while_rank_0_looks(images: Path, tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (tmp_path, images), RANKS)
    launch = f"looking-{tmp_path.parent.name}-{tmp_path.name}"
    for rank in range(RANKS):
        assert contract.looking_file(launch, rank).exists()
    shutil.rmtree(contract.scratch_dir(launch))
