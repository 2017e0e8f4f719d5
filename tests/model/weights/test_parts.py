"""Parts of checkpoints as one file, also those that were cut over processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from model.weights import __main__ as command, stream
from model.weights.convert import convert, export
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


@pytest.mark.parametrize("form", ["ours", "official", "huggingface", "timm"])
def test_an_exported_backbone_is_converted_as_the_checkpoint_is(tmp_path: Path, form: str) -> None:
    folder, file = sealed(tmp_path / "run"), tmp_path / "e.safetensors"
    export(str(folder), str(file), "teacher_backbone")
    of_file, of_run = open_source(str(file)), open_source(str(folder))
    assert (of_file.stated, of_file.backbone, of_file.images) == (True, of_run.backbone, of_run.images)
    ending = "" if form in ("huggingface", "timm") else ".safetensors"
    made = [tmp_path / f"{name}{ending}" for name in ("of_file", "of_run")]
    notes = [convert(source, str(path), form).notes for source, path in zip((of_file, of_run), made, strict=True)]
    assert notes[0] == notes[1]
    for name in ("preprocessor_config.json", "config.json"):
        told = [path / name for path in made]
        assert told[0].exists() == told[1].exists()
        assert not told[0].exists() or told[0].read_text() == told[1].read_text()
    assert [open_source(str(path)).images for path in made] == [of_run.images] * 2


def test_only_a_backbone_has_images(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    export(str(folder), str(tmp_path / "heads.safetensors"), "teacher_heads")
    assert stream.open_file(tmp_path / "heads.safetensors")[1] == {"format": "pt"}


def test_info_shows_how_images_are_normalised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(str(sealed(tmp_path / "run")), str(tmp_path / "e.safetensors"), "teacher_backbone")
    assert command.main(["info", str(tmp_path / "e.safetensors")]) == 0
    said = "images: 3 channels of 8 bits, normalised by mean [0.1, 0.2, 0.3], std [1, 1, 1]"
    assert said in capsys.readouterr().out.splitlines()
    assert command.main(["info", str(tmp_path / "e.safetensors"), "--json"]) == 0
    images = {"bits": 8, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    assert json.loads(capsys.readouterr().out)["images"] == images


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sealed(tmp_path / "run")
    words = ["part", str(folder), str(tmp_path / "heads.safetensors"), "teacher_heads"]
    assert command.main(words) == 0
    assert "heads.safetensors: " in capsys.readouterr().out
    assert command.main(words) == 2
    assert "is there already" in capsys.readouterr().err
