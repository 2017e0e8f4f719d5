"""The writer of progress chunks: one line a step, a chunk at most every `watch_seconds`. `orchestrator` reads them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from model import contract, parallel, storage
from model.contract import Attempt, Step

log = logging.getLogger(__name__)


class Progress:
    """What rank 0 tells of the steps; the other ranks write nothing but their logs.

    A line that has not been published when the process dies is lost: at most `watch_seconds` of them, and none that
    came before a sealed checkpoint.
    """

    def __init__(self, attempt: Attempt, steps: int) -> None:
        self._attempt = attempt
        self._steps = steps
        self._writes = parallel.rank() == 0
        self._pending: list[Step] = []
        self._notes: list[str] = []
        self._beside: dict[str, float] = {}
        self._chunk = 0
        self._published = time.monotonic()
        # A bucket may be slow, and a step does not wait for it; a disk is not, and needs no thread.
        self._sender = ThreadPoolExecutor(1, "progress") if storage.is_uri(attempt.run_dir) else None
        self._sent: Future[None] | None = None

    def note(self, text: str, metrics: Mapping[str, float] | None = None) -> None:
        """Something for a person to read, and metrics that go with it, said with the next step."""
        log.info(text)
        if self._writes:
            self._notes.append(text)
            self._beside.update(metrics or {})

    def step(self, step: int, images_per_second: float, metrics: dict[str, float]) -> None:
        """Record that `step` updates are done. Metrics that are not finite are left out: JSON has no word for them.

        Publishes a chunk if one is due; to a bucket, begins to, once the one before has arrived. Raises
        storage.DiskFullError or another StoreError if that failed.
        """
        if not self._writes:
            return
        record = Step(
            step=step,
            steps=self._steps,
            time=contract.now(),
            images_per_second=images_per_second,
            metrics={name: value for name, value in (metrics | self._beside).items() if math.isfinite(value)},
            note="; ".join(self._notes),
        )
        self._notes.clear()
        self._beside.clear()
        self._pending.append(record)
        if time.monotonic() - self._published >= self._attempt.watch_seconds and (
            self._sent is None or self._sent.done()
        ):
            self._wait()
            self._publish()

    def flush(self) -> None:
        """Publish what is pending as one chunk, nothing if there is nothing; all is there when this returns."""
        self._wait()
        if self._pending:
            self._publish()
            self._wait()

    def _wait(self) -> None:
        """Until the last chunk has arrived. Raises what its publication raised."""
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.result()

    def _publish(self) -> None:
        data = b"".join(contract.encode(record) + b"\n" for record in self._pending)
        name = contract.progress_chunk(self._attempt.attempt, self._chunk)
        path = f"{self._attempt.run_dir}/{name}"
        if self._sender is None:
            storage.publish(path, data)
        else:
            self._sent = self._sender.submit(storage.publish, path, data)
        last = self._pending[-1]
        terms = " ".join(f"{name} {value:.4g}" for name, value in last.metrics.items())
        log.info("step %d of %d, %.1f images/s, %s", last.step, last.steps, last.images_per_second, terms)
        self._pending.clear()
        self._chunk += 1
        self._published = time.monotonic()
