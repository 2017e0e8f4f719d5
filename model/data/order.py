"""Which image stands at which position of a run: a new permutation of the n training images every epoch.

Positions count images from the origin of the clock (a chain of phases joined by `init` has one), so that a phase that
goes on with another's training state goes on in its order too.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model.draws import generator


@lru_cache(maxsize=4)
def permutation(seed: int, origin: str, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of the n images in one epoch. Not to be written to: it is shared."""
    order = generator(seed, f"{origin}/order", epoch).permutation(n)
    order.setflags(write=False)
    return order


def image_at(seed: int, origin: str, n: int, position: int) -> int:
    """Index of the image at a position."""
    epoch, place = divmod(position, n)
    return int(permutation(seed, origin, epoch, n)[place])


def replacement(seed: int, origin: str, n: int, position: int, attempt: int) -> int:
    """Index of the image to try (attempt 1, 2 ...) where the one at `position` is unreadable: a draw of the position
    alone, so that nothing else shifts."""
    return int(generator(seed, f"{origin}/replacement", position, attempt).integers(n))
