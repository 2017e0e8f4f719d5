"""The agent with real processes. The ranks are a stand-in (tests/model/standin/trainer.py), all else is real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from model import contract, storage
from model.contract import Cause, RankEnd
from model.endings import judge
from tests.model.standin.attempts import Case, agent, make, wait_for


def run(case: Case, **environment: str) -> int:
    """The agent's exit code once it has ended."""
    process = agent(case, **environment)
    return process.wait(60)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- one process (an evaluation): everything that needs no torchrun ---------------------------------------------------


def test_done_and_on_end_in_the_agents_own_environment(tmp_path: Path) -> None:
    seen, go = tmp_path / "on_end.json", tmp_path / "go"
    script = (
        "import json, os, pathlib, time\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.05)\n"
        f"p = pathlib.Path({str(seen)!r}); t = p.with_suffix('.tmp');"
        "t.write_text(json.dumps([os.environ.get('PYTHONPATH'), os.environ['MARK'], os.getsid(0) == os.getpid()]));"
        "t.rename(p)"
    )
    case = make(tmp_path, ["steps:5"], threads=3, on_end=[sys.executable, "-c", script])
    began = time.time()
    assert run(case, MARK="mine", PYTHONPATH="") == 0
    assert not seen.exists()  # nothing waited for it

    outcome, facts = case.outcome, case.facts()
    assert (outcome.cause, outcome.step) == (Cause.DONE, 5)
    assert outcome.ended_at >= began
    assert facts["PYTHONPATH"] == case.attempt.code_dir
    assert facts["code"].startswith(case.attempt.code_dir)
    assert (facts["PYTHONSAFEPATH"], facts["OMP_NUM_THREADS"]) == ("1", "3")
    assert "stand-in rank 0" in case.log(0)
    assert (case.claim.launch_name, case.claim.boot_id) == (case.attempt.launch_name, contract.boot_id())
    assert not contract.scratch_dir(case.attempt.launch_name).exists()
    go.touch()
    wait_for(seen.exists)
    assert json.loads(seen.read_text()) == ["", "mine", True]


def test_a_claimed_attempt_is_left_alone_whether_its_holder_lives_or_not(tmp_path: Path) -> None:
    case = make(tmp_path, ["steps:3"], on_end=["touch", str(tmp_path / "on_end")])
    (tmp_path / contract.claim_file(1)).write_text("another's")
    assert run(case) == contract.EXIT_CODES[Cause.SUPERSEDED]
    assert not (tmp_path / "facts-0.json").exists()
    assert not (tmp_path / contract.outcome_file(1)).exists()
    assert not (tmp_path / "on_end").exists()


def test_a_closed_attempt_does_not_start_and_one_closed_later_ends(tmp_path: Path) -> None:
    case = make(tmp_path, ["deaf"])
    process = agent(case)
    pid = case.facts()["pid"]
    (tmp_path / contract.closed_file(1)).write_text("{}")
    assert process.wait(10) == contract.EXIT_CODES[Cause.SUPERSEDED]
    assert is_gone(pid)
    assert case.outcome.cause is Cause.SUPERSEDED

    (tmp_path / contract.claim_file(1)).unlink()
    assert run(case) == contract.EXIT_CODES[Cause.SUPERSEDED]
    assert not (tmp_path / contract.claim_file(1)).exists()


@pytest.mark.parametrize(
    ("behaviour", "cause", "says"),
    [
        ("raise", Cause.CRASHED, "ValueError: the stand-in was told to raise"),
        ("bare:87", Cause.BAD_CHECKPOINT, "exit code 87"),
        ("bare:7", Cause.CRASHED, "exited with 7"),
        ("cause:bad-data", Cause.BAD_DATA, "told to"),
    ],
)
def test_a_failure_is_named_with_its_log(tmp_path: Path, behaviour: str, cause: Cause, says: str) -> None:
    case = make(tmp_path, [behaviour])
    assert run(case) == contract.EXIT_CODES[cause]
    assert case.outcome.cause is cause
    assert says in case.outcome.message
    assert behaviour.partition(":")[0] in case.outcome.detail


FULL = """
import shutil, sys
from contextlib import suppress
with open(sys.argv[1] + "/filler", "wb", buffering=0) as out, suppress(OSError):
    while out.write(bytes(4096)):
        pass
assert shutil.disk_usage(sys.argv[1]).free == 0
"""


