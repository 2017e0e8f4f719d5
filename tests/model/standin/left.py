"""Agents that a test starts, and that are ended with it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Protocol, TypeVar

import pytest


class HasAgents(Protocol):
    agents: dict[int, subprocess.Popen[bytes]]


T = TypeVar("T", bound=HasAgents)
STARTED: list[HasAgents] = []


def started(agents: T) -> T:
    """The same, remembered for `nothing_is_left`."""
    STARTED.append(agents)
    return agents


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """What a test that failed leaves of its agents. The first process of a pod takes the others with it."""
    yield
    while STARTED:
        for agent in STARTED.pop().agents.values():
            agent.kill()
            agent.wait()
