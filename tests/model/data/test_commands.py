"""`python -P -m model.data`: what each command leaves, says and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import config
from model.data import __main__ as command, pack, shards
from model.data.__main__ import main
from model.data.images import decode
from model.data.index import list_images
from model.data.shards import ShardSource
from tests.model.data.conftest import PHOTOGRAPHS, picture, save


@pytest.fixture
def packed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The images of conftest in three shards: their pattern."""
    assert main(["pack", str(images), str(tmp_path / "tars"), "--images-per-shard", "16"]) == 0
    said = capsys.readouterr().out
    pattern = f"{tmp_path}/tars/images-{{000000..000002}}.tar"
    assert said == f"40 images in 3 shards, 2 classes (classes.txt); data.path: {pattern}\n"
    return pattern


def test_packed_images_are_the_folders_with_captions_and_labels(images: Path, tmp_path: Path, packed: str) -> None:
    data = config.read(config.Data, {"path": packed})
    found = shards.build_or_read(data, str(tmp_path / "run"), lambda done, total: None)
    assert found.samples == [16, 16, 8]
    source = ShardSource(found, data)
    paths = {str(Path(path).with_suffix("")): path for path in list_images(images)}
    keys = [source.name(number).split(": ")[1] for number in range(40)]
    assert sorted(keys) == sorted(paths)
    assert keys != sorted(keys)
    classes = (tmp_path / "tars/classes.txt").read_text().split()
    for number, key in enumerate(keys):
        file = images / paths[key]
        assert source.image(number).tobytes() == decode(file, PHOTOGRAPHS).tobytes()
        assert source.caption(number) == file.with_suffix(".txt").read_text().split("\n")[0]
        assert source.label(number) == classes.index(key.split("/")[0])


