"""Real jobs on images that are no photographs: five channels of 16 bits as TIFF, 16-bit grey PNG in tar shards, and
training that goes on from the one to the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from model import contract, sealed
from model.contract import CheckpointRef
from tests.jobs.harness import PATIENCE, STAGES, Job, cleaned_up, each_phase_ran_once, part_of_tiny

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(900)]

STEPS = ("phases.pretrain.steps=6", "phases.gram.steps=4", "phases.highres.steps=4", "phases.text.steps=4")
NO_COLOURS = "augment={saturation: 0.0, hue: 0.0, grayscale: 0.0}"
WEIGHT = "patch_embed.proj.weight"


def cells(number: int, channels: int) -> NDArray[np.uint16]:
    """As a 12-bit camera sees a few round cells, each channel brighter than the one before: [64, 64, channels]."""
    rng = np.random.default_rng(number)
    pixels = rng.normal(300, 20, (64, 64, channels))
    rows, columns = np.mgrid[:64, :64]
    for row, column, radius in zip(*rng.integers((4, 4, 3), (60, 60, 4 + 4 * (number % 3)), (5, 3)).T, strict=True):
        pixels[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] += 400.0 * np.arange(1, channels + 1)
    return np.clip(pixels, 0, 4095).astype(np.uint16)


def run(job: Job, *words: str) -> None:
    assert job.start(job.submit(*words)).wait(2 * PATIENCE) == 0, job.output()


def data(folder: Path, *words: str) -> str:
    """`dinoctl data`, which knows no runs."""
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "data", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def notes(job: Job, attempt: int) -> str:
    return " | ".join(record.note for record in job.records(attempt) if record.note)


def part(job: Job, name: str, phase: str = "pretrain") -> dict[str, Any]:
    """Of the phase's last checkpoint."""
    step, attempt = job.sealed(phase)[-1]
    return sealed.load(CheckpointRef(str(job.run_dir), phase, attempt, step), name)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """All four phases and the evaluation on 36 TIFFs in three folders, normalised as measured; one is of three
    channels."""
    folder = tmp_path_factory.mktemp("five")
    for number in range(36):
        file = folder / "images" / "abc"[number % 3] / f"{number:02d}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(file, np.moveaxis(cells(number, 5), -1, 0), imagej=True)
        file.with_suffix(".txt").write_text(f"cells of kind {number % 3}, number {number}\n")
    tifffile.imwrite(folder / "images/a/rgb.tif", cells(0, 3), photometric="rgb")
    job = Job(folder, folder / "images", name="five")
    with cleaned_up(job):
        said = data(folder, "stats", "images", "--channels", "5", "--bits", "16", "--to", "stats.json")
        assert "1 could not be read" in said
        kind = ["data.channels=5", "data.bits=16", "data.normalise=stats.json", "data.max_skip_rate=0.05"]
        run(job, *STEPS, *kind, "model.backbone.channels=5", NO_COLOURS)
        yield job


def test_five_channels_of_16_bits_go_all_the_way(five: Job) -> None:
    each_phase_ran_once(five)
    measured = json.loads((five.folder / "stats.json").read_bytes())
    assert (measured["channels"], measured["bits"], measured["images"]) == (5, 16, 36)
    assert np.all(np.diff(measured["mean"]) > 0)
    assert 0.004 < measured["mean"][0] < 0.008  # 300 of 65535, and some cells: 16 bits are kept
    for number in range(1, len(STAGES) + 1):
        kind = five.attempt(number).settings["data"]
        assert (kind["mean"], kind["std"], kind["normalise"]) == (measured["mean"], measured["std"], None)
    assert "rgb.tif (3 channels, and data.channels is 5)" in notes(five, 1)
    assert part(five, "teacher_backbone", "highres")[WEIGHT].shape == (32, 5, 8, 8)
    report = json.loads((five.run_dir / contract.REPORT_FILE).read_bytes())
    scores = {row["score"]: row for row in report["rows"]}
    assert set(scores) == {"k-NN accuracy", "linear probe accuracy", "instance retrieval R@1", "caption-to-image R@1"}
    assert [row["score"] for row in report["left_out"]] == ["foreground mIoU"]
    assert set(scores["k-NN accuracy"]["baselines"]) == {"majority", "raw pixels"}  # and no colours
    for picture in report["pictures"]:
        assert (five.run_dir / picture).read_bytes().startswith(b"\x89PNG")


def test_its_normalisation_goes_out_with_the_weights(five: Job) -> None:
    measured = json.loads((five.folder / "stats.json").read_bytes())
    said = five.dinoctl(["weights", "convert", "five", "hf", "--to", "huggingface"])
    assert said.returncode == 0, said.stdout
    told = json.loads((five.folder / "hf/preprocessor_config.json").read_bytes())
    assert (told["image_mean"], told["image_std"]) == (measured["mean"], measured["std"])
    assert told["rescale_factor"] == 1 / 65535
    assert json.loads((five.folder / "hf/config.json").read_bytes())["num_channels"] == 5


@pytest.fixture(scope="module")
def grey(five: Job) -> Path:
    """20 PNGs of 16-bit grey in a folder of the run's, and in tar shards."""
    folder = five.folder / "grey"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(imagecodecs.png_encode(cells(number, 1)[..., 0]))
    data(five.folder, "pack", "grey", "tars", "--images-per-shard", "8")
    return folder


@pytest.mark.usefixtures("grey")
@pytest.mark.parametrize("taken", ["init", "weights"])
def test_grey_in_shards_goes_on_from_five_channels(five: Job, taken: str) -> None:
    """The embedding and its moments are adapted, and the log says so."""
    kind = {"path": "x.tar", "channels": 1, "bits": 16, "normalise": "half", "workers": 2}
    spec = part_of_tiny(five.folder / "grey.yaml", ["pretrain"], data=kind)
    job = Job(five.folder, Path("tars/images-{000000..000002}.tar"), spec, name=taken)
    with cleaned_up(job):
        settings = (f"phases.pretrain.{taken}=five#pretrain@final", "phases.pretrain.steps=4", "optim.lr=0.0")
        run(job, *settings, "model.backbone.channels=1", NO_COLOURS)
        told = "its patch embedding, of 5 channels, is adapted to 1: each has their mean, times 5/1"
        assert f"takes {taken} from " in notes(job, 1)
        assert told in notes(job, 1)
        before, after = part(five, "teacher_backbone"), part(job, "student")  # which no learning rate has moved
        if taken == "init":
            before = {name.removeprefix("backbone."): value for name, value in part(five, "student").items()}
        assert np.allclose(after[f"backbone.{WEIGHT}"], before[WEIGHT].sum(dim=1, keepdim=True), atol=1e-6)
        assert np.array_equal(after["backbone.cls_token"], before["cls_token"])


def test_a_frozen_network_of_other_channels_is_refused(five: Job, grey: Path) -> None:
    settings = ("data.channels=1", "data.bits=16", "data.normalise=half", "model.backbone.channels=1", NO_COLOURS)
    spec = part_of_tiny(five.folder / "gram.yaml", ["gram"])
    job = Job(five.folder, grey, spec, name="frozen")
    with cleaned_up(job):
        teacher = ("phases.gram.init=five#pretrain@final", "phases.gram.gram_teacher=five#pretrain@final")
        assert job.start(job.submit(*teacher, *settings)).wait(PATIENCE) != 0
        says = "gram_teacher: that network looks at images of 5 channels and this job's have 1 (data.channels)"
        assert says in job.end(1)["message"]
