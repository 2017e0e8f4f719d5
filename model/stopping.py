"""How the ranks agree on the step to stop at: on the host, without a collective.

A rank that sees the stop file proposes its own step + 2, once for all ranks, in the rendezvous store. Before it ends a
step, the host has read the sums over all ranks of the step before. So while a rank is between its steps s and s + 1, no
other can end step s + 2, for which it would need this one's part of step s + 1: all ranks see the proposal in time. One
that does not, whatever the reason, must not seal on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from model import contract

AHEAD = 2
KEY = "stop-at-step"


class TooLateError(Exception):
    """This rank is past the step that the others stop at: it ends without sealing."""


@dataclass(frozen=True)
class Stop:
    """The request to stop (`file`, made by the agent of the node) and what the ranks made of it (`store`)."""

    store: Store
    file: Path

    def at(self, step: int, steps: int) -> bool:
        """Whether to stop now, `step` updates of `steps` being done. Every rank asks after every step.

        Raises TooLateError if the others stop at an earlier step.
        """
        agreed = self._agreed(step, steps)
        if agreed is not None and step > agreed:
            raise TooLateError(f"at step {step}, and the ranks agreed to stop at step {agreed}")
        return agreed == step

    def left(self, notice: float) -> float:
        """Seconds until the agent kills, which comes `notice` seconds after the request; infinite without one."""
        try:
            return self.file.stat().st_mtime + notice - contract.now()
        except FileNotFoundError:
            return math.inf

    def _agreed(self, step: int, steps: int) -> int | None:
        if self.store.check([KEY]):
            return int(self.store.get(KEY))
        if not self.file.exists():
            return None
        # Sets the key only if it is not there, and says in any case what it holds.
        return int(self.store.compare_set(KEY, "", str(min(step + AHEAD, steps))))
