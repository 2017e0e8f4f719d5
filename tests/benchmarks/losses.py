"""What is computed otherwise than naively, beside the naive way: `.venv/bin/python -P -m tests.benchmarks.losses`.

Interleaved, one thread, medians of 15 rounds in milliseconds of CPU time. The naive ways are the published formulas as
they stand: Sinkhorn-Knopp on exp(logits / T), which overflows; a loop over the crops; a loop over the parameters;
torch's own attention, of few tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from model import config, ema
from model.losses.sinkhorn import sinkhorn
from model.networks import attention
from model.networks.attention import Group, attend
from model.networks.init import create
from model.networks.vit import View, VisionTransformer
from tests.benchmarks import options as ask

ROUNDS = 15


def plain_sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    q = torch.exp(logits / temperature).t()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(dim=0, keepdim=True)
        q /= q.shape[1]
    q *= q.shape[1]
    return q.t()


def medians(ways: dict[str, Callable[[], object]]) -> str:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            way()
            taken[name].append(1e3 * (time.process_time() - began))
    return ", ".join(f"{name} {statistics.median(times):.2f}" for name, times in taken.items())


def of_sinkhorn(rows: int, prototypes: int) -> None:
    logits = torch.randn(rows, prototypes) * 0.2
    ways = {"ours": lambda: sinkhorn(logits, 0.07), "naive": lambda: plain_sinkhorn(logits, 0.07)}
    print(f"Sinkhorn, {rows} x {prototypes}: {medians(ways)}")


def of_crops(backbone: VisionTransformer) -> None:
    views = [View(torch.randn(2 * 8, 3, 96, 96)), View(torch.randn(8 * 8, 3, 48, 48))]

    def learn(groups: list[list[View]]) -> None:
        for group in groups:
            sum(part.cls.sum() for part in backbone(group)).backward()  # type: ignore[union-attr]

    ways = {"packed": lambda: learn([views]), "one after the other": lambda: learn([[view] for view in views])}
    print(f"ViT-S, forward and backward of 2 x 96 and 8 x 48, 8 images: {medians(ways)}")


def of_teacher(student: VisionTransformer, teacher: VisionTransformer) -> None:
    @torch.no_grad()
    def naive() -> None:
        for target, source in zip(teacher.parameters(), student.parameters(), strict=True):
            target.copy_(0.99 * target + 0.01 * source)

    ways = {"ours": lambda: ema.update(student, teacher, 0.99, torch.tensor(True)), "naive": naive}
    print(f"EMA of a ViT-S: {medians(ways)}")


def of_attention(sequences: int, tokens: int, heads: int = 6, width: int = 64) -> None:
    qkv, group = torch.randn(sequences * tokens, 3 * heads * width).requires_grad_(), Group(sequences, tokens)
    gradient = torch.randn(sequences * tokens, heads * width)

    def learn(short: int) -> None:
        attention.SHORT = short
        torch.autograd.grad(attend(qkv, [group], heads, lambda attended: attended), qkv, gradient)

    ways = {"ours": lambda: learn(tokens), "torch's": lambda: learn(0)}
    print(f"Attention, forward and backward of {sequences} x {tokens} tokens: {medians(ways)}")


def main() -> None:
    ask.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    for sequences, tokens in ((64, 14), (32, 41), (8, 201)):
        of_attention(sequences, tokens)
    for rows, prototypes in ((64, 512), (64, 4096), (300, 4096), (64, 65536)):
        of_sinkhorn(rows, prototypes)
    student, teacher = (create(lambda: VisionTransformer(config.Backbone(arch="vits16")), 0, "b") for _ in range(2))
    of_crops(student)
    of_teacher(student, teacher)


if __name__ == "__main__":
    main()
