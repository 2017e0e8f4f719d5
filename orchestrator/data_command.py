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
            return ["pack", options.folder, options.target, *_kind(options), *given]
    index = [] if options.index is None else ["--index", options.index]
    if options.action == "check":
        return ["check", *options.paths, *_kind(options), *index]
    out = [*([] if options.to is None else ["--to", options.to]), *(["--json"] if options.json else [])]
    return ["stats", *options.paths, *_kind(options), *index, "--images", str(options.images), *out]


def _kind(options: argparse.Namespace) -> list[str]:
    """What an image is, where it is no 8-bit RGB."""
    given = (("--channels", options.channels), ("--bits", options.bits))
    return [word for name, value in given if value is not None for word in (name, str(value))]
