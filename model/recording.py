"""Recorded steps: all that one rank's part of one step depends on and came to, in one safetensors file.

    record(job, batch, moment)      the training loop writes one
    read(path)                      `model.replay` reads it, whoever wrote it

docs/replay.md describes the file for other writers. No pickle: tensors, and one JSON text in the file's header.
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from model import config, contract, cut, parallel, sealed, storage
from model.contract import CheckpointRef
from model.data.batch import Batch
from model.job import Job
from model.networks.perturb import Perturbation
from model.networks.rope import RopeDraws
from model.objectives import kinds
from model.objectives.base import Moment, State, network_state
from model.objectives.kinds import Kind
from model.objectives.pure import Inputs, Outputs, StepNetworks

FORMAT = 1
HEADER = "dinoctl-step"
"""The key of the JSON text in the header of the file."""

MOST_WEIGHTS = 2_000_000_000
"""Bytes of all networks together past which a file names a checkpoint instead of holding them."""


class RecordingError(ValueError):
    """A file is no recorded step, or not a whole one; the message names the file and what is wrong."""


class Header(contract.Record, frozen=True):
    """All of a recorded step that is no tensor. Numbers that are not finite, which JSON has not, are spelt in strings:
    "inf", "-inf", "nan"."""

    format: int
    model: dict[str, Any]  # model.config.Model: how the networks are built
    scalars: dict[str, Any]  # the kind's
    draws: list[dict[str, dict[str, Any]]]  # a micro-batch: numbers of the perturbation by view: `global`, `local`, ...
    added: dict[str, Any] = msgspec.field(default_factory=dict)  # how a text phase's own networks are built
    answers: int | None = None  # how many `answers.<i>` there are; absent: this rank was alone
    weights: CheckpointRef | None = None  # of these networks, where the file does not hold them itself
    made_by: dict[str, Any] = msgspec.field(default_factory=dict)  # for a person: run, phase, step, rank, versions


@dataclass(frozen=True)
class RecordedStep:
    header: Header
    kind: Kind
    weights: State  # `student.*`, `teacher.*`, `gram_teacher.*`; empty where the header names a checkpoint
    inputs: Inputs[Any, Any, Any]  # of the kind's types
    results: dict[str, float]  # `terms.<name>` and `gradient_norms.<network>`


# --- writing ----------------------------------------------------------------------------------------------------------


def due(settings: config.AnyPhase, moment: Moment) -> bool:
    """Whether `debug.record_step` asks for the step that begins now."""
    return settings.debug.record_step == moment.step + 1


def record(job: Job, batch: Batch, moment: Moment) -> None:
    """Compute the step once more, on every rank, and write it down; each rank its file. Changes nothing of training.

    To be called before the update, or where there is none. Of networks that are cut over the processes the terms alone
    are computed: their gradients are summed over the ranks as they arise. A file that cannot be written is told of and
    stops nothing.
    """
    added = kinds.added(job.settings)
    networks = job.objective.step_networks()
    inputs = job.objective.step_inputs(batch, moment, job.settings.optim.micro_batches(parallel.world()))
    sharded = any(cut.is_cut(weight) for network in networks.named().values() for weight in network.parameters())
    with parallel.recorded() as answers, torch.set_grad_enabled(not sharded):
        outputs = kinds.of(added).step(networks, inputs)
    inputs = replace(inputs, answers=tuple(answers) if parallel.world() > 1 else None)
    made_by = _provenance(job, moment)
    state = network_state(networks.named())
    too_large = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > MOST_WEIGHTS
    held, named = ({}, job.last_sealed) if too_large else (network_tensors(networks), None)
    data = pack(job.attempt.model, held, inputs, results(outputs), made_by, named, added)
    name = contract.recorded_file(job.attempt.attempt, moment.step + 1, parallel.rank())
    try:
        storage.publish(f"{job.attempt.run_dir}/{name}", data)
    except storage.StoreError as error:
        job.progress.note(f"step {moment.step + 1} could not be recorded: {error}")
    else:
        job.progress.note(f"recorded step {moment.step + 1}: dinoctl replay {job.attempt.run_dir}/{name}")


def network_tensors(networks: StepNetworks) -> State:
    """All weights under the names of the file, from all processes (a collective)."""
    return {name: cut.whole(tensor) for name, tensor in network_state(networks.named()).items()}


def results(outputs: Outputs) -> dict[str, float]:
    """`terms.<name>`, and `gradient_norms.<network>`: the L2 norm of the gradients of each network."""
    values = {f"terms.{name}": float(term) for name, term in outputs.terms.items()}
    squares: dict[str, float] = {}
    for name, gradient in outputs.gradients.items():
        network = name.split(".")[0]
        squares[network] = squares.get(network, 0.0) + float(gradient.double().square().sum())
    return values | {f"gradient_norms.{network}": total**0.5 for network, total in squares.items()}


def pack(
    model: Mapping[str, Any],
    weights: State,
    inputs: Inputs[Any, Any, Any],
    said: Mapping[str, float],
    made_by: Mapping[str, Any],
    checkpoint_of: CheckpointRef | None = None,
    added: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes of a file."""
    tensors = dict(weights)
    for name, tensor in vars(inputs.batch).items():
        if tensor is not None:
            tensors[f"batch.{name}"] = tensor
    draws = []
    for number, micro in enumerate(inputs.draws):
        views = {name.removeprefix("of_"): drawn for name, drawn in vars(micro).items() if drawn is not None}
        draws.append({view: _unpack(tensors, f"draws.{number}.{view}", drawn) for view, drawn in views.items()})
    tensors |= {f"answers.{number}": answer for number, answer in enumerate(inputs.answers or ())}
    tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in said.items()}
    header = Header(
        format=FORMAT,
        model=dict(model),
        scalars=msgspec.to_builtins(inputs.scalars),
        draws=draws,
        added=dict(added or {}),
        answers=None if inputs.answers is None else len(inputs.answers),
        weights=checkpoint_of,
        made_by=dict(made_by),
    )
    text = msgspec.json.encode(_spelt(msgspec.to_builtins(header))).decode()
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {HEADER: text}
    )


