"""The networks of versions 1 and 2: sizes, agreement with timm at the table's own grid, positions at other grids."""

import math

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked

from model import accounting, config
from model.networks.init import create
from model.networks.vit import View, VisionTransformer, resize_positions

RELEASED = {
    "dino_vits16": 21_665_664,
    "dino_vitb16": 85_798_656,
    "dinov2_vits14": 22_056_576,
    "dinov2_vitb14": 86_580_480,
    "dinov2_vitl14": 304_368_640,
    "dinov2_vitg14": 1_136_480_768,
}


def small(version="v1", **changes):
    arch = {"v1": "dino_vits16", "v2": "dinov2_vitg14"}[version]
    values = {"arch": arch, "dim": 32, "depth": 3, "heads": 2, "patch_size": 4, "position_grid": 4}
    return config.Backbone(**{**values, **changes})


def network(settings, seed=0):
    net = create(lambda: VisionTransformer(settings), seed, "backbone")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


def images(count, height, width=None):
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", RELEASED)
def test_has_the_released_size(arch):
    settings = config.Backbone(arch=arch)
    with torch.device("meta"):
        net = VisionTransformer(settings)
    assert sum(p.numel() for p in net.parameters()) == RELEASED[arch] == accounting.backbone_parameters(settings)
    assert list(net.buffers()) == []


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_equals_timm(version):
    net = network(small(version))
    v2 = {"init_values": 1.0, "mlp_layer": SwiGLUPacked, "mlp_ratio": 2 * 88 / 32, "act_layer": torch.nn.SiLU}
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0, **(v2 if version == "v2" else {})
    ).eval()
    names = {"w12": "fc1", "w3": "fc2"}
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in net.state_dict().items()
        if name != "mask_token"
    }
    theirs.load_state_dict(state, strict=True)
    expected = theirs.forward_features(images(2, 16))
    found = net.features(images(2, 16))
    torch.testing.assert_close(found.cls, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patches, expected[:, 1:], rtol=0, atol=1e-5)
    with torch.no_grad():
        net.pos_embed[0, 3, 5] += 0.01
    assert (net.features(images(2, 16)).patches - expected[:, 1:]).abs().max() > 1e-4


def cubic(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize(("grid", "offset"), [((7, 3), 0.1), ((2, 6), 0.1), ((5, 8), 0.0)])
def test_positions_of_another_grid_are_bicubic_with_the_offset(grid, offset):
    side, dim = 4, 2
    table = torch.randn(1, side * side, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(1, grid[0] * grid[1], dim, dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = (i + 0.5) * side / (grid[0] + offset) - 0.5, (j + 0.5) * side / (grid[1] + offset) - 0.5
            for row in range(math.floor(y) - 1, math.floor(y) + 3):
                for column in range(math.floor(x) - 1, math.floor(x) + 3):
                    inside = min(max(row, 0), side - 1) * side + min(max(column, 0), side - 1)
                    expected[0, i * grid[1] + j] += cubic(y - row) * cubic(x - column) * table[0, inside]
    torch.testing.assert_close(resize_positions(table, grid, offset), expected, rtol=1e-6, atol=1e-6)


def test_positions_of_the_own_grid_are_left_as_they_are():
    table = torch.randn(1, 16, 2)
    assert resize_positions(table, (4, 4), 0.1) is table
    with pytest.raises(ValueError, match=r"position_offset 1\.5 is too large"):
        resize_positions(table, (5, 5), 1.5)


def test_hidden_patches_keep_their_place():
    net = network(small("v2"))
    masks = torch.ones(1, 16, dtype=torch.bool)
    patches = net([View(images(1, 16), masks)])[0].patches[0]
    assert (patches[0] - patches[5]).abs().max() > 1e-3  # the same token in two places


def test_registers_have_no_place():
    one, other = network(small("v2", registers=2)), network(small("v2", registers=2))
    assert one.features(images(1, 16)).registers.shape == (1, 2, 32)
    assert one.pos_embed.shape == (1, 17, 32)
    with torch.no_grad():
        other.pos_embed.zero_()
        one.pos_embed.zero_()
    assert torch.equal(one.features(images(1, 16)).cls, other.features(images(1, 16)).cls)


def test_pictures_of_attention_need_no_rope():
    assert network(small()).cls_attention(images(2, 8, 16)).shape == (2, 2, 2, 4)


def test_without_a_mask_token_nothing_is_masked():
    with pytest.raises(ValueError, match=r"no mask token \(model\.backbone\.mask_token\)"):
        network(small())([View(images(1, 16), torch.ones(1, 16, dtype=torch.bool))])


def test_positions_and_their_grid_go_together():
    for changes in ({"position_grid": None}, {"positions": "rope"}):
        with pytest.raises(ValueError, match="position_grid goes with"):
            small(**changes)
