"""One per attempt and node: `python -P -m model.agent ATTEMPT_YAML`. No torch.

It claims the attempt, starts torchrun, owns all signals, watches the ranks, ends every process, and says in
`outcome.json` and by its exit code how it went. Its last act is the attempt's `on_end` command.

    signal ----------> stop file (ranks seal and stop); a second one, or `notice_seconds` later: kill
    no pulse --------> `stall_seconds` later: stacks of all ranks into their logs, kill; was it the loader, or a step?
    all ranks ended -> what they wrote is the outcome; torchrun's exit code says less and is not read
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shlex
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from model import config, contract, endings, storage
from model.contract import Attempt, Cause, Claim, Outcome, RankEnd
from model.endings import ranks, read_ends
from model.link import Link, closed, say
from model.watch import LINGER_SECONDS, Requests, Watch, dump_stacks, look, watch_pid, why_kill

PR_SET_CHILD_SUBREAPER = 36

RESERVED_BYTES = 1 << 16
"""More than any outcome takes: a cause, a message, the ends of a few logs."""


def main(attempt_yaml: str) -> int:
    """Run the attempt to its end. Returns the exit code of the contract."""
    requests = Requests.install()
    try:
        attempt = contract.read_attempt(storage.read(attempt_yaml), attempt_yaml)
    except (OSError, contract.ContractError) as error:
        say(f"cannot read the attempt: {error}")
        return contract.EXIT_CODES[Cause.STORE_LOST if isinstance(error, storage.StoreError) else Cause.USER_ERROR]
    refusal = _claim(attempt)
    if refusal is not None:
        say(f"{attempt.launch_name}: {refusal.value}, nothing was started")
        return contract.EXIT_CODES[refusal]
    _set_aside(attempt)
    link = Link.open(attempt)
    outcome = _run(attempt, attempt_yaml, requests, link)
    say(f"{attempt.launch_name}: {outcome.cause.value}: {outcome.message}")
    link.shut()
    _publish(attempt, outcome)
    _last_act(attempt)
    return contract.EXIT_CODES[outcome.cause]


def _claim(attempt: Attempt) -> Cause | None:
    """Become the only one to train this attempt, or say why not."""
    me = psutil.Process()
    claim = Claim(
        launch_name=attempt.launch_name,
        host=contract.hostname(),
        boot_id=contract.boot_id(),
        pid=me.pid,
        started=me.create_time(),
        nonce=contract.new_nonce(),
    )
    try:
        if closed(attempt):
            return Cause.SUPERSEDED
        storage.publish(f"{attempt.run_dir}/{contract.claim_file(attempt.attempt)}", contract.encode(claim))
    except storage.AlreadyPublished:
        return Cause.SUPERSEDED
    except storage.DiskFullError as error:
        say(str(error))
        return Cause.DISK_FULL
    except storage.StoreError as error:
        say(str(error))
        return Cause.STORE_LOST
    return None


def _reserve(attempt: Attempt) -> str:
    return f"{attempt.run_dir}/{contract.attempt_dir(attempt.attempt)}/reserve"


def _set_aside(attempt: Attempt) -> None:
    """Room for the outcome, so that it can be told even on a disk without a free byte. A bucket is never full."""
    if storage.is_uri(attempt.run_dir):
        return
    try:
        storage.publish(_reserve(attempt), os.urandom(RESERVED_BYTES))  # nothing that a file system could compress
    except storage.StoreError as error:  # the ranks will find the disk full too, and it is theirs to name
        say(f"no room is set aside for the outcome: {error}")


def _run(attempt: Attempt, attempt_yaml: str, requests: Requests, link: Link) -> Outcome:
    """The attempt's processes, from the first to the last, and how they ended. Whatever happens, none is left."""
    try:
        end = _train(attempt, attempt_yaml, requests, link)
    except Exception as error:
        message = f"the agent failed: {type(error).__name__}: {error}"
        end = RankEnd(cause=Cause.CRASHED, message=message, step=None, detail=traceback.format_exc())
    finally:
        kill_descendants()
    return endings.outcome(attempt, end)


def _train(attempt: Attempt, attempt_yaml: str, requests: Requests, link: Link) -> RankEnd:
    if attempt.nodes != 1:
        message = f"the attempt asks for {attempt.nodes} nodes; the agent runs attempts of one node only, so far"
        return RankEnd(cause=Cause.USER_ERROR, message=message, step=None)
    health = config.read(config.Health, attempt.settings["health"])
    _fresh_scratch(attempt)
    if changed := _fetch_code(attempt):
        return RankEnd(cause=Cause.USER_ERROR, message=changed, step=None)
    adopt_orphans()
    before = endings.oom_kills()
    ending = supervise(attempt, attempt_yaml, health, requests, link)
    after = endings.oom_kills()
    oom = None if before is None or after is None else after > before
    return endings.judge(ending.ends, ending.first_dead, ending.killed, oom)


# --- starting ---------------------------------------------------------------------------------------------------------


def command(attempt: Attempt, attempt_yaml: str) -> list[str]:
    """The command line of the attempt's processes: torchrun over the ranks, or the one process of an evaluation."""
    python = [sys.executable, "-u", "-P", "-m"]
    if attempt.phase == contract.EVALUATE:
        return [*python, "model.rank", "model.evaluate.run", attempt_yaml]
    return [
        *python, "model.tied", str(os.getpid()), "torch.distributed.run",
        "--standalone", "--nnodes", "1", "--nproc-per-node", str(attempt.processes_per_node),
        "--local-addr", "127.0.0.1",  # the machine's name may resolve to nothing, or slowly
        "--max-restarts", "0",
        "--log-dir", str(contract.scratch_dir(attempt.launch_name) / "torchrun"),
        "-m", "model.rank", "model.train", attempt_yaml,
    ]  # fmt: skip