def _spelt(value: Any) -> Any:
    """With every number that is not finite as a string; msgspec would write null for it."""
    if isinstance(value, dict):
        return {name: _spelt(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(held) for held in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _unpack(tensors: State, prefix: str, drawn: Perturbation) -> dict[str, Any]:
    """Add the tensors of a perturbation to `tensors`; returns its numbers."""
    if drawn.rope is not None:
        tensors[f"{prefix}.rope_shift"] = drawn.rope.shift
        tensors[f"{prefix}.rope_scale"] = drawn.rope.scale
    if drawn.indices is not None:
        tensors[f"{prefix}.indices"] = drawn.indices
    return {field.name: getattr(drawn, field.name) for field in fields(drawn) if field.name not in ("rope", "indices")}


def _provenance(job: Job, moment: Moment) -> dict[str, Any]:
    attempt = job.attempt
    return {
        "run": attempt.run_dir,
        "run_id": attempt.run_id,
        "phase": attempt.phase,
        "attempt": attempt.attempt,
        "step": moment.step + 1,
        "rank": parallel.rank(),
        "world": parallel.world(),
        "code_digest": attempt.code_digest,
        "device": str(job.device),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: str) -> RecordedStep:
    """A recorded step in a file or at a URI, on the CPU. Raises RecordingError if it is none or lacks something,
    StoreError for a URI that cannot be read."""
    header, tensors = _read(path)
    kind = kinds.of(header.added)
    try:
        scalars: Any = msgspec.convert(header.scalars, kind.scalars, strict=False)  # else strings are no numbers
        draws = tuple(_draws(kind, tensors, number, views) for number, views in enumerate(header.draws))
        answers = None if header.answers is None else tuple(tensors[f"answers.{i}"] for i in range(header.answers))
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise RecordingError(
            f"{path}: not a whole recorded step: {error}; docs/replay.md says what it holds"
        ) from error
    held: dict[str, Any] = {field.name: tensors.get(f"batch.{field.name}") for field in fields(kind.batch)}
    if missing := [name for name, tensor in held.items() if tensor is None and name != "gram_crops"]:
        raise RecordingError(f"{path}: it holds no batch.{', no batch.'.join(missing)}")
    batch = kind.batch(**held)
    if not draws or len(batch.positions) % len(draws):
        raise RecordingError(f"{path}: {len(batch.positions)} images are not {len(draws)} equal micro-batches")
    return RecordedStep(
        header=header,
        kind=kind,
        weights=_under(tensors, "student", "teacher", "gram_teacher"),
        inputs=Inputs(batch, draws, scalars, answers),
        results={name: float(value) for name, value in _under(tensors, "terms", "gradient_norms").items()},
    )


def weights_of(recorded: RecordedStep) -> State:
    """The weights under the names of the file, from it or from the checkpoint that it names.

    Raises CheckpointError if that is not there any more, RecordingError if the file names none.
    """
    if recorded.weights:
        return recorded.weights
    ref = recorded.header.weights
    if ref is None:
        raise RecordingError("the file holds no weights and names no checkpoint: nothing had been sealed yet")
    manifest = sealed.read_manifest(ref)
    prefixes = {
        "student": "student.",
        "teacher_backbone": "teacher.backbone.",
        "teacher_heads": "teacher.",
        "gram_teacher": "gram_teacher.backbone.",
    }
    if gone := sealed.dropped(ref) & prefixes.keys():
        raise sealed.CheckpointError(f"{ref} has no {', '.join(sorted(gone))} any more: removed, as nothing kept it")
    return {
        prefix + name: tensor
        for part, prefix in prefixes.items()
        if part in manifest.parts
        for name, tensor in sealed.load_files(ref, manifest, part).items()
    }


@contextmanager
def _here(path: str) -> Iterator[Path]:
    """The file, or for as long as it is needed a copy of what lies at a URI."""
    if not storage.is_uri(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="dinoctl-") as folder:
        copy = Path(folder, "recorded.safetensors")
        storage.fetch(path, copy)
        yield copy


def _read(path: str) -> tuple[Header, State]:
    try:
        with _here(path) as there, safe_open(there, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            if text is None:
                raise RecordingError(f"{path}: its header has no {HEADER!r}: this is no recorded step")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        header = msgspec.json.decode(text, type=Header)
    except storage.StoreError:
        raise
    except (OSError, SafetensorError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RecordingError(f"{path}: not a recorded step that this version reads: {error}") from error
    if header.format != FORMAT:
        raise RecordingError(f"{path}: of format {header.format}, and this dinoctl reads {FORMAT}")
    return header, tensors


def _draws(kind: Kind, tensors: State, number: int, views: Mapping[str, Mapping[str, Any]]) -> Any:
    """Of micro-batch `number`. Raises TypeError for views that the kind has not, or lacks."""
    drawn: dict[str, Any] = {
        f"of_{view}": _perturbation(tensors, f"draws.{number}.{view}", numbers) for view, numbers in views.items()
    }
    return kind.draws(**drawn)


def _perturbation(tensors: State, prefix: str, numbers: Mapping[str, Any]) -> Perturbation:
    shift = tensors.get(f"{prefix}.rope_shift")
    rope = None if shift is None else RopeDraws(shift, tensors[f"{prefix}.rope_scale"])
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in numbers.items()
    }
    return Perturbation(rope=rope, indices=tensors.get(f"{prefix}.indices"), **values)


def _under(tensors: State, *prefixes: str) -> State:
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in prefixes}
