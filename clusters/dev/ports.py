"""Neighbouring ports that nobody listens on: a dev cluster takes several."""

from __future__ import annotations

import random
import socket


def free(count: int, wanted: int | None = None) -> int:
    """The first of `count` neighbouring free ports. wanted: which it must be. Raises OSError if there are none.

    Below the range from which the kernel gives ports to whoever connects, or a daemon might not get its own again.
    """
    candidates = [wanted] if wanted is not None else random.sample(range(20_000, 32_000), 100)
    for port in candidates:
        if all(map(_is_free, range(port, port + count))):
            return port
    raise OSError(f"port {wanted} or one of the {count - 1} after it is taken" if wanted else "no free ports found")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
