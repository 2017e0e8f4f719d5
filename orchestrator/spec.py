"""The job spec: one YAML that names data, networks and the phases in order. Read whole, or refused with every mistake.

The file is a mapping of the fields of `Job` plus, at the top, any section that phases have (`optim`, `data` ...) as the
default of all of them (`orchestrator.layers`). What is left after merging is validated (`Job`, `model.config`), then
checked across sections (`orchestrator.checks`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field, PositiveInt

from model import contract, storage
from model.config import (
    DATASET,
    PHASES,
    AnyPhase,
    Count,
    Evaluate,
    Model,
    Phase,
    PhaseBase,
    Section,
    TextPhase,
    read,
)
from orchestrator import checks, handoff, layers, normalisation
from orchestrator.cluster import ClusterProfile, read_cluster
from orchestrator.draft import Draft
from orchestrator.layers import SHARED
from orchestrator.problems import Path, Problem, SpecError, did_you_mean, dotted, listed, shown
from orchestrator.validation import validate
from orchestrator.yaml_reader import read_yaml

NAME_RULE = "at most 30 of a-z, 0-9 and -, beginning with a letter, not ending with -"
PHASE_RULE = "at most 16 of a-z, 0-9 and -, beginning with a letter, not ending with -"
PHASE_PATTERN = r"[a-z]([a-z0-9-]{0,14}[a-z0-9])?"
NAME_PATTERN = r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$", description=NAME_RULE)]
PhaseName = Annotated[str, Field(pattern=f"^{PHASE_PATTERN}$", description=PHASE_RULE)]
"""Both are part of a launch name, `<run>-<8 hex>-<phase>-<attempt>`, which has 63 characters at most."""


S = TypeVar("S", bound=Section)

DEFAULT_RUNS = "runs"


class Tracking(Section):
    """Where the run shows in MLflow."""

    enabled: bool = True
    uri: str | None = Field(None, description="an MLflow tracking URI; null: sqlite, mlflow.db in the folder of runs")
    experiment: str = "dinoctl"


class Control(Section):
    """Who keeps the run going when the process that submitted it is gone."""

    on: Literal["here", "cluster"] = Field(
        "here", description="cluster: a one-core job there that renews itself; here: the process that submits"
    )
    time_limit_minutes: PositiveInt | None = Field(
        None, description="of that job; the next one takes over then; null: the partition's"
    )


class Job(Section):
    """A job, resolved: every phase says all that it needs."""

    name: Name = Field(description=NAME_RULE)
    seed: Count = 0
    cluster: str = Field("local", description="a profile in clusters/, or a file")
    runs: str = Field(DEFAULT_RUNS, description="folder that holds the runs")
    model: Model
    phases: dict[PhaseName, Phase] = Field(description="in the order in which they run")
    evaluate: Evaluate | None = None
    tracking: Tracking = Tracking()
    controller: Control = Control()


def read_job(
    file: str, overrides: Iterable[str] = (), *, check_data: bool = True, check_runs: bool = False, runs: str = ""
) -> Job:
    """The job in `file` with `a.b.c=value` laid over it.

    check_data: look whether the data folders are there. check_runs: look whether checkpoints of other runs are, in the
    folder `runs` or else in the job's own. Raises SpecError with every problem at once.
    """
    values, source, problems = layers.override(read_yaml(file), file, overrides)
    problems += _unknown_keys(values)
    merged, unused = layers.merge({k: v for k, v in values.items() if k in TOP_KEYS}, source)
    merged, unread = normalisation.resolve(merged)
    mistakes: list[Problem] = []
    cluster = _cluster(merged.get("cluster", "local"), mistakes)
    _take_from_profile(merged, cluster)
    draft, more = _draft(merged, cluster)
    mistakes = [*more, *mistakes]
    if check_runs:
        draft = replace(draft, runs=runs or str(merged.get("runs", DEFAULT_RUNS)))
    problems += [*unused, *unread, *mistakes, *checks.all_problems(draft, check_data=check_data)]
    if problems:
        raise SpecError(source.place_all(problems))
    _make_absolute(merged)
    job, mistakes = validate(Job, merged, ())
    if job is None or mistakes:
        raise SpecError(source.place_all(mistakes))
    return job


def leave_out_uncaptioned(job: Job, cluster: ClusterProfile) -> tuple[Job, list[str]]:
    """The job without the text phases that have no caption to learn from, and a line for each of them."""
    gone = checks.uncaptioned(job.phases, cluster)
    lines = [
        f"phase {n} is left out: no image in {job.phases[n].data.path} has a caption (a .txt beside it)" for n in gone
    ]
    return job.model_copy(update={"phases": {n: p for n, p in job.phases.items() if n not in gone}}), lines


def resolved(job: Job) -> dict[str, Any]:
    """The job as a plain mapping with every default filled in: what a run's first event holds."""
    return job.model_dump(mode="json")


