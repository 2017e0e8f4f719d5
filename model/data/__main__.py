"""What `dinoctl data` runs. Exits 2, with one message, for a user's mistake, and 1 where images cannot be read.

python -P -m model.data index PATH... --to FOLDER
python -P -m model.data pack FOLDER TARGET [KIND] [--name images] [--images-per-shard 1000] [--seed 0]
python -P -m model.data check PATH... [KIND] [--index FOLDER]
python -P -m model.data stats PATH... [KIND] [--index FOLDER] [--images 10000] [--to FILE] [--json]

KIND, what an image is: --channels 3 --bits 8
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model import config, storage
from model.data import check, pack, shards, stats
from model.data.errors import DataError
from model.data.threads import Tell
from model.data.whole import Whole, open_whole, patterns_of

DONE, UNREADABLE, WRONG_INPUT, DISK_FULL, INTERRUPTED = 0, 1, 2, 3, 130

SAY_SECONDS = 10.0
"""Between two lines of progress."""


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        _refuse_empty(options)
        return int(COMMANDS[options.command](options))
    except DataError as error:
        return _said(str(error).removeprefix("data.path: "), WRONG_INPUT)
    except storage.UnknownStoreError as error:
        return _said(error.strerror or str(error), WRONG_INPUT)
    except OSError as error:
        text = str(error) if error.filename else error.strerror or str(error)
        return _said(text, DISK_FULL if error.errno in storage.NO_SPACE else UNREADABLE)
    except KeyboardInterrupt:
        return INTERRUPTED


def _said(text: str, code: int) -> int:
    print(f"dinoctl: {text}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dinoctl data")
    commands = parser.add_subparsers(dest="command", required=True)
    indexed, packed, checked, measured = (commands.add_parser(name) for name in COMMANDS)
    for command in (indexed, checked, measured):
        command.add_argument("paths", nargs="+")
    indexed.add_argument("--to", required=True)
    packed.add_argument("folder")
    packed.add_argument("target")
    packed.add_argument("--name", default="images")
    packed.add_argument("--images-per-shard", type=_positive, default=1000)
    packed.add_argument("--seed", type=int, default=0)
    for command in (packed, checked, measured):
        command.add_argument("--channels", type=_positive, default=config.RGB)
        command.add_argument("--bits", type=int, choices=(8, 16), default=8)
    for command in (checked, measured):
        command.add_argument("--index")
    measured.add_argument("--images", type=_positive, default=10_000)
    measured.add_argument("--to")
    measured.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


# --- commands ---------------------------------------------------------------------------------------------------------


def index_(options: argparse.Namespace) -> int:
    """Index tar shards as they are now; those that are as they were when they were indexed are not looked into."""
    data = _data(options.paths, config.RGB, 8)
    if storage.is_uri(options.to):
        raise DataError(f"{options.to}: an index lies in a folder, not on a bucket")
    with _progress("shards indexed") as tell:
        found = shards.index_anew(patterns_of(data), os.path.abspath(options.to), tell)
    print(f"{found.index}: {found.total:,} images in {len(found.paths):,} shards; data.index takes this folder")
    if found.without_image:
        print(f"{found.without_image:,} keys have no image and are passed over")
    for text in found.lost:
        print(text)
    for one in found.skipped:
        print(f"damaged: {one.path}: {one.reason}")
    return UNREADABLE if found.skipped else DONE


def pack_(options: argparse.Namespace) -> int:
    with _progress("images packed") as tell:
        size, seed, suffixes = options.images_per_shard, options.seed, _of_kind(options).suffixes
        made = pack.pack(options.folder, options.target, options.name, size, seed, tell, suffixes)
    classes = f", {made.classes} classes ({pack.CLASSES})" if made.classes else ""
    print(f"{made.images:,} images in {made.shards:,} shards{classes}; data.path: {made.pattern}")
    return DONE


def check_(options: argparse.Namespace) -> int:
    bad = 0
    with _whole(options) as whole, _progress("images checked") as tell:
        for problem in check.problems(whole, tell):
            bad += 1
            print(f"{problem.path}: {problem.reason}", flush=True)
        without = whole.shards.without_image if whole.shards else 0
    passed_over = f"; {without:,} keys have no image" if without else ""
    print(f"{whole.total:,} images of {whole.where} looked at, {bad:,} problems{passed_over}")
    return UNREADABLE if bad else DONE


def stats_(options: argparse.Namespace) -> int:
    with _whole(options) as whole, _progress("images measured") as tell:
        try:
            found = stats.measure(whole, _of_kind(options), options.images, tell)
        except DataError as error:  # it names `data check`, which looks for RGB unless told
            raise DataError(f"{error}{_given(options)}") from error
    if options.to:
        stats.write(found, options.to)
    if options.json:
        print(found.model_dump_json())
        return DONE
    digits = 4 if options.bits == 8 else 6
    for name, values in (("mean", found.mean), ("std", found.std)):
        print(f"{name}: [{', '.join(f'{value:.{digits}f}' for value in values)}]")
    unreadable = f", {found.unreadable:,} could not be read" if found.unreadable else ""
    unreadable += "".join(f"; left out: {one}" for one in whole.closed)
    print(f"# of {found.images:,} images of {whole.where}{unreadable}")
    if options.to:
        print(f"# data.normalise: {options.to}")
    return DONE


COMMANDS = {"index": index_, "pack": pack_, "check": check_, "stats": stats_}


# --- what they share --------------------------------------------------------------------------------------------------


def _refuse_empty(options: argparse.Namespace) -> None:
    """Raises DataError for an empty path: to the system that is the folder one is in, and it was hardly meant."""
    for name in ("paths", "folder", "target", "index", "to"):
        given = getattr(options, name, None)
        if given == "" or (isinstance(given, list) and "" in given):
            option = f"--{name} " if name in ("index", "to") else ""
            raise DataError(f"{option}'': an empty path, as of a variable that is not set; name one (. is this folder)")


def _of_kind(options: argparse.Namespace) -> config.Data:
    """A `data:` section of such images, wherever they lie."""
    return _data(["."], options.channels, options.bits)


def _given(options: argparse.Namespace) -> str:
    """What `data check` has to be given to look at the same images in the same way."""
    defaults = (("channels", config.RGB), ("bits", 8), ("index", None))
    values = ((name, getattr(options, name), default) for name, default in defaults)
    words = [f"--{name} {value}" for name, value, default in values if value != default]
    return f", given {' '.join(words)}" if words else ""


def _data(paths: list[str], channels: int, bits: int) -> config.Data:
    """`paths` as a `data:` section, not normalised. Raises DataError with what is wrong with them."""
    kind = {"channels": channels, "bits": bits, "normalise": "none"}
    try:
        return config.read(config.Data, {"path": paths[0] if len(paths) == 1 else paths, **kind})
    except ValidationError as error:
        raise DataError("; ".join(_reason(one) for one in error.errors())) from error


def _reason(one: Mapping[str, Any]) -> str:
    """One of pydantic's errors, with the option where it is an option's."""
    said = str(one.get("ctx", {}).get("error", one["msg"])).removeprefix("path: ")
    option = one["loc"][0] if one["loc"] else "path"
    return f"--{option} {one['input']}: {said}" if option in ("channels", "bits") else said


@contextmanager
def _whole(options: argparse.Namespace) -> Iterator[Whole]:
    """Every image that the options name. Without --index the index is made for now and thrown away."""
    data = _data(options.paths, options.channels, options.bits)
    if options.index and not data.shards:
        raise DataError(f"--index: an index is of tar shards, and {data.shown} is no .tar: leave it out")
    with tempfile.TemporaryDirectory(prefix="dinoctl-index-") as scratch:
        with _progress("shards indexed") as tell:
            whole = open_whole(data, os.path.abspath(options.index) if options.index else scratch, tell)
        yield whole


@contextmanager
def _progress(what: str) -> Iterator[Tell]:
    """A bar on stderr, shown once there is something to tell; lines where that is no terminal, as of a batch job."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _lines(what: str) -> Tell:
    said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            print(f"{done:,} of {total:,} {what}", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
