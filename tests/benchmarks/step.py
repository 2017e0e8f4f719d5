"""How fast a training step is, beside what the machine's matrix products can do: `python -P -m tests.benchmarks.step`.

The step is the trainer's own, on random images: targets, losses, backward, clipping, update, moving average. Each round
times one, then a product of two 4096 x 4096 matrices in the same dtype on the same threads, then the products of
another step where they stand, then each of them alone; what is printed are medians of the rounds (of the large product
the best: it is the peak).

- FLOPs are those of the recipe (`model.accounting`): nothing for what is computed twice or padded; drop path is 0.
- `fraction_of_shape_ceiling`: how much of the step's time its products alone would take. Their shapes allow no more.
- `ceiling_fraction_of_products`: how much of the time of the products where they stand (on data that other operations
  have just written, with what is added to them) they take alone. A step whose other parts took no time would reach it.
- `data` is what one loader thread takes to make a batch of decoded images. It is made beside the step, and not part of
  it; `images_per_s_with_data` is for cores that do both.
- Memory is the process's peak after the first steps, interpreter and libraries included; on a GPU what torch allocated.
- It starts itself anew with what an agent sets for the memory of its ranks (`model.processes.MEMORY`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model import accounting, config, optim, parallel, sharding
from model.data.augment import Recipe, ssl_views
from model.data.batch import SslBatch
from model.data.masks import group_masks
from model.data.views import SslViews
from model.draws import generator
from model.networks.init import create
from model.objectives.base import Moment
from model.objectives.build import build
from model.objectives.ssl import SslObjective
from model.processes import MEMORY
from tests.benchmarks import options as ask
from tests.benchmarks.products import Recorder, Timer, cube_flops_per_second

HEAD = {"hidden": 2048, "bottleneck": 256}
STEPS = 10_000
WARM_UP = 3
PARTS = ("data", "teacher", "student", "heads", "losses", "backward", "clip", "optimizer", "ema")
SIDE = 256  # of an image


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A phase on one process, always on the same batch."""

    model: config.Model
    settings: config.SslPhase
    device: torch.device
    objective: SslObjective
    optimizer: optim.Optimizer
    maker: Maker
    batch: SslBatch
    step: int = 0


def prepare(options: argparse.Namespace) -> Training:
    model, settings = _sections(options)
    device = torch.device(options.device)
    prepare_network = sharding.Prepare(settings.parallel, settings.precision, device)
    make = partial(create, prepare=prepare_network, device=device)
    objective = build(settings, model, 0, "pretrain", make)
    assert isinstance(objective, SslObjective)
    optimizer = optim.build(objective.networks().trained, settings.optim)
    maker = Maker(settings, objective.views(0))
    return Training(model, settings, device, objective, optimizer, maker, maker.batch(0).to(device))


def _sections(options: argparse.Namespace) -> tuple[config.Model, config.SslPhase]:
    (globals_, global_size), (locals_, local_size) = options.global_crops, options.local_crops
    if globals_ != accounting.GLOBAL_CROPS:
        raise SystemExit(f"--global {globals_}x{global_size}: a step has {accounting.GLOBAL_CROPS} global crops")
    head = {"prototypes": options.prototypes, **HEAD}
    backbone = {"arch": options.arch, "drop_path": 0.0}
    resolution = {"global_size": global_size, "local_size": local_size}
    phase = {
        "kind": "gram" if options.gram else "pretrain",
        "steps": STEPS,
        "data": {"path": "none"},
        "optim": {"batch_size": options.batch, "group_size": options.batch, "lr": 1e-4},
        "checkpoints": {"every": STEPS},
        "precision": {"compute": options.dtype},
        "parallel": {"compile": options.compile},
    }
    if options.gram:
        phase["gram_teacher"] = "pretrain@final"
        resolution["gram_size"] = round(options.gram * global_size)
    phase["crops"] = {"resolutions": [resolution], "local_count": locals_}
    settings = config.read_phase(phase)
    assert isinstance(settings, config.SslPhase)
    return config.read(config.Model, {"backbone": backbone, "dino_head": head, "ibot_head": head}), settings


