"""What lies on a disk: checkpoints, official files, distributed ones; strict, streamed, nothing untrusted unpickled."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoint, config, storage
from model.config import Backbone
from model.networks.init import create
from model.networks.vit import VisionTransformer
from model.weights import __main__ as command, networks, start, stream
from model.weights.convert import convert
from model.weights.entries import WeightsError, of
from model.weights.outside import Prepared
from model.weights.pickled import read_index
from model.weights.sources import local_copy, open_source
from tests.model.test_checkpoint import make_attempt

ROOT = Path(__file__).parents[3]
BACKBONE: dict[str, Any] = {"arch": "custom", "dim": 32, "depth": 2, "heads": 2, "patch_size": 8, "registers": 2}
HEAD = {"prototypes": 8, "hidden": 16, "bottleneck": 4}
MODEL: dict[str, Any] = {"backbone": BACKBONE, "dino_head": HEAD, "ibot_head": HEAD}


def model(**changes: Any) -> config.Model:
    return config.read(config.Model, {**MODEL, "backbone": {**BACKBONE, **changes}})


def state(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    return dict(create(lambda: VisionTransformer(model(**changes).backbone), seed, "backbone").state_dict())


def heads() -> dict[str, Tensor]:
    shapes = [shape for head in start.heads(model()).values() for shape in head.items()]
    return {name: torch.randn(shape) for name, shape in shapes}


def same(found: Any, wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name].read(), wanted[name]) for name in wanted)


def training_file(path: Path) -> dict[str, Tensor]:
    """As official training leaves it: a student too, and the losses' centres. Returns the teacher under our names."""
    teacher, teacher_heads, student = state(1), heads(), state(2)
    content = {
        "teacher": {**{f"backbone.{name}": value for name, value in teacher.items()}, **teacher_heads},
        "student": {f"backbone.{name}": value for name, value in student.items()},
        "iteration": 7,
    }
    torch.save(content, path)
    return {**teacher, **teacher_heads}


# --- kinds of sources -------------------------------------------------------------------------------------------------


