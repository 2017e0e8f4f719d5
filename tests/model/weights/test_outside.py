"""Against independent code: Hugging Face's DINOv3ViTModel and timm's Eva, offline, every weight random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, DINOv3ViTConfig, DINOv3ViTModel

from model import config
from model.config import Backbone
from model.networks.init import create
from model.networks.vit import View, VisionTransformer
from model.weights import networks
from model.weights.convert import convert
from model.weights.outside import Prepared
from model.weights.sources import Source, open_source

SIZES = [(96, 96), (48, 80), (112, 16)]
TOLERANCE = 1e-5

BACKBONES = {
    "vits16": {"arch": "vits16"},
    "vits16plus": {"arch": "vits16plus"},
    "7B's shape": {
        "arch": "custom", "dim": 128, "depth": 3, "heads": 2, "ffn": "swiglu", "ffn_ratio": 3.0, "ffn_align": 64,
        "qkv_bias": False, "untie_local_cls_norm": True,
    },
    "bare": {
        "arch": "custom", "dim": 48, "depth": 2, "heads": 3, "patch_size": 8, "registers": 0, "layer_scale": None,
        "rope_base": 50.0, "ffn_ratio": 3.5,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return config.read(Backbone, BACKBONES[request.param])


def randomise(module: nn.Module) -> None:
    """Weights as wide as keeps the activations in range; everything else far from where it begins."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "token" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)


def ours(settings: Backbone) -> VisionTransformer:
    network = create(lambda: VisionTransformer(settings), 0, "backbone").eval()
    randomise(network)
    return network


def saved(network: VisionTransformer, path: Path) -> Source:
    """As a released file is: names and tensors, nothing else."""
    torch.save(network.state_dict(), path)
    return open_source(str(path), network.settings)


def images(settings: Backbone) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for height, width in SIZES:
        yield torch.randn(2, settings.channels, height, width, generator=generator)


@torch.no_grad()
def seen(network: VisionTransformer, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
    found = network([View(pixels, masks)])[0]
    return torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    assert one.abs().max() > 0.5, "nothing to compare"
    return float((one - other).abs().max())


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def masked(settings: Backbone, pixels: Tensor) -> Tensor:
    patches = pixels[0, 0].numel() // settings.patch_size**2
    return torch.rand(len(pixels), patches, generator=torch.Generator().manual_seed(3)) < 0.4


@torch.no_grad()
def huggingface_sees(model: nn.Module, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
    return model(pixels, bool_masked_pos=masks).last_hidden_state  # type: ignore[no-any-return]


def test_to_huggingface(backbone: Backbone, tmp_path: Path) -> None:
    network = ours(backbone)
    done = convert(saved(network, tmp_path / "a.pth"), str(tmp_path / "hf"), "huggingface")
    model, loaded = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model) is DINOv3ViTModel
    assert not any(loaded.values()), loaded
    for pixels in images(backbone):
        for masks in (None, masked(backbone, pixels)):
            assert apart(seen(network, pixels, masks), huggingface_sees(model.eval(), pixels, masks)) < TOLERANCE
    assert [name.split(" ")[0] for name in done.dropped if "local_cls_norm" in name] == (
        ["local_cls_norm.weight", "local_cls_norm.bias"] if backbone.untie_local_cls_norm else []
    )


def huggingface_model(backbone: Backbone, folder: Path) -> DINOv3ViTModel:
    """A model that we had no hand in, saved by transformers itself."""
    hidden = networks.expected(backbone)
    width = hidden.get("blocks.0.mlp.w1.weight", hidden.get("blocks.0.mlp.fc1.weight", (0,)))[0]
    gated = backbone.ffn == "swiglu"
    model = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=backbone.dim, num_hidden_layers=backbone.depth, num_attention_heads=backbone.heads,
            intermediate_size=width, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
            num_register_tokens=backbone.registers, query_bias=backbone.qkv_bias, value_bias=backbone.qkv_bias,
            patch_size=backbone.patch_size, rope_theta=backbone.rope_base,
        )
    ).eval()  # fmt: skip
    randomise(model)
    model.save_pretrained(folder)
    return model


