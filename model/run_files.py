"""Where the files of a run lie. Part of `model.contract`, through which everybody comes.

A run's directory, every path relative to it:

    events/000001.json                  the log; the state of the run is its fold
    code/<digest>/model/                the read-only copy of model/ that the attempts run
    attempts/<n>/attempt.yaml           all that attempt n is told; its only argument
    attempts/<n>/claim.json             who trains attempt n (published exclusively, before rendezvous)
    attempts/<n>/reserve                room that the agent gives up for its last word, should the disk be full
    attempts/<n>/closed.json            the controller ended attempt n: nothing it seals from now on counts
    attempts/<n>/outcome.json           how attempt n ended, in its agent's words
    attempts/<n>/ranks/<rank>.json      how one rank ended, in its own words
    attempts/<n>/nodes/<node>.json      how one node ended, in its agent's words; node 0 judges them all
    attempts/<n>/progress/<chunk>.jsonl what happened at each step (rank 0)
    attempts/<n>/looked.txt             how far its first look at the images was, in words (rank 0)
    attempts/<n>/recorded/              steps written down whole, for `dinoctl replay`
    attempts/<n>/log/                   agent.log, agent-<node>.log, rank-<rank>.log; in a bucket folders of chunks
    checkpoints/<phase>/<n>/<step>/     shards, then manifest.json: no manifest, no checkpoint;
                                        <part>.dropped: that part is gone, as only others are kept
    data/                               the index of the images
    controller.json                     the job on the cluster that was submitted last to keep this run going
    pins/<phase>-<n>-<step>-<by>.json   another run takes that checkpoint, or a person wants it: it is never pruned
    bad/<phase>-<n>-<step>.json         that checkpoint cannot be read: nobody takes it
    watchers/<id>.json                  who keeps this run going, and when they last looked
    folded.msgpack                      what the log folds to, read where it is still true; may be removed
    report/, tracking/, watch.log       table and pictures; how far the MLflow shipper got; what a watcher said
"""

from __future__ import annotations

from model import kept

EVENTS_DIR, ATTEMPTS_DIR, PINS_DIR, BAD_DIR, WATCHERS_DIR = "events", "attempts", "pins", "bad", "watchers"
REPORT_DIR = "report"
REPORT_FILE = "report/report.json"
CONTROLLER_FILE = "controller.json"


def event_file(number: int) -> str:
    return f"events/{number:06d}.json"


def attempt_dir(attempt: int) -> str:
    return f"attempts/{attempt}"


def attempt_yaml(attempt: int) -> str:
    return f"attempts/{attempt}/attempt.yaml"


def claim_file(attempt: int) -> str:
    return f"attempts/{attempt}/claim.json"


def closed_file(attempt: int) -> str:
    return f"attempts/{attempt}/closed.json"


def outcome_file(attempt: int) -> str:
    return f"attempts/{attempt}/outcome.json"


def rank_file(attempt: int, rank: int) -> str:
    return f"attempts/{attempt}/ranks/{rank}.json"


def node_file(attempt: int, node: int) -> str:
    """A RankEnd: how the node's part ended, as its agent judges it."""
    return f"attempts/{attempt}/nodes/{node}.json"


def progress_dir(attempt: int) -> str:
    return f"attempts/{attempt}/progress"


def progress_chunk(attempt: int, chunk: int) -> str:
    return f"attempts/{attempt}/progress/{chunk:06d}.jsonl"


def looked_file(attempt: int) -> str:
    return f"attempts/{attempt}/looked.txt"


def recorded_file(attempt: int, step: int, rank: int) -> str:
    """The update that led to `step`, as that rank computed it."""
    return f"attempts/{attempt}/recorded/{step}-rank{rank}.safetensors"


def log_dir(attempt: int) -> str:
    return f"attempts/{attempt}/log"


def agent_log(attempt: int, node: int = 0) -> str:
    return f"attempts/{attempt}/log/agent{f'-{node}' if node else ''}.log"


def rank_log(attempt: int, rank: int) -> str:
    return f"attempts/{attempt}/log/rank-{rank}.log"


def checkpoint_dir(phase: str, attempt: int, step: int) -> str:
    return f"checkpoints/{phase}/{attempt}/{step}"


def pin_file(phase: str, attempt: int, step: int, by: str) -> str:
    """Published in the run that holds the checkpoint; `by`: the taker's run id and the input, or `user`."""
    return f"{PINS_DIR}/{phase}-{attempt}-{step}-{by}.json"


def bad_file(phase: str, attempt: int, step: int) -> str:
    return f"{BAD_DIR}/{phase}-{attempt}-{step}.json"


def manifest_file(phase: str, attempt: int, step: int) -> str:
    return f"{checkpoint_dir(phase, attempt, step)}/manifest.json"


def dropped_file(phase: str, attempt: int, step: int, part: str) -> str:
    """The note that a part is gone, on purpose (`kept.DROPPED`)."""
    return f"{checkpoint_dir(phase, attempt, step)}/{part}{kept.DROPPED}"
