"""A process whose life is tied to its parent's: `python -P -m model.tied PARENT MODULE ARGUMENTS...`.

The kernel has to be asked by the child itself. Between fork and exec of a parent that has threads (an agent's, for the
store) Python code may wait for a lock for ever, so it is asked here, after the exec; then MODULE runs as `__main__`.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

from model.signals import be_deaf

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """The kernel kills this process when `parent` ends, however that ends (prctl(2), PR_SET_PDEATHSIG).

    It watches the thread of the parent that forked, which must therefore be its main one.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:  # it ended while we asked: there will be no signal
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    be_deaf()
    die_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
