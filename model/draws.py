"""Every random number of a run, by counter: nothing here remembers anything.

A draw is named by (seed, stream, keys ...), for instance (0, "masks", step, group). The name is hashed to a 128-bit
key of Philox (Salmon et al. 2011), so one more view or loader worker shifts no other draw, a resumed run continues
with the draws that it would have made, and there is no random-number state to save.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, stream: str, *keys: int | str) -> np.random.Generator:
    """The generator of that name: the same numbers wherever and whenever it is asked for."""
    name = "\x1f".join(str(part) for part in (seed, stream, *keys))
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