@pytest.mark.requires("mount")
def test_the_outcome_is_told_on_a_disk_without_a_free_byte(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], check=True)
    try:
        case = make(tmp_path, ["steps:100000"])
        process = agent(case)
        wait_for(case.pulsing)
        subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], check=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == contract.EXIT_CODES[case.outcome.cause]
        assert not (tmp_path / contract.attempt_dir(1) / "reserve").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_one_signal_seals_and_stops(tmp_path: Path) -> None:
    case = make(tmp_path, ["steps:100000"])
    process = agent(case)
    wait_for(case.pulsing)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(10) == contract.EXIT_CODES[Cause.STOPPED]
    assert case.outcome.cause is Cause.STOPPED
    assert case.outcome.step


def test_a_stop_before_the_first_step_waits_for_nothing(tmp_path: Path) -> None:
    case = make(tmp_path, ["steps:100000"])
    process = agent(case)
    wait_for((tmp_path / contract.claim_file(1)).exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == contract.EXIT_CODES[Cause.STOPPED]


def test_an_index_that_takes_longer_than_a_stall_is_not_hung_as_long_as_it_goes_on(tmp_path: Path) -> None:
    case = make(tmp_path, ["look:150"], stall=1.0)
    assert run(case) == contract.EXIT_CODES[Cause.DONE]


def test_a_stop_while_the_images_are_looked_at_waits_for_nothing(tmp_path: Path) -> None:
    case = make(tmp_path, ["look:100000"])
    process = agent(case)
    wait_for(contract.looking_file(case.attempt.launch_name, 0).exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == contract.EXIT_CODES[Cause.STOPPED]
    assert "before its first step" in case.outcome.message


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGINT], [signal.SIGUSR1]], ids=["twice", "notice"])
def test_a_second_signal_or_the_end_of_the_notice_kills_everything(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    case = make(tmp_path, ["children"], notice=60.0 if len(signals) > 1 else 0.5)
    process = agent(case)
    pid = case.facts()["pid"]
    wait_for(case.pulsing)
    child = wait_for(lambda: psutil.Process(pid).children())[0]
    for number in signals:
        process.send_signal(number)
        wait_for(contract.stop_file(case.attempt.launch_name).exists)
    assert process.wait(10) == contract.EXIT_CODES[Cause.UNSEALED]
    assert is_gone(pid)
    assert is_gone(child.pid)  # in a session of its own, and still found
    assert case.outcome.cause is Cause.UNSEALED


def test_a_hung_rank_leaves_its_stacks(tmp_path: Path) -> None:
    case = make(tmp_path, ["hang"], stall=1.0)
    assert run(case) == contract.EXIT_CODES[Cause.HUNG]
    assert is_gone(case.facts()["pid"])
    assert "in take_steps" in case.log(0)
    assert "in take_steps" in case.outcome.detail
    assert "health.stall_seconds" in case.outcome.message


@pytest.mark.jobs
def test_a_rank_that_waits_for_a_batch_is_told_from_one_that_hangs(tmp_path: Path) -> None:
    case = make(tmp_path, ["starve"], stall=3.0)
    assert run(case) == contract.EXIT_CODES[Cause.DATA_STALLED]
    assert "no batch for health.stall_seconds (3 s): the loader waits for s3://bucket/x.tar" in case.outcome.message
    assert "in take_steps" in case.log(0)


def test_what_the_agent_cannot_do_is_said(tmp_path: Path) -> None:
    two_nodes = make(tmp_path / "nodes", ["steps:1"], nodes=2)
    assert run(two_nodes) == contract.EXIT_CODES[Cause.USER_ERROR]
    assert "2 nodes" in two_nodes.outcome.message

    broken = make(tmp_path / "settings", ["steps:1"], settings={"health": {"stall_seconds": "long"}})
    assert run(broken) == contract.EXIT_CODES[Cause.CRASHED]
    assert "stall_seconds" in broken.outcome.detail

    Path(broken.yaml).write_text("format: 1")
    assert run(broken) == contract.EXIT_CODES[Cause.USER_ERROR]


# --- the judgement over several ranks ---------------------------------------------------------------------------------


def said(cause: Cause, step: int | None = 3) -> RankEnd:
    return RankEnd(cause=cause, message="said so", step=step)


DONE, STOPPED, CRASHED, BAD_DATA = (said(c) for c in (Cause.DONE, Cause.STOPPED, Cause.CRASHED, Cause.BAD_DATA))
HUNG = said(Cause.HUNG, None)


@pytest.mark.parametrize(
    ("ends", "first_dead", "killed", "cause"),
    [
        ([DONE, DONE], 0, None, Cause.DONE),
        ([DONE, DONE], None, HUNG, Cause.DONE),  # it hung after its work was done
        ([STOPPED, STOPPED], 1, None, Cause.STOPPED),
        ([None, CRASHED], 0, None, Cause.KILLED),  # rank 1 only lost its peer
        ([CRASHED, None], 0, None, Cause.CRASHED),  # torchrun ended rank 1 afterwards
        ([CRASHED, BAD_DATA], 0, None, Cause.BAD_DATA),
        ([None, BAD_DATA], 1, None, Cause.BAD_DATA),
        ([None, None], 1, None, Cause.KILLED),
        ([None, None], None, HUNG, Cause.HUNG),
        ([CRASHED, said(Cause.DATA_STALLED)], 0, None, Cause.DATA_STALLED),  # rank 0 lost a peer that had no images
        ([CRASHED, None], None, HUNG, Cause.CRASHED),  # rank 1 waited in vain for rank 0
        ([STOPPED, None], 0, None, Cause.KILLED),
        ([CRASHED, said(Cause.UNSEALED)], 0, None, Cause.UNSEALED),
    ],
)
def test_the_cause_is_the_rank_in_trouble(
    ends: list[RankEnd | None], first_dead: int | None, killed: RankEnd | None, cause: Cause
) -> None:
    assert judge(dict(enumerate(ends)), first_dead, killed, oom=False).cause is cause


def test_a_killed_rank_is_named_with_a_word_on_memory() -> None:
    assert judge({0: CRASHED, 1: None}, 1, None, oom=True).message.startswith("rank 1 was killed by a signal")
    assert "lack of memory meanwhile" in judge({0: None}, 0, None, oom=True).message
    assert "dmesg" in judge({0: None}, 0, None, oom=None).message


# --- torchrun ---------------------------------------------------------------------------------------------------------


@pytest.mark.jobs
def test_torchrun_seals_and_stops_on_every_rank(tmp_path: Path) -> None:
    case = make(tmp_path, ["steps:100000", "steps:100000"], phase="pretrain")
    process = agent(case)
    assert case.facts(0)["WORLD_SIZE"] == "2"
    assert case.facts(1)["sid"] != process.pid  # a terminal's Ctrl-C does not reach it
    wait_for(case.pulsing)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == contract.EXIT_CODES[Cause.STOPPED]
    assert case.outcome.cause is Cause.STOPPED
    assert "stand-in rank 0" in case.log(0)
    assert "stand-in rank 1" in case.log(1)
    assert case.processes() == []


@pytest.mark.jobs
def test_a_killed_rank_is_told_from_the_one_that_lost_it(tmp_path: Path) -> None:
    case = make(tmp_path, ["peer", "deaf"], phase="pretrain")
    process = agent(case)
    wait_for(contract.pulse_file(case.attempt.launch_name, 1).exists)
    time.sleep(1)  # the agent watches both by now, as it does long before real ranks have connections to lose
    os.kill(case.facts(1)["pid"], signal.SIGKILL)
    assert process.wait(30) == contract.EXIT_CODES[Cause.KILLED]
    assert case.outcome.message.startswith("rank 1 was killed")
    assert case.processes() == []


@pytest.mark.jobs
@pytest.mark.parametrize("victim", ["agent", "torchrun"])
def test_nothing_outlives_the_agent_or_torchrun(tmp_path: Path, victim: str) -> None:
    case = make(tmp_path, ["deaf", "deaf"], phase="pretrain")
    process = agent(case)
    case.facts(0), case.facts(1)
    torchrun = psutil.Process(case.facts(0)["pid"]).parent()
    assert torchrun is not None
    assert len(case.processes()) == 4
    os.kill(process.pid if victim == "agent" else torchrun.pid, signal.SIGKILL)
    wait_for(lambda: case.processes() == [], seconds=2)
    code = process.wait(5)
    storage.remove_tree(str(contract.scratch_dir(case.attempt.launch_name)))
    assert code == (-signal.SIGKILL if victim == "agent" else contract.EXIT_CODES[Cause.KILLED])


@pytest.mark.jobs
def test_a_crash_and_a_hang_among_ranks(tmp_path: Path) -> None:
    crash = make(tmp_path / "crash", ["deaf", "raise"], phase="pretrain")
    hang = make(tmp_path / "hang", ["hang", "hang"], phase="pretrain", stall=40.0)
    processes = agent(crash), agent(hang)
    assert processes[0].wait(60) == contract.EXIT_CODES[Cause.CRASHED]
    assert crash.outcome.message == "rank 1: ValueError: the stand-in was told to raise"
    assert "Traceback" in crash.outcome.detail
    assert processes[1].wait(60) == contract.EXIT_CODES[Cause.HUNG]
    assert all("in take_steps" in hang.log(rank) for rank in (0, 1))
    assert crash.processes() == hang.processes() == []
