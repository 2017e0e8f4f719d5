from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from model.data.errors import DataError
from model.data.patterns import absolute, expand, locate


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x.tar", ["x.tar"]),
        ("s3://b/x-{008..011}.tar", ["s3://b/x-008.tar", "s3://b/x-009.tar", "s3://b/x-010.tar", "s3://b/x-011.tar"]),
        ("x-{9..10}.tar", ["x-9.tar", "x-10.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("x-{3..1}.tar", "counts down"),
        ("x-{}.tar", "neither a count"),
        ("x-{00..9.tar", "a brace without its other"),
        ("x-{0..99999999}.tar", "more than 10,000,000 names"),
    ],
)
def test_braces_that_say_nothing_are_refused(pattern: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        expand(pattern)


def test_globs_are_looked_up_and_counts_are_not(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "a.txt"):
        (tmp_path / name).touch()
    assert locate([f"{tmp_path}/*.tar", "/not/there-{0..1}.tar"]) == [
        f"{tmp_path}/a.tar", f"{tmp_path}/b.tar", "/not/there-0.tar", "/not/there-1.tar",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no tar shard matches .*z\*.tar"):
        locate([f"{tmp_path}/z*.tar"])
    with pytest.raises(DataError, match=r"a.tar is named twice"):
        locate([f"{tmp_path}/*.tar", f"{tmp_path}/a.tar"])


def test_globs_of_uris_give_uris(tmp_path: Path) -> None:
    with fsspec.open("memory://shards/one.tar", "wb") as file:
        file.write(b"x")
    assert locate(["memory://shards/*.tar"]) == ["memory:///shards/one.tar"]
    (tmp_path / "x.tar").touch()
    assert locate([f"file://{tmp_path}/*.tar"]) == [f"file://{tmp_path}/x.tar"]


def test_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a/{0..1}.tar") == f"{tmp_path}/a/{{0..1}}.tar"
    assert absolute("s3://b/x.tar") == "s3://b/x.tar"
