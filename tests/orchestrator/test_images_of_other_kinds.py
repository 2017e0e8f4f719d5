"""Jobs on images that are no photographs: what has to fit together, and where the numbers of `normalise` come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.problems import Problem, SpecError
from orchestrator.spec import Job, read_job, reread, resolved

JOB = (Path(__file__).parent / "valid.yaml").read_text()
FIVE = ("data.channels=5", "data.bits=16", "model.backbone.channels=5")
NO_COLOURS = ("augment.saturation=0", "augment.hue=0", "augment.grayscale=0")
HALF = "data.normalise=half"
MEASURED = {"channels": 5, "bits": 16, "mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.1, 0.2, 0.1, 0.2, 0.1], "images": 3}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def job(*overrides: str) -> Job:
    return read_job("job.yaml", overrides, check_data=False)


def problems(*overrides: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        job(*overrides)
    return caught.value.problems


def only(*overrides: str) -> str:
    found = problems(*overrides)
    assert len(found) == 1, "\n".join(map(str, found))
    return str(found[0])


def measured(**changes: Any) -> str:
    Path("stats.json").write_text(json.dumps({**MEASURED, **changes}))
    return "data.normalise=stats.json"


# --- normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_a_name_is_resolved_to_its_numbers(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    data = job(f"data.normalise={name}").phases["pretrain"].data
    assert (data.mean, data.std, data.normalise) == (mean, std, None)


def test_a_file_is_read_once_and_may_change_afterwards(folder: Path) -> None:
    made = job(*FIVE, *NO_COLOURS, measured())
    assert made.evaluate is not None
    for data in (*(phase.data for phase in made.phases.values()), made.evaluate.data):
        assert (data.mean, data.std) == (tuple(MEASURED["mean"]), tuple(MEASURED["std"]))
    spec = resolved(made)
    (folder / "stats.json").unlink()
    assert reread(spec, {"name": "local", "launcher": "local"})[0] == spec


def test_a_phase_may_have_its_own() -> None:
    made = job("phases.text.data={mean: [0.1, 0.2, 0.3], std: [1.0, 1.0, 1.0]}", "phases.gram.data.normalise=half")
    assert made.phases["text"].data.mean == (0.1, 0.2, 0.3)
    assert made.phases["gram"].data.mean == (0.5, 0.5, 0.5)
    assert made.phases["pretrain"].data.mean == (0.485, 0.456, 0.406)


def test_the_evaluation_normalises_as_the_backbone_learnt() -> None:
    mean, std = problems("phases.highres.data.normalise=half")
    assert "data.mean: the evaluation's is not that of phase highres, whose backbone it scores" in str(mean)
    assert "found: [0.485, 0.456, 0.406]" in str(mean)
    assert "allowed: [0.5, 0.5, 0.5] (phases.highres.data.mean)" in str(mean)
    assert std.found == "[0.229, 0.224, 0.225]"
    assert job("phases.highres.data.normalise=half", "evaluate.data.normalise=half").phases


def test_what_is_wrong_with_a_file_is_said_once() -> None:
    says = only(*FIVE, *NO_COLOURS, "data.normalise=nowhere.json")
    assert says.startswith("override data.normalise=nowhere.json: data.normalise: no such file")
    assert "imagenet, half, none, or a file" in says
    Path("torn.json").write_text("{")
    assert "cannot be read" in only(*FIVE, *NO_COLOURS, "data.normalise=torn.json")
    Path("other.json").write_text('{"mean": [1]}')
    assert "not a file of measured numbers" in only(*FIVE, *NO_COLOURS, "data.normalise=other.json")
    says = only(*FIVE, *NO_COLOURS, measured(channels=3, bits=8))
    assert "measured of images of another kind\n    found: stats.json: channels 3 and bits 8" in says


def test_numbers_for_each_channel_and_said_once() -> None:
    assert "5 channels have no usual one, as RGB has; `dinoctl data stats PATH --channels 5" in only(*FIVE, *NO_COLOURS)
    assert "imagenet is for 3 channels and not for 5" in only(*FIVE, *NO_COLOURS, "data.normalise=imagenet")
    assert "normalise and mean exclude each other" in only(HALF, "data.mean=[0.5, 0.5, 0.5]")
    assert "mean: 2 numbers for channels: 3" in only("data.mean=[0.5, 0.5]")
    assert "data.std" in only("data.std=[0.0, 1.0, 1.0]")
    assert "data.channels: not allowed here" in only("data.channels=1000000000", HALF)
    assert "data.normalise: not allowed here" in only("data.normalise=[1]")
    says = only(*FIVE, *NO_COLOURS, HALF, "data.background=[0.0, 0.0, 0.0]")
    assert "background: a colour, which 5 channels have not" in says


# --- what fits together -----------------------------------------------------------------------------------------------


def test_five_channels_are_fine_once_all_says_so() -> None:
    made = job(*FIVE, *NO_COLOURS, HALF)
    assert made.phases["text"].data.channels == made.model.backbone.channels == 5
    assert job(*FIVE, HALF, "augment.jitter=0", "augment.grayscale=0").phases  # without jitter there are no colours


def test_images_and_network_have_the_same_channels() -> None:
    says = only(*FIVE[:2], *NO_COLOURS, HALF)
    assert says.startswith("override data.channels=5: data.channels: the network is made for other images")
    assert "found: data.channels 5, model.backbone.channels 3" in says
    assert "hint: model.backbone.channels=5" in says


def test_colour_operations_are_refused_by_name() -> None:
    found = problems(*FIVE, HALF)
    assert [problem.path for problem in found] == [f"phases.{name}.augment" for name in ("pretrain", "gram", "highres")]
    assert "needs RGB, and images have 5 channels" in str(found[0])
    assert "found: augment.saturation 0.2, augment.hue 0.1, augment.grayscale 0.2" in str(found[0])
    assert "hint: augment: {saturation: 0.0, hue: 0.0, grayscale: 0.0}" in str(found[0])
    found = problems(*FIVE, HALF, "augment={jitter: 0.0, grayscale: 0.1}")
    assert "found: augment.grayscale 0.1\n" in str(found[0])