def test_from_huggingface(backbone: Backbone, tmp_path: Path) -> None:
    model = huggingface_model(backbone, tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"))
    convert(source, str(tmp_path / "ours.safetensors"), "ours")
    back = open_source(str(tmp_path / "ours.safetensors"))
    assert (back.format, back.stated, back.backbone) == ("ours", True, source.backbone)
    network = VisionTransformer(back.backbone).eval()
    network.load_state_dict(load_file(tmp_path / "ours.safetensors"))
    for pixels in images(backbone):
        for masks in (None, masked(backbone, pixels)):
            assert apart(seen(network, pixels, masks), huggingface_sees(model, pixels, masks)) < TOLERANCE


def test_a_weight_nudged_by_a_hundredth_is_seen(tmp_path: Path) -> None:
    """The control: the tolerance is no wider than it must be."""
    network = ours(config.read(Backbone, BACKBONES["vits16"]))
    convert(saved(network, tmp_path / "a.pth"), str(tmp_path / "hf"), "huggingface")
    convert(saved(network, tmp_path / "b.pth"), str(tmp_path / "timm"), "timm")
    with torch.no_grad():
        network.blocks[5].mlp.fc1.weight[7, 7] += 0.01  # type: ignore[union-attr,index]
    model = AutoModel.from_pretrained(tmp_path / "hf").eval()
    eva = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    for pixels in images(network.settings):
        assert apart(seen(network, pixels), huggingface_sees(model, pixels)) > TOLERANCE
        assert apart(seen(network, pixels), timm_sees(eva, pixels)) > TOLERANCE


def test_a_bias_of_keys_goes_to_huggingface_and_back(tmp_path: Path) -> None:
    settings = config.read(Backbone, {**BACKBONES["7B's shape"], "qkv_bias": True, "mask_k_bias": False})
    network = ours(settings)
    convert(saved(network, tmp_path / "a.pth"), str(tmp_path / "hf"), "huggingface")
    model = AutoModel.from_pretrained(tmp_path / "hf").eval()
    for pixels in images(settings):
        assert apart(seen(network, pixels), huggingface_sees(model, pixels)) < TOLERANCE
    back = open_source(str(tmp_path / "hf"))
    assert torch.equal(back.own["blocks.1.attn.qkv.bias"].read(), network.state_dict()["blocks.1.attn.qkv.bias"])


def test_the_image_processor_normalises_as_training_did(tmp_path: Path) -> None:
    network = ours(config.read(Backbone, BACKBONES["bare"]))
    convert(saved(network, tmp_path / "a.pth"), str(tmp_path / "hf"), "huggingface")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    grey = Image.fromarray(np.full((30, 50, 3), 51, dtype=np.uint8))
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 112, 112)
    wanted = (0.2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels.amax(dim=(0, 2, 3)), wanted)


def test_five_channels_of_16_bits_are_prepared_and_seen_as_in_training(tmp_path: Path) -> None:
    network = ours(config.read(Backbone, {**BACKBONES["bare"], "channels": 5}))
    images = Prepared(16, (0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.1, 0.2, 0.1))
    source = replace(saved(network, tmp_path / "a.pth"), images=images)
    for form in ("huggingface", "timm"):
        convert(source, str(tmp_path / form), form)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "huggingface")
    values = torch.randint(0, 65536, (5, 112, 112), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    prepared = processor(values, input_data_format="channels_first", do_resize=False, return_tensors="pt")
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (images.mean, images.std))
    pixels = (values[None] / 65535 - mean) / std
    torch.testing.assert_close(prepared["pixel_values"], pixels)
    model = AutoModel.from_pretrained(tmp_path / "huggingface").eval()
    assert apart(seen(network, pixels), huggingface_sees(model, pixels)) < TOLERANCE
    eva = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert apart(seen(network, pixels), timm_sees(eva, pixels)) < TOLERANCE
    assert eva.pretrained_cfg["mean"] == list(images.mean)


