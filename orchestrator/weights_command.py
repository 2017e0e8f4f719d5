"""`dinoctl weights`, and the look into files that a job begins with. Both need torch, so another process does it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from model import storage
from model.contract import EVALUATE
from orchestrator import attempts, handoff, status, store
from orchestrator.handoff import HandoffError, Reference
from orchestrator.problems import Problem
from orchestrator.state import fold

COMMAND = [sys.executable, "-P", "-m", "model.weights"]


def run(options: argparse.Namespace, runs: str) -> int:
    """`weights info` and `weights convert`; what they print goes straight through."""
    more = ["--arch", options.arch] if options.arch else []
    if options.action == "info":
        words = ["info", place(options.what, runs), *(["--json"] if options.json else [])]
    else:
        words = ["convert", place(options.source, runs), options.target, "--to", options.to]
    return subprocess.run([*COMMAND, *words, *more, "--network", options.network], check=False).returncode


def place(text: str, runs: str) -> str:
    """Where the weights lie that `text` names: RUN#<phase>@<step>, RUN for its last SSL phase's end, or itself.

    A URI is itself. Raises HandoffError for a checkpoint that is not there.
    """
    if storage.is_uri(text):
        return text
    if "#" in text:
        return attempts.find(handoff.parse(text), _beside(runs)).path
    try:
        run_dir = status.find(text, runs)
    except status.RunNotFoundError:
        return text
    return attempts.find(_end(run_dir), _beside(runs)).path


def _beside(runs: str) -> str:
    """A path in the folder of runs, next to which names are looked up."""
    return f"{status.absolute(runs)}/-"


def _end(run_dir: str) -> Reference:
    state = fold(store.read(run_dir))
    backbone = handoff.references(state.spec, EVALUATE).get("backbone") if state else None
    if backbone is None:
        raise HandoffError(f"{run_dir} has no self-supervised phase, so no backbone; name RUN#<phase>@<step>")
    return Reference(backbone.phase, run=run_dir)


def problems(spec: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the files that the phases of a resolved spec begin with: names and shapes are looked at."""
    found = []
    for phase in spec["phases"]:
        for name, file in handoff.files(spec, phase).items():
            words = ["check", file, json.dumps(spec["model"])]
            done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                why = done.stderr.strip().removeprefix("dinoctl: ") or f"it ended with {done.returncode}"
                found.append(Problem(f"cannot begin with these weights: {why}", ("phases", phase, name), found=file))
    return found
