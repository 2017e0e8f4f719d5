"""What is wrong with where a job says that images are, as `test_bad_input.py` has it for the rest."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

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


def test_an_index_that_is_a_file(folder: Path) -> None:
    (folder / "index").touch()
    problem = only("data.index=index")
    assert (problem.path, problem.message, problem.found) == ("data.index", "not a folder", "index")
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