def test_a_released_file_tells_its_backbone(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pth")
    source = open_source(str(tmp_path / "a.pth"))
    assert (source.format, source.stated) == ("official", False)
    assert source.backbone.model_dump(exclude={"layer_scale"}) == model().backbone.model_dump(exclude={"layer_scale"})
    assert same(source.own, state())


@pytest.mark.parametrize("arch", ["vits16", "vitb16"])
def test_a_released_architecture_is_known_by_its_shapes(arch: str) -> None:
    with torch.device("meta"):
        found = VisionTransformer(networks.named(arch)).state_dict()
    assert networks.released({name: tuple(value.shape) for name, value in found.items()}) == networks.named(arch)


def test_of_a_training_file_the_teacher_is_taken_and_the_rest_is_told(tmp_path: Path) -> None:
    wanted = training_file(tmp_path / "a.pth")
    source = open_source(str(tmp_path / "a.pth"))
    assert same(source.own, wanted)
    assert set(source.left) == {f"student.backbone.{name}" for name in state()}
    student = open_source(str(tmp_path / "a.pth"), network="student")
    assert same(student.own, state(2))
    with pytest.raises(WeightsError, match="has no gram_teacher: there is"):
        open_source(str(tmp_path / "a.pth"), network="gram_teacher")


def distributed(folder: Path) -> dict[str, Tensor]:
    teacher = state(1)
    content = {
        "model": {f"teacher.backbone.{name}": value for name, value in teacher.items()}
        | {f"student.backbone.{name}": value for name, value in state(2).items()},
        "optimizer": {"state": {"a": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "iteration": 7,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder)
    return teacher


def test_a_distributed_checkpoint_is_a_source(tmp_path: Path) -> None:
    wanted = distributed(tmp_path / "dcp")
    source = open_source(str(tmp_path / "dcp"))
    assert same(source.own, wanted)
    convert(source, str(tmp_path / "a.safetensors"), "official")
    assert load_file(tmp_path / "a.safetensors").keys() == wanted.keys()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def test_nothing_untrusted_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": state(), "args": Evil()}, "a.pth")
    with pytest.raises(WeightsError, match=r"holds more than tensors, .* not unpickled .*posix\.mkdir"):
        open_source("a.pth")
    distributed(Path("dcp"))
    index = read_index(Path("dcp/.metadata"))
    for planner_data in (Evil(), [eval]):
        index.planner_data = planner_data
        Path("dcp/.metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(WeightsError, match=r"names (posix|builtins)\.(mkdir|eval), which no index"):
            open_source("dcp")
    assert not Path("pwned").exists()


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    distributed(tmp_path / "dcp")
    index = read_index(tmp_path / "dcp" / ".metadata")
    assert index.storage_data is not None
    next(iter(index.storage_data.values())).relative_path = "../secret"
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(WeightsError, match="outside of its folder"):
        open_source(str(tmp_path / "dcp"))


def sealed(run_dir: Path, parts: dict[str, dict[str, Tensor]] | None = None) -> Path:
    attempt = make_attempt(run_dir)
    student = {"backbone.cls_token": torch.zeros(1)}
    parts = parts or {"teacher_backbone": state(1), "teacher_heads": heads(), "student": student}
    data = {"path": "images", "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    checkpoint.seal(attempt, 5, parts, {}, {"step": 5}, {"networks": MODEL, "phase": {"data": data}})
    return run_dir / "checkpoints" / "pretrain" / "1" / "5"


def test_a_checkpoint_of_ours_is_a_source_that_tells_everything(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    source = open_source(str(folder))
    assert (source.stated, source.backbone) == (True, model().backbone)
    assert source.images == Prepared(8, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert "part student" in source.left
    done = convert(source, str(tmp_path / "hf"), "huggingface")
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    assert sum("(a head)" in name for name in done.dropped) == len(heads())


def test_a_teacher_is_read_beside_its_centres_and_where_its_backbone_alone_was_kept(tmp_path: Path) -> None:
    own, centre = heads(), {"dino_center.center": torch.zeros(1, 8)}
    folder = sealed(tmp_path / "centred", {"teacher_backbone": state(1), "teacher_heads": {**own, **centre}})
    source = open_source(str(folder))
    assert same(source.own, {**state(1), **own})
    assert source.left == ("dino_center.center",)
    assert same(open_source(str(sealed(tmp_path / "kept", {"teacher_backbone": state(1)}))).own, state(1))


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    file = sealed(tmp_path / "run") / "teacher_backbone.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="not what its manifest says"):
        open_source(str(file.parent))


def test_a_uri_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(state(), tmp_path / "a.pth")
    uri = (tmp_path / "a.pth").as_uri()
    assert same(open_source(uri).own, state())
    (tmp_path / "a.pth").unlink()
    assert same(open_source(uri).own, state())
    with pytest.raises(storage.StoreError, match=r"fetching .*/b\.pth"):
        local_copy((tmp_path / "b.pth").as_uri())
    with pytest.raises(storage.StoreError, match="fetching nothing://x"):
        local_copy("nothing://x")


def test_tensors_that_are_views_are_read_as_they_are(tmp_path: Path) -> None:
    """Files of torch.save hold storages: parameters, transposed and sliced ones included."""
    wanted = state()
    packed = torch.cat([wanted["norm.weight"], wanted["norm.bias"]])
    views = {
        "norm.weight": packed[:32], "norm.bias": packed[32:],
        "blocks.0.attn.proj.weight": wanted["blocks.0.attn.proj.weight"].t().contiguous().t(),
        "cls_token": torch.nn.Parameter(wanted["cls_token"]),
    }  # fmt: skip
    torch.save({**wanted, **views}, tmp_path / "a.pth")
    assert same(open_source(str(tmp_path / "a.pth")).own, wanted)
    torch.save({**wanted, **views}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(open_source(str(tmp_path / "old.pth")).own, wanted)


def test_a_torn_or_forged_safetensors_file_is_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pth")
    whole = tmp_path / "a.safetensors"
    convert(open_source(str(tmp_path / "a.pth")), str(whole), "official")
    torn = tmp_path / "torn.safetensors"
    data = whole.read_bytes()
    for spoilt in (b"", data[:5], data[:200], data[:-1], b"\xff" * 8 + data[8:], data.replace(b"[32]", b"[33]", 1)):
        torn.write_bytes(spoilt)
        with pytest.raises(WeightsError, match=r"torn\.safetensors is no safetensors file"):
            open_source(str(torn))


# --- strict -----------------------------------------------------------------------------------------------------------


def test_every_name_that_does_not_fit_is_told(tmp_path: Path) -> None:
    wrong = state()
    del wrong["blocks.1.norm2.weight"], wrong["norm.bias"]
    wrong["blocks.0.surplus"] = torch.zeros(3)
    wrong["blocks.0.norm1.weight"] = torch.zeros(31)
    torch.save(wrong, tmp_path / "a.pth")
    with pytest.raises(WeightsError) as caught:
        open_source(str(tmp_path / "a.pth"), model().backbone)
    for part in ("missing blocks.1.norm2.weight [32]", "missing norm.bias", "unexpected blocks.0.surplus [3]",
                 "blocks.0.norm1.weight is [31] and not [32]"):  # fmt: skip
        assert part in str(caught.value)


def test_a_target_is_never_overwritten(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pth")
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(WeightsError, match="is there already"):
        convert(open_source(str(tmp_path / "a.pth")), str(tmp_path / "b.safetensors"), "ours")
    with pytest.raises(WeightsError, match=r"ends in \.safetensors"):
        convert(open_source(str(tmp_path / "a.pth")), str(tmp_path / "b"), "ours")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "b.safetensors"]


def test_heads_stay_in_ours_and_go_from_the_official_one(tmp_path: Path) -> None:
    wanted = training_file(tmp_path / "a.pth")
    source = open_source(str(tmp_path / "a.pth"))
    convert(source, str(tmp_path / "ours.safetensors"), "ours")
    assert same(open_source(str(tmp_path / "ours.safetensors")).own, wanted)
    done = convert(source, str(tmp_path / "official.safetensors"), "official")
    assert load_file(tmp_path / "official.safetensors").keys() == state().keys()
    assert {f"{name} (a head)" for name in heads()} < set(done.dropped)


# --- what a phase begins with -----------------------------------------------------------------------------------------


def test_what_fits_a_model_and_what_does_not(tmp_path: Path) -> None:
    training_file(tmp_path / "a.pth")
    torch.save(state(), tmp_path / "bare.pth")
    assert start.fresh_heads(start.open_fitting(str(tmp_path / "a.pth"), model()), model()) == []
    source = start.open_fitting(str(tmp_path / "bare.pth"), model())
    assert start.fresh_heads(source, model()) == ["dino_head", "ibot_head"]
    with pytest.raises(WeightsError, match=r"missing storage_tokens|storage_tokens is \[1, 2, 32\] and not"):
        start.open_fitting(str(tmp_path / "bare.pth"), model(registers=4))
    convert(source, str(tmp_path / "hf"), "huggingface")
    assert start.mistakes(open_source(str(tmp_path / "hf")), model()) == []
    with pytest.raises(WeightsError, match=r"norm_eps is 1e-05 there and 1e-06 in model\.backbone"):
        start.open_fitting(str(tmp_path / "hf"), model(norm_eps=1e-6))


def test_a_head_that_the_model_has_not_is_left_and_told(tmp_path: Path) -> None:
    training_file(tmp_path / "a.pth")
    torch.save(state(), tmp_path / "bare.pth")
    tied, data = config.read(config.Model, {**MODEL, "ibot_head": "tied"}), config.read(config.Data, {"path": "."})
    source = start.open_fitting(str(tmp_path / "a.pth"), tied)
    assert start.read(source, tied).keys() == {n for n in source.own if not n.startswith("ibot_head.")}
    assert start.told(source, tied, data) == "; its ibot_head is not taken: the model has none"
    bare = start.open_fitting(str(tmp_path / "bare.pth"), tied)
    assert start.told(bare, tied, data) == "; it has no dino_head: fresh ones"


# --- streaming --------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
from model.weights import __main__ as command

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

before, most, over = anonymous(), 0, threading.Event()

def watch():
    global most
    while not over.wait(0.002):
        most = max(most, anonymous())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
code = command.main(sys.argv[1:])
over.set()
watcher.join()
print(most - before)
sys.exit(code)
"""


def sparse(path: Path, backbone: Backbone) -> int:
    """A file of the backbone's tensors that takes no space on the disk: all zeros but the buffers."""
    values = networks.buffers(backbone)
    entries = {name: of(torch.empty(shape, device="meta")) for name, shape in networks.expected(backbone).items()}
    head = stream.header(entries, {})
    with path.open("wb") as file:
        file.write(head)
        for name, entry in entries.items():
            if name in values:
                file.write(values[name].numpy().tobytes())
            else:
                file.seek(entry.count * 4, os.SEEK_CUR)
        file.truncate()
    return path.stat().st_size


@pytest.mark.requires("proc")
@pytest.mark.jobs
def test_three_gigabytes_take_the_memory_of_one_tensor(tmp_path: Path) -> None:
    backbone = networks.named("vit7b16", depth=5)
    size = sparse(tmp_path / "a.safetensors", backbone)
    assert size > 3e9
    run = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, "convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b"),
         "--to", "huggingface"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    largest = 3 * 4096 * 4096 * 4
    assert int(run.stdout.splitlines()[-1]) < largest + 1e9
    written = tmp_path / "b" / "model.safetensors"
    assert written.stat().st_size > size - 1e6
    written.unlink()  # pytest keeps the folders of its last runs


# --- the command ------------------------------------------------------------------------------------------------------


def test_info_counts_the_parameters_of_an_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info", "vit7b16"]) == 0
    out = capsys.readouterr().out
    assert "610 tensors, 6,716,043,264 parameters" in out
    assert "rope_embed.periods" in out
    assert "(buffer)" in out


def test_info_of_a_file_and_of_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training_file(tmp_path / "a.pth")
    assert command.main(["info", str(tmp_path / "a.pth"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    counted = sum(value.numel() for name, value in state().items() if "periods" not in name and "mask" not in name)
    counted += state()["mask_token"].numel() + sum(value.numel() for value in heads().values())
    assert told["parameters"] == counted
    for wrong, says in {"nothing.pth": "no such file", __file__: "no file of torch.save"}.items():
        assert command.main(["info", wrong]) == 2
        assert says in capsys.readouterr().err


def test_check_names_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state(), tmp_path / "a.pth")
    assert command.main(["check", str(tmp_path / "a.pth"), json.dumps(MODEL)]) == 0
    wider = {**MODEL, "backbone": {**BACKBONE, "registers": 4}}
    assert command.main(["check", str(tmp_path / "a.pth"), json.dumps(wider)]) == 2
    assert "storage_tokens is [1, 2, 32] and not [1, 4, 32]" in capsys.readouterr().err
