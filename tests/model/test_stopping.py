"""Stopping: alone, and two real processes that see the request at different times."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import HashStore

from model.stopping import KEY, Stop, TooLateError
from tests.model.test_parallel import run_ranks


def test_nobody_asked(tmp_path: Path) -> None:
    stop = Stop(HashStore(), tmp_path / "stop")
    assert not any(stop.at(step, 10) for step in range(1, 11))


def test_alone_stops_two_steps_later_and_not_beyond_the_phase(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    stop = Stop(HashStore(), tmp_path / "stop")
    assert [step for step in range(1, 4) if stop.at(step, 10)] == [3]
    stop = Stop(HashStore(), tmp_path / "stop")
    assert [step for step in range(9, 11) if stop.at(step, 10)] == [10]


def test_a_rank_past_the_step_must_not_seal(tmp_path: Path) -> None:
    store = HashStore()
    store.set(KEY, "4")
    with pytest.raises(TooLateError, match=r"at step 5.*stop at step 4"):
        Stop(store, tmp_path / "stop").at(5, 10)


TWO_RANKS = """
import sys, time
from pathlib import Path
import torch
from model import parallel
from model.stopping import Stop

store = parallel.join("gloo")
folder, asked = Path(sys.argv[1]), int(sys.argv[2])
# Each rank has a file of its own, as on two nodes: only the asked one sees the request.
stop = Stop(store, folder / f"stop-{parallel.rank()}")
for step in range(1, 50):
    time.sleep(0.003 * parallel.rank())  # one is always behind
    parallel.all_reduce_sum(torch.ones(1))
    if step == 7 and parallel.rank() == asked:
        stop.file.touch()
    if stop.at(step, 50):
        break
print(step)
parallel.leave()
"""


@pytest.mark.jobs
@pytest.mark.parametrize("asked", [0, 1])
def test_two_ranks_stop_at_the_same_step(tmp_path: Path, asked: int) -> None:
    results = run_ranks(TWO_RANKS, 2, str(tmp_path), str(asked))
    assert [result.stdout.strip() for result in results] == ["9", "9"], [result.stderr for result in results]
