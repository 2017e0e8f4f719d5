"""`dinoctl data`: index, pack, check and measure images. Decoding is the data plane's work: another process does it."""

from __future__ import annotations

import argparse
import subprocess
import sys

COMMAND = [sys.executable, "-P", "-m", "model.data"]


def run(options: argparse.Namespace) -> int:
    """What it prints, progress included, goes straight through; its exit code."""
    return subprocess.run([*COMMAND, *words(options)], check=False).returncode


def words(options: argparse.Namespace) -> list[str]:
    """The options as `model.data` takes them."""
    match options.action:
        case "index":
            return ["index", *options.paths, "--to", options.to]
        case "pack":
            size, seed = str(options.images_per_shard), str(options.seed)
            given = ["--name", options.name, "--images-per-shard", size, "--seed", seed]
            return ["pack", options.folder, options.target, *given]
    index = ["--index", options.index] if options.index else []
    if options.action == "check":
        return ["check", *options.paths, *index]
    return ["stats", *options.paths, *index, "--images", str(options.images), *(["--json"] if options.json else [])]
