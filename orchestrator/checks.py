"""What types cannot say of a job: references that can be met, layouts that fit, sizes, data that is there.

Every check takes the phases that are valid by themselves and gives every problem it finds; nothing here stops at the
first. Places are paths of the merged job; `orchestrator.layers.Source` turns them into where a value was written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any, cast

from model import contract, storage
from model.config import AnyPhase, Data, SslPhase, TextPhase
from orchestrator import (
    attempts,
    data_places,
    fp8_checks,
    handoff,
    image_checks,
    kubernetes_checks,
    layouts,
    slurm_checks,
)
from orchestrator.cluster import ClusterProfile
from orchestrator.draft import Draft
from orchestrator.handoff import SSL_KINDS, TAKES, HandoffError, Reference
from orchestrator.problems import Path, Problem, did_you_mean, listed, shown
from orchestrator.state import IllegalEvent
from orchestrator.store import LogError


def all_problems(draft: Draft, *, check_data: bool) -> list[Problem]:
    problems = [*references(draft), *layouts.all_problems(draft), *sizes(draft), *ranges(draft), *towers(draft)]
    problems += [*held_out(draft), *schedules(draft), *evaluated(draft), *image_checks.all_problems(draft)]
    problems += fp8_checks.all_problems(draft)
    problems += [*slurm_checks.all_problems(draft), *kubernetes_checks.all_problems(draft)]
    return [*problems, *data(draft), *captions(draft)] if check_data else problems


# --- references -------------------------------------------------------------------------------------------------------


def references(draft: Draft) -> Iterator[Problem]:
    """References that cannot be read or met, and cycles."""
    found: dict[str, dict[str, Reference]] = {}
    files: set[tuple[str, str]] = set()
    for phase, settings in draft.raw.items():
        found[phase] = {}
        for name in TAKES.get(str(settings.get("kind")), ()):
            text = settings.get(name)
            if isinstance(text, str) and handoff.is_file(name, text):
                files.add((phase, name))
                yield from _file(text, ("phases", phase, name))
            elif isinstance(text, str):
                try:
                    found[phase][name] = handoff.parse(text)
                except HandoffError:
                    yield Problem("not a reference to a checkpoint", ("phases", phase, name), found=shown(text),
                                  allowed=handoff.GRAMMAR)  # fmt: skip
        if "init" in found[phase] and ("weights" in found[phase] or (phase, "weights") in files):
            hint = "init goes on with the full training state; weights begins anew with the EMA teacher"
            yield Problem("init and weights exclude each other", ("phases", phase, "weights"), hint=hint)
    cycles = list(_cycles(found))
    in_cycle = {frozenset(pair) for cycle in cycles for pair in zip(cycle, [*cycle[1:], cycle[0]], strict=True)}
    for cycle in cycles:
        text, hint = " -> ".join([*cycle, cycle[0]]), "let each phase refer to phases above it"
        yield Problem("a cycle: each of these phases waits for another", ("phases", cycle[0]), found=text, hint=hint)
    for phase, named in found.items():
        for name, reference in named.items():
            if frozenset((phase, reference.phase)) not in in_cycle or reference.run is not None:
                yield from _reference(draft, phase, name, reference)


def _file(text: str, at: Path) -> Iterator[Problem]:
    """Weights that are not there. What is in them is looked at by `submit`, as that needs torch."""
    if not storage.is_uri(text) and not contract.data_folder(text).exists():
        yield Problem("no such file or folder of weights", at, found=shown(text),
                      allowed=f"{handoff.GRAMMAR}, or a path or URI of weights")  # fmt: skip


def _cycles(found: Mapping[str, Mapping[str, Reference]]) -> Iterator[list[str]]:
    """Each cycle of two or more phases once, beginning with the phase that stands first."""
    told: set[str] = set()
    for start in found:
        path, here, visited = [start], [_waits_for(found, start)], {start}
        while here and start not in told:
            following = next(here[-1], None)
            if following is None:
                path.pop()
                here.pop()
            elif following == start and len(path) > 1:
                yield list(path)
                told.update(path)
            elif following not in visited:
                visited.add(following)
                path.append(following)
                here.append(_waits_for(found, following))


def _waits_for(found: Mapping[str, Mapping[str, Reference]], phase: str) -> Iterator[str]:
    return iter([ref.phase for ref in found[phase].values() if ref.run is None and ref.phase in found])


def _reference(draft: Draft, phase: str, name: str, reference: Reference) -> Iterator[Problem]:
    at, text = ("phases", phase, name), str(reference)
    if reference.best is not None:
        yield Problem("choosing a checkpoint by a metric is not there yet", at, found=text, allowed=handoff.GRAMMAR)
    elif reference.run is not None and draft.runs is not None:
        yield from _of_another_run(reference, at, draft.runs)
    if reference.run is not None:
        return
    earlier = list(draft.names[: draft.names.index(phase)])
    if reference.phase not in draft.names:
        hint = did_you_mean(reference.phase, earlier) or "a phase of another run: RUN#<phase>@<step>"
        yield Problem("no such phase", at, found=text, allowed=listed(earlier) or "none: it is the first", hint=hint)
    elif reference.phase == phase:
        yield Problem("a phase cannot take its own checkpoint", at, found=text, allowed=listed(earlier) or "none")
    elif reference.phase not in earlier:
        yield Problem("refers to a later phase", at, found=text, allowed=listed(earlier) or "none: it is the first",
                      hint=f"move {reference.phase} above {phase}")  # fmt: skip
    else:
        yield from _meets(draft, name, at, reference)


def _of_another_run(reference: Reference, at: Path, runs: str) -> Iterator[Problem]:
    """What `submit` would say of it too."""
    beside = f"{runs.rstrip('/')}/this"
    try:
        attempts.find(reference, beside if storage.is_uri(beside) else os.path.abspath(beside))
    except (HandoffError, LogError, IllegalEvent, contract.ContractError, storage.StoreError) as error:
        yield Problem(str(error), at)


def _meets(draft: Draft, name: str, at: Path, reference: Reference) -> Iterator[Problem]:
    """Of a reference to an earlier phase: is it of the right kind, and is that step saved?"""
    kind = str(draft.raw.get(reference.phase, {}).get("kind"))
    if kind in TAKES and kind not in SSL_KINDS:
        allowed = listed([n for n, settings in draft.raw.items() if str(settings.get("kind")) in SSL_KINDS])
        yield Problem(f"{name} needs a self-supervised phase, and {reference.phase} is of kind {kind}", at,
                      found=str(reference), allowed=allowed)  # fmt: skip
    giver = draft.phases.get(reference.phase)
    if giver is None or reference.step is None:
        return
    every, spec = giver.checkpoints.every, {"phases": {reference.phase: giver.model_dump()}}
    if handoff.is_saved(spec, reference.phase, reference.step):
        return
    near = " or ".join(f"{reference.phase}@{s}" for s in handoff.nearest_saved(spec, reference.phase, reference.step))
    if reference.step > giver.steps:
        yield Problem(
            f"{reference.phase} ends at step {giver.steps}", at, found=str(reference), hint=f"nearest: {near}"
        )
    else:
        saved = "1 and more" if every == "auto" else f"multiples of {every}"
        yield Problem("no checkpoint is saved at that step", at, found=str(reference),
                      allowed=f"{saved} (checkpoints.every), and the last step {giver.steps}",
                      hint=f"nearest: {near}")  # fmt: skip


# --- sizes -------------------------------------------------------------------------------------------------


def sizes(draft: Draft) -> Iterator[Problem]:
    """Sides that are not whole patches."""
    if draft.model is None:
        return
    patch = draft.model.backbone.patch_size
    for at, side in _sides(draft):
        if side % patch:
            near = " or ".join(str(s) for s in (side // patch * patch, side // patch * patch + patch) if s)
            yield Problem("not whole patches", at, found=str(side), allowed=f"multiples of patch_size {patch}",
                          hint=f"nearest: {near}")  # fmt: skip


def _sides(draft: Draft) -> Iterator[tuple[Path, int]]:
    for name, phase in draft.phases.items():
        if isinstance(phase, SslPhase):
            for index, resolution in enumerate(phase.crops.resolutions):
                for side in ("global_size", "local_size", "gram_size"):
                    if (value := getattr(resolution, side)) is not None:
                        yield ("phases", name, "crops", "resolutions", index, side), value
        elif isinstance(phase, TextPhase):
            yield ("phases", name, "image_size"), phase.image_size
    if draft.evaluate is not None:
        yield ("evaluate", "image_size"), draft.evaluate.image_size


def ranges(draft: Draft) -> Iterator[Problem]:
    """Pairs that are the wrong way round, and losses that a group of one image cannot have."""
    for name, phase in draft.phases.items():
        if not isinstance(phase, SslPhase):
            continue
        crops, at = phase.crops, ("phases", name)
        pairs = {
            (*at, "crops", "global_scale"): crops.global_scale,
            (*at, "crops", "local_scale"): crops.local_scale,
            (*at, "crops", "aspect"): crops.aspect,
            (*at, "losses", "ibot", "mask_ratio"): phase.losses.ibot.mask_ratio,
        }
        for path, (low, high) in pairs.items():
            if low > high:
                yield Problem("the smaller one comes first", path, found=f"[{low}, {high}]", allowed=f"[{high}, {low}]")
        if draft.model and phase.losses.ibot.weight and not (draft.model.ibot_head and draft.model.backbone.mask_token):
            lacking = "ibot_head" if draft.model.ibot_head is None else "backbone.mask_token"
            yield Problem(f"the iBOT loss needs model.{lacking}", (*at, "losses", "ibot", "weight"),
                          found=str(phase.losses.ibot.weight), hint="or losses.ibot.weight: 0")  # fmt: skip
        if phase.losses.koleo.weight and phase.koleo_group < 2:
            yield Problem("KoLeo needs at least two images in a group", (*at, "optim", "group_size"),
                          found=str(phase.optim.group_size), hint="or losses.koleo.weight: 0")  # fmt: skip


BOUNDS: dict[Path, tuple[float, float, str]] = {
    ("optim", "lr"): (0.0, math.inf, "0 or more"),
    ("optim", "weight_decay"): (0.0, math.inf, "0 or more"),
    ("losses", "dino", "teacher_temp"): (math.ulp(0.0), math.inf, "greater than 0"),
    ("ema",): (0.0, 1.0, "between 0 and 1"),
}


def schedules(draft: Draft) -> Iterator[Problem]:
    """Values that would leave their bounds at some step."""
    for name, phase in draft.phases.items():
        for path, (low, high, allowed) in BOUNDS.items():
            schedule = reduce(lambda section, key: getattr(section, str(key), None), path, cast(Any, phase))
            for key in ("start", "peak", "end") if schedule else ():
                if (value := getattr(schedule, key)) is not None and not low <= value <= high:
                    yield Problem("not allowed here", ("phases", name, *path, key), found=str(value), allowed=allowed)


SMALLEST_VOCABULARY = 259
"""256 bytes and three marks (`model.data.text`)."""


def towers(draft: Draft) -> Iterator[Problem]:
    """Text towers that cannot be built: better said now than when the phases before have been trained."""
    for name, phase in draft.phases.items():
        if not isinstance(phase, TextPhase):
            continue
        at, tower = ("phases", name), phase.text
        if tower.dim % tower.heads:
            yield Problem("does not divide among the heads", (*at, "text", "dim"), found=str(tower.dim),
                          allowed=f"multiples of heads {tower.heads}")  # fmt: skip
        if tower.vocabulary < SMALLEST_VOCABULARY:
            yield Problem("too small a vocabulary", (*at, "text", "vocabulary"), found=str(tower.vocabulary),
                          allowed=f"{SMALLEST_VOCABULARY} or more: 256 bytes and three marks")  # fmt: skip
        if phase.embed_dim % 2:
            yield Problem("half of it is the CLS's, half the patches'", (*at, "embed_dim"), found=str(phase.embed_dim),
                          allowed="even numbers")  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------------------


def data(draft: Draft) -> Iterator[Problem]:
    """Folders that are not there or hold no image, where this machine can see them."""
    if draft.cluster is None or draft.cluster.launcher != "local":
        return
    sections: list[tuple[Path, Data]] = [(("phases", n, "data", *at), part) for n, p in draft.phases.items()
                                              for at, part in p.data.parts]  # fmt: skip
    if draft.evaluate is not None:
        sections.append((("evaluate", "data", "path"), draft.evaluate.data))
        yield from _index(draft.evaluate.data, ("evaluate", "data", "index"))
    for name, phase in draft.phases.items():
        yield from _index(phase.data, ("phases", name, "data", "index"))
    looked_at: dict[str, Problem | None] = {}
    for at, section in sections:
        if section.shown not in looked_at:
            looked_at[section.shown] = (
                data_places.shards(section.shards)
                if section.shards
                else data_places.folder(section.shown, section.suffixes)
            )
        if (problem := looked_at[section.shown]) is not None:
            yield Problem(problem.message, at, found=problem.found, allowed=problem.allowed, hint=problem.hint)


def _index(data: Data, at: Path) -> Iterator[Problem]:
    """An index that no attempt could write."""
    if data.index is None:
        return
    folder = contract.data_folder(data.index).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))  # `/` always is
    if not os.path.isdir(there):
        found = data.index if there == folder else f"{data.index}, in the file {there}"
        yield Problem("not a folder", at, found=found, allowed="a folder, which may be there or not",
                      hint="or null: the index is written into the run")  # fmt: skip


def captions(draft: Draft) -> Iterator[Problem]:
    """Text phases that may not be left out, on folders where there is nothing for them to learn."""
    hint = "write a .txt beside each image, its first line the caption, or {}.without_captions=skip"
    for name in uncaptioned(draft.phases, draft.cluster):
        phase = draft.phases[name]
        assert isinstance(phase, TextPhase)
        if phase.without_captions == "fail":
            yield Problem("no image of the folder has a caption", ("phases", name, "data", "path"),
                          found=phase.data.shown, hint=hint.format(f"phases.{name}"))  # fmt: skip
        elif all(isinstance(other, TextPhase) for other in draft.phases.values()):
            yield Problem("no image of the folder has a caption, and without this phase nothing is left",
                          ("phases", name, "data", "path"), found=phase.data.shown)  # fmt: skip


def uncaptioned(phases: Mapping[str, AnyPhase], cluster: ClusterProfile | None) -> list[str]:
    """The text phases whose folder, where this machine can see it, holds images and no caption."""
    if cluster is None or cluster.launcher != "local":
        return []
    text = {n: (p.data.shown, p.data.suffixes) for n, p in phases.items()
            if isinstance(p, TextPhase) and not p.data.shards and not storage.is_uri(p.data.shown)}  # fmt: skip
    without = {(path, ends) for path, ends in text.values()
               if data_places.has_image(folder := contract.data_folder(path), ends)
               and not any(map(data_places.has_caption, data_places.images(folder, ends)))}  # fmt: skip
    return [name for name, where in text.items() if where in without]


def evaluated(draft: Draft) -> Iterator[Problem]:
    """An evaluation of what no phase of this run trains, or on what cannot be split fairly."""
    kinds = [settings.get("kind") for settings in draft.raw.values()]
    if draft.evaluate is not None and kinds and all(kind == "text" for kind in kinds):
        yield Problem("the evaluation scores a vision backbone, and no phase of this run trains one", ("evaluate",),
                      allowed=f"beside a phase of kind {listed(SSL_KINDS)}", hint="evaluate: null")  # fmt: skip
    if draft.evaluate is not None and draft.evaluate.data.shards:
        yield Problem("an evaluation looks at a folder of images: near-duplicates are looked for there, and not in tar "
                      "shards", ("evaluate", "data", "path"), found=draft.evaluate.data.shown, allowed="a folder",
                      hint="evaluate.data.path=FOLDER, or evaluate: null")  # fmt: skip


HIDES = {"none": (), "test": ("test",), "validation": ("validation", "test")}
"""`data.hold_out` -> the splits that training does not see."""


def held_out(draft: Draft) -> Iterator[Problem]:
    """Phases that train on what the evaluation is about to hold against them."""
    if draft.evaluate is None:
        return
    split, scored = draft.evaluate.split, draft.evaluate.data
    for name, phase in draft.phases.items():
        for at, part in phase.data.parts:
            here, there = _real(part), _real(scored)
            if here == there and split not in HIDES[part.hold_out]:
                allowed = " or ".join(hold_out for hold_out, hidden in HIDES.items() if split in hidden)
                yield Problem(f"training would see the {split} split, which the evaluation scores on",
                              ("phases", name, "data", *at[:-1], "hold_out"), found=part.hold_out,
                              allowed=allowed)  # fmt: skip
            elif not (part.shards or scored.shards) and (_within(here, there) or _within(there, here)):
                yield Problem("one of the folders of training and evaluation lies in the other, and splits go by the "
                              "path in the folder: data.hold_out would hide other images than the evaluation scores on",
                              ("phases", name, "data", *at), found=f"{part.shown}, and evaluate.data.path "
                              f"{scored.shown}", hint="name the same folder in both")  # fmt: skip


def _real(data: Data) -> str:
    """Where the images lie, whichever of its names the path is."""
    if data.shards or storage.is_uri(data.shown):
        return data.shown.rstrip("/")
    return os.path.realpath(contract.data_folder(data.shown))


def _within(inner: str, outer: str) -> bool:
    return inner != outer and inner.startswith(outer.rstrip("/") + "/")
