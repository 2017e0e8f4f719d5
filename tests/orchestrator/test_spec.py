"""The job spec: how defaults, phases and overrides come together, the job files that ship, schema and digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.amend import digest
from orchestrator.cluster import profiles, read_cluster
from orchestrator.launchers import launcher_for
from orchestrator.problems import SpecError
from orchestrator.schema import job_schema
from orchestrator.spec import Job, not_there_yet, read_job, resolved
from orchestrator.yaml_reader import dump, read_yaml

ROOT = Path(__file__).parents[2]
JOBS = [*sorted((ROOT / "jobs").glob("*.yaml")), ROOT / "tests/jobs/tiny.yaml"]
SHARDS = 'data.path=["x-{0..1}.tar", "s3://b/y.tar"]'
TINY = str(ROOT / "tests/orchestrator/valid.yaml")
V3_7B = str(ROOT / "jobs/v3_7b.yaml")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def job(file: str = TINY, *overrides: str) -> Job:
    return read_job(file, overrides, check_data=False)


def phase(name: str, *overrides: str) -> dict[str, Any]:
    settings: dict[str, Any] = resolved(job(TINY, *overrides))["phases"][name]
    return settings


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_every_job_file_is_right(file: Path) -> None:
    assert job(str(file)).phases


@pytest.mark.parametrize("name", profiles())
def test_every_cluster_profile_is_right_and_has_a_launcher(name: str) -> None:
    profile = read_cluster(name)
    assert profile.name == name
    assert launcher_for(profile.model_dump(mode="json"))


# --- merging ----------------------------------------------------------------------------------------------------------


def test_a_phase_overrides_a_section_at_the_top_field_by_field() -> None:
    optim = phase("gram", "phases.gram.optim.beta2=0.9")["optim"]
    assert (optim["beta2"], optim["batch_size"], optim["group_size"]) == (0.9, 16, 4)
    assert phase("pretrain", "phases.gram.optim.beta2=0.9")["optim"]["beta2"] == 0.999


def test_a_schedule_is_merged_field_by_field_and_a_number_replaces_it_whole() -> None:
    assert phase("gram", "phases.gram.optim.lr.peak=0.5")["optim"]["lr"]["start"] == 0.0
    lr = phase("gram", "phases.gram.optim.lr=0.5")["optim"]["lr"]
    assert (lr["start"], lr["peak"], lr["warmup_steps"]) == (None, 0.5, 0)


def test_a_list_replaces_a_list_and_null_is_a_value() -> None:
    assert phase("gram")["crops"]["resolutions"] == [
        {"global_size": 32, "local_size": 16, "gram_size": 64, "ratio": 1.0}
    ]
    assert phase("gram", "phases.gram.optim.clip=null")["optim"]["clip"] is None


def test_a_phase_gets_only_the_sections_that_its_kind_has() -> None:
    assert "crops" not in phase("text")
    assert phase("text")["checkpoints"] == phase("pretrain")["checkpoints"]


def test_the_evaluation_takes_the_data_but_its_own_resources() -> None:
    spec = resolved(job())
    assert spec["evaluate"]["data"] == spec["phases"]["text"]["data"]
    assert spec["evaluate"]["resources"]["processes_per_node"] == 1


def test_phases_stay_in_the_order_of_the_file() -> None:
    assert list(resolved(job())["phases"]) == ["pretrain", "gram", "highres", "text"]


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    assert phase("gram", "phases.gram.steps=20", "phases.gram.steps=30")["steps"] == 30
    assert phase("gram", "optim.lr={peak: 5e-5}")["optim"]["lr"]["peak"] == 5e-5
    assert phase("gram", "phases.gram.crops.resolutions[0].gram_size=48")["crops"]["resolutions"][0]["gram_size"] == 48


def test_an_override_may_make_a_section_or_a_phase_anew() -> None:
    assert phase("pretrain", "augment.hue=0.2")["augment"]["hue"] == 0.2
    more = "phases.more={kind: pretrain, steps: 8, init: gram@final}"
    assert list(job(TINY, more).phases)[-1] == "more"


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_an_item_of_an_inherited_list_is_set_where_the_list_is() -> None:
    def told(override: str) -> tuple[str, str]:
        with pytest.raises(SpecError) as caught:
            job(TINY, override)
        (problem,) = caught.value.problems
        return problem.message, problem.hint

    message, hint = told("phases.pretrain.crops.resolutions[0].global_size=40")
    assert message == "cannot be set: the list is inherited from crops.resolutions"
    there = "crops.resolutions[0].global_size=40"
    assert hint == f"set it there: {there}, or here the whole list: phases.pretrain.crops.resolutions=[...]"
    message, hint = told("data.skip[0].at=3")
    assert message == "cannot be set: no list is there"
    assert hint == "set it whole: data.skip=[...]"


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_the_resolved_job_is_a_job_and_the_same_one(file: Path, tmp_path: Path) -> None:
    spec = resolved(job(str(file)))
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(spec))
    assert resolved(job(str(again))) == spec
    assert yaml.safe_load(dump(spec)) == spec, "readers of YAML 1.1 see the same"


def test_the_digest_tells_every_change_and_no_formatting(tmp_path: Path) -> None:
    first = digest(resolved(job()))
    assert digest(resolved(job(TINY, "seed=4"))) != first
    reordered = yaml.safe_load(Path(TINY).read_text())
    reordered["phases"]["pretrain"]["optim"] = reordered["optim"]  # says again what it inherits
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(reordered, sort_keys=False))
    assert digest(resolved(job(str(tmp_path / "job.yaml")))) == first


def test_the_digest_tells_the_order_of_phases() -> None:
    spec = resolved(job())
    turned = {**spec, "phases": dict(reversed(spec["phases"].items()))}
    assert digest(turned) != digest(spec)


def test_a_relative_data_folder_is_pinned_to_where_dinoctl_was_called(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert job().phases["gram"].data.path == str(tmp_path / "images")
    assert job(TINY, "data.path=cache:x").phases["gram"].data.path == "cache:x"
    assert job(TINY, "data.path=s3://b/x").phases["gram"].data.path == "s3://b/x"
    shards = job(TINY, "data.hold_out=none", "evaluate=null", SHARDS, "data.index=i")
    data = shards.phases["gram"].data
    assert data.path == [str(tmp_path / "x-{0..1}.tar"), "s3://b/y.tar"]
    assert data.index == str(tmp_path / "i")


def test_dinov3s_dataset_strings_are_folders(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    spec = job(TINY, 'data.path="ImageNet:split=TRAIN:root=in1k:extra=/extra"')
    assert spec.phases["gram"].data.path == str(tmp_path / "in1k/train")
    assert spec.evaluate is not None
    assert spec.evaluate.data.path == str(tmp_path / "in1k/train")
    for path, means in (
        ("ADE20K:split=VAL:root=ade", "ade/images/validation"),
        ("ImageNet22k:root=i:extra=e", "i/*.tar"),
    ):
        found = job(TINY, f'data.path="{path}"', "evaluate=null")
        assert found.phases["gram"].data.path == str(tmp_path / means)
    for path, says in (
        ("ImageNet22k:split=TRAIN:root=x", "write ImageNet22k:root=FOLDER, it has no split"),
        ("ImageNet:root=x", "write ImageNet:split=TRAIN:root=FOLDER, split one of TRAIN, VAL, TEST"),
        ("CocoCaptions:split=TRAIN:root=x", "write each as a .txt beside its image"),
        ("NYU:split=TRAIN:root=x", "of these dataset strings ImageNet, ImageNet22k, ADE20K are read"),
    ):
        with pytest.raises(SpecError, match=says):
            job(TINY, f'data.path="{path}"')


def test_past_a_link_two_dots_lead_where_the_system_leads(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/link").symlink_to(tmp_path / "disk/deep")
    monkeypatch.chdir(tmp_path / "home")
    for written, meant in (
        ("../disk/./images", f"{tmp_path}/disk/images"),
        ("link/../images", f"{tmp_path}/home/link/../images"),
    ):
        assert job(TINY, f"data.path={written}").phases["gram"].data.path == meant


def test_what_is_mixed_in_is_pinned_and_checked_too(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data = job(TINY, "data.also=[{path: more, share: 0.1}]").phases["gram"].data
    assert [part.path for _, part in data.parts] == [str(tmp_path / "images"), str(tmp_path / "more")]
    assert [part.hold_out for _, part in data.parts] == ["test", "test"]
    apart = job(TINY, "data.also=[{path: more, share: 0.1, hold_out: none}]").phases["gram"].data
    assert [part.hold_out for _, part in apart.parts] == ["test", "none"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    with pytest.raises(SpecError, match=r"data\.also\[0\]\.path: no such data folder"):
        read_job(TINY, ["data.also=[{path: more, share: 0.1}]"])
    with pytest.raises(SpecError, match=r"leave nothing for data\.path"):
        job(TINY, "data.also=[{path: a, share: 0.5}, {path: b, share: 0.5}]")
    with pytest.raises(SpecError, match=r"0\.12345 is not a multiple of 0\.001"):
        job(TINY, "data.also=[{path: a, share: 0.12345}]")
    overrides = ("data.path=x.tar", "data.hold_out=none", "data.also=[{path: s, share: 0.1}]", "evaluate.data.path=s")
    with pytest.raises(SpecError, match=r"data\.also\[0\]\.hold_out: training would see the test split"):
        job(TINY, *overrides)
    with pytest.raises(SpecError, match=r"data\.also\[0\]\.hold_out: training would see the test split"):
        job(TINY, "data.also=[{path: images, share: 0.1, hold_out: none}]")


def test_tar_shards_are_looked_for_where_this_machine_sees_them(tmp_path: Path) -> None:
    (tmp_path / "x-00.tar").touch()

    def found(path: str) -> list[str]:
        overrides = [f'data.path="{path}"', "data.hold_out=none", "evaluate=null"]
        try:
            read_job(TINY, overrides)
        except SpecError as error:
            return [problem.message for problem in error.problems]
        return []

    assert set(found(f"{tmp_path}/y-{{00..10}}.tar")) == {"no such tar shard"}
    assert set(found(f"{tmp_path}/y*.tar")) == {"no such tar shard"}
    assert found(f"{tmp_path}/x-{{00..10}}.tar") == found(f"{tmp_path}/*.tar") == found("s3://b/x.tar") == []
    assert found("https://a.b/x-{00..10}.tar") == []
    assert set(found("nosuch://b/x.tar")) == {"a URI that nothing here can read (Protocol not known: nosuch)"}


def test_an_evaluation_needs_a_folder() -> None:
    with pytest.raises(SpecError, match=r"data\.path: an evaluation looks at a folder of images: near-dup"):
        job(TINY, "data.path=x.tar")
    job(TINY, "data.path=x.tar", "evaluate.data.path=images")
    job(TINY, "data.path=x.tar", "evaluate=null")


# --- what is not there yet --------------------------------------------------------------------------------------------


def test_the_7b_needs_nothing_of_the_trainer_that_is_not_there() -> None:
    spec = job(V3_7B)
    assert not_there_yet(spec, read_cluster(spec.cluster)) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.gram.resources.nodes=2", "more than one node with the local launcher"),
        (
            "phases.gram.data.path=s3://b/images",
            "a folder of images on a bucket (tar shards on one are: `dinoctl data pack` makes some)",
        ),
    ],
)
def test_each_feature_is_named_once_with_the_phases_that_ask_for_it(override: str, message: str) -> None:
    problems = not_there_yet(job(TINY, override), read_cluster("local"))
    assert [problem.message for problem in problems] == [f"not there yet: {message}"]
    assert "phases.gram." in problems[0].found


def test_captions_from_more_than_one_folder_say_what_to_do() -> None:
    (problem,) = not_there_yet(job(TINY, "data.also=[{path: more, share: 0.1}]"), read_cluster("local"))
    assert problem.message == "not there yet: captions from more than one folder"
    assert problem.hint == "phases.text.data.also=[]"


def test_the_tiny_job_needs_nothing_that_is_not_there() -> None:
    assert not_there_yet(job(), read_cluster("local")) == []


# --- the schema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_the_schema_takes_the_job_files_as_they_are_written(file: Path) -> None:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(read_yaml(str(file)).values, schema)
    jsonschema.validate(resolved(job(str(file))), schema)


@pytest.mark.parametrize(
    "change",
    [
        {"sede": 1},
        {"optim": {"batchsize": 3}},
        {"optim": {"lr": "fast"}},
        {"phases": {"a": {"steps": 3}}},
        {"phases": {"a": {"kind": "gramm"}}},
        {"phases": {"Bad Name": {"kind": "pretrain"}}},
        {"phases": {"a": {"kind": "text", "crops": {}}}},
        {"crops": {"resolutions": [{"global_size": 32}]}},
        {"model": {"backbone": {"arch": "custom"}}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_validate_refuses(change: dict[str, Any], tmp_path: Path) -> None:
    values = {**read_yaml(TINY).values, **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, job_schema())
    (tmp_path / "job.yaml").write_text(dump(values))
    with pytest.raises(SpecError):
        job(str(tmp_path / "job.yaml"))
