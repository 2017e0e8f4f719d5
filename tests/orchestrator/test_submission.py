"""What a submit makes of a run that is there: the same spec, a changed one, an older dinoctl's; amendments, forks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model import storage
from model.contract import CheckpointRef, manifest_file
from orchestrator import control, dry_run, spec as specs, store
from orchestrator.amend import digest
from orchestrator.cluster import read_cluster
from orchestrator.control import ControlError, SpecChangedError
from orchestrator.handoff import HandoffError
from tests.orchestrator.pretend import Bench, job_spec, request


def test_the_same_spec_attaches(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    assert bench.submit().what == "attached"
    assert len(store.read(bench.dir())) == 3


def test_a_changed_spec_is_refused_with_its_differences(bench: Bench) -> None:
    bench.submit()
    spec = job_spec()
    spec["phases"]["gram"]["steps"] = 8
    spec["tracking"]["enabled"] = True
    with pytest.raises(SpecChangedError) as caught:
        bench.submit(spec)
    assert "phases.gram.steps: 4 -> 8" in str(caught.value)
    assert "tracking.enabled: False -> True" in str(caught.value)
    assert "--amend" in str(caught.value)
    assert len(store.read(bench.dir())) == 1


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (("phases", "pretrain", "health", "stall_seconds"), True),
        (("phases", "pretrain", "resources", "processes_per_node"), True),
        (("phases", "pretrain", "checkpoints", "every"), True),
        (("phases", "pretrain", "data", "workers"), True),
        (("phases", "pretrain", "data", "max_skip_rate"), True),
        (("phases", "pretrain", "data", "path"), False),
        (("phases", "pretrain", "optim", "lr"), False),
        (("phases", "pretrain", "steps"), False),
        (("phases", "gram", "optim", "lr"), True),
        (("phases", "gram", "steps"), True),
        (("evaluate", "split"), True),
        (("tracking", "enabled"), True),
        (("cluster",), True),
        (("seed",), False),
        (("model", "backbone", "dim"), False),
    ],
)
def test_an_amendment_takes_up_what_is_operational_or_has_not_begun(
    bench: Bench, path: tuple[str, ...], allowed: bool
) -> None:
    bench.submit()
    bench.tick()
    spec = job_spec()
    section = spec
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = 3
    if not allowed:
        with pytest.raises(SpecChangedError, match=r"fixed once their phase has begun"):
            bench.submit(spec, amending=True)
        return
    submitted = bench.submit(spec, amending=True)
    assert submitted.what == "amended"
    assert [change.path for change in submitted.changes] == [path]
    assert submitted.state.spec == spec


def test_a_changed_cluster_profile_is_a_change_too(bench: Bench) -> None:
    bench.submit()
    with pytest.raises(SpecChangedError, match=r"cluster.sustained_tflops: \(not there\) -> 3"):
        control.submit(bench.dir(), request(sustained_tflops=3), by="test")


# --- a spec that another dinoctl recorded -----------------------------------------------------------------------------


def today(*overrides: str) -> control.Request:
    """A real job, as `dinoctl submit` hands it over."""
    job = specs.read_job(str(Path(__file__).with_name("valid.yaml")), overrides, check_data=False)
    profile = read_cluster(job.cluster).model_dump(mode="json")
    return control.Request("demo", specs.resolved(job), profile, specs.reread)


def submit_as_then(bench: Bench, then: Callable[[dict[str, Any], dict[str, Any]], None]) -> control.Request:
    """Submit today's job with spec and profile as `then` makes them; returns what was recorded."""
    request = copy.deepcopy(today())
    then(request.spec, request.cluster)
    control.submit(bench.dir(), request, by="test")
    return request


def before_some_fields(spec: dict[str, Any], cluster: dict[str, Any]) -> None:
    """As a dinoctl wrote it in whose schema these were not yet."""
    for phase in spec["phases"].values():
        del phase["optim"]["accumulate"]
        phase.pop("debug", None)
    for resolution in spec["phases"]["pretrain"]["crops"]["resolutions"]:
        del resolution["gram_size"]
    del cluster["sustained_tflops"]


