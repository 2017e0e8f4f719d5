"""References to checkpoints, what each kind of phase takes, and which checkpoint a reference means.

Works on the resolved spec as a plain mapping, without pydantic, since every tick of the controller comes this way.
Grammar of a reference: `<phase>@<step>`, `<phase>@final` or `<phase>@best(<metric>)`, of this run or, with
`RUN_OR_URI#` before it, of another; or `PATH_OR_URI/checkpoints/<phase>/<attempt>/<step>`, the folder of a checkpoint
or of a copy of one. `@N` is the state after N updates of that phase.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.contract import EVALUATE, PARTS, CheckpointRef, kept
from model.storage import is_uri

SSL_KINDS = ("pretrain", "gram", "highres")

TAKES: dict[str, tuple[str, ...]] = {
    "pretrain": ("init", "weights"),
    "gram": ("init", "weights", "gram_teacher"),
    "highres": ("init", "weights", "gram_teacher"),
    "text": ("vision_tower",),
}
"""What a phase of each kind may take. `init` and `weights` exclude each other."""

PARTS_TAKEN: dict[str, tuple[str, ...]] = {
    "init": tuple(part for part in PARTS if part != "gram_teacher"),  # which a Gram phase always names by itself
    "weights": ("teacher_backbone", "teacher_heads"),
    "gram_teacher": ("teacher_backbone",),
    "vision_tower": ("teacher_backbone",),
}
"""The parts of a checkpoint that each input reads; a pin has to keep no others."""

GRAMMAR = "<phase>@<step>, <phase>@final, RUN#<phase>@<step> or the folder of a checkpoint"

FILE_INPUTS = ("weights",)
"""Inputs that may also name a file, a folder or a URI of weights that no run of dinoctl made."""

FILE_SUFFIXES = (".pth", ".pt", ".safetensors")

_REFERENCE = re.compile(
    r"(?:(?P<run>[^#]+)#)?(?P<phase>[A-Za-z0-9_.-]+)@(?:(?P<step>[0-9]{1,15})|(?P<final>final)|best\((?P<best>[^()]+)\))"
)

_FOLDER = re.compile(
    r"(?P<run>.+)/checkpoints/(?P<phase>[A-Za-z0-9_.-]+)/(?P<attempt>[0-9]{1,9})/(?P<step>[0-9]{1,15})/?"
)

Spec = Mapping[str, Any]
Accepted = Mapping[str, Sequence[tuple[int, int]]]
"""Phase -> (attempt, step) of each sealed checkpoint that counts."""


class HandoffError(ValueError):
    """A reference that cannot be read or met; the message says which one and what to do."""


class BadCheckpointError(HandoffError):
    """The checkpoints that could be meant were found to be damaged, and are marked so."""


def repair(run: str) -> str:
    """What to do about damaged checkpoints, as the end of a sentence."""
    return (
        f"restore the file from a copy and run `dinoctl ckpt verify {run} --mark`, which lifts the mark of what is "
        f"whole again, or name another checkpoint (`dinoctl ckpt ls {run}`)"
    )


@dataclass(frozen=True)
class Reference:
    """`step` is None for `final` and for `best`; `best` names a metric; `run` is None for this run.

    attempt: of a checkpoint that is named by its folder, as a copy is, which has no log to look it up in.
    """

    phase: str
    step: int | None = None
    best: str | None = None
    run: str | None = None
    attempt: int | None = None

    def __str__(self) -> str:
        if self.attempt is not None:
            return f"{self.run}/checkpoints/{self.phase}/{self.attempt}/{self.step}"
        at = f"best({self.best})" if self.best else "final" if self.step is None else str(self.step)
        return f"{self.run + '#' if self.run else ''}{self.phase}@{at}"


def parse(text: str) -> Reference:
    """The reference that `text` writes. Raises HandoffError with the grammar."""
    match = _REFERENCE.fullmatch(text.strip())
    if match is None and (folder := _FOLDER.fullmatch(text.strip())):
        return Reference(folder["phase"], int(folder["step"]), run=folder["run"], attempt=int(folder["attempt"]))
    if match is None:
        raise HandoffError(f"not a reference to a checkpoint: {text!r}; write {GRAMMAR}")
    step = match["step"]
    return Reference(match["phase"], int(step) if step else None, match["best"], match["run"])


def is_folder(text: str) -> bool:
    """Whether `text` is the path or URI of a checkpoint's folder."""
    return _FOLDER.fullmatch(text.strip()) is not None


def is_file(name: str, text: str) -> bool:
    """Whether the input `name` says where weights lie (a path or a URI) and refers to no checkpoint of a run."""
    if name not in FILE_INPUTS or _REFERENCE.fullmatch(text.strip()) or "#" in text:
        return False
    if is_uri(text) and is_folder(text):
        return False
    return "/" in text or text.endswith(FILE_SUFFIXES)


def files(spec: Spec, phase: str) -> dict[str, str]:
    """The inputs of `phase` that are files, by input: path or URI."""
    return {name: text for name, text in _written(spec, phase).items() if is_file(name, text)}


def references(spec: Spec, phase: str) -> dict[str, Reference]:
    """What `phase` takes of phases. The evaluation takes the last SSL phase's backbone and the last text phase."""
    if phase == EVALUATE:
        return _evaluated(spec)
    return {name: parse(text) for name, text in _written(spec, phase).items() if not is_file(name, text)}


