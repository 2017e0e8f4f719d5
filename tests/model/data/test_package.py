"""On a package of our own making, unpacked as dpkg would; nothing is downloaded."""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.data import package, stamps
from model.data.package import PackageError

PACKAGE = replace(stamps.PACKAGE, digest=lambda unpacked: unpacked.name)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an earlier run left in the cache, as it should be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["stamps"])
    (PACKAGE.folder / "birds").mkdir(parents=True)
    for name in ("birds/owl.png", "birds/owl.txt", "COPYRIGHT"):
        (PACKAGE.folder / name).write_text(name)
    package.write_sums(PACKAGE.folder)
    return PACKAGE.folder


def test_what_was_prepared_is_checked(prepared: Path) -> None:
    assert not package.is_complete(prepared.parent)
    assert package.is_complete(prepared)
    (prepared / "birds/owl.txt").write_text("Changed.\n")
    assert not package.is_complete(prepared)
    (prepared / "birds/owl.txt").unlink()
    assert not package.is_complete(prepared)


def test_a_second_run_finds_it_done(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert package.main(PACKAGE, "The images.") == 0
    assert f"The stamps are there already, 3 files, each as it should be: {prepared}" in capsys.readouterr().out


def test_only_known_or_accepted_packages_are_taken(tmp_path: Path) -> None:
    file, unpacked = tmp_path / "stamps_1.deb", tmp_path / "unpacked"
    file.write_bytes(b"a package")
    seen = hashlib.sha256(b"a package").hexdigest()
    with pytest.raises(PackageError, match=f"sha256 {seen}.\n.*python -P -m model.data.stamps --accept {seen}"):
        package.check(PACKAGE, file, unpacked, None)
    with pytest.raises(PackageError):
        package.check(PACKAGE, file, unpacked, "0" * 64)
    package.check(PACKAGE, file, unpacked, seen)
    package.check(replace(PACKAGE, known={seen: "1"}), file, unpacked, None)
    package.check(replace(PACKAGE, known_contents={"unpacked": "1"}), file, unpacked, None)


def test_without_apt_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["stamps"])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert package.main(PACKAGE, "The images.") == 2
    said = capsys.readouterr().err
    assert "package tuxpaint-stamps-default, and apt is not here" in said
    assert "dinoctl submit jobs/demo.yaml data.path=FOLDER" in said
