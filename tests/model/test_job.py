"""Where a phase stands, and which layouts it can be trained in. What it goes on from: test_train.py, on real jobs."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
from pydantic import ValidationError

from model import config
from model.job import Loop, check_layout
from model.networks.fp8 import missing as fp8_missing
from tests.model.test_train import phase_settings


def test_layouts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    settings = config.read_phase(phase_settings(tmp_path))
    check_layout(settings, 2)
    with pytest.raises(ValueError, match=r"3 processes .* these can: \[1, 2\]"):
        check_layout(settings, 3)
    fp8 = config.read_phase(phase_settings(tmp_path, precision={"compute": "bf16", "fp8": "blocks"}))
    if fp8_missing():
        with pytest.raises(ValueError, match=r"precision.fp8: fp8 needs .* set it to none"):
            check_layout(fp8, 2)
    sharded = config.read_phase(phase_settings(tmp_path, parallel={"shard": "hsdp", "shard_size": 4}))
    with pytest.raises(ValueError, match=r"parallel.shard_size: 2 processes cannot be cut into copies of 4"):
        check_layout(sharded, 2)


def test_fewer_processes_take_more_micro_batches(tmp_path: Path) -> None:
    base = {"batch_size": 48, "group_size": 4, "lr": 0.001}
    capped = config.read_phase(phase_settings(tmp_path, optim={**base, "micro_batch": 10})).optim
    assert [capped.micro_batches(processes) for processes in (1, 2, 3, 4, 6, 12)] == [6, 3, 2, 3, 1, 1]
    fixed = config.read_phase(phase_settings(tmp_path, optim={**base, "accumulate": 3})).optim
    assert fixed.worlds() == [1, 2, 4]
    with pytest.raises(ValueError, match="8 processes cannot share batch_size 48 in whole groups of 4 and 3"):
        fixed.micro_batches(8)
    with pytest.raises(ValidationError, match="micro_batch 2 goes without accumulate, and holds a whole group"):
        config.read_phase(phase_settings(tmp_path, optim={**base, "micro_batch": 2}))


def test_the_loop_counts_what_changed_nothing() -> None:
    loop = Loop(step=3, origin="pretrain", clock=10, position=80)
    bad = loop.after_step(8).settled(finite=False)
    assert bad == Loop(step=4, origin="pretrain", clock=11, position=88, non_finite=1)
    assert bad.after_step(8).settled(finite=False).non_finite == 2
    assert bad.after_step(8).settled(finite=True).non_finite == 0


def test_what_was_jumped_over_stays_and_what_is_ahead_comes_from_the_phase() -> None:
    jump = config.read(config.Jump, {"at": 4, "steps": 9})
    loop = Loop(step=0, origin="pretrain", clock=10, position=80, jumps=((7, 2),)).with_jumps([jump])
    assert loop.jumps == ((7, 2), (14, 9))  # the phase began at clock 10, with another's state
    after = accumulate(range(5), lambda at, _: at.after_step(8), initial=loop)
    assert [at.position for at in after] == [80, 88, 96, 104, 112, 120 + 9 * 8]
    at_the_jump = Loop(step=4, origin="pretrain", clock=14, position=112, jumps=loop.jumps)
    assert at_the_jump.with_jumps([jump]).jumps == loop.jumps
    assert at_the_jump.with_jumps([]).jumps == ((7, 2),)  # not jumped yet, and nobody asks for it any more
    beyond = Loop(step=5, origin="pretrain", clock=15, position=120, jumps=loop.jumps)
    assert beyond.with_jumps([]).jumps == beyond.with_jumps([jump]).jumps == loop.jumps


def test_a_phase_of_another_batch_size_goes_on_with_the_next_whole_batch_of_its_own() -> None:
    loop = Loop(step=0, origin="pretrain", clock=10, position=80)
    assert [loop.in_batches_of(images).position for images in (4, 8, 16, 32)] == [80, 80, 80, 96]
