"""How the agents of an attempt's nodes keep together: each of the others holds a connection to node 0's. No torch.

    others -> node 0   who they are, stops asked of them, deaths of ranks, why they end theirs, how their part ended
    node 0 -> others   where the ranks meet, stops asked of anyone, why all end theirs, and how the attempt ended

Connections and not files in the run directory: the kernel tells at once that the other end died, a store that is slow
or away is not taken for a lost node, and a bucket is not asked by 32 nodes every few seconds. A beat over each of them
tells of a machine that went without a word. Who connects has to know the claim's nonce, so to read the run's folder.
"""

from __future__ import annotations

import hmac
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from model import contract
from model.contract import Cause, Claim, ContractError, RankEnd, Record
from model.link import say
from model.nodes import Node
from model.signals import Requests

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A node that was not heard of for so long is lost. Well below any `health.stall_seconds`."""

CONNECT_SECONDS = 60.0
READY_SECONDS, GOODBYE_SECONDS = 60.0, 5.0
"""How long node 0 waits for what the others still have to bring, and for each to hang up."""

LONGEST_WORD = 16 << 20


class NodeEnd(Record, frozen=True):
    """How the part of an attempt on one node ended: what node 0 judges by. `ends`: what each rank said (None: nothing);
    `killed`: why the agent ended them, if it did; `oom`: as for `endings.judge`."""

    ends: dict[int, RankEnd | None]
    killed: RankEnd | None
    oom: bool | None
    tails: str  # of its ranks' logs, where it did not end well

    @property
    def well(self) -> bool:
        return all(end is not None and end.cause in (Cause.DONE, Cause.STOPPED) for end in self.ends.values())


class Word(Record, frozen=True, omit_defaults=True):
    """What one agent says to another; each says what is new. An empty one is a beat."""

    nonce: str = ""  # of the claim: the first word, with `node` and `host`
    node: int = 0
    host: str = ""
    port: int = 0  # where the ranks meet: start yours
    asked: int = 0  # requests to stop so far
    dead: tuple[int, ...] = ()  # ranks, in the order of their deaths
    leave: bool = False  # end your ranks now
    why: RankEnd | None = None
    end: NodeEnd | None = None
    ready: bool = False  # all is said and brought: it only waits for the outcome
    over: Cause | None = None  # the outcome is published: exit with its code


class Line:
    """The connection to another node's agent, with a thread that listens and beats.

    What was heard is in its fields, which the thread sets and others only read; `wake` is called after each word.
    """

    def __init__(self, link: socket.socket, node: int, host: str, wake: Callable[[], None]) -> None:
        self.node, self.host = node, host
        self.port, self.asked, self.ready = 0, 0, False
        self.leave = False
        self.why: RankEnd | None = None
        self.end: NodeEnd | None = None
        self.over: Cause | None = None
        self.lost = ""  # why nothing more is to be heard
        self.take: Callable[[Line, Word], None] = lambda line, word: None
        self._link, self._wake, self._lock = link, wake, threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"line to node {node}", daemon=True)

    @property
    def is_lost(self) -> bool:
        return bool(self.lost) and self.end is None and self.over is None

    def listen(self) -> None:
        self._thread.start()

    def say(self, word: Word) -> None:
        """Send it. One that cannot be sent is a line that is lost, and no error."""
        try:
            with self._lock:
                self._link.sendall(contract.encode(word) + b"\n")
        except OSError as error:
            self.lost = self.lost or f"its connection failed: {error}"

    def tell_end(self, end: NodeEnd) -> None:
        self.say(Word(end=end))

    def tell_ready(self) -> None:
        self.say(Word(ready=True))

    def shut(self, seconds: float = 0.0) -> None:
        """Say no more, and hang up once the other end has, or after `seconds`."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._link.close()

    def _run(self) -> None:
        """Silence is counted in beats and not by the clock: the time that this process stood still itself, as in a
        suspended job, is one beat of it."""
        left, silent, beaten = b"", 0, time.monotonic()
        self._link.settimeout(BEAT_SECONDS)
        while not self.lost:
            try:
                data = self._link.recv(1 << 16)
                silent = 0
                if not data:
                    self.lost = self.lost or "its agent is gone"
                *lines, left = (left + data).split(b"\n")
                for line in lines:
                    self._hear(contract.decode(line, Word, f"a word of {self.host}"))
                if len(left) > LONGEST_WORD:
                    self.lost = "it says too much"
            except TimeoutError:
                silent += 1
                if silent * BEAT_SECONDS >= SILENT_SECONDS:
                    self.lost = f"not heard of for {SILENT_SECONDS:g} s"
            except (OSError, ContractError) as error:
                self.lost = self.lost or f"its connection failed: {error}"
            if time.monotonic() - beaten >= BEAT_SECONDS:
                self.say(Word())
                beaten = time.monotonic()
        self._link.close()
        self._wake()

    def _hear(self, word: Word) -> None:
        self.port = word.port or self.port
        self.asked = max(self.asked, word.asked)
        self.ready = self.ready or word.ready
        self.why = self.why or word.why
        self.leave = self.leave or word.leave
        self.end = word.end or self.end
        self.over = word.over or self.over
        self.take(self, word)
        if word != Word():  # a beat wakes nobody
            self._wake()


