"""The command line as a process: what `status` must not import, and a reader that leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.orchestrator.written import Run

HEAVY = ["torch", "mlflow", "pydantic", "numpy", "fsspec", "yaml", "sqlalchemy", "requests"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINOCTL_RUNS", raising=False)


@pytest.mark.parametrize("words", ["--help", "status", "status tiny", "logs tiny"])
def test_answers_that_must_come_at_once_import_nothing_heavy(tmp_path: Path, words: str) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    run.launch(1, "pretrain")
    run.log(1, "hello")
    run.watched()
    script = (
        "import sys; from orchestrator import cli\n"
        f"try: cli.main({words.split()!r})\n"
        "except SystemExit: pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "closed", "code"), [(["validate", "nowhere.yaml"], "stderr", 2), (["schema"], "stdout", 0)]
)
def test_a_reader_that_has_had_enough(words: list[str], closed: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, closed: writer}
    done = subprocess.run([sys.executable, "-P", "-m", "orchestrator.cli", *words], check=False, **streams)
    os.close(writer)
    assert (done.returncode, done.stderr or b"") == (code, b"")