class Maker:
    """Makes batches as the loader does, of decoded images of noise."""

    def __init__(self, settings: config.SslPhase, views: SslViews) -> None:
        rng = np.random.default_rng(0)
        self.settings, self.views, self.size = settings, views, settings.optim.batch_size
        self.images = list(rng.integers(0, 256, (self.size, SIDE, SIDE, 3), np.uint8))

    def batch(self, step: int) -> SslBatch:
        size, ibot, grid = (
            self.size,
            self.settings.losses.ibot,
            self.views.resolution.global_size // self.views.patch_size,
        )
        recipe = Recipe(self.settings.data, self.settings.augment, self.settings.crops, 0, "pretrain")
        made = ssl_views(recipe, self.images, range(step * size, (step + 1) * size), self.views)
        masks = group_masks(generator(0, "masks", step), 2 * size, grid, ibot.mask_probability, ibot.mask_ratio)
        return SslBatch(
            positions=torch.arange(size),
            groups=torch.arange(1),
            global_crops=torch.from_numpy(made.global_crops),
            local_crops=torch.from_numpy(made.local_crops),
            gram_crops=None if made.gram_crops is None else torch.from_numpy(made.gram_crops),
            masks=torch.from_numpy(masks.reshape(2, size, -1)),
        )


# --- the clock --------------------------------------------------------------------------------------------------------


class Stopwatch:
    """What the parts of a step take: the time up to a mark, from the one before, is the named part's."""

    def __init__(self, timer: Timer) -> None:
        self.timer, self.cuda = timer, timer.device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, self.timer.now()))

    def milliseconds(self) -> dict[str, float]:
        """By part, and begin anew."""
        if self.cuda:
            torch.cuda.synchronize()
        taken = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, now) in itertools.pairwise(self.marks):
            taken[part] += before.elapsed_time(now) if self.cuda else 1e3 * (now - before)
        self.marks.clear()
        return taken

    def watch(self, part: str, module: nn.Module) -> None:
        """Let the module's forward passes be this part's, and what comes before them the losses'."""
        module.register_forward_pre_hook(lambda *_: self.mark("losses"))
        module.register_forward_hook(lambda *_: self.mark(part))


def step(training: Training, watch: Stopwatch) -> None:
    """One of the trainer's (`model.train.train`), on one process, with nothing to record."""
    settings, objective = training.settings, training.objective
    moment = Moment(step=training.step, steps=STEPS, clock=training.step)
    trained = objective.networks().trained
    watch.mark("data")
    targets = objective.targets(training.batch, moment)
    terms = objective.loss(training.batch, targets, moment)
    watch.mark("losses")
    terms["total"].backward()
    watch.mark("backward")
    parallel.reduce_gradients(p for network in trained.values() for p in network.parameters() if p.requires_grad)
    norms = optim.clip(trained, settings.optim.clip, settings.optim.clip_each)
    finite = torch.stack([*terms.values(), *norms.values()]).isfinite().all()
    watch.mark("clip")
    optim.set_step(training.optimizer, settings.optim, moment.step, moment.steps)
    optim.update(training.optimizer, finite)
    watch.mark("optimizer")
    objective.after_step(moment, finite)
    watch.mark("ema")
    training.optimizer.zero_grad()
    training.step += 1


# --- the report -------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    training = prepare(options)
    watch = Stopwatch(Timer(training.device, options.cpu_time))
    for part, module in _parts(training.objective):
        watch.watch(part, module)
    for _ in range(WARM_UP):
        step(training, watch)
    watch.marks.clear()
    memory = peak_memory_mib(training.device)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    rounds = [_round(training, watch, dtype) for _ in range(options.rounds)]
    return {**_report(training, rounds), "peak_memory_mib": memory, **_machine(options, training.device)}


@dataclass(frozen=True)
class Round:
    parts: dict[str, float]  # milliseconds
    peak: float  # FLOP/s
    in_place: float  # seconds of all products of a step, where they stand
    alone: float  # seconds of all of them, each alone


def _round(training: Training, watch: Stopwatch, dtype: torch.dtype) -> Round:
    timer, began = watch.timer, watch.timer.now()
    training.maker.batch(training.step)
    data = 1e3 * (timer.now() - began)
    step(training, watch)
    parts = {**watch.milliseconds(), "data": data}
    peak = cube_flops_per_second(dtype, timer)
    with Recorder(timer) as recorder:
        step(training, watch)
    watch.marks.clear()
    alone = sum(count * product.seconds(timer) for product, count in recorder.products.items())
    return Round(parts, peak, recorder.seconds, alone)


