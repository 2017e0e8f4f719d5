"""The worker image: linted, its rules looked at, and built where a builder is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from orchestrator.kubernetes_section import Kubernetes
from tests import builders

ROOT = Path(__file__).parents[1]
FILE = ROOT / "images" / "Containerfile"


def instructions() -> list[tuple[str, str]]:
    """Name and rest of each, lines that go on put together."""
    lines = [line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def copied() -> list[str]:
    """What the build takes of the repository."""
    return [name for rest in of("COPY") if not rest.startswith("--from") for name in rest.split()[:-1]]


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([linter, "--failure-threshold", "style", FILE], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_its_base_has_a_version_its_user_is_the_pods_and_nothing_stands_before_the_agent() -> None:
    (base,) = [rest.removeprefix("BASE=") for rest in of("ARG") if rest.startswith("BASE=")]
    assert re.fullmatch(r"\S+:3\.\d+\S*", base)
    assert {rest.split()[0] for rest in of("FROM")} == {"${BASE}"}
    assert all(re.fullmatch(r"\S+=\S+", rest) for rest in of("ARG")), "each argument has a value"
    assert of("USER")[-1] == f"{Kubernetes(image='x').run_as_user}:1000"
    assert of("ENTRYPOINT") == []


def test_the_build_is_let_see_what_it_copies_and_that_makes_the_package(tmp_path: Path) -> None:
    ignore = FILE.with_name("Containerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == set(copied())
    for name in copied():
        take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        take(ROOT / name, tmp_path / name)
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", tmp_path / "dist", tmp_path], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert {"model/agent.py", "orchestrator/cli.py"} <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.jobs
@pytest.mark.requires("builder")
@pytest.mark.timeout(3600)
def test_it_is_built_and_both_houses_are_in_it() -> None:
    builder = builders.there()
    assert builder is not None
    image = "localhost/dinoctl-worker:test"
    subprocess.run([builder, "build", "-f", str(FILE), "-t", image, str(ROOT)], check=True)
    code = "import os, model.agent, orchestrator.cli; print(os.getuid())"
    run = [builder, "run", "--rm", "--read-only", "--tmpfs", "/tmp", image, "python3", "-P", "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "1000"
