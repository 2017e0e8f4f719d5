"""One per attempt and node: `python -P -m model.agent ATTEMPT_YAML`. No torch.

Node 0's claims the attempt, and the others join it (`model.team`). Each starts torchrun, owns all signals, watches its
ranks and ends every process; node 0's says in `outcome.json` how it went, and all by their exit code. Its last act is
the attempt's `on_end` command. In a pod it is the first process, and has none.

    signal ----------> stop files on all nodes (ranks seal and stop); a second one, or `notice_seconds` later: kill
    no pulse --------> `stall_seconds` later: stacks of all ranks into their logs, kill; was it the loader, or a step?
    a node is lost --> the others end their ranks: the attempt's end, and the lost node's host is in the outcome
    all ranks ended -> what they wrote is the outcome; torchrun's exit code says less and is not read
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback

import psutil

from model import config, contract, endings, nodes, storage
from model.contract import Attempt, Cause, Claim, Outcome, RankEnd
from model.endings import ranks
from model.link import Link, Logs, closed, keep_log, say
from model.part import Part, work
from model.signals import Requests, be_deaf
from model.team import Entrance, NodeEnd, Team, connect, lost

RESERVED_BYTES = 1 << 16
"""More than any outcome takes: a cause, a message, the ends of a few logs."""

JOIN_SECONDS = 300.0
"""How long the nodes wait for one another before the ranks start: a scheduler starts them at about the same time."""

COLLECT_SECONDS = 60.0
"""How long another node may take to end its ranks and say how that went, once it was told to."""

OVER_SECONDS = 600.0
"""How long a node waits for node 0's last word while that is there: its store may be slow to take the outcome."""


def main(attempt_yaml: str) -> int:
    """Run the attempt to its end. Returns the exit code of the contract."""
    try:
        node = nodes.here(os.environ)
        requests = Requests.install(scheduled=bool(node.job))
        attempt = contract.read_attempt(storage.read(attempt_yaml), attempt_yaml)
    except (OSError, ValueError) as error:
        say(f"cannot read the attempt: {error}")
        return contract.EXIT_CODES[Cause.STORE_LOST if isinstance(error, storage.StoreError) else Cause.USER_ERROR]
    if nodes.in_a_pod(os.environ):
        keep_log(attempt, node.number)
    cause = _take_part(Part(attempt, attempt_yaml, Team(node, requests)))
    return contract.EXIT_CODES[cause]


def _take_part(part: Part) -> Cause:
    """This node's part, however it goes. The log of one that came to nothing is brought too, unless the attempt, and
    with it the log's name, is another's."""
    try:
        cause = _lead(part) if part.team.node.number == 0 else _follow(part)
    except Exception:
        say(traceback.format_exc())
        cause = Cause.CRASHED
    if nodes.in_a_pod(os.environ) and cause is not Cause.SUPERSEDED:
        try:
            Logs(part.attempt).ship()
        except OSError as error:
            say(f"the end of the log could not be brought: {error}")
    return cause


# --- node 0 -----------------------------------------------------------------------------------------------------------


def _lead(part: Part) -> Cause:
    """Claim the attempt, run it, judge it, publish how it ended, tell the others."""
    attempt, team = part.attempt, part.team
    nonce = contract.new_nonce()
    fits = team.node.count == attempt.nodes
    entrance = Entrance(team, nonce) if fits and attempt.nodes > 1 else None
    refusal = _claim(attempt, team, nonce, entrance)
    if refusal is not None:
        say(f"{attempt.launch_name}: {refusal.value}, nothing was started")
        return refusal
    if entrance is not None:
        entrance.open()
    _set_aside(attempt)
    link = Link.open(attempt)

    def meet(part: Part, link: Link) -> RankEnd | None:
        return None if entrance is None else _gather(part, entrance, link)

    own = work(part, link, meet if fits else _does_not_fit)
    _collect(part, own, link)
    outcome = _judge(part, own)
    say(f"{attempt.launch_name}: {outcome.cause.value}: {outcome.message}")
    link.shut()
    _publish(attempt, outcome)
    _clean(attempt)
    _last_act(attempt)
    team.farewell(outcome.cause)
    return outcome.cause


