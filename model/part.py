"""An attempt's part on one node: its ranks, watched from the first process to the last. No torch."""

from __future__ import annotations

import selectors
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from model import config, endings, processes
from model.contract import Attempt, Cause, RankEnd
from model.endings import ranks, read_ends
from model.link import Link, say
from model.team import NodeEnd, Team
from model.watch import Watch, dump_stacks, look, stalled, stood_still, watch_pid, why_kill


@dataclass(frozen=True)
class Part:
    """What this agent runs: the attempt's part on this node."""

    attempt: Attempt
    yaml: str
    team: Team

    @property
    def ranks(self) -> range:
        return ranks(self.attempt, self.team.node.number)

    def on(self, rank: int) -> str:
        """Where a rank is, for a message: nothing where there is but one node."""
        return f" on {self.host(rank // self.attempt.processes_per_node)}" if self.attempt.nodes > 1 else ""

    def host(self, node: int) -> str:
        line = self.team.lines.get(node)
        own = self.team.node
        return own.name if node == own.number else line.host if line else own.host(node)


def work(part: Part, link: Link, meet: Callable[[Part, Link], RankEnd | None]) -> NodeEnd:
    """This node's processes, from the first to the last, and how they ended. Whatever happens, none is left. `meet`
    waits for the other nodes and says why there is nothing to start, if so."""
    nothing: dict[int, RankEnd | None] = dict.fromkeys(part.ranks)
    try:
        health = config.read(config.Health, part.attempt.settings["health"])
        processes.fresh_scratch(part.attempt)
        changed = processes.fetch_code(part.attempt)
        why_not = RankEnd(cause=Cause.USER_ERROR, message=changed, step=None) if changed else meet(part, link)
        if why_not is not None:
            return NodeEnd(ends=nothing, killed=why_not, oom=None, tails="")
        processes.adopt_orphans()
        before = endings.oom_kills()
        ending = supervise(part, health, link)
        after = endings.oom_kills()
        oom = None if before is None or after is None else after > before
        end = NodeEnd(ends=ending.ends, killed=ending.killed, oom=oom, tails="")
        return end if end.well else NodeEnd(
            ends=end.ends, killed=end.killed, oom=oom, tails=endings.tails(part.attempt, part.ranks)
        )  # fmt: skip
    except Exception as error:
        message = f"the agent failed: {type(error).__name__}: {error}"
        killed = RankEnd(cause=Cause.CRASHED, message=message, step=None, detail=traceback.format_exc())
        return NodeEnd(ends=nothing, killed=killed, oom=None, tails="")
    finally:
        processes.kill_descendants()


@dataclass(frozen=True)
class Ending:
    """`ends` is what each rank said (None: nothing), `killed` why the agent killed them, if it did."""

    ends: dict[int, RankEnd | None]
    killed: RankEnd | None


def supervise(part: Part, health: config.Health, link: Link) -> Ending:
    """Start the processes and watch them until they have ended, or have to be ended."""
    attempt, team = part.attempt, part.team
    watch = Watch(time.monotonic(), part.ranks, team.node.name if attempt.nodes > 1 else "")
    process = processes.start(attempt, part.yaml, team)
    say(f"{attempt.launch_name}: {len(part.ranks)} ranks, pid {process.pid}")
    with selectors.DefaultSelector() as selector:
        selector.register(team.requests.inbox, selectors.EVENT_READ)
        watch_pid(selector, process.pid, None)
        while process.poll() is None:
            look(attempt, watch, team, selector, attempt.watch_seconds)
            processes.reap(but=process.pid)
            stood_still(watch, link, attempt.watch_seconds)
            now = time.monotonic()
            killed = team.why() if team.told else why_kill(health, watch, team.asked, link, now, team.leads)
            if killed is None and not team.told and not watch.overstayed(now):
                continue
            ends = read_ends(attempt, part.ranks)  # before the kill: what survivors say of lost peers is no news
            if killed is not None:
                killed = stop_all(health, watch, team, killed)
            processes.kill_descendants()
            process.wait()
            return Ending(ends, killed)
        look(attempt, watch, team, selector, 0)
    return Ending(read_ends(attempt, part.ranks), None)


def stop_all(health: config.Health, watch: Watch, team: Team, killed: RankEnd) -> RankEnd:
    """Tell the other nodes before the ranks here are ended, so that they take what follows for the echo that it is."""
    team.leave(killed)
    if killed.cause not in (Cause.HUNG, Cause.DATA_STALLED):
        return killed
    dump_stacks(watch)
    return stalled(health, watch) if watch.waiting else killed  # the others may wait for a rank here
