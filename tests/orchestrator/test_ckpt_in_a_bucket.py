"""`dinoctl ckpt` on a run in a bucket of a real S3 store, and copies between a bucket and a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from model import contract, sealed, storage
from model.contract import Cause, CheckpointRef
from orchestrator import cli
from tests.orchestrator.checkpoint_files import left, seal
from tests.orchestrator.written import Run

pytestmark = [pytest.mark.jobs, pytest.mark.requires("s3")]


def test_all_that_it_does(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def dinoctl(*words: str, exits: int = 0) -> str:
        assert cli.main(["ckpt", *words]) == exits
        said = capsys.readouterr()
        return said.out + said.err

    run = Run(f"{s3}/runs/tiny", checkpoints={"every": 2, "keep_last": 1})
    for number, step in enumerate((2, 4, 6), 1):
        run.launch(number, "pretrain")
        seal(run.path, "pretrain", number, step)
        run.end(number, Cause.KILLED, [step])
    assert [line.split()[:2] for line in dinoctl("ls", run.path).splitlines()[1:-1]] == [
        ["pretrain", "2"], ["pretrain", "4"], ["pretrain", "6"],
    ]  # fmt: skip
    assert dinoctl("verify", run.path).count(": whole, ") == 3
    dinoctl("pin", f"{run.path}#pretrain@4", "--why", "a reason")
    assert dinoctl("prune", run.path).startswith("removed pretrain@2 (attempt 1): not kept, ")
    assert left(run.path, "pretrain") == ["2/4", "3/6"]
    assert "a reason" in dinoctl("inspect", f"{run.path}#pretrain@4")

    dinoctl("unpin", f"{run.path}#pretrain@4")
    dinoctl("pin", f"{run.path}#pretrain@4", "--parts", "student")
    assert dinoctl("prune", run.path).startswith("removed optimizer, teacher_backbone of pretrain@4 (attempt 2): ")
    names = storage.names(CheckpointRef(run.path, "pretrain", 2, 4).path)
    assert names == ["manifest.json", "optimizer.dropped", "student.safetensors", "teacher_backbone.dropped"]
    assert dinoctl("verify", run.path).count(": whole, ") == 2
    with pytest.raises(sealed.CheckpointError, match="it was removed, as nothing kept it"):
        sealed.load(CheckpointRef(run.path, "pretrain", 2, 4), "optimizer")

    dinoctl("copy", f"{run.path}#pretrain@6", str(tmp_path / "copy"))
    dinoctl("copy", f"{tmp_path}/copy/checkpoints/pretrain/3/6", f"{s3}/copy", "--parts", "student")
    back = CheckpointRef(f"{s3}/copy", "pretrain", 3, 6)
    assert sealed.load(back, "student")["w"].tolist() == [3, 6, 0]
    assert "whole" in dinoctl("verify", back.path)

    exported = tmp_path / "student.safetensors"
    assert cli.main(["ckpt", "export", back.path, str(exported), "--part", "student"]) == 0
    assert load_file(exported)["w"].tolist() == [3, 6, 0]

    path = f"{run.path}/{contract.checkpoint_dir('pretrain', 3, 6)}/student.safetensors"
    storage.replace(path, storage.read(path)[:-1])
    assert f"{path}: " in dinoctl("verify", run.path, "--mark", exits=1)
    assert "BAD: " in dinoctl("ls", run.path)
    with pytest.raises(sealed.DamagedError, match="torn"):
        sealed.load(CheckpointRef(run.path, "pretrain", 3, 6), "student")