def reread(spec: Mapping[str, Any], cluster: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A resolved spec and cluster profile that some dinoctl recorded, as this one resolves them: with the defaults that
    have come since, and paths as it writes them. Raises SpecError with all that it does not know or does not allow."""
    _, problems = _sections(dict(spec))
    profile, more = validate(ClusterProfile, cluster, ("cluster",))
    if problems or more or profile is None:
        raise SpecError([*problems, *more])
    known = copy.deepcopy(dict(spec))
    _make_absolute(known)
    return resolved(read(Job, known)), profile.model_dump(mode="json")


def name_problems(run: str) -> list[Problem]:
    """What is wrong with a name for a run that was given apart from the file (`submit --run`)."""
    if re.fullmatch(NAME_PATTERN, run):
        return []
    return [Problem("not a name for a run", file="option --run", found=shown(run), allowed=NAME_RULE)]


TOP_KEYS = (*Job.model_fields, *SHARED)


def not_there_yet(job: Job, cluster: ClusterProfile) -> list[Problem]:
    """What the trainer cannot do yet, one problem a feature: `validate` and `plan` remark on it, `submit` refuses."""
    asked: dict[str, list[Path]] = {}
    for name, phase in job.phases.items():
        for feature, path in _features(phase, cluster):
            asked.setdefault(feature, []).append(("phases", name, *path))
    if job.controller.on == "cluster" and cluster.launcher == "local":
        asked.setdefault(
            f"a controller on {cluster.name}, whose launcher is {cluster.launcher} and not slurm", []
        ).append(("controller", "on"))
    if job.evaluate is not None and storage.is_uri(job.evaluate.data.shown):
        asked.setdefault(_ON_A_BUCKET, []).append(("evaluate", "data", "path"))
    return [
        Problem(f"not there yet: {feature}", paths[0], found=listed([dotted(path) for path in paths]),
                hint=" ".join(f"{dotted(path)}=[]" for path in paths) if feature == _MORE_CAPTIONS else "")
        for feature, paths in asked.items()
    ]  # fmt: skip


_MORE_CAPTIONS = "captions from more than one folder"
_ON_A_BUCKET = "a folder of images on a bucket (tar shards on one are: `dinoctl data pack` makes some)"


def _features(phase: PhaseBase, cluster: ClusterProfile) -> Iterator[tuple[str, Path]]:
    for path, part in phase.data.parts:
        if storage.is_uri(part.shown) and not part.shards:
            yield _ON_A_BUCKET, ("data", *path)
    if phase.data.also and isinstance(phase, TextPhase):
        yield _MORE_CAPTIONS, ("data", "also")
    if cluster.launcher == "local" and phase.resources.nodes > 1:
        yield "more than one node with the local launcher", ("resources", "nodes")


# --- reading as much as can be read -----------------------------------------------------------------------------------


def _unknown_keys(values: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for key in values:
        if key not in TOP_KEYS:
            fields = {name for kind in PHASES.values() for name in kind.model_fields}
            hint = did_you_mean(key, TOP_KEYS) or (f"did you mean phases.<phase>.{key}?" if key in fields else "")
            problems.append(Problem("unknown key", (key,), found=key, allowed=listed(TOP_KEYS), hint=hint))
    return problems


def _take_from_profile(merged: Mapping[str, Any], cluster: ClusterProfile | None) -> None:
    """How often nodes fail, for phases that need to know and do not say."""
    phases = merged.get("phases")
    for phase in phases.values() if isinstance(phases, dict) else ():
        saves = phase.get("checkpoints") if isinstance(phase, dict) else None
        if not (cluster and isinstance(saves, dict) and saves.get("every") == "auto"):
            continue
        if saves.get("node_mtbf_hours") is None:
            phase["checkpoints"] = {**saves, "node_mtbf_hours": cluster.node_mtbf_hours}


def _draft(merged: dict[str, Any], cluster: ClusterProfile | None) -> tuple[Draft, list[Problem]]:
    """The job with its cluster, as far as both could be read, and the problems of the rest."""
    draft, problems = _sections(merged)
    problems += runs_problems(merged.get("runs"), merged.get("tracking") or {})
    return replace(draft, cluster=cluster), problems


def _sections(merged: Mapping[str, Any]) -> tuple[Draft, list[Problem]]:
    """The sections of the job that are valid by themselves, and the problems of the others."""
    problems = _head(merged)
    model = _section(Model, merged, "model", problems)
    evaluate = _section(Evaluate, merged, "evaluate", problems) if merged.get("evaluate") is not None else None
    raw = _raw_phases(merged, problems)
    phases = {name: phase for name, values in raw.items() if (phase := _phase(name, values, problems)) is not None}
    return Draft(raw, list(merged["phases"]) if raw else [], phases, model, evaluate, None), problems


def _head(merged: Mapping[str, Any]) -> list[Problem]:
    """The problems of the plain fields at the top; the sections under them are looked at one by one."""
    apart = ("model", "phases", "evaluate")
    _, problems = validate(Job, {key: value for key, value in merged.items() if key not in apart}, ())
    return [problem for problem in problems if problem.at[0] not in apart]


def runs_problems(runs: Any, tracking: Any) -> list[Problem]:
    """What is wrong with a URI of runs. SQLite cannot lie in a bucket, so runs there need a server, or no tracking."""
    if not (isinstance(runs, str) and storage.is_uri(runs) and isinstance(tracking, dict)):
        return []
    if not re.match("s3a?://[^/]+", runs):
        return [Problem("no place for runs", ("runs",), found=runs, allowed="a folder, or s3://BUCKET/PREFIX")]
    if tracking.get("uri") is not None or tracking.get("enabled") is False:
        return []
    return [Problem("missing", ("tracking", "uri"), allowed="the URI of an MLflow server, as runs are on a bucket",
                    hint="or tracking.enabled: false")]  # fmt: skip


def _section(kind: type[S], merged: Mapping[str, Any], key: str, problems: list[Problem]) -> S | None:
    if merged.get(key) is None:
        problems.append(Problem("missing", (key,), allowed=f"a section with {listed(list(kind.model_fields))}"))
        return None
    section, mistakes = validate(kind, merged[key], (key,))
    problems += mistakes
    return section


def _raw_phases(merged: Mapping[str, Any], problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """The phases that are mappings, by name."""
    phases = merged.get("phases")
    kinds = listed(list(PHASES))
    if not isinstance(phases, dict) or not phases:
        found = shown(phases) if "phases" in merged else ""
        allowed = f"at least one phase by its name, each with a kind: {kinds}"
        problems.append(Problem("no phases", ("phases",), found=found, allowed=allowed))
        return {}
    for name, values in phases.items():
        at = ("phases", name)
        if name == contract.EVALUATE:
            problems.append(Problem("the name is taken by the stage after the last phase", at, hint="rename the phase"))
        elif not re.fullmatch(PHASE_PATTERN, name):
            problems.append(Problem("not a name for a phase", at, found=shown(name), allowed=PHASE_RULE))
        if not isinstance(values, dict):
            problems.append(Problem("not a phase", at, found=shown(values), allowed=f"a section with a kind: {kinds}"))
    return {name: values for name, values in phases.items() if isinstance(values, dict)}


def _phase(name: str, values: dict[str, Any], problems: list[Problem]) -> AnyPhase | None:
    kind, at = values.get("kind"), ("phases", name)
    if not isinstance(kind, str) or kind not in PHASES:
        found, message = ("", "missing") if kind is None else (shown(kind), "no such kind of phase")
        hint = did_you_mean(kind, PHASES)
        problems.append(Problem(message, (*at, "kind"), found=found, allowed=listed(list(PHASES)), hint=hint))
        return None
    phase, mistakes = validate(PHASES[kind], values, at)
    problems += [_for_all_phases(problem) for problem in mistakes]
    return cast(AnyPhase | None, phase)


def _for_all_phases(problem: Problem) -> Problem:
    """A phase that lacks a whole section probably means that the job does."""
    if problem.message == "missing" and len(problem.at) == 3 and problem.at[2] in SHARED:
        return replace(problem, at=problem.at[2:], hint="write it once at the top, or in each phase that has it")
    return problem


def _cluster(name: Any, problems: list[Problem]) -> ClusterProfile | None:
    if not isinstance(name, str):
        return None  # `_head` has told it
    try:
        return read_cluster(name)
    except SpecError as error:
        problems += error.problems
        return None


def _make_absolute(merged: dict[str, Any]) -> None:
    """A path is relative to where dinoctl was called; attempts may start elsewhere, and `resume` too."""
    for phase in merged["phases"].values():
        for name in handoff.PARTS_TAKEN:
            text = phase.get(name)
            if not isinstance(text, str) or storage.is_uri(text):
                continue
            if handoff.is_file(name, text) or handoff.is_folder(text):
                phase[name] = _from_the_root(text)
    for section in (*merged["phases"].values(), merged.get("evaluate") or {}):
        if data := section.get("data"):
            section["data"] = {**_pinned(data), "also": [_pinned(part) for part in data.get("also", [])]}


def _pinned(data: Mapping[str, Any]) -> dict[str, Any]:
    """A `data` section, or a part of one, with absolute paths."""
    pinned = dict(data)
    for name in ("path", "index"):
        if value := data.get(name):
            pinned[name] = _absolute(value) if isinstance(value, str) else [_absolute(one) for one in value]
    return pinned


def _absolute(path: str) -> str:
    pinned = storage.is_uri(path) or path.startswith("cache:") or DATASET.match(path)
    return path if pinned else _from_the_root(path)


def _from_the_root(path: str) -> str:
    """Without `..`, so that it is the same wherever the job is submitted from."""
    written = str(contract.data_folder(path).absolute())
    normal = os.path.normpath(written)
    # Past a link to a folder, `..` leads elsewhere than the names say.
    return normal if os.path.realpath(normal) == os.path.realpath(written) else written
