"""The patch embedding of other channels: what it computes, and what becomes of moments, files and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import config
from model.networks.vit import VisionTransformer
from model.weights import start, stem
from model.weights.convert import convert
from model.weights.entries import WeightsError
from model.weights.outside import IMAGENET, Prepared
from model.weights.sources import open_source
from tests.model.weights.test_sources import model, state

WEIGHT = "patch_embed.proj.weight"


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_an_image_that_is_the_same_in_all_channels_is_embedded_as_before(channels: int) -> None:
    before, now = VisionTransformer(model().backbone), VisionTransformer(model(channels=channels).backbone)
    before.load_state_dict(state())
    now.load_state_dict(stem.fit(state(), channels))
    grey = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        seen = [
            network.features(grey.expand(-1, count, -1, -1)).cls for network, count in ((before, 3), (now, channels))
        ]
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


def test_moments_are_averaged_and_all_else_is_as_it_was() -> None:
    weight = torch.randn(4, 3, 2, 2)
    tensors = {
        f"exp_avg/backbone.{WEIGHT}": weight,
        f"exp_avg_sq/backbone.{WEIGHT}": weight**2,
        f"step/backbone.{WEIGHT}": torch.tensor(7.0),
        f"backbone.{WEIGHT}": weight,
        "dino_head.mlp.0.weight": weight,
    }
    found = stem.fit(tensors, 6)
    assert torch.equal(found[f"exp_avg/backbone.{WEIGHT}"], weight.mean(1, keepdim=True).repeat(1, 6, 1, 1))
    assert torch.equal(found[f"exp_avg_sq/backbone.{WEIGHT}"], (weight**2).mean(1, keepdim=True).repeat(1, 6, 1, 1))
    assert torch.equal(found[f"backbone.{WEIGHT}"], weight.mean(1, keepdim=True).repeat(1, 6, 1, 1) / 2)
    for name in (f"step/backbone.{WEIGHT}", "dino_head.mlp.0.weight"):
        assert found[name] is tensors[name]
    assert stem.fit(tensors, 3)[f"backbone.{WEIGHT}"] is weight


@dataclass(frozen=True)
class Unread:
    shape: tuple[int, ...]

    def read(self, rows: range) -> torch.Tensor:
        return torch.ones(len(rows), *self.shape[1:])


def test_of_what_is_not_read_yet_only_the_embedding_is() -> None:
    norm = Unread((4,))
    found = stem.fit({WEIGHT: Unread((4, 3, 2, 2)), "norm.weight": norm}, 6)
    assert torch.equal(found[WEIGHT], torch.full((4, 6, 2, 2), 0.5))
    assert found["norm.weight"] is norm


def networks(channels: int) -> dict[str, Any]:
    return model(channels=channels).model_dump(mode="json")


def test_only_what_goes_on_learning_is_adapted() -> None:
    def read(part: str) -> dict[str, torch.Tensor]:
        return {WEIGHT: torch.ones(4, 3, 2, 2)}

    for name in ("init", "weights"):
        adapted, told = stem.handed_over(name, read, networks(3), networks(5))
        assert adapted("teacher_backbone")[WEIGHT].shape == (4, 5, 2, 2)
        assert told == "; its patch embedding, of 3 channels, is adapted to 5: each has their mean, times 3/5"
        assert stem.handed_over(name, read, networks(3), networks(3)) == (read, "")
    assert stem.handed_over("gram_teacher", read, networks(3), networks(3)) == (read, "")
    with pytest.raises(
        ValueError, match="gram_teacher: that network looks at images of 3 channels and this job's have 5"
    ):
        stem.handed_over("gram_teacher", read, networks(3), networks(5))


@pytest.mark.parametrize("form", ["official", "ours"])
def test_a_file_of_rgb_fits_a_job_of_five_channels(tmp_path: Path, form: str) -> None:
    save_file(state(), tmp_path / "rgb.safetensors")
    file = tmp_path / "rgb.safetensors"
    if form == "ours":
        file = tmp_path / "ours.safetensors"
        convert(open_source(str(tmp_path / "rgb.safetensors"), model().backbone), str(file), "ours")
    source = start.open_fitting(str(file), model(channels=5))
    assert start.read(source, model(channels=5))[WEIGHT].shape[1] == 5
    half = config.read(config.Data, {"path": ".", "normalise": "half"})
    assert start.told(source, model(channels=5), half).endswith(stem.told(3, 5))
    of_imagenet = replace(source, images=IMAGENET)
    assert start.told(of_imagenet, model(), half).endswith("; it was trained on images normalised otherwise")
    assert start.told(of_imagenet, model(), config.read(config.Data, {"path": "."})).endswith("fresh ones")
    with pytest.raises(WeightsError, match=r"storage_tokens is \[1, 2, 32\] and not \[1, 1, 32\]"):
        start.open_fitting(str(file), model(channels=5, registers=1))


def test_what_its_images_are_goes_with_the_weights(tmp_path: Path) -> None:
    prepared = Prepared(16, (0.1, 0.2, 0.3, 0.4, 0.5), (0.1,) * 5)
    save_file(state(channels=5), tmp_path / "bare.safetensors")
    bare = open_source(str(tmp_path / "bare.safetensors"), model().backbone)
    assert bare.backbone.channels == 5
    with pytest.raises(WeightsError, match="does not say how images of 5 channels are normalised"):
        convert(bare, str(tmp_path / "no"), "huggingface")
    source = replace(bare, images=prepared)
    for form in ("ours", "official", "huggingface", "timm"):
        target = tmp_path / (f"{form}.safetensors" if form in ("ours", "official") else form)
        convert(source, str(target), form)
        again = open_source(str(target), model().backbone)
        assert (again.images, again.backbone.channels) == (prepared, 5)
    assert load_file(tmp_path / "official.safetensors")[WEIGHT].shape[1] == 5
