"""What dino.txt (arXiv 2412.16334, section 3) puts on top of a frozen vision transformer: a text tower and a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model import config
from model.networks.attention import Group, pack, unpack
from model.networks.blocks import Attention, Block, Mlp, SwiGlu
from model.networks.init import Normal, Rule
from model.networks.perturb import Perturbation
from model.networks.vit import Features

NORM_EPS = 1e-5
FFN_RATIO = 4.0
FFN_ALIGN = 64
LAYER_SCALE = 1e-5


class TextTower(nn.Module):
    """A causal pre-norm transformer over token ids, read at the end token. Its initial weights are CLIP's."""

    def __init__(self, settings: config.TextTower, embed_dim: int) -> None:
        super().__init__()
        dim = settings.dim
        self.settings = settings
        # Not drawn here, as `init.create` draws all; on the meta device torch's own drawing would import its compiler.
        table = torch.empty(settings.vocabulary, dim)
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        self.positional_embedding = nn.Parameter(torch.empty(settings.context, dim))
        self.blocks = nn.ModuleList(_text_block(settings) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.projection = nn.Linear(dim, embed_dim, bias=False)

    def initial(self) -> dict[str, Rule]:
        dim, depth = self.settings.dim, self.settings.depth
        into_residual = Normal((dim * 2 * depth) ** -0.5)
        rules: dict[str, Rule] = {"positional_embedding": Normal(0.01), "projection.weight": Normal(dim**-0.5)}
        for block in range(depth):
            rules[f"blocks.{block}.attn.qkv.weight"] = Normal(dim**-0.5)
            rules[f"blocks.{block}.attn.proj.weight"] = into_residual
            rules[f"blocks.{block}.mlp.fc1.weight"] = Normal((2 * dim) ** -0.5)
            rules[f"blocks.{block}.mlp.fc2.weight"] = into_residual
        return rules

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids int64 [n, context] -> [n, embed_dim]. The end token is each row's largest id, its first if repeated."""
        count, length = tokens.shape
        x = pack([self.token_embedding(tokens) + self.positional_embedding[:length]])
        for block in self.blocks:
            x = block(x, [Group(count, length)], [None])
        ends = tokens.argmax(dim=1)
        pooled = self.norm(x[torch.arange(count, device=tokens.device) * length + ends])
        return self.projection(pooled)  # type: ignore[no-any-return]


class VisionHead(nn.Module):
    """Blocks over a frozen tower's [CLS, registers, patches], without RoPE; CLS joined with the mean of the patches."""

    def __init__(self, settings: config.VisionHead, dim: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_vision_block(dim, heads) for _ in range(settings.blocks))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        if 2 * dim != embed_dim and embed_dim % 2:
            raise ValueError(f"embed_dim must be even, half of it is the CLS's and half the patches', got {embed_dim}")
        self.projection = nn.Identity() if 2 * dim == embed_dim else nn.Linear(dim, embed_dim // 2, bias=False)

    def initial(self) -> dict[str, Rule]:
        if isinstance(self.projection, nn.Linear):
            return {"projection.weight": Normal(self.projection.in_features**-0.5)}
        return {}

    def forward(self, features: Features, perturbation: Perturbation | None = None) -> Tensor:
        """[n, embed_dim] of n images; `perturbation` is the drop path of these blocks in training."""
        prefix = 1 + features.registers.shape[1]
        tokens = torch.cat((features.cls[:, None], features.registers, features.patches), dim=1)
        groups, x = [Group(*tokens.shape[:2])], pack([tokens])
        for depth, block in enumerate(self.blocks):
            x = block(x, groups, [None if perturbation is None else perturbation.kept(depth)])
        (x,) = unpack(self.norm(x), groups)
        pooled = torch.stack((x[:, 0], x[:, prefix:].mean(dim=1)), dim=1)
        return self.projection(pooled).flatten(1)  # type: ignore[no-any-return]


class LogitScale(nn.Module):
    """The learnt inverse temperature, kept as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.empty(()))

    def initial(self) -> dict[str, Rule]:
        return {"log": math.log(1 / 0.07)}

    def forward(self) -> Tensor:
        return self.log.exp()


def _text_block(settings: config.TextTower) -> Block:
    attn = Attention(settings.dim, settings.heads, qkv_bias=False, mask_k_bias=False, causal=True)
    return Block(settings.dim, attn, Mlp(settings.dim, settings.ffn_ratio), layer_scale=None, eps=NORM_EPS)


def _vision_block(dim: int, heads: int) -> Block:
    attn = Attention(dim, heads, qkv_bias=False, mask_k_bias=False)
    return Block(dim, attn, SwiGlu(dim, FFN_RATIO, FFN_ALIGN), layer_scale=LAYER_SCALE, eps=NORM_EPS)