def _claim(attempt: Attempt, team: Team, nonce: str, entrance: Entrance | None) -> Cause | None:
    """Become the only one to train this attempt, or say why not."""
    me = psutil.Process()
    claim = Claim(
        launch_name=attempt.launch_name,
        host=contract.hostname(),
        boot_id=contract.boot_id(),
        pid=me.pid,
        started=me.create_time(),
        nonce=nonce,
        job=team.node.job,
        address=nodes.address() if entrance else "",
        port=entrance.port if entrance else 0,
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


def _does_not_fit(part: Part, link: Link) -> RankEnd:
    asks, has = part.attempt.nodes, part.team.node.count
    message = f"the attempt asks for {asks} nodes, and its job has {has}: one task has to be started on each of {asks}"
    return RankEnd(cause=Cause.USER_ERROR, message=message, step=None)


def _gather(part: Part, entrance: Entrance, link: Link) -> RankEnd | None:
    """Wait for all other nodes and tell them where the ranks meet; why not, if it came to nothing."""
    team = part.team
    team.wait(lambda: not entrance.missing() or bool(team.asked) or team.told or link.closed, JOIN_SECONDS)
    entrance.close()
    if link.closed:
        return RankEnd(cause=Cause.SUPERSEDED, message="the controller closed this attempt", step=None)
    if team.told:
        return team.why()
    if team.asked:
        return RankEnd(cause=Cause.STOPPED, message="stopped before its first step", step=None)
    if missing := entrance.missing():
        team.missing = [team.node.hosts[node] for node in missing if node < len(team.node.hosts)]
        hosts = ", ".join(map(part.host, missing))
        message = f"{hosts} did not come within {JOIN_SECONDS:g} s: no agent of this job was heard of there"
        return RankEnd(cause=Cause.VANISHED, message=message, step=None)
    team.start_at(nodes.address(), nodes.free_port())
    return None


def _collect(part: Part, own: NodeEnd, link: Link) -> None:
    """Wait until the other nodes have said how their parts ended; those that still run are told to end."""
    team = part.team

    def no_use() -> bool:
        return team.told or team.failed() or link.closed or team.asked > 1

    if own.well:
        seconds = config.read(config.Health, part.attempt.settings["health"]).stall_seconds
        team.wait(lambda: team.ended() or no_use(), seconds)
    if not team.ended():
        team.leave(own.killed)
        team.wait(team.ended, COLLECT_SECONDS)


def _judge(part: Part, own: NodeEnd) -> Outcome:
    """The attempt's end from those of its nodes."""
    attempt, team = part.attempt, part.team
    there = {node: line.end for node, line in team.lines.items() if line.end is not None} | {0: own}
    gone = [line for line in team.lines.values() if line.end is None]
    ends = {rank: end for node in there.values() for rank, end in node.ends.items()}
    for line in gone:
        ends |= endings.published_ends(attempt, ranks(attempt, line.node))
    killed = endings.most_telling([*(end.killed for end in there.values()), *(lost(line) for line in gone)])
    first_dead = team.deaths[0] if team.deaths else None
    first = there.get((first_dead or 0) // attempt.processes_per_node, own)
    end = endings.judge(ends, first_dead, killed, first.oom, part.on)
    others = [node.tails for node in there.values() if node is not first]
    logs = "\n".join(filter(None, [first.tails, *others]))
    return endings.outcome(attempt, end, logs, [*(line.host for line in gone), *team.missing])


# --- the other nodes --------------------------------------------------------------------------------------------------


def _follow(part: Part) -> Cause:
    """Join node 0's agent, run this node's part, tell it how that ended, and leave with the outcome that it finds."""
    attempt, team = part.attempt, part.team
    if team.node.count != attempt.nodes:
        team.wait(lambda: _outcome(attempt) is not None, COLLECT_SECONDS)
        return _outcome(attempt) or Cause.USER_ERROR
    claim = _await_claim(part)
    if isinstance(claim, Cause):
        say(f"{attempt.launch_name}: {claim.value}, nothing was started on {team.node.name}")
        return claim
    if not connect(team, claim, lambda: _outcome(attempt) is not None):
        say(f"node 0 cannot be reached at {claim.address}:{claim.port} from {team.node.name}")
        return _outcome(attempt) or Cause.VANISHED
    link = Link.open(attempt, leads=False)
    own = work(part, link, _await_start)
    line = team.lines[0]
    line.tell_end(own)
    end = endings.judge(own.ends, team.deaths[0] if team.deaths else None, own.killed, own.oom, part.on)
    say(f"{attempt.launch_name}, {team.node.name}: {end.cause.value}: {end.message}")
    _publish_node(part, end)
    _clean(attempt)
    link.shut()
    line.tell_ready()
    team.wait(lambda: line.over is not None or bool(line.lost), OVER_SECONDS)
    line.shut()
    return line.over or _outcome(attempt) or Cause.VANISHED


def _await_claim(part: Part) -> Claim | Cause:
    """Node 0's claim, or why there is nothing to join. The folder is listed first: a network file system remembers for
    a while that a file was not there."""
    attempt, said = part.attempt, ""
    path = f"{attempt.run_dir}/{contract.claim_file(attempt.attempt)}"
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        try:
            names = storage.names(f"{attempt.run_dir}/{contract.attempt_dir(attempt.attempt)}")
            if closed(attempt):
                return Cause.SUPERSEDED
            if os.path.basename(path) in names:
                claim = contract.decode(storage.read(path), Claim, path)
                return claim if claim.job == part.team.node.job else Cause.SUPERSEDED
        except OSError as error:
            if str(error) != said:
                said = str(error)
                say(said)
        part.team.requests.wait(1.0)
    say(f"node 0 did not claim the attempt within {JOIN_SECONDS:g} s")
    return Cause.VANISHED


def _await_start(part: Part, link: Link) -> RankEnd | None:
    """Wait until all nodes are there and node 0 says where the ranks meet; why not, if it came to nothing."""
    team, line = part.team, part.team.lines[0]
    if team.wait(lambda: bool(line.port) or team.told, JOIN_SECONDS + COLLECT_SECONDS) and not team.told:
        team.meeting = team.meeting[0], line.port
        return None
    message = "node 0 did not say where the ranks meet"
    return team.why() or RankEnd(cause=Cause.VANISHED, message=message, step=None)


def _outcome(attempt: Attempt) -> Cause | None:
    """How node 0's agent says that the attempt ended, if it has."""
    path = f"{attempt.run_dir}/{contract.outcome_file(attempt.attempt)}"
    try:
        return contract.decode(storage.read(path), Outcome, path).cause
    except OSError:
        return None


def _publish_node(part: Part, end: RankEnd) -> None:
    path = f"{part.attempt.run_dir}/{contract.node_file(part.attempt.attempt, part.team.node.number)}"
    try:
        storage.publish(path, contract.encode(end))
    except storage.StoreError as error:  # node 0 has heard it
        say(f"how this node ended could not be published: {error}")


# --- ending -----------------------------------------------------------------------------------------------------------


def _publish(attempt: Attempt, outcome: Outcome) -> None:
    try:
        if not storage.is_uri(attempt.run_dir):
            storage.remove(_reserve(attempt))  # a disk without a free byte has room for the outcome now
        storage.publish(f"{attempt.run_dir}/{contract.outcome_file(attempt.attempt)}", contract.encode(outcome))
    except storage.StoreError as error:  # the log and the exit code still say it
        say(f"the outcome could not be published: {error}")


def _clean(attempt: Attempt) -> None:
    try:
        storage.remove_tree(str(contract.scratch_dir(attempt.launch_name)))
    except storage.StoreError as error:
        say(str(error))


def _last_act(attempt: Attempt) -> None:
    """Start `on_end`, detached and in the agent's own environment, so that somebody takes in the outcome."""
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
    code = main(sys.argv[1])
    be_deaf()  # a scheduler ends all tasks when the first has left, and its signal would be another exit code
    sys.exit(code)