# --- timm -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def timm_sees(model: nn.Module, pixels: Tensor) -> Tensor:
    return model.forward_features(pixels)  # type: ignore[no-any-return,operator]


def test_to_timm(backbone: Backbone, tmp_path: Path) -> None:
    network = ours(backbone)
    done = convert(saved(network, tmp_path / "a.pth"), str(tmp_path / "timm"), "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert "mask_token (timm hides no patches)" in done.dropped
    for pixels in images(backbone):
        assert apart(seen(network, pixels), timm_sees(model, pixels)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("vit_small_patch16_dinov3_qkvb", "vits16"),
        ("vit_small_plus_patch16_dinov3_qkvb", "vits16plus"),
        ("vit_small_plus_patch16_dinov3", "vits16plus"),
    ],
)
def test_from_timm(name: str, arch: str, tmp_path: Path) -> None:
    """A model that we had no hand in; from names and shapes alone."""
    model = timm.create_model(name, num_classes=0).eval()
    randomise(model)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    source = open_source(str(tmp_path / "timm.safetensors"))
    assert (source.format, source.backbone.arch, source.backbone.qkv_bias) == ("timm", arch, name.endswith("qkvb"))
    assert "mask_token" in source.made
    network = VisionTransformer(source.backbone).eval()
    network.load_state_dict({key: value.read() for key, value in source.own.items()})
    for pixels in images(source.backbone):
        assert apart(seen(network, pixels), timm_sees(model, pixels)) < TOLERANCE


def test_a_norm_that_timm_cannot_have_is_told(tmp_path: Path) -> None:
    network = ours(config.read(Backbone, {**BACKBONES["bare"], "norm_eps": 1e-6}))
    done = convert(saved(network, tmp_path / "a.pth"), str(tmp_path / "timm"), "timm")
    assert any("norm_eps is 1e-06 and timm's 1e-05" in note for note in done.notes)


# --- all the way round ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["huggingface", "timm"])
def test_there_and_back_again_is_equal_bit_for_bit(backbone: Backbone, to: str, tmp_path: Path) -> None:
    network = ours(backbone)
    convert(saved(network, tmp_path / "a.pth"), str(tmp_path / "there"), to)
    back = open_source(str(tmp_path / "there"))
    state = network.state_dict()
    for name, value in back.own.items():
        if name.endswith("qkv.bias"):  # the keys' third is masked, so nothing is lost
            value_mask = state[f"{name}_mask"]
            assert torch.equal(value.read(), state[name] * value_mask)
        elif ".ls" in name and name not in state:
            assert bool((value.read() == 1).all())  # Hugging Face has LayerScale always
        elif name in ("mask_token",) and to == "timm":
            assert not value.read().any()
        else:
            assert torch.equal(value.read(), state[name]), name
    assert state.keys() - back.own.keys() <= {"local_cls_norm.weight", "local_cls_norm.bias"}


def test_what_has_no_place_is_an_error(tmp_path: Path) -> None:
    """Learnt positions are no such model's, and RoPE of another base is not what the file's settings say."""
    network = ours(config.read(Backbone, BACKBONES["bare"]))
    state = network.state_dict()
    state["rope_embed.periods"] = state["rope_embed.periods"] * torch.linspace(1, 2, 4)
    torch.save(state, tmp_path / "a.pth")
    source = open_source(str(tmp_path / "a.pth"), network.settings)
    with pytest.raises(ValueError, match=r"rope_embed\.periods is not what this architecture implies"):
        convert(source, str(tmp_path / "hf"), "huggingface")
    assert not (tmp_path / "hf").exists()


def test_settings_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    convert(
        saved(ours(config.read(Backbone, BACKBONES["bare"])), tmp_path / "a.pth"), str(tmp_path / "hf"), "huggingface"
    )
    settings = tmp_path / "hf" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "proj_bias": False}))
    with pytest.raises(ValueError, match="proj_bias: False"):
        open_source(str(tmp_path / "hf"))
