"""Every way to get a spec wrong: told at once, each with file, line, path, what was found and what would be right."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from model.data import splits, text
from orchestrator import checks
from orchestrator.cluster import read_cluster
from orchestrator.problems import Problem, SpecError
from orchestrator.spec import read_job

ROOT = Path(__file__).parents[2]
TINY = (ROOT / "tests/orchestrator/valid.yaml").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with images beside the job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.PNG").touch()
    (tmp_path / "images" / "a.txt").write_text("a red ball\n")
    return tmp_path


def problems(job: str = TINY, *overrides: str) -> list[Problem]:
    Path("job.yaml").write_text(job)
    with pytest.raises(SpecError) as caught:
        read_job("job.yaml", overrides)
    return caught.value.problems


def only(job: str = TINY, *overrides: str) -> Problem:
    found = problems(job, *overrides)
    assert len(found) == 1, "\n".join(str(problem) for problem in found)
    return found[0]


def line_of(job: str, start: str) -> int:
    return next(n for n, line in enumerate(job.splitlines(), 1) if line.strip().startswith(start))


@pytest.mark.usefixtures("folder")
class TestKeysAndValues:
    def test_the_job_that_the_others_break_is_right(self) -> None:
        Path("job.yaml").write_text(TINY)
        assert list(read_job("job.yaml").phases) == ["pretrain", "gram", "highres", "text"]

    def test_what_an_override_put_there_is_shown_at_the_override(self) -> None:
        found = only(TINY, "optim.lr=.inf")
        assert (found.file, found.line, found.path) == ("override optim.lr=.inf", None, "optim.lr.peak")

    def test_a_section_and_a_list_are_called_so(self) -> None:
        assert only(TINY, "model=3").allowed == "a section with backbone, dino_head, ibot_head"
        assert only(TINY, "crops.resolutions=[]").allowed == "at least 1 of them"

    def test_a_misspelt_key_says_where_and_what_was_meant(self) -> None:
        text = TINY.replace("batch_size: 16\n  group", "batchsize: 16\n  group")
        unknown, missing = sorted(problems(text), key=lambda p: p.message, reverse=True)
        assert str(unknown).startswith(f"job.yaml:{line_of(text, 'batchsize')}: optim.batchsize: unknown key\n")
        assert unknown.hint == "did you mean batch_size?"
        assert "group_size" in unknown.allowed
        assert (missing.path, missing.message) == ("optim.batch_size", "missing")

    def test_a_key_in_the_wrong_place_says_where_it_belongs(self) -> None:
        assert only(TINY, "phases.gram.batch_size=16").hint == "did you mean phases.gram.optim.batch_size?"
        assert only(TINY, "steps=16").hint == "did you mean phases.<phase>.steps?"

    def test_a_key_that_stands_for_the_one_that_is_missing(self) -> None:
        hints = {problem.path: problem.hint for problem in problems(TINY, "data.also=[{path: odd, weight: 0.1}]")}
        assert hints == {"data.also[0].weight": "did you mean share?", "data.also[0].share": ""}

    def test_a_misspelt_section_at_the_top(self) -> None:
        assert only(TINY, "trackng.enabled=false").hint == "did you mean tracking?"

    def test_a_mistake_in_a_default_is_told_once_and_where_it_was_written(self) -> None:
        text = TINY.replace("local_count: 2", "local_count: two")
        problem = only(text)
        assert (problem.path, problem.line) == ("crops.local_count", line_of(text, "local_count"))
        assert (problem.found, problem.allowed) == ("'two'", "a valid integer")

    def test_a_rule_across_fields_of_a_default_is_told_once(self) -> None:
        problem = only(TINY.replace("group_size: 4", "group_size: 5"))
        assert problem.path == "optim"
        assert "batch_size 16 must be a multiple" in problem.message

    def test_a_value_of_a_phase_is_told_at_the_phase(self) -> None:
        text = TINY.replace("steps: 14", "steps: -1")
        assert (only(text).path, only(text).line) == ("phases.pretrain.steps", line_of(text, "steps: -1"))

    @pytest.mark.parametrize(
        ("override", "found", "allowed"),
        [
            ("seed=1.5", "1.5", "integer"),
            ("seed='1'", "'1'", "integer"),
            ("seed=true", "true", "integer"),
            ("optim.lr=.inf", "inf", "finite"),
            ("optim.lr=.nan", "nan", "finite"),
            ("optim.lr=-1", "-1.0", "0 or more"),
            ("optim.lr='1e-3'", "'1e-3'", "a number, or a section with start, peak"),
            ("optim.weight_decay={peak: 0.1, end: -0.1}", "-0.1", "0 or more"),
            ("losses.dino.teacher_temp=0", "0.0", "greater than 0"),
            ("phases.gram.ema=1.5", "1.5", "between 0 and 1"),
            ("optim.beta1=1.0", "1.0", "less than 1"),
            ("phases.pretrain.steps=0", "0", "greater than 0"),
            ("precision.compute=bf61", "'bf61'", "'fp32', 'bf16' or 'fp64'"),
            ("phases.gram.kind=gramm", "'gramm'", "pretrain, gram"),
            ("name=My Job", "'My Job'", "at most 30 of a-z"),
            ("phases=[]", "[]", "at least one phase"),
            ("phases={}", "{}", "at least one phase"),
            ("crops.global_scale=[0.9, 0.1]", "[0.9, 0.1]", "[0.1, 0.9]"),
            ("evaluate.resources.nodes=2", "2 processes", ""),
        ],
    )
    def test_a_wrong_value(self, override: str, found: str, allowed: str) -> None:
        told = [problem for problem in problems(TINY, override) if problem.found == found]
        assert told
        assert allowed in told[0].allowed

    def test_names_of_phases(self) -> None:
        for name in ("evaluate", "Gram", "a" * 17, "x_y", "-a", "a.b", ""):
            text = TINY.replace("\n  highres:", f"\n  '{name}':").replace("highres@", "gram@")
            assert f"phases.{name}" in [problem.path for problem in problems(text)]

    def test_everything_at_once(self) -> None:
        text = TINY.replace("steps: 14", "stpes: 14").replace("seed: 3", "seed: x").replace("pretrain@4", "pretrian@4")
        text = text.replace("local_count: 2", "local_count: -2").replace(
            "image_size: 32\n  batch", "image_size: 30\n  batch"
        )
        paths = [problem.path for problem in problems(text, "cluster=lokal", "data.workers=many")]
        assert sorted(paths) == [
            "cluster",
            "crops.local_count",
            "data.workers",
            "evaluate.image_size",
            "phases.gram.gram_teacher",
            "phases.pretrain.steps",
            "phases.pretrain.stpes",
            "seed",
        ]

    def test_a_missing_section_is_told_once(self) -> None:
        text = TINY.replace("checkpoints: {every: 4, keep_last: 2}\n", "")
        problem = only(text)
        assert (problem.path, problem.message) == ("checkpoints", "missing")

    def test_a_section_that_no_phase_takes(self) -> None:
        text = TINY[: TINY.index("phases:")] + (
            "phases:\n  text:\n    kind: text\n    steps: 5\n    vision_tower: other#gram@final\n"
            "    image_size: 32\n    text: {dim: 32, depth: 1, heads: 2}\n"
        )
        assert (only(text).path, only(text).message) == ("crops", "no phase of this job takes it")

    def test_an_unknown_cluster(self) -> None:
        problem = only(TINY, "cluster=lokal")
        assert problem.hint == "did you mean local?"
        assert "h100_slurm" in problem.allowed

    def test_a_cluster_profile_with_mistakes_is_told_with_its_own_file(self) -> None:
        Path("mine.yaml").write_text("name: mine\nlauncher: slurm\nslurm:\n  partiton: gpu\nkubernetes: {image: x}\n")
        first, second = problems(TINY, "cluster=mine.yaml")
        assert str(first).startswith("mine.yaml:4: slurm.partiton: unknown key")
        assert (second.file, second.line, second.message) == ("mine.yaml", 5, "a section of another launcher")

    def test_runs_on_a_bucket_need_a_tracking_server(self) -> None:
        assert only(TINY, "runs=s3://b/runs", "tracking.enabled=true").path == "tracking.uri"


@pytest.mark.usefixtures("folder")
class TestReferences:
    @pytest.mark.parametrize(
        ("override", "message", "hint"),
        [
            ("phases.gram.gram_teacher=pretrian@4", "no such phase", "did you mean pretrain?"),
            ("phases.gram.gram_teacher=pretrain@400", "pretrain ends at step 14", "pretrain@12 or pretrain@14"),
            ("phases.gram.gram_teacher=pretrain@6", "no checkpoint is saved at that step", "pretrain@4 or pretrain@8"),
            ("phases.gram.gram_teacher=pretrain@0", "no checkpoint is saved at that step", "nearest: pretrain@4"),
            ("phases.gram.gram_teacher=gram@4", "a phase cannot take its own checkpoint", ""),
            ("phases.gram.gram_teacher=highres@4", "a cycle: each of these phases waits for another", "above"),
            ("phases.pretrain.init=text@4", "a cycle: each of these phases waits for another", "above"),
            ("phases.gram.gram_teacher=pretrain", "not a reference to a checkpoint", ""),
            ("phases.gram.gram_teacher=pretrain@best(knn)", "choosing a checkpoint by a metric is not there yet", ""),
            ("phases.gram.weights=pretrain@final", "init and weights exclude each other", "full training state"),
        ],
    )
    def test_one_that_cannot_be_met(self, override: str, message: str, hint: str) -> None:
        problem = only(TINY, override)
        assert problem.message == message
        assert hint in problem.hint
        assert problem.file == f"override {override}" or "cycle" in message

    def test_auto_saves_where_it_is_asked_to_and_needs_to_know_how_often_nodes_fail(self) -> None:
        auto = ("checkpoints.every=auto", "checkpoints.node_mtbf_hours=6000")
        problem = only(TINY, "phases.gram.gram_teacher=pretrain@0", *auto)
        assert problem.allowed == "1 and more (checkpoints.every), and the last step 14"
        problem = only(TINY, auto[0])
        assert problem.path == "checkpoints"
        assert "every: auto needs node_mtbf_hours" in problem.message

    def test_how_often_nodes_fail_may_come_from_the_cluster_and_the_job_knows_better(self, tmp_path: Path) -> None:
        profile = tmp_path / "flaky.yaml"
        profile.write_text("name: flaky\nlauncher: local\nnode_mtbf_hours: 500\n")
        words = (f"cluster={profile}", "phases.pretrain.checkpoints.every=auto")
        Path("job.yaml").write_text(TINY)
        job = read_job("job.yaml", words, check_data=False)
        assert [phase.checkpoints.node_mtbf_hours for phase in job.phases.values()] == [500, None, None, None]
        job = read_job("job.yaml", [*words, "phases.pretrain.checkpoints.node_mtbf_hours=20"], check_data=False)
        assert job.phases["pretrain"].checkpoints.node_mtbf_hours == 20
        assert "or in the cluster's profile" in only(TINY, words[1]).message
        profile.write_text("name: flaky\nlauncher: local\nnode_mtbf_hours: 0\n")
        assert only(TINY, words[0]).path == "node_mtbf_hours"

    def test_a_cycle_is_named(self) -> None:
        problem = only(TINY, "phases.pretrain.init=highres@4")
        assert (
            problem.found == "pretrain -> gram -> highres -> pretrain"
            or problem.found == "pretrain -> highres -> gram -> pretrain"
        )

    def test_a_later_phase_that_waits_for_nothing(self) -> None:
        late = "\n  late:\n    kind: pretrain\n    steps: 8\n\n  text:"
        problem = only(TINY.replace("\n  text:", late), "phases.gram.gram_teacher=late@4")
        assert (problem.message, problem.hint) == ("refers to a later phase", "move late above gram")

    @pytest.mark.parametrize("take", ["init", "weights", "gram_teacher"])
    def test_a_text_phase_gives_no_ssl_phase_anything(self, take: str) -> None:
        text = TINY.replace(
            "evaluate:\n", "  more:\n    kind: gram\n    steps: 8\n    gram_teacher: gram@4\n\nevaluate:\n"
        )
        problem = only(text, f"phases.more.{take}=text@4")
        assert "needs a self-supervised phase, and text is of kind text" in problem.message
        assert problem.allowed == "pretrain, gram, highres, more"

    def test_another_run_is_not_looked_into_here(self) -> None:
        Path("job.yaml").write_text(TINY)
        assert read_job("job.yaml", ["phases.gram.gram_teacher=old-run#pretrain@123"])


@pytest.mark.usefixtures("folder")
class TestLayout:
    def test_a_batch_that_does_not_divide_lists_the_worlds_that_fit(self) -> None:
        problem = only(TINY, "phases.gram.resources.processes_per_node=3")
        assert problem.path == "optim.batch_size"
        assert problem.allowed == "numbers of processes that fit: 1, 2, 4"

    def test_sizes_are_whole_patches(self) -> None:
        problem = only(TINY, "phases.gram.crops.resolutions[0].gram_size=60")
        assert problem.path == "phases.gram.crops.resolutions[0].gram_size"
        assert (problem.allowed, problem.hint) == ("multiples of patch_size 8", "nearest: 56 or 64")
        assert only(TINY, "phases.text.image_size=7").hint == "nearest: 8"

    def test_processes_that_are_no_whole_copies(self) -> None:
        copies = ("optim.batch_size=48", "parallel={shard: hsdp, shard_size: 4}", "resources.processes_per_node=6")
        found = problems(TINY, *copies)
        assert {
            (problem.path, problem.found, problem.allowed) for problem in found if "whole copies" in problem.message
        } >= {("parallel.shard_size", "4", "divisors of 6")}

    def test_fp8_without_bf16(self) -> None:
        assert any("goes with compute: bf16" in str(problem) for problem in problems(TINY, "precision={fp8: blocks}"))

    def test_fp8_of_widths_that_are_no_multiples_of_16(self) -> None:
        fp8 = "precision={compute: bf16, fp8: blocks}"
        narrow = only(TINY, fp8, "model.backbone.dim=40", "phases.text.precision.fp8=none")
        assert (narrow.path, narrow.found, narrow.allowed) == ("model.backbone.dim", "40", "multiples of 16")
        assert narrow.hint == "nearest: 32 or 48; or precision.fp8: none"
        assert "phases pretrain, gram, highres" in narrow.message
        assert only(TINY, fp8, "model.backbone.ffn_ratio=2.4").hint == "nearest: 2 or 2.5; or precision.fp8: none"
        swiglu = only(TINY, fp8, "model.backbone.ffn=swiglu", "model.backbone.ffn_ratio=3.1")
        assert (swiglu.path, swiglu.found) == ("model.backbone.ffn_ratio", "3.1, which is a hidden width of 72")
        assert swiglu.hint == "model.backbone.ffn_align: 16; or precision.fp8: none"
        text = only(TINY, f"phases.text.{fp8}", "phases.text.text.ffn_ratio=2.1")
        assert (text.path, text.found) == ("phases.text.text.ffn_ratio", "2.1, which is a hidden width of 67")
        assert text.hint == "nearest: 2 or 2.5; or precision.fp8: none"

    def test_a_node_holds_no_more_processes_than_gpus(self) -> None:
        problem = only(TINY, "cluster=h100_slurm", "optim.batch_size=64", "phases.gram.resources.processes_per_node=16")
        assert (problem.path, problem.allowed) == ("phases.gram.resources.processes_per_node", "at most 8")

    def test_a_text_tower_that_cannot_be_built(self) -> None:
        assert only(TINY, "phases.text.text.heads=3").allowed == "multiples of heads 3"
        assert "259 or more" in only(TINY, "phases.text.text.vocabulary=258").allowed
        assert only(TINY, "phases.text.embed_dim=31").allowed == "even numbers"

    def test_koleo_needs_two_images(self) -> None:
        assert only(TINY, "optim.group_size=1").hint == "or losses.koleo.weight: 0"


class TestData:
    def test_the_evaluation_scores_on_what_training_did_not_see(self, folder: Path) -> None:
        problem = only(TINY, "data.hold_out=none")
        assert (problem.path, problem.found, problem.allowed) == ("data.hold_out", "none", "test or validation")
        assert only(TINY, "evaluate.split=validation").allowed == "validation"

    def test_a_missing_folder(self, folder: Path) -> None:
        problem = only(TINY, "data.path=nowhere")
        assert (problem.path, problem.message, problem.found) == ("data.path", "no such data folder", "nowhere")
        assert "data.path=FOLDER" in problem.hint

    def test_a_folder_without_images(self, folder: Path) -> None:
        (folder / "empty" / "deep").mkdir(parents=True)
        (folder / "empty" / "deep" / "notes.txt").touch()
        (folder / "empty" / ".hidden.png").touch()
        assert only(TINY, "data.path=empty").message == "no images in the data folder"
        (folder / "empty" / "deep" / "b.jpeg").touch()
        (folder / "empty" / "deep" / "b.txt").write_text("a ball")
        Path("job.yaml").write_text(TINY)
        assert read_job("job.yaml", ["data.path=empty"])

    def test_a_file_is_no_folder(self, folder: Path) -> None:
        assert only(TINY, "data.path=job.yaml").message == "not a folder"

    def test_images_that_make_data_fetches(self, folder: Path) -> None:
        problem = only(TINY, "data.path=cache:tuxpaint-stamps")
        assert "make data" in problem.hint
        assert "data.path=FOLDER" in problem.hint
        (folder / "cache/dinoctl/tuxpaint-stamps").mkdir(parents=True)
        (folder / "cache/dinoctl/tuxpaint-stamps/x.png").touch()
        (folder / "cache/dinoctl/tuxpaint-stamps/x.txt").write_text("a ball")
        Path("job.yaml").write_text(TINY)
        job = read_job("job.yaml", ["data.path=cache:tuxpaint-stamps"])
        assert job.phases["text"].data.path == "cache:tuxpaint-stamps"

    def test_a_cluster_sees_other_folders(self, folder: Path) -> None:
        Path("job.yaml").write_text(TINY)
        assert read_job("job.yaml", ["cluster=h100_slurm", "data.path=/on/the/cluster"])


@pytest.mark.usefixtures("folder")
class TestOverrides:
    def test_an_unknown_phase(self) -> None:
        problem = only(TINY, "phases.gran.steps=5")
        assert (problem.message, problem.hint) == ("no such phase", "did you mean gram?")
        assert problem.file == "override phases.gran.steps=5"

    @pytest.mark.parametrize("text", ["steps", "=5", "a..b=1", "a[x]=1", ".a=1", "[0]=1", ""])
    def test_what_is_no_override(self, text: str) -> None:
        assert only(TINY, text).message == "not an override"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("seed.x=1", "it is 3 in the file"),
            ("name.a.b=1", "it is 'tiny' in the file"),
            ("augment[0].hue=1", "a mapping is there"),
            ("crops.resolutions.x=1", "a list is there"),
            ("crops.resolutions[3].ratio=1", "the list has 1 items"),
            ("crops[0]=1", "a mapping is there"),
        ],
    )
    def test_a_path_that_does_not_fit_what_is_there(self, text: str, said: str) -> None:
        assert said in only(TINY, text).message

    def test_one_that_changes_nothing(self) -> None:
        own = TINY
        for phase in ("pretrain", "gram", "highres", "text"):
            own = own.replace(f"    kind: {phase}\n", f"    kind: {phase}\n    checkpoints: {{every: 2}}\n")
        Path("job.yaml").write_text(own)
        read_job("job.yaml", ["phases.gram.checkpoints.every=1", "checkpoints.keep_last=3"])
        found = only(own, "checkpoints.every=1")
        assert (found.file, found.path) == ("override checkpoints.every=1", "checkpoints.every")
        assert found.message == "without effect: every phase sets its own"
        assert found.hint == "set it there: phases.<phase>.checkpoints.every=..."

    def test_a_value_that_is_no_yaml_or_not_plain(self) -> None:
        assert "not YAML" in only(TINY, "seed=[1").message
        assert "!!python/none" in only(TINY, "seed=!!python/none x").message

    def test_every_bad_override_at_once(self) -> None:
        found = problems(TINY.replace("seed: 3", "sede: 3"), "phases.gran.steps=5", "oops", "name=[1", "optim.lr=fast")
        assert len(found) == 5


@pytest.mark.usefixtures("folder")
def test_an_evaluation_of_what_no_phase_trains() -> None:
    text_alone = copy.deepcopy(yaml.safe_load(TINY))
    text_alone["phases"] = {"text": {**text_alone["phases"]["text"], "vision_tower": "other#pretrain@final"}}
    del text_alone["crops"]
    told = {problem.path: problem for problem in problems(yaml.safe_dump(text_alone))}
    assert "no phase of this run trains one" in told["evaluate"].message
    assert told["evaluate"].hint == "evaluate: null"


def test_what_the_checks_know_of_the_data_plane_is_true() -> None:
    assert checks.SMALLEST_VOCABULARY == text.SMALLEST
    assert checks.HIDES == splits.HIDDEN


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for name in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SpecError, match="cannot be read"):
            read_job(str(name))
    with pytest.raises(SpecError, match="cannot be read"):
        read_cluster(str(tmp_path / "none.yaml"))