def test_progress_is_told_in_lines_where_stderr_is_no_terminal(
    packed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SAY_SECONDS", 0.0)
    assert main(["check", packed]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [f"{number} of 3 shards indexed" for number in (1, 2, 3)]
    assert said[-1] == "40 of 40 images checked"
    monkeypatch.setattr(command, "SAY_SECONDS", 3600.0)
    assert main(["check", packed]) == 0
    assert capsys.readouterr().err == ""


def test_the_same_folder_packs_to_the_same_bytes(images: Path, tmp_path: Path) -> None:
    def bytes_of(folder: str, seed: int) -> list[bytes]:
        pack.pack(str(images), str(tmp_path / folder), "x", 20, seed, lambda done, total: None)
        return [file.read_bytes() for file in sorted((tmp_path / folder).glob("*.tar"))]

    first = bytes_of("a", 0)
    assert bytes_of("b", 0) == first
    assert bytes_of("c", 1) != first


def test_a_second_set_beside_the_first_has_its_classes_or_is_refused(
    images: Path, tmp_path: Path, packed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = tmp_path / "tars"
    assert main(["pack", str(images), str(tars), "--name", "same"]) == 0
    there = {file.name: file.read_bytes() for file in tars.iterdir()}
    (images / "b").rename(images / "0")  # which would now be class 0, and a class 1
    capsys.readouterr()
    assert main(["pack", str(images), str(tars), "--name", "val"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dinoctl: {tars}/classes.txt holds other classes, which the labels of shards there go by: ")
    assert {file.name: file.read_bytes() for file in tars.iterdir()} == there


def test_a_uri_of_a_file_of_this_machine_is_no_folder_either(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(images), f"file://{images}/a/00.png"]) == 2
    assert capsys.readouterr().err.startswith(f"dinoctl: {images}/a/00.png is a file, and shards go into a folder: ")


def test_names_with_dots_and_names_that_collide(tmp_path: Path) -> None:
    for number, name in enumerate(("v1.2.png", "v1_2.png", "v1_2.webp")):
        save(picture(number), tmp_path / "odd" / name)
    made = pack.pack(str(tmp_path / "odd"), str(tmp_path / "out"), "x", 10, 0, lambda done, total: None)
    assert (made.pattern, made.images, made.shards, made.classes) == (f"{tmp_path}/out/x-000000.tar", 3, 1, 0)
    with tarfile.open(tmp_path / "out/x-000000.tar") as tar:
        assert sorted(tar.getnames()) == ["v1_2-2.png", "v1_2-3.webp", "v1_2.png"]


def test_index_is_made_once_and_used_by_check_and_stats(
    images: Path, tmp_path: Path, packed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index = str(tmp_path / "index")
    for _ in range(2):
        assert main(["index", packed, "--to", index]) == 0
        assert capsys.readouterr().out == f"{index}: 40 images in 3 shards; data.index takes this folder\n"
    assert main(["check", packed, "--index", index]) == 0
    assert "40 images of 3 tar shards" in capsys.readouterr().out
    assert main(["stats", packed, "--index", index, "--json"]) == 0
    of_shards = json.loads(capsys.readouterr().out)
    assert main(["stats", str(images), "--json"]) == 0
    of_folder = json.loads(capsys.readouterr().out)
    assert of_shards["images"] == of_folder["images"] == 40
    for name in ("mean", "std"):
        assert of_shards[name] == pytest.approx(of_folder[name])


def test_stats_are_of_images_that_all_weigh_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Image.new("RGB", (50, 50), (255, 0, 51)), tmp_path / "i/a.png")
    save(Image.new("RGB", (2, 2), (0, 0, 51)), tmp_path / "i/b.png")
    (tmp_path / "i/c.png").write_bytes(b"")
    assert main(["stats", str(tmp_path / "i")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("mean: [0.5000, 0.0000, 0.2000]\nstd: [0.5000, 0.0000, 0.0000]\n# of 2 images of ")
    assert "1 could not be read" in said
    save(picture(1), tmp_path / "one/a.png")
    pixels = np.asarray(decode(tmp_path / "one/a.png", PHOTOGRAPHS)) / 255
    assert main(["stats", str(tmp_path / "one"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean"] == pytest.approx(pixels.mean((0, 1)).tolist())
    assert found["std"] == pytest.approx(pixels.std((0, 1)).tolist())


def test_images_of_another_kind_are_packed_checked_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "bands"
    folder.mkdir()
    bands = rng.integers(0, 4096, (4, 20, 30, 5), dtype=np.uint16)
    for number, pixels in enumerate(bands):
        np.save(folder / f"{number}.npy", pixels)
    save(picture(1), folder / "preview.png")
    kind = ["--channels", "5", "--bits", "16"]
    assert main(["check", str(folder), *kind]) == 1
    assert capsys.readouterr().out.startswith("preview.png: 4 channels, and data.channels is 5\n5 images of ")
    assert main(["pack", str(folder), str(tmp_path / "tars"), *kind]) == 0
    shard = str(tmp_path / "tars/images-000000.tar")
    for path in (str(folder), shard):
        assert main(["stats", path, *kind, "--to", str(tmp_path / "stats.json")]) == 0
        said = capsys.readouterr().out
        assert "# of 4 images of " in said
        assert said.endswith(f", 1 could not be read\n# data.normalise: {tmp_path}/stats.json\n")
        found = config.read(config.Statistics, json.loads((tmp_path / "stats.json").read_bytes()))
        assert (found.channels, found.bits, found.images, found.unreadable) == (5, 16, 4, 1)
        assert found.mean == pytest.approx(bands.mean((0, 1, 2)) / 65535)
        assert found.std == pytest.approx(bands.std((0, 1, 2)) / 65535)
    bands[..., 2] = 7
    for number, pixels in enumerate(bands):
        np.save(folder / f"{number}.npy", pixels)
    assert main(["stats", str(folder), *kind, "--to", str(tmp_path / "stats.json")]) == 2
    assert "channel 2 (from 0) is the same everywhere in " in capsys.readouterr().err
    assert main(["stats", str(folder)]) == 0  # as RGB: the preview alone


def test_check_names_everything_that_cannot_be_read(
    images: Path, tmp_path: Path, packed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "a/04.png").write_bytes(b"")
    assert main(["check", str(images)]) == 1
    assert capsys.readouterr().out.startswith("a/04.png: empty file\n40 images of ")
    index = str(tmp_path / "index")
    assert main(["index", packed, "--to", index]) == 0
    first, second = sorted((tmp_path / "tars").glob("*.tar"))[:2]
    with first.open("r+b") as file:
        file.seek(512)
        file.write(b"damaged!")
    with second.open("ab") as file:
        file.write(bytes(512))
    capsys.readouterr()
    assert main(["check", packed, "--index", index]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{second}: ")
    assert lines[0].endswith("when it was indexed: index it anew")
    assert lines[1].startswith(f"{first}: ")
    assert "not an image of a known format" in lines[1]
    assert lines[2].endswith("looked at, 2 problems")


def test_indexing_a_damaged_shard_says_so(tmp_path: Path, packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    last = sorted((tmp_path / "tars").glob("*.tar"))[-1]
    with last.open("r+b") as file:
        file.truncate(2000)
    assert main(["index", packed, "--to", str(tmp_path / "index")]) == 1
    assert f"damaged: {last}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["index", "nowhere.tar", "--to", "i"], "no such tar shard: "),
        (["index", "images", "--to", "i"], "images: not tar shards (.tar); a folder of images needs no index"),
        (["index", "a.tar", "--to", "s3://b/i"], "an index lies in a folder, not on a bucket"),
        (["index", "a.tar.gz", "--to", "i"], "dinoctl: a.tar.gz is compressed"),
        (["index", "x-{3..1}.tar", "--to", "i"], "counts down"),
        (["index", "a.tar", "b", "--to", "i"], "b in a list: only tar shards can be listed"),
        (["check", "nowhere"], "no such folder: "),
        (["check", "s3://b/images"], "of what is on a bucket only tar shards can be read"),
        (["check", "images", "--index", "idx"], "--index: an index is of tar shards, and images is no .tar: leave it"),
        (["stats", "images", "--index", "idx"], "--index: an index is of tar shards, and images is no .tar: leave it"),
        (["stats", "images", "--channels", "2000"], "--channels 2000: Input should be less than or equal to 1024"),
        (
            ["stats", "images", "--channels", "5"],
            "5 channels of 8 bits; `dinoctl data check` says why, given --channels 5",
        ),
        (["stats", "images", "--channels", "5", "--bits", "16"], " says why, given --channels 5 --bits 16\n"),
        (["stats", "nothing"], " are 3 channels of 8 bits; `dinoctl data check` says why\n"),
        (["check", "full/"], "/full, but tar shards (images-000000.tar): name those, as full/*.tar or full/x-{0000"),
        (["stats", "empty"], "no images under "),
        (["pack", "nowhere", "out"], "no such folder: "),
        (["pack", "empty", "out"], "no images under "),
        (["pack", "images", "s3:/b/x"], "s3:/b/x: one slash makes a folder of it; write s3://b/x, or ./s3:/b/x"),
        (["pack", "images", "full"], "images-000000.tar is there already"),
        (["pack", "images", "ds[v1]"], "/ds[v1]: holds [ and ], which in a data.path stand for other names"),
        (["pack", "images", "s3://b/what?"], "s3://b/what?: holds ?, which in a data.path"),
        (["pack", "images", "out", "--name", "w{eird,*}"], "--name w{eird,*}: holds * and { and }, which in a "),
        (["pack", "images", "a.file"], "/a.file is a file, and shards go into a folder: name one, there already or"),
        (["pack", "images", "a.file/sub/x"], "/a.file is a file, and shards go into a folder"),
        (["pack", "images", ""], "'': an empty path, as of a variable that is not set; name one (. is this folder)"),
        (["pack", "", "out"], "'': an empty path"),
        (["check", ""], "'': an empty path"),
        (["check", "a.tar", ""], "'': an empty path"),
        (["stats", ""], "'': an empty path"),
        (["stats", "images", "--to", ""], "--to '': an empty path"),
        (["check", "x.tar", "--index", ""], "--index '': an empty path"),
        (["index", "x.tar", "--to", ""], "--to '': an empty path"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    says: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/images-000000.tar").touch()
    (tmp_path / "a.file").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/empty.png").touch()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("dinoctl: ")
    assert said.count("\n") == 1
    assert says in said
    assert not list(tmp_path.glob("*:"))
    assert not {"out", "ds[v1]"} & {path.name for path in tmp_path.iterdir()}


def test_it_runs_as_a_process(images: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "model.data", "check", str(images)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"40 images of {images} looked at, 0 problems\n"
