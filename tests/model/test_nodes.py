"""Agents of several nodes with real processes and real torchruns; the ranks are a stand-in, and so is Slurm's word."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from model import config, contract, nodes, storage
from model.contract import Cause, RankEnd
from model.link import Link, Logs
from model.watch import Watch, stood_still, why_kill
from tests.model.standin.attempts import Case, make, wait_for
from tests.model.standin.left import nothing_is_left, started
from tests.model.standin.nodes import Nodes
from tests.model.test_checkpoint import make_attempt

__all__ = ["nothing_is_left"]

CODES = contract.EXIT_CODES


def over(case: Case, **changes: Any) -> Nodes:
    return started(Nodes(case, **changes))


def attempt(folder: Path, standin: list[str], count: int = 2, **changes: Any) -> Case:
    each = len(standin) // count
    return make(folder, standin, phase="pretrain", nodes=count, processes_per_node=each, **changes)


def node_end(case: Case, node: int) -> RankEnd:
    path = case.run_dir / contract.node_file(1, node)
    return contract.decode(path.read_bytes(), RankEnd, str(path))


def outcome_is_there(case: Case) -> bool:
    return (case.run_dir / contract.outcome_file(1)).exists()


# --- which node it is -------------------------------------------------------------------------------------------------


def test_slurm_says_which_node_it_is() -> None:
    said = {
        "SLURM_JOB_ID": "12", "SLURM_NODEID": "1", "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "3",
        "SLURMD_NODENAME": "gpu02", "SLURM_JOB_NODELIST": "gpu[01-03,7]",
    }  # fmt: skip
    expected = nodes.Node(1, 3, "gpu02", "12.0", ("gpu01", "gpu02", "gpu03", "gpu7"))
    assert nodes.here(said) == expected
    assert nodes.here({**said, "SLURM_RESTART_COUNT": "2"}).job == "12.2"
    assert nodes.here({"SLURM_JOB_ID": "12"}) == nodes.Node(0, 1, contract.hostname())
    with pytest.raises(ValueError, match="start one task on each node"):
        nodes.here({**said, "SLURM_NODEID": "3"})
    assert (expected.host(2), expected.host(9)) == ("gpu03", "node 9")


def test_a_pod_is_told_which_node_it_is() -> None:
    said = {
        "DINOCTL_NODE": "1", "DINOCTL_NODES": "4", "DINOCTL_ADDRESS": "demo-1a2b3c4d-gram-3-1.demo-1a2b3c4d-gram-3",
        "DINOCTL_JOB": "5e8a", "DINOCTL_HOST": "gpu02", "SLURM_JOB_ID": "12", "SLURM_NODEID": "0",
    }  # fmt: skip
    assert nodes.here(said) == nodes.Node(1, 4, "gpu02", "5e8a")
    assert nodes.address(said) == "demo-1a2b3c4d-gram-3-1.demo-1a2b3c4d-gram-3"
    assert nodes.address({}) == contract.hostname()
    with pytest.raises(ValueError, match="lacks DINOCTL_ADDRESS, DINOCTL_HOST"):
        nodes.here({**said, "DINOCTL_ADDRESS": "", "DINOCTL_HOST": ""})
    for number in ("4", "-1", "first"):
        with pytest.raises(ValueError, match=r"DINOCTL_NODE is|invalid literal"):
            nodes.here({**said, "DINOCTL_NODE": number})


@pytest.mark.parametrize(
    ("signals", "scheduled", "alone"),
    [
        ([signal.SIGTERM], 1, 1),
        ([signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM], 1, 3),  # a time limit's notice, then the limit
        ([signal.SIGTERM, signal.SIGINT], 2, 2),
        ([signal.SIGINT, signal.SIGINT], 2, 2),
        ([], 0, 0),
    ],
)
def test_what_a_scheduler_sends_before_it_kills_is_one_request(
    signals: list[signal.Signals], scheduled: int, alone: int
) -> None:
    for is_scheduled, count in ((True, scheduled), (False, alone)):
        code = (
            "import os, sys; from model.signals import Requests; r = Requests.install(sys.argv[1] == 'True')\n"
            "for number in sys.argv[2:]: os.kill(os.getpid(), int(number))\n"
            "r.wake(); r.wait(1); print(r.count)"
        )
        numbers = [str(int(number)) for number in signals]
        command = [sys.executable, "-P", "-c", code, str(is_scheduled), *numbers]
        assert int(subprocess.run(command, capture_output=True, check=True).stdout) == count


def test_time_in_which_the_agent_stood_still_is_nobodys_fault(tmp_path: Path) -> None:
    now, health = time.monotonic(), config.Health(stall_seconds=60, notice_seconds=60)
    link = Link(make_attempt(tmp_path), Logs(make_attempt(tmp_path)), reached=now - 500)
    watch = Watch(began=now - 600, asked=now - 500, pulse=now - 500, looked=now - 500)
    assert why_kill(health, watch, 1, link, now) is not None
    stood_still(watch, link, 1.0)
    assert why_kill(health, watch, 1, link, now) is None
    stood_still(watch, link, 1.0)
    assert why_kill(health, watch, 1, link, now + 61) is not None


# --- before the ranks -------------------------------------------------------------------------------------------------


@pytest.mark.jobs
def test_another_job_or_one_that_was_requeued_finds_the_claim_taken(tmp_path: Path) -> None:
    case = attempt(tmp_path / "run", ["steps:3"] * 2)
    first = over(case, settings="agent.JOIN_SECONDS = 3")
    first.start(0)
    wait_for((case.run_dir / contract.claim_file(1)).exists)
    assert (case.claim.job, case.claim.address) == ("77.0", contract.hostname())
    for second in (over(case, job="78"), over(case, restarts=1)):
        second.start()
        assert second.wait() == [CODES[Cause.SUPERSEDED]] * 2
        assert "superseded, nothing was started on node2" in second.log(1)
    assert first.wait() == [CODES[Cause.VANISHED]]  # its own node 1 never came
    assert case.outcome.cause is Cause.VANISHED
    assert case.outcome.bad_nodes == ["node2"]
    assert "node2 did not come within 3 s" in case.outcome.message
    assert not list(case.run_dir.glob("facts-*"))


def test_a_wrong_number_of_nodes(tmp_path: Path) -> None:
    case = attempt(tmp_path / "run", ["steps:3"] * 2)
    three = over(case, count=3)
    three.start()
    assert three.wait() == [CODES[Cause.USER_ERROR]] * 3
    assert "asks for 2 nodes, and its job has 3" in case.outcome.message


@pytest.mark.jobs
def test_no_claim_a_closed_attempt_and_a_node_0_that_is_not_there(tmp_path: Path) -> None:
    case = attempt(tmp_path / "none", ["steps:3"] * 2)
    alone = over(case, settings="agent.JOIN_SECONDS = 1")
    alone.start(1)
    assert alone.wait() == [CODES[Cause.VANISHED]]
    assert "node 0 did not claim the attempt within 1 s" in alone.log(1)

    shut = attempt(tmp_path / "closed", ["steps:3"] * 2)
    waiting = over(shut)
    waiting.start(1)
    storage.publish(f"{shut.run_dir}/{contract.closed_file(1)}", b"{}")
    assert waiting.wait() == [CODES[Cause.SUPERSEDED]]

    nobody = attempt(tmp_path / "nobody", ["steps:3"] * 2)
    claimed = over(nobody, settings="team.CONNECT_SECONDS = 2")
    claim = contract.Claim("x", "h", "b", 1, 0.0, "n", job="77.0", address=contract.hostname(), port=nodes.free_port())
    storage.publish(f"{nobody.run_dir}/{contract.claim_file(1)}", contract.encode(claim))
    claimed.start(1)
    assert claimed.wait() == [CODES[Cause.VANISHED]]
    assert "node 0 cannot be reached" in claimed.log(1)


@pytest.mark.jobs
@pytest.mark.parametrize("asked", [0, 1])
def test_stopped_or_closed_while_a_node_is_missing(tmp_path: Path, asked: int) -> None:
    """Two of three are there, the other one asked before node 0 has claimed; the third comes later, or never."""
    stopped = attempt(tmp_path / "stopped", ["steps:3"] * 3, count=3)
    three = over(stopped, count=3)
    three.start(asked)
    wait_for(lambda: three.takes_signals(asked))
    three.agents[asked].send_signal(signal.SIGTERM)
    three.start(1 - asked)
    three.start(2)
    assert three.wait() == [CODES[Cause.STOPPED]] * 3
    assert stopped.outcome.message == "stopped before its first step"

    shut = attempt(tmp_path / "closed", ["steps:3"] * 3, count=3)
    two = over(shut, count=3)
    two.start(0, 1)
    wait_for((shut.run_dir / contract.claim_file(1)).exists)
    storage.publish(f"{shut.run_dir}/{contract.closed_file(1)}", b"{}")
    assert set(two.wait()) == {CODES[Cause.SUPERSEDED]}
    assert not list(tmp_path.rglob("facts-*"))


@pytest.mark.jobs
def test_who_does_not_know_the_claim_is_no_part_of_the_attempt(tmp_path: Path) -> None:
    case = attempt(tmp_path / "run", ["steps:3"] * 2)
    one = over(case, settings="agent.JOIN_SECONDS = 5")
    one.start(0)
    wait_for((case.run_dir / contract.claim_file(1)).exists)
    for said in (b'{"nonce":"guess","node":1,"host":"node2","asked":9}\n', b"GET / HTTP/1.1\r\n\r\n", b"{}\n"):
        with socket.create_connection((case.claim.address, case.claim.port), timeout=60) as stranger:
            stranger.sendall(said)
            assert stranger.recv(100) == b""
    assert one.wait() == [CODES[Cause.VANISHED]]
    assert case.outcome.bad_nodes == ["node2"]


# --- with ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.jobs
def test_done_on_two_nodes_and_on_end_once(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    case = attempt(tmp_path / "run", ["steps:5"] * 4, on_end=["sh", "-c", f"echo ended >> {ended}"])
    two = over(case)
    two.start()
    assert two.wait() == [0, 0]
    assert (case.outcome.cause, case.outcome.bad_nodes) == (Cause.DONE, [])
    assert [case.facts(rank)["WORLD_SIZE"] for rank in range(4)] == ["4"] * 4
    assert node_end(case, 1).cause is Cause.DONE
    wait_for(ended.exists)
    assert ended.read_text() == "ended\n"
    assert all("stand-in rank" in case.log(rank) for rank in range(4))
    assert not two.scratch(0).exists()
    assert not two.scratch(1).exists()


@pytest.mark.jobs
@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_to_one_node_seals_and_stops_all(tmp_path: Path, node: int) -> None:
    case = attempt(tmp_path / "run", ["steps:100000"] * 2)
    two = over(case)
    two.start()
    wait_for(two.pulsing, 300)
    two.agents[node].send_signal(signal.SIGUSR2)
    two.agents[node].send_signal(signal.SIGTERM)  # no second request: a scheduler sends both
    assert two.wait() == [CODES[Cause.STOPPED]] * 2
    assert case.outcome.cause is Cause.STOPPED
    assert case.outcome.step


@pytest.mark.jobs
def test_one_notice_to_all_processes_of_all_nodes_is_one_request(tmp_path: Path) -> None:
    """As some sites signal the whole tree."""
    case = attempt(tmp_path / "run", ["steps:100000"] * 2)
    two = over(case)
    two.start()
    wait_for(two.pulsing, 300)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        for agent in two.agents.values():
            for process in (psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)):
                process.send_signal(number)
    assert two.wait() == [CODES[Cause.STOPPED]] * 2


@pytest.mark.jobs
def test_a_second_request_the_end_of_the_notice_and_a_closed_attempt(tmp_path: Path) -> None:
    impatient, slow = attempt(tmp_path / "a", ["deaf"] * 2), attempt(tmp_path / "b", ["deaf"] * 2, notice=1.0)
    shut = attempt(tmp_path / "c", ["deaf"] * 2)
    three = over(impatient), over(slow), over(shut)
    for one in three:
        one.start()
    wait_for(lambda: all(one.pulsing() for one in three), 300)
    storage.publish(f"{shut.run_dir}/{contract.closed_file(1)}", b"{}")
    three[0].agents[1].send_signal(signal.SIGTERM)
    three[0].agents[1].send_signal(signal.SIGINT)
    three[1].agents[1].send_signal(signal.SIGTERM)
    ends = Cause.UNSEALED, Cause.UNSEALED, Cause.SUPERSEDED
    assert [one.wait() for one in three] == [[CODES[cause]] * 2 for cause in ends]
    assert "a second request" in impatient.outcome.message
    assert "did not seal" in slow.outcome.message
    assert impatient.processes() == slow.processes() == shut.processes() == []


@pytest.mark.jobs
def test_a_rank_killed_on_another_node_is_the_cause_and_not_its_echo(tmp_path: Path) -> None:
    case = attempt(tmp_path / "run", ["peer", "peer", "deaf", "peer"])
    two = over(case)
    two.start()
    wait_for(two.pulsing, 300)
    time.sleep(1)  # the agents watch all by now, as they do long before real ranks have connections to lose
    os.kill(case.facts(2)["pid"], signal.SIGKILL)
    assert two.wait() == [CODES[Cause.KILLED]] * 2
    assert case.outcome.message.startswith("rank 2 on node2 was killed")
    assert "stand-in rank 2" in case.outcome.detail
    assert case.outcome.bad_nodes == []
    assert "rank 2 on node2 was killed" in node_end(case, 1).message
    assert case.processes() == []


@pytest.mark.jobs
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_ends_the_others(tmp_path: Path, lost: int) -> None:
    case = attempt(tmp_path / "run", ["deaf"] * 3, count=3)
    three = over(case, count=3)
    three.start()
    wait_for(three.pulsing, 300)
    three.kill(lost)
    codes = three.wait()
    assert codes[lost] == -signal.SIGKILL
    assert [code for node, code in enumerate(codes) if node != lost] == [CODES[Cause.VANISHED]] * 2
    assert case.processes() == []
    assert outcome_is_there(case) == (lost == 1)
    if lost == 1:
        assert (case.outcome.cause, case.outcome.bad_nodes) == (Cause.VANISHED, ["node2"])
        assert case.outcome.message.startswith("node 1 (node2) is lost")
    assert node_end(case, 2).cause is Cause.VANISHED


@pytest.mark.jobs
def test_a_node_that_falls_silent_is_lost_and_a_job_that_is_suspended_is_not(tmp_path: Path) -> None:
    case = attempt(tmp_path / "run", ["deaf"] * 2, stall=20.0)
    two = over(case, settings="team.BEAT_SECONDS, team.SILENT_SECONDS = 0.5, 8")
    two.start()
    wait_for(two.pulsing, 300)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for agent in two.agents.values():
            for process in (psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)):
                process.send_signal(number)
        time.sleep(25 if number is signal.SIGSTOP else 3)
    assert all(agent.poll() is None for agent in two.agents.values())
    two.agents[1].send_signal(signal.SIGSTOP)  # as a machine that hangs
    assert two.agents[0].wait(120) == CODES[Cause.VANISHED]
    assert "node 1 (node2) is lost: not heard of for 8 s" in case.outcome.message
    assert case.outcome.bad_nodes == ["node2"]
    two.agents[1].send_signal(signal.SIGCONT)
    assert two.agents[1].wait(120) == CODES[Cause.VANISHED]
    assert case.processes() == []


@pytest.mark.jobs
def test_a_hung_a_starved_and_a_broken_rank_name_their_node(tmp_path: Path) -> None:
    hung = attempt(tmp_path / "hung", ["deaf", "hang"], stall=40.0)
    starved = attempt(tmp_path / "starved", ["hang", "starve"], stall=40.0)
    broken = attempt(tmp_path / "broken", ["peer", "raise"])
    running = [over(case) for case in (hung, starved, broken)]
    for one in running:
        one.start()
    assert [one.wait()[0] for one in running] == [CODES[c] for c in (Cause.HUNG, Cause.DATA_STALLED, Cause.CRASHED)]
    assert hung.outcome.message.startswith("no step on node2 for health.stall_seconds")
    assert "in take_steps" in hung.outcome.detail
    assert starved.outcome.message.startswith("rank 1 on node2: no batch")
    assert broken.outcome.message == "rank 1 on node2: ValueError: the stand-in was told to raise"
    assert "Traceback" in broken.outcome.detail
