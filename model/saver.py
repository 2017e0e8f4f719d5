"""Saving beside training: a thread in each rank writes what was staged; at most one save is under way.

    due(step)            after each step: whether to save now, the same on every rank
    make_way(left)       before the last save: the one under way goes on to its end, or is given up
    start(...)           stage the state and have it written
    ended(wait)          what came of a save that is over

Rank 0 decides (`model.agreement`). A save that falls due while another is under way is skipped and told of, unless
somebody asked for just that step. What went wrong in the thread is raised where the main thread next looks.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from model import agreement, cadence, checkpoint, contract, parallel
from model.checkpoint import GivenUpError, Parts, Save
from model.config import Checkpoints
from model.contract import Attempt, File, Manifest
from model.progress import Progress
from model.staging import stage

log = logging.getLogger(__name__)

PULSE_SECONDS = 0.2
LEAVING_SECONDS = 5.0
"""How long the thread may take to leave a save that was given up."""


@dataclass(frozen=True)
class Saved:
    """A save that is over and well."""

    manifest: Manifest
    stall: float  # seconds that training stood still while the state was copied
    seconds: float  # from the begin of that copy until all was done, pruning included
    bytes: int  # that all ranks wrote

    @property
    def metrics(self) -> dict[str, float]:
        """For the progress, and so for MLflow."""
        return {
            "checkpoint/stall_seconds": self.stall,
            "checkpoint/save_seconds": self.seconds,
            "checkpoint/bytes": float(self.bytes),
        }

    def __str__(self) -> str:
        took = f"{self.bytes / 1e6:,.4g} MB in {self.seconds:.2g} s, training waited {self.stall:.2g} s"
        return f"sealed {self.manifest.step} ({took})"


class Saver:
    """The saves of one attempt. store: the ranks' rendezvous store. chosen: what `every: auto` settled on before."""

    def __init__(
        self, attempt: Attempt, settings: Checkpoints, store: Store, progress: Progress, chosen: int | None = None
    ) -> None:
        self.chosen = chosen
        self._attempt, self._settings, self._progress = attempt, settings, progress
        self._store = PrefixStore("saver", store)
        self._buffer: Tensor | None = None  # that the last save was staged in
        self._save: Save | None = None  # under way, or over and not taken in yet
        self._thread = threading.Thread()
        self._result: Saved | Exception | None = None
        self._started = self._skipped = 0
        self._well: list[Saved] = []  # the newest two
        self._steps, self._first_step = -1, 0.0  # steps since the first one that was counted, and when that ended

    # --- when ---------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether to save, `step` updates being done. Every rank asks after every step, and gets the same answer."""
        self._count_step()
        multiple = self._settings.keep_every
        wanted = step in self._attempt.keep_steps or (multiple is not None and step % multiple == 0)
        if not cadence.is_due(self._settings, step, self.chosen, wanted):
            return False
        decision = json.loads(agreement.agreed(self._store, f"due/{step}", lambda: self._decide(wanted)))
        self.chosen = decision["chosen"]
        if not decision["save"]:
            self._skipped += 1
            said = (
                f"step {step} is not sealed: the save before it is still being written ({self._skipped} skipped so far)"
            )
            self._progress.note(f"{said}; runbooks/save-skipped.md", {"checkpoint/skipped": float(self._skipped)})
        return bool(decision["save"])

    def _decide(self, wanted: bool) -> str:
        """On rank 0: whether to save now, and how many steps apart from now on."""
        chosen, settings = self.chosen, self._settings
        if settings.every == "auto" and chosen is None and len(self._well) == 2 and settings.node_mtbf_hours:
            last, step_seconds = self._well[-1], (time.monotonic() - self._first_step) / self._steps
            measured = cadence.Measured(last.stall, last.seconds, step_seconds)
            chosen, why = cadence.choose(measured, settings.node_mtbf_hours, self._attempt.nodes)
            self._progress.note(f"checkpoints.every: auto: {why}", {"checkpoint/every": float(chosen)})
        return json.dumps({"save": wanted or not self._thread.is_alive(), "chosen": chosen})

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps == 0:
            self._first_step = time.monotonic()

    # --- the last one -------------------------------------------------------------------------------------------------

    def make_way(self, step: int, left: float) -> None:
        """Before the save of `step`, the last one: the save under way goes on, or is given up, whichever loses fewer
        steps. left: seconds until the kill, infinite where nobody asked for a stop. The same on every rank."""
        decision = agreement.agreed(self._store, f"last/{step}", lambda: json.dumps(self._gives_up(left)))
        if json.loads(decision) and self._save is not None:
            self._progress.note(f"the save of step {self._save.step} is given up for that of step {step}")
            checkpoint.give_up(self._save)

    def _gives_up(self, left: float) -> bool:
        save = self._save
        if save is None or not self._thread.is_alive() or math.isinf(left):
            return False
        if save.written < save.staged.size / 100:  # next to nothing would be lost
            return True
        pace = max((time.monotonic() - save.began) / save.written, 1 / (save.limit or math.inf))  # seconds a byte
        rest = pace * (save.staged.size - save.written)
        return cadence.gives_up(rest, pace * save.staged.size, left)

    # --- saving -------------------------------------------------------------------------------------------------------

    def start(
        self,
        step: int,
        parts: Parts,
        stored: Mapping[str, list[File]],
        loop: Mapping[str, Any],
        model: Mapping[str, Any],
        then: Callable[[Manifest], None],
    ) -> None:
        """Stage the state and have it written (arguments as in `checkpoint.seal`); returns once training may go on.

        The save before must have been taken in (`ended`). then: what rank 0's thread does when it is sealed.
        """
        assert self._save is None, "two saves at once would share one buffer"
        began = time.monotonic()
        staged = stage(checkpoint.own_files(parts), self._take_buffer())
        self._buffer, self._started = staged.buffer, self._started + 1
        limit = self._settings.upload_limit_mb_s
        self._save = Save(
            self._attempt, step, staged, stored, loop, model, self._store, self._started,
            None if limit is None else limit * 1e6, began,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._work, args=(self._save, then), name="saver", daemon=True)
        self._thread.start()

    def _take_buffer(self) -> Tensor | None:
        """Nobody else may hold it: `stage` lets it go before it takes a larger one."""
        buffer, self._buffer = self._buffer, None
        return buffer

    def _work(self, save: Save, then: Callable[[Manifest], None]) -> None:
        """In the thread."""
        try:
            manifest = checkpoint.write(save)
            if parallel.rank() == 0:
                then(manifest)
            written = sum(file.bytes for part in manifest.parts.keys() - save.stored for file in manifest.parts[part])
            self._result = Saved(manifest, save.staged.arrived(), time.monotonic() - save.began, written)
        except Exception as error:  # the main thread raises it
            self._result = error

    def ended(self, *, wait: bool = False) -> Saved | None:
        """The save that is over and was not taken in yet; None if there is none, or it was given up.

        wait: for the save under way, if there is one; meanwhile the agent sees a pulse as long as bytes are written.
        Raises what went wrong with it.
        """
        if self._save is None or (self._thread.is_alive() and not wait):
            return None
        self._join(self._save)
        result, self._save, self._result = self._result, None, None
        if isinstance(result, GivenUpError):
            return None
        if isinstance(result, Exception):
            raise result
        assert result is not None
        self._well = [*self._well[-1:], result]
        return result

    def _join(self, save: Save) -> None:
        pulse, seen = contract.pulse_file(self._attempt.launch_name, parallel.rank()), -1
        while self._thread.is_alive():
            self._thread.join(PULSE_SECONDS)
            if save.written > seen:
                seen = save.written
                pulse.touch()

    def close(self, patience: float) -> None:
        """As the process ends: a save that is under way may end within so many seconds; then it is given up."""
        if self._save is None:
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            try:
                checkpoint.give_up(self._save)
            except RuntimeError as error:  # the store has gone before us
                log.warning("a save is left behind: %s", error)
            self._thread.join(LEAVING_SECONDS)
