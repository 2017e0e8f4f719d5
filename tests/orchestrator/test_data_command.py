"""`dinoctl data`: its options reach `model.data`, and its exit codes come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import cli, data_command


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        ("index a.tar b.tar --to i", "index a.tar b.tar --to i"),
        ("pack f t", "pack f t --name images --images-per-shard 1000 --seed 0"),
        ("check f", "check f"),
        ("check x-{0..9}.tar --index i", "check x-{0..9}.tar --index i"),
        ("stats f --images 5 --json", "stats f --images 5 --json"),
        ("stats f --channels 5 --bits 16 --to s", "stats f --channels 5 --bits 16 --images 10000 --to s"),
        ("pack f t --bits 16", "pack f t --bits 16 --name images --images-per-shard 1000 --seed 0"),
    ],
)
def test_the_options_are_handed_on(given: str, handed: str) -> None:
    assert data_command.words(cli.parse(["data", *given.split()])) == handed.split()


def test_a_mistake_comes_back_as_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert capfd.readouterr().err == f"dinoctl: no such folder: {tmp_path}/nowhere\n"
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "index", "a.tar"])
    assert caught.value.code == 2
    assert "--to" in capfd.readouterr().err
