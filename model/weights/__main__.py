"""What `dinoctl weights` runs, as it needs torch. Exits 2, with one message, for weights that cannot be used.

python -P -m model.weights info ARCH_OR_FILE [--json]
python -P -m model.weights convert SRC DST --to ours|official|huggingface|timm [--arch ARCH] [--network teacher]
python -P -m model.weights part CHECKPOINT FILE PART   one part of a checkpoint of ours as one file
python -P -m model.weights check FILE MODEL      whether FILE fits MODEL, the `model` section of a job as JSON
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from model import config
from model.architectures import ARCHITECTURES
from model.config import Backbone
from model.sealed import CheckpointError
from model.storage import StoreError
from model.weights import networks, start
from model.weights.convert import FORMS, Converted, convert, export
from model.weights.entries import WeightsError
from model.weights.sources import NETWORKS, open_source


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        code = int(COMMANDS[options.command](options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (WeightsError, CheckpointError, StoreError) as error:
        print(f"dinoctl: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dinoctl weights")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info")
    info.add_argument("what")
    info.add_argument("--json", action="store_true")
    converted = commands.add_parser("convert")
    converted.add_argument("source")
    converted.add_argument("target")
    converted.add_argument("--to", choices=list(FORMS), required=True)
    part = commands.add_parser("part")
    for word in ("source", "target", "part"):
        part.add_argument(word)
    check = commands.add_parser("check")
    check.add_argument("source")
    check.add_argument("model")
    for command in (info, converted):
        command.add_argument("--arch", choices=[name for name in ARCHITECTURES if name != "custom"])
        command.add_argument("--network", choices=NETWORKS, default="teacher")
    return parser.parse_args(arguments)


# --- info -------------------------------------------------------------------------------------------------------------


def info(options: argparse.Namespace) -> int:
    """Names, shapes and the number of parameters, of an architecture or of what lies somewhere."""
    told = _of_architecture(options.what) if options.what in ARCHITECTURES else _of_file(options)
    if options.json:
        print(json.dumps(told))
        return 0
    for tensor in told["tensors"]:
        shape = " x ".join(str(side) for side in tensor["shape"]) or "scalar"
        print(f"{tensor['name']:<44} {shape:<18} {tensor['dtype']}{'  (buffer)' if tensor['buffer'] else ''}")
    print(f"{told['what']}: {told['is']}; {len(told['tensors'])} tensors, {told['parameters']:,} parameters")
    if told["images"]:
        print(_images(told["images"]))
    for name in told["left"]:
        print(f"not looked at: {name}")
    return 0


def _of_architecture(arch: str) -> dict[str, Any]:
    if arch == "custom":
        raise WeightsError("custom is no architecture by itself; name a released one or a file")
    backbone = networks.named(arch)
    tensors = [(name, shape, "float32") for name, shape in networks.expected(backbone).items()]
    return _told(arch, "an architecture", backbone, tensors)


def _images(images: Mapping[str, Any]) -> str:
    numbers = (f"{name} [{', '.join(f'{value:g}' for value in images[name])}]" for name in ("mean", "std"))
    return f"images: {len(images['mean'])} channels of {images['bits']} bits, normalised by {', '.join(numbers)}"


def _of_file(options: argparse.Namespace) -> dict[str, Any]:
    source = open_source(options.what, _like(options), options.network)
    tensors = [(name, value.shape, str(value.dtype).removeprefix("torch.")) for name, value in source.own.items()]
    heads = sum(networks.is_head(name) for name, *_ in tensors)
    kind = f"{source.format}, {source.backbone.arch} {'with' if heads else 'without'} heads, under our names"
    images = msgspec.to_builtins(source.images) if source.images else None
    return _told(source.where, kind, source.backbone, tensors, source.left, images)


def _told(
    what: str,
    kind: str,
    backbone: Backbone,
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    left: Iterable[str] = (),
    images: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    buffers = {name for name, _ in networks.meta(backbone).named_buffers()}
    return {
        "what": what,
        "is": kind,
        "backbone": backbone.model_dump(),
        "images": images,
        "tensors": [{"name": n, "shape": list(s), "dtype": d, "buffer": n in buffers} for n, s, d in tensors],
        "parameters": sum(math.prod(shape) for name, shape, _ in tensors if name not in buffers),
        "left": list(left),
    }


# --- convert and check ------------------------------------------------------------------------------------------------


def converted(options: argparse.Namespace) -> int:
    source = open_source(options.source, _like(options), options.network)
    print(_text(convert(source, options.target, options.to)))
    return 0


def _like(options: argparse.Namespace) -> Backbone | None:
    return networks.named(options.arch) if options.arch else None


def _text(done: Converted) -> str:
    lines = [f"{done.target}: {done.tensors} tensors, {done.bytes:,} bytes"]
    lines += [f"dropped: {name}" for name in done.dropped]
    lines += [f"made: {name}" for name in done.made]
    lines += [f"note: {note}" for note in done.notes]
    return "\n".join(lines)


def part(options: argparse.Namespace) -> int:
    print(f"{options.target}: {export(options.source, options.target, options.part):,} bytes")
    return 0


def check(options: argparse.Namespace) -> int:
    """Silent if it fits."""
    start.open_fitting(options.source, config.read(config.Model, json.loads(options.model)))
    return 0


COMMANDS = {"info": info, "convert": converted, "part": part, "check": check}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
