"""A real phase that begins with a file of another project, and leaves for another project again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from model import config, contract, sealed
from model.contract import Cause, CheckpointRef
from model.networks.vit import VisionTransformer
from model.weights import __main__ as command
from orchestrator import progress
from tests.model.test_checkpoint import make_attempt
from tests.model.test_train import MODEL, images as images, phase_settings, train
from tests.model.weights.test_outside import apart, ours, seen

pytestmark = pytest.mark.jobs


def attempt(run_dir: Path, images: Path, weights: Path, **changes: Any) -> contract.Attempt:
    settings = phase_settings(images, steps=2, checkpoints={"every": 2}, weights=str(weights))
    settings["optim"]["lr"] = 0.0  # so that what it began with is what it ends with
    return make_attempt(run_dir, model=MODEL, settings=settings, files={"weights": str(weights)}, **changes)


def test_a_public_backbone_is_taken_and_heads_begin_fresh(tmp_path: Path, images: Path) -> None:
    network = ours(config.read(config.Model, MODEL).backbone)
    torch.save(network.state_dict(), tmp_path / "public.pth")
    ran = train(attempt(tmp_path / "run", images, tmp_path / "public.pth"))
    assert ran.end().cause is Cause.DONE
    notes = [step.note for step in progress.steps(ran.attempt.run_dir, 1)]
    assert any("public.pth (official); it has no dino_head and no ibot_head: fresh ones" in note for note in notes)
    ref = CheckpointRef(run=ran.attempt.run_dir, phase="pretrain", attempt=1, step=2)
    taken = sealed.load(ref, "teacher_backbone")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(taken[name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(sealed.load(ref, "student")[f"backbone.{name}"], tensor)

    assert command.main(["convert", ref.path, str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    trained = VisionTransformer(network.settings).eval()
    trained.load_state_dict(taken)
    pixels = torch.randn(1, 3, 40, 24)
    model = AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert apart(seen(trained, pixels), model(pixels).last_hidden_state) < 1e-5


def test_weights_that_do_not_fit_are_the_users_mistake(tmp_path: Path, images: Path) -> None:
    other = ours(config.read(config.Backbone, {**MODEL["backbone"], "registers": 1}))
    torch.save(other.state_dict(), tmp_path / "other.pth")
    ran = train(attempt(tmp_path / "run", images, tmp_path / "other.pth"), world=1)
    assert ran.end().cause is Cause.USER_ERROR
    assert "storage_tokens is [1, 1, 32] and not [1, 2, 32]" in ran.end().message