def _written(spec: Spec, phase: str) -> dict[str, str]:
    if phase == EVALUATE:
        return {}
    settings = spec["phases"][phase]
    return {name: settings[name] for name in TAKES[settings["kind"]] if settings.get(name) is not None}


def _evaluated(spec: Spec) -> dict[str, Reference]:
    kinds = {name: settings["kind"] for name, settings in spec["phases"].items()}
    ssl = [name for name, kind in kinds.items() if kind in SSL_KINDS]
    text = [name for name, kind in kinds.items() if kind == "text"]
    found = {"backbone": ssl[-1:], "text": text[-1:]}
    return {name: Reference(phases[0]) for name, phases in found.items() if phases}


def step_of(spec: Spec, reference: Reference) -> int:
    """The step that a reference to a phase of this run means."""
    if reference.best is not None:
        raise HandoffError(f"{reference}: choosing a checkpoint by a metric is not there yet; name a step or `final`")
    return int(spec["phases"][reference.phase]["steps"]) if reference.step is None else reference.step


def is_saved(spec: Spec, phase: str, step: int) -> bool:
    """Whether `phase` seals a checkpoint at `step`: at each multiple of checkpoints.every and at its end. With `auto`
    it does wherever a phase refers to a step."""
    settings = spec["phases"][phase]
    every = settings["checkpoints"]["every"]
    return bool(0 < step <= settings["steps"]) and (every == "auto" or step == settings["steps"] or step % every == 0)


def nearest_saved(spec: Spec, phase: str, step: int) -> list[int]:
    """The saved steps on both sides of one that is not."""
    settings = spec["phases"][phase]
    every, last = settings["checkpoints"]["every"], settings["steps"]
    if every == "auto":
        return [last]
    below = min(step, last) // every * every
    return [near for near in sorted({below, min(below + every, last)}) if is_saved(spec, phase, near)]


def keep_steps(spec: Spec, phase: str) -> list[int]:
    """The steps of `phase` that are never pruned, ascending: its last, and those that another phase refers to."""
    return sorted(keep_parts(spec, phase))


def keep_parts(spec: Spec, phase: str) -> dict[int, kept.Parts]:
    """What stays of them once they are no longer among the newest: all of the last, and the parts that are taken of
    the others."""
    last = int(spec["phases"][phase]["steps"])
    found: dict[int, kept.Parts] = {last: None}
    for other in spec["phases"]:
        for name, reference in references(spec, other).items():
            if reference.run is None and reference.phase == phase:
                step = step_of(spec, reference)
                found[step] = kept.together([found.get(step, frozenset()), frozenset(PARTS_TAKEN[name])])
    return found


def inputs(
    spec: Spec,
    phase: str,
    accepted: Accepted,
    *,
    run: str,
    other: Callable[[Reference], CheckpointRef] | None = None,
    refer: Callable[[Reference], Reference] = lambda reference: reference,
    is_bad: Callable[[CheckpointRef], bool] = lambda ref: False,
) -> dict[str, CheckpointRef]:
    """The checkpoint behind each input of `phase`.

    accepted: the checkpoints of this run that count; of several attempts that sealed a step, the newest's is taken.
    run: path or URI of this run's directory. other: finds the checkpoint of a reference to another run.
    refer: what a reference means in a fork, where earlier checkpoints are those of the run that it was forked from.
    is_bad: whether a checkpoint of this run was marked as damaged.
    Raises HandoffError for a reference that cannot be met: a phase never begins without what it names.
    """
    found = {}
    for name, reference in ((name, refer(written)) for name, written in references(spec, phase).items()):
        if reference.run is None:
            found[name] = own(spec, reference, accepted, run, is_bad)
        elif other is None:
            raise HandoffError(f"{phase}.{name}: {reference} is of another run, which cannot be read here")
        else:
            found[name] = other(reference)
    return found


def own(
    spec: Spec,
    reference: Reference,
    accepted: Accepted,
    run: str,
    is_bad: Callable[[CheckpointRef], bool] = lambda ref: False,
) -> CheckpointRef:
    """The checkpoint of this run that a reference means. Raises HandoffError if it is not among the accepted ones,
    BadCheckpointError if every attempt's is marked as damaged."""
    step = step_of(spec, reference)
    sealed = accepted.get(reference.phase, ())
    if step not in {at for _, at in sealed}:
        steps = ", ".join(str(at) for at in sorted({at for _, at in sealed})) or "none"
        raise HandoffError(f"{reference}: no such checkpoint; phase {reference.phase} has sealed steps: {steps}")
    return newest_whole(reference, run, [attempt for attempt, at in sealed if at == step], step, is_bad)


def newest_whole(
    reference: Reference, run: str, attempts: Sequence[int], step: int, is_bad: Callable[[CheckpointRef], bool]
) -> CheckpointRef:
    """Of the attempts that sealed a step, the newest's that is not marked. Raises BadCheckpointError."""
    sealed = [CheckpointRef(run, reference.phase, attempt, step) for attempt in sorted(attempts, reverse=True)]
    whole = next((ref for ref in sealed if not is_bad(ref)), None)
    if whole is None:
        raise BadCheckpointError(
            f"{reference}: that checkpoint is damaged, and marked so: {sealed[0].path}; {repair(run)}"
        )
    return whole
