"""What is wrong with where a job says that images are, as `test_bad_input.py` has it for the rest."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from model.config import Data
from model.data import patterns
from model.data.errors import DataError
from orchestrator.problems import Problem, SpecError
from orchestrator.spec import read_job

TINY = str(Path(__file__).parent / "valid.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with images and captions in it and in a folder of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images/a").mkdir(parents=True)
    for place in ("images/1", "images/a/2"):
        (tmp_path / f"{place}.png").touch()
        (tmp_path / f"{place}.txt").write_text("a red ball\n")
    return tmp_path


def problems(*overrides: str) -> list[Problem]:
    try:
        read_job(TINY, overrides)
    except SpecError as error:
        return error.problems
    return []


def only(*overrides: str) -> Problem:
    found = problems(*overrides)
    assert len(found) == 1, "\n".join(str(problem) for problem in found)
    return found[0]


# --- what the evaluation scores on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images/", "./images", "images/a/..", "link", "{here}/images"])
def test_other_names_of_a_folder_are_that_folder(folder: Path, name: str) -> None:
    (folder / "link").symlink_to("images")
    scored = f"evaluate.data.path={name.format(here=folder)}"
    problem = only("data.hold_out=none", scored)
    assert (problem.path, problem.found, problem.allowed) == ("data.hold_out", "none", "test or validation")
    assert problems("data.hold_out=test", scored) == []


@pytest.mark.parametrize(("seen", "scored"), [("images/a", "images"), ("images/", "images/a")])
def test_a_folder_within_the_other_has_other_splits(seen: str, scored: str) -> None:
    problem = only(f"data.path={seen}", f"evaluate.data.path={scored}")
    assert problem.message.startswith("one of the folders of training and evaluation lies in the other, and splits go")
    assert (problem.path, problem.found) == ("data.path", f"{seen}, and evaluate.data.path {scored}")
    assert problem.hint == "name the same folder in both"


def test_folders_on_a_bucket_are_compared_by_their_text() -> None:
    def told(scored: str) -> list[str]:
        overrides = ("cluster=h100_slurm", "data.path=s3://b/images", "data.hold_out=none")
        return [problem.message for problem in problems(*overrides, f"evaluate.data.path={scored}")]

    assert "training would see the test split, which the evaluation scores on" in told("s3://b/images/")
    assert any("lies in the other" in message for message in told("s3://b/images/a"))
    assert told("s3://b/images-2") == []


# --- what is there ----------------------------------------------------------------------------------------------------


def test_a_home_that_nobody_has_is_no_folder() -> None:
    problem = only("data.path=~nobody-of-that-name/images", "evaluate=null")
    assert (problem.path, problem.message) == ("data.path", "no such data folder")
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read_job("~nobody-of-that-name/job.yaml")


def test_an_index_that_is_a_file(folder: Path) -> None:
    (folder / "index").touch()
    problem = only("data.index=index")
    assert (problem.path, problem.message, problem.found) == ("data.index", "not a folder", "index")
    assert only("data.index=index/deep").found == f"index/deep, in the file {folder}/index"
    assert problems("data.index=not-there-yet") == problems("data.index=images") == []


def test_a_folder_that_may_not_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "images":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root, as whom tests may run, lists anything
    problem = only()
    assert (problem.path, problem.found) == ("data.path", "images")
    assert problem.message == "the data folder cannot be listed: permission denied"


# --- paths that name nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ['data.path=""', 'data.path=["x.tar", ""]', 'data.also=[{path: "", share: 0.1}]'])
def test_an_empty_path_names_no_folder(override: str) -> None:
    told = [problem for problem in problems(override) if "an empty path: write the folder" in problem.message]
    assert [problem.path for problem in told] == ["data.also[0].path" if "also" in override else "data.path"]


BRACES = (
    ("a b{1}/x.tar", "{1} is neither a count ({000..123}) nor a list ({a,b})"),
    ("x-{9..1}.tar", "{9..1} counts down"),
    ("x-{0..1.tar", "a brace without its other"),
    ("x-{0..9999}{0..9999}.tar", "stands for more than 10,000,000 names"),
)


@pytest.mark.parametrize(("pattern", "said"), BRACES)
def test_braces_that_name_no_shards(pattern: str, said: str) -> None:
    override = f'data.path="{pattern}"'
    problem = only(override, "evaluate=null")
    assert (problem.file, problem.path) == (f"override {override}", "data.path")
    assert problem.message.startswith(pattern)
    assert said in problem.message
    with pytest.raises(DataError, match=re.escape(said)):  # what the run would end with
        patterns.expand(pattern)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # of the folder, which it leaves alone
@given(st.text(alphabet="{},.0123a", max_size=12))
def test_braces_are_judged_as_the_run_would(text: str) -> None:
    try:
        patterns.expand(f"{text}.tar")
    except DataError:
        with pytest.raises(ValueError, match=re.escape(f"{text}.tar")):
            Data(path=f"{text}.tar")
    else:
        assert Data(path=f"{text}.tar")


# --- what may be one of several things --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "found", "allowed"),
    [
        ("data.path=3", "data.path", "3", "a valid string, or a valid array"),
        ("data.path=[3, x.tar]", "data.path[0]", "3", "a valid string"),
        ("data.path=[]", "data.path", "[]", "a valid string, or at least 1 of them"),
        ("data.std=[]", "data.std", "[]", "at least 1 of them"),
        ("checkpoints.every=0", "checkpoints.every", "0", "greater than 0, or 'auto'"),
        ("checkpoints.every=aut", "checkpoints.every", "'aut'", "a valid integer, or 'auto'"),
        ("model.ibot_head=tie", "model.ibot_head", "'tie'",
         "a section with prototypes, hidden, bottleneck, layers, weight_norm, or 'tied'"),
        ("model.ibot_head.prototypes=x", "model.ibot_head.prototypes", "'x'", "a valid integer"),
    ],
)  # fmt: skip
def test_the_path_is_the_files_and_each_place_is_told_once(override: str, path: str, found: str, allowed: str) -> None:
    told = [problem for problem in problems(override) if problem.message == "not allowed here"]
    assert [(problem.path, problem.found, problem.allowed) for problem in told] == [(path, found, allowed)]


def test_a_key_of_a_section_that_may_be_a_word() -> None:
    told = {problem.path: problem.message for problem in problems("model.ibot_head={prototypes: 8, foo: 3}")}
    of = "model.ibot_head"
    assert told == {f"{of}.foo": "unknown key", f"{of}.hidden": "missing", f"{of}.bottleneck": "missing"}


def test_a_list_of_wrong_numbers_is_not_too_short() -> None:
    told = {problem.path: problem.allowed for problem in problems("data.std=[0, 0, 0]")}
    assert told == {f"data.std[{number}]": "greater than 0" for number in range(3)}