@dataclass
class Team:
    """The agents that this one is connected to: all others on node 0, node 0's elsewhere; none where there is one node.

    `deaths`: ranks in the order in which their deaths came to be known, of all nodes on node 0, else of this one.
    `meeting`: host and port where the ranks meet.
    """

    node: Node
    requests: Requests
    lines: dict[int, Line] = field(default_factory=dict)
    deaths: list[int] = field(default_factory=list)
    meeting: tuple[str, int] = ("", 0)
    told_deaths: int = 0
    told_asked: int = 0
    missing: list[str] = field(default_factory=list)  # hosts of nodes that never came
    left: bool = False  # the others were told to end their ranks

    @property
    def leads(self) -> bool:
        return self.node.number == 0

    @property
    def asked(self) -> int:
        """How often a stop was asked for: one notice comes to all nodes, so not the sum but the most of any."""
        return max([self.requests.count, *(line.asked for line in self.lines.values())])

    def share(self, dead: Sequence[int] = ()) -> None:
        """Tell the others of stops and, node 0, of the deaths here that it does not know. `dead`: all so far."""
        news = list(dead[self.told_deaths :])
        self.told_deaths += len(news)
        self.deaths += news
        told = () if self.leads else tuple(news)
        if told or self.asked > self.told_asked:
            self.told_asked = self.asked
            self.tell(Word(asked=self.asked, dead=told))

    def tell(self, word: Word) -> None:
        for line in self.lines.values():
            line.say(word)

    @property
    def told(self) -> bool:
        """Whether another node wants the ranks to be ended, or is lost, which wants the same."""
        return any(line.leave or line.is_lost for line in self.lines.values())

    def why(self) -> RankEnd | None:
        """Why, if it is not just an echo."""
        lines = self.lines.values()
        reasons = [*(line.why for line in lines), *(lost(line) for line in lines if line.is_lost)]
        return next((why for why in reasons if why is not None), None)

    def failed(self) -> bool:
        """Whether the ranks of another node have ended, and not well."""
        return any(line.end is not None and not line.end.well for line in self.lines.values())

    def start_at(self, address: str, port: int) -> None:
        """Have the ranks of all nodes start, and meet there."""
        self.meeting = address, port
        self.tell(Word(port=port))

    def leave(self, why: RankEnd | None) -> None:
        """Have the others end their ranks, whatever they do. `why`: None where that is but an echo."""
        if not self.left:
            self.left = True
            self.tell(Word(leave=True, why=why))

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until `done`, at most `seconds`, sharing signals as they come. Returns whether it is done."""
        deadline = time.monotonic() + seconds
        while not (finished := done()) and time.monotonic() < deadline:
            self.requests.wait(min(1.0, max(0.0, deadline - time.monotonic())))
            self.share()
        return finished

    def ended(self) -> bool:
        """Whether nothing more is to be heard of how the others' parts ended."""
        return all(line.end is not None or line.lost for line in self.lines.values())

    def farewell(self, cause: Cause) -> None:
        """Node 0's last word. No agent leaves before it: some schedulers end all tasks once one has failed."""
        self.wait(lambda: all(line.ready or line.lost for line in self.lines.values()), READY_SECONDS)
        self.tell(Word(over=cause))
        for line in self.lines.values():
            line.shut(GOODBYE_SECONDS)


def lost(line: Line) -> RankEnd:
    message = f"node {line.node} ({line.host}) is lost: {line.lost or 'it does not say how its part ended'}"
    return RankEnd(cause=Cause.VANISHED, message=message, step=None)


# --- node 0 -----------------------------------------------------------------------------------------------------------


@dataclass
class Entrance:
    """Where the other nodes' agents come in. Only those of this attempt's other nodes do, each once."""

    team: Team
    nonce: str
    listener: socket.socket = field(default_factory=lambda: _listener())
    greeting: threading.Lock = field(default_factory=threading.Lock)  # two lines' threads may have a first word at once

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    def open(self) -> None:
        threading.Thread(target=self._run, name="entrance", daemon=True).start()

    def missing(self) -> list[int]:
        return [node for node in range(1, self.team.node.count) if node not in self.team.lines]

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _run(self) -> None:
        while True:
            try:
                link, (host, *_) = self.listener.accept()
            except OSError:  # closed
                return
            line = Line(link, -1, host, self.team.requests.wake)
            line.take = self._greet
            line.listen()

    def _greet(self, line: Line, word: Word) -> None:
        """The first word says who it is; from the second on deaths are put in the order of all."""
        if line.node < 0 and not self._admits(line, word):
            line.lost = "it is none of this attempt's agents"
            return
        self.team.deaths += word.dead

    def _admits(self, line: Line, word: Word) -> bool:
        if not hmac.compare_digest(word.nonce.encode(), self.nonce.encode()):
            return False
        with self.greeting:
            if word.node not in self.missing():
                return False
            line.node, line.host = word.node, word.host
            self.team.lines = {**self.team.lines, word.node: line}  # anew: other threads go through it meanwhile
        line.say(Word(asked=self.team.asked))
        return True


def _listener() -> socket.socket:
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # no IPv6 here
        return socket.create_server(("", 0))


# --- the others -------------------------------------------------------------------------------------------------------


def connect(team: Team, claim: Claim, is_over: Callable[[], bool]) -> bool:
    """Join node 0's agent where its claim says. Returns whether it could be reached in CONNECT_SECONDS, unless the
    attempt is over before."""
    deadline, said = time.monotonic() + CONNECT_SECONDS, ""
    while time.monotonic() < deadline and not is_over():
        try:
            link = socket.create_connection((claim.address, claim.port), timeout=10)
        except OSError as error:  # it may be about to listen, or its name about to be known
            if str(error) != said:
                said = str(error)
                say(f"node 0 at {claim.address}:{claim.port}: {said}")
            team.requests.wait(1.0)
            continue
        line = Line(link, 0, claim.address, team.requests.wake)
        line.say(Word(nonce=claim.nonce, node=team.node.number, host=team.node.name, asked=team.asked))
        line.listen()
        team.lines[0], team.meeting = line, (claim.address, 0)
        return True
    return False
