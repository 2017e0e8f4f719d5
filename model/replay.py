"""`python -P -m model.replay FILE`: compute a recorded step again and compare, term by term.

Exit code 0 if every number is the recorded one within rounding, 1 if one is not, 2 if the file cannot be replayed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model import config, recording
from model.objectives.base import copy_strictly
from model.objectives.pure import Inputs, StepNetworks
from model.recording import RecordedStep
from model.sealed import CheckpointError
from model.storage import StoreError

SAME, DIFFERENT, WRONG_INPUT = 0, 1, 2

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative: what another machine, or another number of threads, may add up differently."""


@dataclass(frozen=True)
class Row:
    """One number of a step."""

    name: str
    recorded: float | None  # None: the file does not say
    replayed: float | None  # None: there is no such term

    def difference(self) -> float:
        """Relative to the larger of the two; 0 for two that are not finite in the same way."""
        if self.recorded is None or self.replayed is None:
            return math.inf
        if self.recorded == self.replayed or (math.isnan(self.recorded) and math.isnan(self.replayed)):
            return 0.0
        difference = abs(self.recorded - self.replayed) / max(abs(self.recorded), abs(self.replayed))
        return math.inf if math.isnan(difference) else difference


def replay(recorded: RecordedStep, device: str = "cpu", *, double: bool = False) -> dict[str, float]:
    """The numbers of the recorded step, computed again: `terms.<name>` and `gradient_norms.<network>`.

    `double`: in float64, to tell rounding from a fault; so is a file of float64 images. Raises RecordingError or
    ValueError if weights and networks do not fit, CheckpointError if the checkpoint that holds them is not there.
    """
    double = double or any(
        tensor is not None and tensor.dtype == torch.float64 for tensor in vars(recorded.inputs.batch).values()
    )
    networks = _networks(recorded)
    for module in networks.named().values():
        module.to(device, torch.float64 if double else None)
    inputs = _on(recorded.inputs, device, double=double)
    return recording.results(recorded.kind.step(networks, inputs))


def compare(recorded: Mapping[str, float], replayed: Mapping[str, float]) -> list[Row]:
    """Beside each other, in the order in which the step has them."""
    names = [*replayed, *(name for name in recorded if name not in replayed)]
    return [Row(name, recorded.get(name), replayed.get(name)) for name in names]


def _networks(recorded: RecordedStep) -> StepNetworks:
    header, weights = recorded.header, recording.weights_of(recorded)
    model = config.read(config.Model, header.model)
    networks = recorded.kind.create(model, header.added, recorded.inputs.scalars, weights)
    copy_strictly(recording.network_tensors(networks), weights, "the recorded step")
    return networks


def _on(inputs: Inputs[Any, Any, Any], device: str, *, double: bool) -> Inputs[Any, Any, Any]:
    batch, scalars = inputs.batch.to(device), inputs.scalars
    if double:
        batch = replace(batch, **{name: _double(tensor) for name, tensor in vars(batch).items()})
        scalars = replace(scalars, compute="fp32")
    draws = tuple(
        replace(micro, **{view: drawn.to(torch.device(device)) for view, drawn in vars(micro).items() if drawn})
        for micro in inputs.draws
    )
    return replace(inputs, batch=batch, draws=draws, scalars=scalars)


def _double(tensor: Tensor | None) -> Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        recorded = recording.read(options.file)
        replayed = replay(recorded, options.device, double=options.double)
    except (ValueError, CheckpointError, StoreError) as error:  # RecordingError and pydantic's errors are ValueErrors
        said = error.strerror if isinstance(error, StoreError) else error
        print(f"dinoctl: {options.file} cannot be replayed: {said}", file=sys.stderr)
        return WRONG_INPUT
    tolerance = options.tolerance or TOLERANCES[recorded.inputs.scalars.compute]
    rows = compare(recorded.results, replayed)
    print(_about(recorded))
    print(_table(rows, tolerance))
    different = [row.name for row in rows if row.difference() > tolerance]
    if different:
        print(f"{len(different)} of {len(rows)} differ by more than {tolerance:g}: {', '.join(different)}")
        return DIFFERENT
    print(f"all {len(rows)} are equal within {tolerance:g}")
    return SAME


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -P -m model.replay", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a recorded step: a path or a URI")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--tolerance", type=float, metavar="X", help="relative; 1e-4, or 2e-2 for bf16 products")
    parser.add_argument("--double", action="store_true", help="compute in float64, to tell rounding from a fault")
    return parser


def _about(recorded: RecordedStep) -> str:
    header, batch, scalars = recorded.header, recorded.inputs.batch, recorded.inputs.scalars
    by = header.made_by
    lines = [
        f"{by.get('phase', 'somebody')} step {by.get('step', '?')}, rank {by.get('rank', 0)} of {by.get('world', 1)}, "
        f"attempt {by.get('attempt', '?')} of {by.get('run', 'another writer')}",
        f"{len(batch.positions)} of {scalars.images} images in {len(recorded.inputs.draws)} micro-batches, "
        f"products in {scalars.compute}",
    ]
    if header.weights is not None and not recorded.weights:
        behind = by["step"] - 1 - header.weights.step if "step" in by else 0
        late = f"; {behind} updates lie between, so the numbers will differ" if behind else ""
        lines.append(f"weights of {header.weights}{late}")
    return "\n".join(lines)


def _table(rows: Sequence[Row], tolerance: float) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'recorded':>16}  {'replayed':>16}  {'difference':>10}"]
    for row in rows:
        mark = "" if row.difference() <= tolerance else "  differs"
        said, now = _number(row.recorded), _number(row.replayed)
        lines.append(f"{row.name:{width}}  {said:>16}  {now:>16}  {row.difference():>10.2g}{mark}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.10g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
