"""What several benchmarks take on the command line: what cannot be measured is refused in a line, exit code 2."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from model import config
from model.architectures import ARCHITECTURES

PATCH_SIZE: int = config.Backbone.model_fields["patch_size"].default
RELEASED = [name for name in ARCHITECTURES if name != "custom"]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a benchmark, described by the first line of its docstring."""
    return argparse.ArgumentParser(description=(doc or "").split("\n")[0])


def patch_size(arch: str) -> int:
    size: int = ARCHITECTURES[arch].get("patch_size", PATCH_SIZE)
    return size


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def times(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0, such as 2")
    return number


def seconds(text: str) -> float:
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, such as 0.02")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder that is there")
    return Path(text)