def _report(training: Training, rounds: list[Round]) -> dict[str, Any]:
    batch = training.settings.optim.batch_size
    parts = {part: statistics.median(one.parts[part] for one in rounds) for part in PARTS}
    taken = statistics.median(sum(one.parts.values()) - one.parts["data"] for one in rounds) / 1e3
    flops = accounting.step_flops(training.model, training.settings) * batch
    peak = max(one.peak for one in rounds)
    alone, in_place = (statistics.median(getattr(one, name) for one in rounds) for name in ("alone", "in_place"))
    return {
        "images_per_s": batch / taken,
        "images_per_s_with_data": batch / (taken + parts["data"] / 1e3),
        "flops_per_step": flops,
        "flops_per_s": flops / taken,
        "matmul_peak_flops_per_s": peak,
        "fraction_of_matmul_peak": flops / taken / peak,
        "shape_ceiling_fraction_of_peak": flops / alone / peak,
        "fraction_of_shape_ceiling": alone / taken,
        "ceiling_fraction_of_products": alone / in_place,
        "step_ms": 1e3 * taken,
        "products_ms": 1e3 * in_place,
        "breakdown_ms": parts,
    }


def peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _parts(objective: SslObjective) -> Iterator[tuple[str, nn.Module]]:
    student, teacher = objective.student, objective.teacher
    yield "student", student.backbone
    yield "teacher", teacher.backbone
    if objective.gram_teacher is not None:
        yield "teacher", objective.gram_teacher
    for trio in (student, teacher):
        for head in (trio.dino_head, trio.ibot_head):
            assert head is not None
            yield "heads", head


def _machine(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    told = {key: value for key, value in vars(options).items() if key != "json"}
    return {"machine": name, "torch": torch.__version__, "options": told}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _crops(text: str) -> tuple[int, int]:
    count, _, size = text.partition("x")
    if not count.isdecimal() or not size.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not COUNTxSIZE, such as 4x48")
    return int(count), int(size)


def _device(text: str) -> str:
    kind, _, number = text.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or text.endswith(":"):
        raise argparse.ArgumentTypeError(f"{text} is none of cpu, cuda, cuda:0, cuda:1 ...")
    if kind == "cuda" and int(number or 0) >= (there := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{text}: torch sees {there} GPUs here; cpu always goes")
    return text


def _mistake(options: argparse.Namespace) -> str | None:
    """What is wrong with options that are well by themselves."""
    patch = ask.patch_size(options.arch)
    (_, global_size), (_, local_size) = options.global_crops, options.local_crops
    sides = {"--global": global_size, "--local": local_size}
    if options.gram:
        sides[f"--gram {options.gram:g}"] = round(options.gram * global_size)
    for option, side in sides.items():
        if side < patch or side % patch:
            return f"{option}: crops of {side} pixels are not whole patches; sizes are multiples of {patch}"
    return "--batch 1: KoLeo needs 2 images or more" if options.batch < 2 else None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ask.parser(__doc__)
    parser.add_argument("--arch", default="vits16", choices=ask.RELEASED, metavar="ARCH", help="a released one")
    parser.add_argument("--global", dest="global_crops", type=_crops, default="2x96", metavar="2xSIZE")
    parser.add_argument("--local", dest="local_crops", type=_crops, default="4x48", metavar="COUNTxSIZE")
    parser.add_argument("--batch", type=ask.positive, default=16, help="images a step")
    parser.add_argument("--prototypes", type=ask.positive, default=4096, help="of each head")
    parser.add_argument("--threads", type=ask.positive, default=2)
    parser.add_argument("--gram", type=ask.times, metavar="TIMES", help="with a Gram teacher, on crops so much larger")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the products")
    parser.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=ask.positive, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: CPU seconds, with --threads 1")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if wrong := _mistake(options):
        parser.error(wrong)
    return options


def main() -> None:
    options = parse()
    if options.cpu_time and (options.threads > 1 or options.device != "cpu"):
        raise SystemExit("--cpu-time: threads that wait for each other take CPU time too; go with --threads 1 on a CPU")
    if not MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**MEMORY, **os.environ})
    told = measure(options)
    if options.json:
        print(json.dumps(told))
        return
    for name, value in told.items():
        print(f"{name:<32} {value:,.3f}" if isinstance(value, float) else f"{name:<32} {value}")


if __name__ == "__main__":
    main()
