"""How long a user waits for an answer that needs no torch: `.venv/bin/python -P -m tests.benchmarks.cli`.

Whole processes, `dinoctl --help` and `dinoctl status` over a folder of 50 runs that are done, seven times each after a
first that fills the page cache; prints the median and the slowest in seconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import options as ask
from tests.orchestrator.written import Run

RUNS = 50
TIMES = 7


def seconds(words: list[str]) -> list[float]:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", *words]
    taken = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return taken[1:]


def main() -> None:
    ask.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as runs:
        for number in range(RUNS):
            run = Run(Path(runs) / f"run-{number}", created=time.time() - number)
            run.done()
        for words in (["--help"], ["status", "--runs", runs]):
            taken = seconds(words)
            print(f"dinoctl {words[0]}: median {statistics.median(taken):.2f}, slowest {max(taken):.2f}")


if __name__ == "__main__":
    main()
