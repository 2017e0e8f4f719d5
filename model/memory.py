"""Keeping what a training step frees, so that the next step need not ask the kernel for it.

A step on a CPU allocates and frees gigabytes in blocks of some megabytes. By itself glibc gives much of it back to the
kernel at once, and the next step pays for every page of it again: a twentieth of its time, and fragments besides.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)
NEVER = 2**31 - 1
LARGEST_OF_HEAP = 32 << 20  # the most that glibc takes; what is larger still comes from the kernel and goes back to it


def keep_freed() -> bool:
    """Have this process's allocator keep freed memory below that size. False where it is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((M_MMAP_THRESHOLD, LARGEST_OF_HEAP), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in options)
