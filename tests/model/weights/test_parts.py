"""Parts of checkpoints as one file, also those that were cut over processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from model.weights import __main__ as command
from model.weights.convert import export
from model.weights.entries import WeightsError
from model.weights.sources import open_source
from tests.model.weights.test_sources import sealed


def cut_in_two(folder: Path, part: str) -> None:
    """The part as two processes seal it: each file has some rows of each tensor, and says which."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    whole = load_file(folder / f"{part}.safetensors")
    files = []
    for shard in (1, 0):  # the order of the files says nothing
        cuts = {name: tensor.shape[0] // 3 for name, tensor in whole.items()}
        own = {n: (t[: cuts[n]] if shard == 0 else t[cuts[n] :]).contiguous() for n, t in whole.items()}
        rows = {name: [0 if shard == 0 else cuts[name], tensor.shape[0]] for name, tensor in whole.items()}
        data = save(own, {"dinoctl-rows": json.dumps(rows)})
        path = folder / f"{part}-{shard:05d}-of-00002.safetensors"
        path.write_bytes(data)
        about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files.append({"path": str(path.relative_to(folder.parents[3])), **about})
    manifest["parts"][part] = files
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_cut_over_processes_is_put_together(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    whole = load_file(folder / "teacher_backbone.safetensors")
    export(str(folder), str(tmp_path / "whole.safetensors"), "teacher_backbone")
    cut_in_two(folder, "teacher_backbone")
    size = export(str(folder), str(tmp_path / "cut.safetensors"), "teacher_backbone")
    assert size == (tmp_path / "cut.safetensors").stat().st_size
    for file in ("whole", "cut"):
        exported = load_file(tmp_path / f"{file}.safetensors")
        assert exported.keys() == whole.keys()
        assert all(tensor.equal(whole[name]) for name, tensor in exported.items())
    own = open_source(str(folder)).own
    assert all(own[name].read().equal(tensor) for name, tensor in whole.items())


def test_a_part_is_exported_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    target = tmp_path / "out.safetensors"
    with pytest.raises(WeightsError, match="has no gram_teacher, only "):
        export(str(folder), str(target), "gram_teacher")
    file = folder / "teacher_backbone.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="torn or altered"):
        export(str(folder), str(target), "teacher_backbone")
    assert not target.exists()
    target.touch()
    with pytest.raises(WeightsError, match="is there already"):
        export(str(folder), str(target), "teacher_backbone")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sealed(tmp_path / "run")
    words = ["part", str(folder), str(tmp_path / "heads.safetensors"), "teacher_heads"]
    assert command.main(words) == 0
    assert "heads.safetensors: " in capsys.readouterr().out
    assert command.main(words) == 2
    assert "is there already" in capsys.readouterr().err
