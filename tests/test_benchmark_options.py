"""What the benchmarks say of themselves, and what they refuse before they measure anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

NAMES = (
    "ablations", "augment", "bucket", "checkpoint", "cli", "controller", "demo_seeds", "index", "losses", "step"
)  # fmt: skip


def refused(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """What the benchmark exits with."""
    benchmark = importlib.import_module(f"tests.benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *words])
    given = {"bucket": [words], "ablations": [Path("runs")]}.get(name, [])
    with pytest.raises(SystemExit) as caught:
        (benchmark.parse if name == "step" else benchmark.main)(*given)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_it_measures_and_measures_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(name, ["--help"], monkeypatch) == 0
    first = (importlib.import_module(f"tests.benchmarks.{name}").__doc__ or "").split("\n")[0]
    assert " ".join(first.split()) in " ".join(capsys.readouterr().out.split())


def test_no_benchmark_is_left_out() -> None:
    there = {file.stem for file in (Path(__file__).parent / "benchmarks").glob("*.py")}
    assert there - {"__init__", "options", "products"} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("augment", ["--batch", "0"], "--batch: 0 is not a whole number from 1 on"),
        ("augment", ["--images", "NOT_THERE"], "--images: NOT_THERE is no folder that is there"),
        ("augment", ["--images", str(Path(__file__).parent)], "no photographs there, of names that end in .avif"),
        ("index", ["--shards", "0"], "--shards: 0 is not a whole number from 1 on"),
        ("index", ["--shards", "2", "--images", "3"], "--shards 2 --images 3: fewer images than a batch has (4096)"),
        ("checkpoint", ["--arch", "nope"], "--arch: invalid choice: 'nope' (choose from "),
        ("checkpoint", ["--arch", "dinov2_vits14"], "--arch: invalid choice: "),  # its patches are no part of the crops
        ("checkpoint", ["--batch", "1"], "--batch 1: KoLeo needs 2 images or more"),
        ("checkpoint", ["--folder", "NOT_THERE"], "--folder: NOT_THERE is no folder that is there"),
        ("bucket", ["--windows", "0"], "--windows: 0 is not a whole number from 1 on"),
        ("bucket", ["--latency", "-1"], "--latency: -1 is not a number of seconds"),
        ("bucket", ["--batches", "3"], "--batches 3: 4 or more"),
        ("losses", ["--rounds", "2"], "unrecognized arguments: --rounds 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    name: str, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(name, words, monkeypatch) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
