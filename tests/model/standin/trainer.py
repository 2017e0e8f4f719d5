"""A stand-in for the trainer and the evaluation, without torch: it does to the agent what a rank can do to it.

`settings["standin"]` names one behaviour per rank (the last one holds for the rest):
    steps:N      N steps of 20 ms each, then done; seals and stops at a stop request
    deaf         steps for ever, whatever is asked
    look:N       looks at N images for the index, 20 ms each, then one step
    hang         one step, then none
    starve       one step, then waits for a batch that does not come
    cause:NAME   ends with that cause of the contract, in its own published words
    raise        an exception that nobody catches
    peer         steps until another rank is gone, then crashes as a collective would
    bare:CODE    leaves with that exit code and not a word
    children     like deaf, with a child of its own that has left its session
    orphans      like steps for ever, and leaves processes to whoever adopts them, which end soon
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from model import contract, storage
from model.contract import Attempt, Cause, RankEnd


def main(attempt_yaml: str) -> None:
    attempt = contract.read_attempt(storage.read(attempt_yaml), attempt_yaml)
    rank = int(os.environ.get("RANK", "0"))
    behaviours = attempt.settings["standin"]
    kind, _, value = behaviours[min(rank, len(behaviours) - 1)].partition(":")
    keep_facts(attempt, rank)
    print(f"stand-in rank {rank}: {kind} {value}", flush=True)
    if kind == "raise":
        raise ValueError("the stand-in was told to raise")
    if kind == "bare":
        sys.exit(int(value))
    if kind == "cause":
        step(attempt, rank)
        end(attempt, rank, Cause(value), "told to", 1)
    if kind == "children":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    if kind == "look":
        look(attempt, rank, int(value))
        value = "1"
    if kind == "orphans":
        subprocess.run(["sh", "-c", "sleep 0.5 & sleep 0.6 & sleep 0.7 &"], check=True)
    take_steps(attempt, rank, "steps" if kind == "orphans" else kind, int(value or 10**9))


def keep_facts(attempt: Attempt, rank: int) -> None:
    """What the agent gave this rank, for the tests to look at."""
    names = ("PYTHONPATH", "PYTHONSAFEPATH", "OMP_NUM_THREADS", "WORLD_SIZE", "MASTER_ADDR")
    facts = {"pid": os.getpid(), "sid": os.getsid(0), "code": contract.__file__}
    path = f"{attempt.run_dir}/facts-{rank}.json"
    storage.publish(path, json.dumps(facts | {name: os.environ.get(name) for name in names}).encode())


def take_steps(attempt: Attempt, rank: int, kind: str, steps: int) -> None:
    for done in range(1, steps + 1):
        step(attempt, rank)
        if kind == "starve":
            contract.waiting_file(attempt.launch_name, rank).write_text("s3://bucket/x.tar")
        if kind in ("hang", "starve"):
            time.sleep(1000)
        if kind == "peer" and peer_is_gone(attempt, rank):
            end(attempt, rank, Cause.CRASHED, "connection closed by peer", done)
        if kind == "steps" and contract.stop_file(attempt.launch_name).exists():
            end(attempt, rank, Cause.STOPPED, "sealed", done)
    end(attempt, rank, Cause.DONE, "all steps done", steps)


def look(attempt: Attempt, rank: int, images: int) -> None:
    for _ in range(images):
        time.sleep(0.02)
        contract.looking_file(attempt.launch_name, rank).touch()


def step(attempt: Attempt, rank: int) -> None:
    time.sleep(0.02)
    contract.pulse_file(attempt.launch_name, rank).touch()


def peer_is_gone(attempt: Attempt, rank: int) -> bool:
    others = set(range(int(os.environ["WORLD_SIZE"]))) - {rank}
    facts = [Path(attempt.run_dir) / f"facts-{other}.json" for other in others]
    return any(is_gone(json.loads(file.read_bytes())["pid"]) for file in facts if file.exists())


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


def end(attempt: Attempt, rank: int, cause: Cause, message: str, done: int) -> NoReturn:
    word = RankEnd(cause=cause, message=message, step=done)
    storage.publish(f"{attempt.run_dir}/{contract.rank_file(attempt.attempt, rank)}", contract.encode(word))
    sys.exit(contract.EXIT_CODES[cause])


if __name__ == "__main__":
    main(sys.argv[1])