def test_defaults_that_came_since_are_no_change(bench: Bench) -> None:
    submit_as_then(bench, before_some_fields)
    assert control.submit(bench.dir(), today(), by="test").what == "attached"
    assert "differs" not in dry_run.show(bench.dir(), today(), fork=None)
    with pytest.raises(SpecChangedError) as caught:
        control.submit(bench.dir(), today("optim.accumulate=2", "seed=9"), by="test")
    changed = {change.path[-1]: (change.before, change.after) for change in caught.value.changes}
    assert changed == {"accumulate": (1, 2), "seed": (3, 9)}


def test_a_job_is_the_same_from_every_folder(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    control.submit(bench.dir(), today("data.path=../../images"), by="test")
    monkeypatch.chdir(tmp_path / "a")
    assert control.submit(bench.dir(), today("data.path=../images"), by="test").what == "attached"
    assert control.submit(bench.dir(), today(f"data.path={tmp_path}/images"), by="test").what == "attached"


def test_dots_that_an_older_dinoctl_recorded_are_no_change(bench: Bench, tmp_path: Path) -> None:
    def dotted(spec: dict[str, Any], cluster: dict[str, Any]) -> None:
        for section in (*spec["phases"].values(), spec["evaluate"]):
            section["data"]["path"] = f"{tmp_path}/a/../images"

    recorded = submit_as_then(bench, dotted)
    wanted = today(f"data.path={tmp_path}/images", "phases.gram.checkpoints.every=2")
    state = control.submit(bench.dir(), wanted, by="test", amending=True).state
    assert state.spec["phases"]["gram"]["checkpoints"]["every"] == 2
    assert state.spec["phases"]["pretrain"] == recorded.spec["phases"]["pretrain"]


def test_an_amendment_brings_no_default_that_the_runs_code_may_not_know(bench: Bench) -> None:
    recorded = submit_as_then(bench, before_some_fields)
    wanted = today("phases.gram.checkpoints.every=2", "tracking.experiment=other")
    state = control.submit(bench.dir(), wanted, by="test", amending=True).state
    expected = copy.deepcopy(recorded.spec)
    expected["phases"]["gram"]["checkpoints"]["every"] = 2
    expected["tracking"]["experiment"] = "other"
    assert state.spec == expected
    assert state.spec_digest == digest(state.spec)
    assert state.cluster == recorded.cluster
    assert control.submit(bench.dir(), wanted, by="test").what == "attached"


def test_a_fork_of_an_older_run_has_the_same_networks(bench: Bench) -> None:
    def then(spec: dict[str, Any], cluster: dict[str, Any]) -> None:
        del spec["model"]["backbone"]["rope_per_block"]

    submit_as_then(bench, then)
    bench.tick()
    bench.launcher.job.train(4)
    request = replace(today(), run="new")
    assert control.submit(bench.dir("new"), request, by="test", fork="demo#pretrain@4").what == "created"


def test_a_spec_with_what_is_no_longer_known_is_told_plainly(bench: Bench) -> None:
    def then(spec: dict[str, Any], cluster: dict[str, Any]) -> None:
        spec["phases"]["gram"]["optim"]["mood"] = "good"
        spec["model"]["backbone"]["ffn"] = "moe"
        cluster["colour"] = "red"

    submit_as_then(bench, then)
    for ask in (lambda: control.submit(bench.dir(), today(), by="test"),
                lambda: dry_run.show(bench.dir(), today(), fork=None)):  # fmt: skip
        with pytest.raises(ControlError) as caught:
            ask()
        said = str(caught.value)
        assert "phases.gram.optim.mood: unknown key" in said
        assert "model.backbone.ffn: not allowed here, found 'moe'" in said
        assert "cluster.colour: unknown key" in said
        assert "`dinoctl resume demo` goes on with it as it is" in said
    assert control.resume(bench.dir(), by="test").status == "running"


# --- amendments and forks ---------------------------------------------------------------------------------------------


def test_an_amendment_cannot_name_a_checkpoint_that_was_not_kept(bench: Bench) -> None:
    bench.submit()
    bench.drive(until="gram")
    spec = job_spec()
    spec["phases"]["text"]["vision_tower"] = "pretrain@1"
    with pytest.raises(HandoffError, match="sealed steps: 2, 4"):
        bench.submit(spec, amending=True)


def test_a_fork_takes_over_what_came_before_and_pins_it(bench: Bench) -> None:
    bench.submit()
    bench.drive(until="text")
    spec = job_spec()
    spec["phases"]["gram"]["optim"]["lr"] = 0.01
    assert bench.submit(spec, run="new", fork="demo#gram@2").what == "created"
    assert bench.submit(spec, run="new", fork="demo#gram@2").what == "attached"
    with pytest.raises(ControlError, match="was not forked from"):
        bench.submit(spec, run="new", fork="demo#gram@4")
    assert bench.drive("new").status == "done"
    old, new = bench.dir(), bench.dir("new")
    gram, text, evaluation = [job.attempt for job in bench.launcher.jobs if job.attempt.run == "new"]
    assert gram.resume == [CheckpointRef(run=old, phase="gram", attempt=2, step=2)]
    assert gram.inputs["init"] == CheckpointRef(run=old, phase="pretrain", attempt=1, step=4)
    assert text.inputs["vision_tower"] == CheckpointRef(run=new, phase="gram", attempt=1, step=4)
    assert evaluation.inputs["backbone"].run == new
    pins = {name.rsplit("-", 2)[0] + name[-10:] for name in storage.names(f"{old}/pins")}
    assert len(storage.names(f"{old}/pins")) == 3, pins
    pin = json.loads(storage.read(f"{old}/pins/pretrain-1-2-{gram.run_id}-gram_teacher.json"))
    assert pin == {"run": new, "run_id": gram.run_id, "parts": ["teacher_backbone"]}


def test_a_fork_of_a_fork_finds_the_first_run(bench: Bench) -> None:
    bench.submit()
    bench.drive()
    bench.submit(run="second", fork="demo#gram@4")
    bench.drive("second")
    bench.submit(run="third", fork="second#gram@4")
    assert bench.drive("third").status == "done"
    text = next(job.attempt for job in bench.launcher.jobs if job.attempt.run == "third")
    assert text.inputs["vision_tower"] == CheckpointRef(run=bench.dir(), phase="gram", attempt=2, step=4)


@pytest.mark.parametrize(
    ("fork", "error", "why"),
    [
        ("gram@2", HandoffError, "name the run too"),
        ("nobody#gram@2", HandoffError, "there is no run at"),
        ("demo#what@2", HandoffError, "has the phases"),
        ("demo#pretrain@3", HandoffError, "no such checkpoint"),
        ("demo#pretrain@best(loss)", HandoffError, "by a metric"),
        ("demo@2", HandoffError, "name the run too"),
    ],
)
def test_a_fork_from_nowhere_is_refused(bench: Bench, fork: str, error: type[Exception], why: str) -> None:
    bench.submit()
    bench.drive(until="text")
    with pytest.raises(error, match=why):
        bench.submit(run="new", fork=fork)
    assert store.read(bench.dir("new")) == []


def test_a_fork_needs_the_same_networks(bench: Bench) -> None:
    bench.submit()
    bench.drive(until="text")
    spec = job_spec()
    spec["model"]["backbone"]["dim"] = 128
    with pytest.raises(ControlError, match=r"model.backbone.dim: 64 -> 128"):
        bench.submit(spec, run="new", fork="demo#gram@2")


def test_a_live_runs_sealed_checkpoint_can_be_taken(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.job.train(2)
    spec = job_spec()
    spec["phases"]["pretrain"]["weights"] = "demo#pretrain@2"
    bench.submit(spec, run="new")
    bench.tick(bench.controller("new"))
    assert bench.launcher.job.attempt.inputs["weights"].step == 2
    storage.remove(f"{bench.dir()}/{manifest_file('pretrain', 1, 2)}")
    with pytest.raises(HandoffError, match="no such checkpoint"):
        bench.submit(spec, run="newer")
