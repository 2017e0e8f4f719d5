"""`dinoctl ckpt`, as a user calls it, on a run's directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model import contract, sealed, storage
from model.contract import Cause, CheckpointRef
from orchestrator import checkpoints, cli
from tests.orchestrator.checkpoint_files import left, seal
from tests.orchestrator.written import Run

ROOT = Path(__file__).parents[2]


class Shell:
    """dinoctl on the runs of a folder."""

    def __init__(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.runs, self.capsys = runs, capsys

    def __call__(self, *words: str, exits: int = 0) -> str:
        code = cli.main(["ckpt", *words, "--runs", str(self.runs)])
        said = self.capsys.readouterr()
        assert code == exits, said.out + said.err
        return said.out + said.err


@pytest.fixture
def dinoctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path / "runs", capsys)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """pretrain over, by two attempts; gram under way."""
    run = Run(tmp_path / "runs" / "tiny", checkpoints={"every": 2, "keep_last": 1, "keep_every": 4})
    for number, steps in ((1, [2, 4]), (2, [6])):
        run.launch(number, "pretrain")
        for step in steps:
            seal(run.path, "pretrain", number, step)
        run.end(number, Cause.KILLED, steps)
    run.launch(3, "gram")
    run.told(3, "gram", resume=[])
    frozen = sealed.read_manifest(ref(run, "pretrain", 1, 4)).parts["teacher_backbone"]
    seal(run.path, "gram", 3, 2, gram_teacher=frozen)
    return run


def ref(run: Run, phase: str, attempt: int, step: int) -> CheckpointRef:
    return CheckpointRef(run.path, phase, attempt, step)


# --- looking ----------------------------------------------------------------------------------------------------------


def test_ls(run: Run, dinoctl: Shell) -> None:
    dinoctl("pin", "tiny#pretrain@4", "--why", "for the paper")
    lines = dinoctl("ls", "tiny").splitlines()
    assert lines[0].split() == ["phase", "step", "attempt", "size", "age", "parts", "why", "it", "stays"]
    assert [line.split()[:3] for line in lines[1:-1]] == [
        ["pretrain", "2", "1"], ["pretrain", "4", "1"], ["pretrain", "6", "2"], ["gram", "2", "3"],
    ]  # fmt: skip
    assert lines[1].endswith("may go")
    assert "every 4, pinned by " in lines[2]
    assert lines[2].endswith(": for the paper")
    assert lines[3].endswith("newest, final, evaluate.backbone takes it") or lines[3].endswith("newest, final")
    assert lines[-1].startswith("4 checkpoints, ")
    assert lines[-1].endswith("of them may go")


def test_ls_for_programs(run: Run, dinoctl: Shell) -> None:
    rows = {(row["phase"], row["step"]): row for row in json.loads(dinoctl("ls", "tiny", "--json"))}
    gram = rows["gram", 2]
    assert gram["shared"] == gram["parts"]["gram_teacher"] > 0
    assert gram["bytes"] == sum(gram["parts"].values())
    assert (gram["counts"], gram["bad"], gram["sealed_at"]) == (True, "", 1000.0)
    assert gram["path"] == ref(run, "gram", 3, 2).path
    assert rows["pretrain", 2]["kept"] == []


def test_inspect(run: Run, dinoctl: Shell) -> None:
    said = dinoctl("inspect", "tiny#pretrain@4")
    for word in ("state after 4 updates of pretrain", "student.safetensors", "sha256", "torch 2", "loop: step 4"):
        assert word in said
    assert "w                                                    3                  U8" in said
    view = json.loads(dinoctl("inspect", "tiny#pretrain@4", "--json"))
    (file,) = view["parts"]["optimizer"]
    assert file["tensors"] == [{"name": "w", "dtype": "U8", "shape": [3]}]
    assert view["manifest"]["step"] == 4
    assert dinoctl("inspect", ref(run, "pretrain", 1, 4).path) == said


# --- verifying --------------------------------------------------------------------------------------------------------


def alter(ref: CheckpointRef, name: str, how: str) -> Path:
    path = Path(ref.path, name)
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(data[:-1] if how == "torn" else data[:-1] + bytes([data[-1] ^ 1]))
    return path


@pytest.mark.parametrize(("how", "says"), [("missing", "not there"), ("torn", "torn"), ("flipped", "altered")])
def test_verify_names_each_bad_file_and_marks_only_when_asked(run: Run, dinoctl: Shell, how: str, says: str) -> None:
    assert dinoctl("verify", "tiny").count(": whole, ") == 4
    bad = ref(run, "pretrain", 2, 6)
    whole = Path(bad.path, "student.safetensors").read_bytes()
    paths = [alter(bad, f"{part}.safetensors", how) for part in ("student", "optimizer")]
    said = dinoctl("verify", "tiny", exits=1)
    assert "pretrain@6 (attempt 2): BAD\n" in said
    assert all(f"  {path}" in said for path in paths)
    assert said.count(says) == 2
    assert said.count(": whole, ") == 3
    assert storage.names(f"{run.path}/bad") == []

    assert "BAD; marked" in dinoctl("verify", "tiny#pretrain@6", "--mark", exits=1)
    assert "BAD: " in dinoctl("ls", "tiny")
    paths[0].unlink(missing_ok=True)
    paths[0].write_bytes(whole)
    assert "BAD; marked already" in dinoctl("verify", "tiny", exits=1)


def test_what_was_repaired_is_whole_again(run: Run, dinoctl: Shell) -> None:
    path = Path(ref(run, "pretrain", 2, 6).path, "student.safetensors")
    whole = path.read_bytes()
    alter(ref(run, "pretrain", 2, 6), "student.safetensors", "torn")
    dinoctl("verify", "tiny", "--mark", exits=1)
    path.write_bytes(whole)
    assert "lift that with --mark" in dinoctl("verify", "tiny")
    assert "its mark is lifted" in dinoctl("verify", "tiny", "--mark")
    assert storage.names(f"{run.path}/bad") == []


def test_verify_misses_a_manifest_that_should_be_there(run: Run, dinoctl: Shell) -> None:
    manifest = Path(ref(run, "pretrain", 2, 6).path, "manifest.json")
    whole = manifest.read_bytes()
    manifest.unlink()
    assert f"{manifest}: not there, though the log counts it" in dinoctl("verify", "tiny", exits=1)
    manifest.write_bytes(b"{")
    said = json.loads(dinoctl("verify", "tiny", "--json", exits=1))
    assert "torn" in next(one for one in said if one["wrong"])["wrong"][0]
    manifest.write_bytes(whole.replace(b'"loop":{"step":6}', b'"loop":{"step":7}'))
    (found,) = [one for one in json.loads(dinoctl("verify", "tiny", "--json", exits=1)) if one["wrong"]]
    assert "altered" in found["wrong"][0]


# --- keeping and removing ---------------------------------------------------------------------------------------------


def test_prune(run: Run, dinoctl: Shell) -> None:
    assert "would remove pretrain@2 (attempt 1): not kept, " in dinoctl("prune", "tiny", "--dry-run")
    assert left(run.path, "pretrain") == ["1/2", "1/4", "2/6"]
    assert "removed pretrain@2 (attempt 1): not kept" in dinoctl("prune", "tiny")
    assert left(run.path, "pretrain") == ["1/4", "2/6"]
    assert left(run.path, "gram") == ["3/2"], "the live attempt removes its own"
    assert "nothing to remove" in dinoctl("prune", "tiny")


def test_pin_and_unpin(run: Run, dinoctl: Shell) -> None:
    assert "pinned pretrain@2 (attempt 1)" in dinoctl("pin", "tiny#pretrain@2")
    dinoctl("pin", "tiny#pretrain@2")  # again is no mistake
    assert "is pinned by" in dinoctl("pin", "tiny#pretrain@2", "--why", "another reason", exits=2)
    assert "nothing to remove" in dinoctl("prune", "tiny")
    assert "no longer" in dinoctl("unpin", "tiny#pretrain@2")
    assert "is not pinned" in dinoctl("unpin", "tiny#pretrain@2", exits=2)
    pin = checkpoints.Pin(run="/runs/other", run_id="c0ffee", parts=("student",))
    storage.publish(f"{run.path}/{contract.pin_file('pretrain', 1, 2, 'c0ffee-init')}", contract.encode(pin))
    assert "pinned by run /runs/other: --force removes" in dinoctl("unpin", "tiny#pretrain@2", exits=2)
    assert "no longer" in dinoctl("unpin", "tiny#pretrain@2", "--force")
    assert "removed pretrain@2" in dinoctl("prune", "tiny")


def test_parts(run: Run, dinoctl: Shell, tmp_path: Path) -> None:
    """Of a pinned checkpoint the parts that the pin names stay, and every command knows."""
    dinoctl("pin", "tiny#pretrain@2", "--parts", "teacher_backbone")
    assert "; its student, optimizer may go" in dinoctl("ls", "tiny").splitlines()[1]
    assert "would remove student, optimizer of pretrain@2 (attempt 1): " in dinoctl("prune", "tiny", "--dry-run")
    assert "removed student, optimizer of pretrain@2 (attempt 1): " in dinoctl("prune", "tiny")
    (row,) = [row for row in json.loads(dinoctl("ls", "tiny", "--json")) if row["step"] == 2 and row["phase"] != "gram"]
    assert (list(row["parts"]), row["may_go"]) == (["teacher_backbone"], {})
    assert "its optimizer, student went, as nothing kept them" in dinoctl("inspect", "tiny#pretrain@2")
    assert "pretrain@2 (attempt 1): whole, 71 B in 1 files" in dinoctl("verify", "tiny#pretrain@2")
    dinoctl("unpin", "tiny#pretrain@2")
    assert "student of that checkpoint went" in dinoctl("pin", "tiny#pretrain@2", "--parts", "student", exits=2)
    assert "no such part: head" in dinoctl("pin", "tiny#pretrain@2", "--parts", "head", exits=2)
    assert "has no student; it has teacher_backbone" in dinoctl(
        "copy", "tiny#pretrain@2", str(tmp_path / "copy"), "--parts", "student", exits=2
    )
    dinoctl("copy", "tiny#pretrain@2", str(tmp_path / "copy"))
    made = CheckpointRef(str(tmp_path / "copy"), "pretrain", 1, 2)
    assert storage.names(made.path) == ["manifest.json", "teacher_backbone.safetensors"]
    assert "whole" in dinoctl("verify", made.path)


# --- taking out -------------------------------------------------------------------------------------------------------


def test_copy_is_whole_and_can_be_read(run: Run, dinoctl: Shell, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    assert dinoctl("copy", "tiny#gram@2", str(target)).splitlines()[0] == f"{target}/checkpoints/gram/3/2"
    made = CheckpointRef(str(target), "gram", 3, 2)
    for part in ("student", "optimizer", "gram_teacher"):
        assert sealed.load(made, part)["w"].equal(sealed.load(ref(run, "gram", 3, 2), part)["w"])
    assert "whole" in dinoctl("verify", made.path)
    assert "is there already" in dinoctl("copy", "tiny#gram@2", str(target), exits=2)

    dinoctl("copy", "tiny#pretrain@6", str(target), "--parts", "teacher_backbone")
    assert set(sealed.read_manifest(CheckpointRef(str(target), "pretrain", 2, 6)).parts) == {"teacher_backbone"}
    assert storage.names(f"{target}/checkpoints/pretrain/2/6") == ["manifest.json", "teacher_backbone.safetensors"]
    assert "has no nothing; it has " in dinoctl("copy", "tiny#pretrain@4", str(target), "--parts", "nothing", exits=2)


@pytest.mark.parametrize("how", ["missing", "torn", "flipped"])
def test_a_damaged_one_is_not_copied_at_all(run: Run, dinoctl: Shell, tmp_path: Path, how: str) -> None:
    path = alter(ref(run, "pretrain", 1, 4), "teacher_backbone.safetensors", how)
    assert str(path) in dinoctl("copy", "tiny#pretrain@4", str(tmp_path / "copy"), exits=2)
    assert not [file for file in (tmp_path / "copy").rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "nix"], ["inspect", "tiny#pretrain@3"], ["inspect", "pretrain@2"], ["verify", "tiny#nix@2"],
        ["pin", "tiny"], ["copy", "tiny#pretrain@best(x)", "y"],
    ],
)  # fmt: skip
def test_mistakes_are_sentences(run: Run, dinoctl: Shell, words: list[str]) -> None:
    said = dinoctl(*words, exits=2)
    assert said.startswith("dinoctl: ")
    assert len(said.splitlines()) == 1


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; from orchestrator import ckpt_command; "
        "print([name for name in ('torch', 'numpy', 'pydantic', 'rich', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