def environment(attempt: Attempt) -> dict[str, str]:
    """The agent's own environment, and the code and the threads that the attempt is pinned to."""
    return {
        **os.environ,
        "PYTHONPATH": str(_code_here(attempt)),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(attempt.threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # one node: nothing leaves the machine
    }


def start(attempt: Attempt, attempt_yaml: str) -> subprocess.Popen[bytes]:
    """Start the processes in a session of their own, so that a terminal's Ctrl-C reaches the agent alone."""
    return subprocess.Popen(
        command(attempt, attempt_yaml), env=environment(attempt), stdin=subprocess.DEVNULL, start_new_session=True
    )


def adopt_orphans() -> None:
    """Descendants whose parent died become the agent's children (prctl(2)), so that it finds and ends them all."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) was refused")


def _fresh_scratch(attempt: Attempt) -> None:
    """An empty folder of ours alone: others may write to the machine's temporary folder too."""
    scratch = contract.scratch_dir(attempt.launch_name)
    storage.own_scratch()
    storage.remove_tree(str(scratch))
    scratch.mkdir(mode=0o700)


def _code_here(attempt: Attempt) -> Path:
    """Where on this machine the code is that the attempt is pinned to."""
    if storage.is_uri(attempt.code_dir):
        return contract.scratch_dir(attempt.launch_name) / "code"
    return Path(attempt.code_dir)


def _fetch_code(attempt: Attempt) -> str:
    """Bring the code out of a bucket; why it cannot be run if it is not what its digest says, else nothing. On a disk
    it is run where it lies, as the controller has looked at it."""
    if not storage.is_uri(attempt.code_dir):
        return ""
    files = storage.contents(f"{attempt.code_dir}/model")
    if storage.digest(files) != attempt.code_digest:
        return f"{attempt.code_dir}/model is not the code that this run is pinned to (sha256 {attempt.code_digest})"
    for name, data in files.items():
        target = _code_here(attempt) / "model" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return ""


# --- watching ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """`ends` is what each rank said (None: nothing), `killed` why the agent killed them, if it did."""

    ends: dict[int, RankEnd | None]
    first_dead: int | None
    killed: RankEnd | None


def supervise(attempt: Attempt, attempt_yaml: str, health: config.Health, requests: Requests, link: Link) -> Ending:
    """Start the processes and watch them until they have ended, or have to be ended."""
    watch = Watch(began=time.monotonic())
    process = start(attempt, attempt_yaml)
    say(f"{attempt.launch_name}: {len(ranks(attempt))} ranks, pid {process.pid}")
    with selectors.DefaultSelector() as selector:
        selector.register(requests.inbox, selectors.EVENT_READ)
        watch_pid(selector, process.pid, None)
        while process.poll() is None:
            look(attempt, watch, requests, selector, attempt.watch_seconds)
            now = time.monotonic()
            killed = why_kill(health, watch, requests.count, link, now)
            if killed is None and not watch.overstayed(now):
                continue
            ends = read_ends(attempt)  # before the kill: what survivors say of lost peers is no news
            if killed is not None and killed.cause in (Cause.HUNG, Cause.DATA_STALLED):
                dump_stacks(watch)
            kill_descendants()
            process.wait()
            return Ending(ends, watch.first_dead, killed)
        look(attempt, watch, requests, selector, 0)
    return Ending(read_ends(attempt), watch.first_dead, None)


# --- ending -----------------------------------------------------------------------------------------------------------


def kill_descendants() -> None:
    """End every process below this one, at once. A process that the kernel will not end is named and left."""
    deadline = time.monotonic() + LINGER_SECONDS
    while living := _living():
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if time.monotonic() > deadline:
            say(f"these processes do not die: {[process.pid for process in living]}")
            return
        time.sleep(0.02)


def _living() -> list[psutil.Process]:
    """This process's descendants; a zombie is dead."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _publish(attempt: Attempt, outcome: Outcome) -> None:
    try:
        if not storage.is_uri(attempt.run_dir):
            storage.remove(_reserve(attempt))  # a disk without a free byte has room for the outcome now
        storage.publish(f"{attempt.run_dir}/{contract.outcome_file(attempt.attempt)}", contract.encode(outcome))
    except storage.StoreError as error:  # the log and the exit code still say it
        say(f"the outcome could not be published: {error}")


def _last_act(attempt: Attempt) -> None:
    """Start `on_end`, detached and in the agent's own environment, so that somebody takes in the outcome."""
    try:
        storage.remove_tree(str(contract.scratch_dir(attempt.launch_name)))
    except storage.StoreError as error:
        say(str(error))
    if not attempt.on_end:
        return
    no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    try:
        os.posix_spawnp(attempt.on_end[0], attempt.on_end, os.environ, file_actions=[no_input], setsid=True)
    except OSError as error:  # the next tick of anybody finds the outcome
        say(f"on_end could not be started: {shlex.join(attempt.on_end)}: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -P -m model.agent ATTEMPT_YAML")
    sys.exit(main(sys.argv[1]))
