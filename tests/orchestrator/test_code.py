"""The run's copy of model/: complete, read-only, importable, and refused once it is not what it was."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import code


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "train.py").write_text("STEPS = 3\n")
    (folder / "data" / "words.txt").write_text("a\n")
    return folder


def test_the_digest_is_of_names_and_contents_alone(source: Path) -> None:
    before = code.digest(source)
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "train.cpython-311.pyc").write_bytes(b"x")
    (source / ".train.py.swp").write_bytes(b"x")
    (source / "train.py").touch()
    assert code.digest(source) == before
    (source / "data" / "words.txt").rename(source / "data" / "other.txt")
    assert code.digest(source) != before


def test_the_copy_is_read_only_and_has_the_digest(source: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    pinned = code.pin(run, source)
    folder = Path(code.verify(run, pinned))
    assert (folder / "model" / "data" / "words.txt").read_text() == "a\n"
    assert all(not path.stat().st_mode & stat.S_IWUSR for path in folder.rglob("*") if path.is_file())
    assert code.pin(run, source) == pinned


def test_a_broken_off_copy_is_completed(source: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    pinned = code.pin(run, source)
    (Path(code.code_dir(run, pinned)) / "model" / "train.py").unlink()
    with pytest.raises(code.CodeError, match="--code new"):
        code.verify(run, pinned)
    code.pin(run, source)
    code.verify(run, pinned)


def test_changed_code_goes_beside_the_old(source: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    old = code.pin(run, source)
    (source / "train.py").write_text("STEPS = 4\n")
    new = code.pin(run, source)
    assert old != new
    code.verify(run, old)


def test_a_changed_copy_is_refused(source: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    pinned = code.pin(run, source)
    target = Path(code.code_dir(run, pinned)) / "model" / "train.py"
    target.chmod(0o644)
    target.write_text("STEPS = 0\n")
    with pytest.raises(code.CodeError, match="is not the code that this run began with"):
        code.verify(run, pinned)


def test_python_runs_the_copy_and_not_the_checkout(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    folder = code.code_dir(run, code.pin(run))
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import model.contract; print(model.contract.__file__)"],
        env={"PYTHONPATH": folder}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"{folder}/model/contract.py"
    assert code.verify(run, code.digest(code.installed())) == folder, "bytecode is not part of the digest"


IMAGE = "registry.example.org/worker"


def pods(image: str) -> dict[str, Any]:
    return {"launcher": "kubernetes", "kubernetes": {"image": image}}


def test_pods_bring_their_code_with_their_image(tmp_path: Path) -> None:
    """By its digest wherever it is pulled from; nothing of it is copied into the run."""
    run, digest = str(tmp_path / "run"), "a" * 64
    cluster = pods(f"{IMAGE}@sha256:{digest}")
    assert code.settle(run, cluster) == code.there_now(cluster) == digest
    assert not (tmp_path / "run").exists()
    assert code.for_attempt(run, cluster, digest) == ""
    assert code.for_attempt(run, pods(f"mirror/worker:v1@sha256:{digest}"), digest) == ""
    assert code.settle(run, pods("worker:dev")) != code.settle(run, pods("worker:v2"))


@pytest.mark.parametrize("image", [f"{IMAGE}@sha256:{'b' * 64}", f"{IMAGE}:latest"])
def test_another_image_is_other_code(tmp_path: Path, image: str) -> None:
    with pytest.raises(code.CodeError, match="dinoctl resume RUN --code new") as caught:
        code.for_attempt(str(tmp_path), pods(image), "a" * 64)
    assert image in str(caught.value)
    assert ("a" * 16) in str(caught.value)


def test_a_run_that_leaves_pods_needs_a_copy_of_the_code(tmp_path: Path) -> None:
    with pytest.raises(code.CodeError, match="had their code from an image so far"):
        code.for_attempt(str(tmp_path), {"launcher": "local"}, "a" * 64)
