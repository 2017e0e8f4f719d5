"""Who is let in at node 0's entrance, over real sockets. What agents tell each other then: test_nodes.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from model import contract
from model.nodes import Node
from model.signals import Requests
from model.team import Entrance, Team, Word
from tests.jobs.harness import wait_until

NODES = 24


@pytest.fixture
def entrance() -> Iterator[Entrance]:
    """Of node 0 of many."""
    inbox, outbox = socket.socketpair()
    for end in (inbox, outbox):
        end.setblocking(False)
    opened = Entrance(Team(Node(0, NODES, "node0"), Requests(inbox, outbox)), nonce="secret")
    opened.open()
    yield opened
    opened.close()
    for name in ("entrance", "line to node"):  # the one begins the others, strangers' too
        for thread in threading.enumerate():
            if thread.name.startswith(name):
                thread.join(20)
    for end in (inbox, outbox):
        end.close()


def enter(entrance: Entrance, word: Word) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", entrance.port), timeout=10)
    link.sendall(contract.encode(word) + b"\n")
    return link


@pytest.mark.parametrize("word", [Word(nonce="guess", node=1, dead=(9,)), Word(nonce="secret", node=NODES, dead=(9,))])
def test_a_stranger_is_not_heard(entrance: Entrance, word: Word) -> None:
    with enter(entrance, word) as link:
        while link.recv(1 << 16):  # until it hangs up
            pass
    assert entrance.team.lines == {}
    assert entrance.team.deaths == []


def test_all_come_in_at_once_each_once_and_their_deaths_are_heard(entrance: Entrance) -> None:
    words = [Word(nonce="secret", node=node, host=f"node{node}", dead=(node,)) for node in range(1, NODES)]
    with ThreadPoolExecutor(NODES) as pool:
        links = list(pool.map(lambda word: enter(entrance, word), 2 * words))
    wait_until(lambda: not entrance.missing(), "all nodes")
    assert sorted(entrance.team.lines) == list(range(1, NODES))
    wait_until(lambda: len(entrance.team.deaths) == NODES - 1, "their deaths")
    assert sorted(entrance.team.deaths) == list(range(1, NODES))
    for link in links:
        link.close()
