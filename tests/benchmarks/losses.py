"""What is computed otherwise than naively, beside the naive way: `.venv/bin/python -P -m tests.benchmarks.losses`.

Interleaved, one thread, medians of 15 rounds in milliseconds. The naive ways are the published formulas as they stand:
Sinkhorn-Knopp on exp(logits / T), which overflows; a loop over the crops; a loop over the parameters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from model import config, ema
from model.losses.sinkhorn import sinkhorn
from model.networks.init import create
from model.networks.vit import View, VisionTransformer

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
            began = time.perf_counter()
            way()
            taken[name].append(1e3 * (time.perf_counter() - began))
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


def main() -> None:
    torch.set_num_threads(1)
    for rows, prototypes in ((64, 512), (64, 4096), (300, 4096), (64, 65536)):
        of_sinkhorn(rows, prototypes)
    student, teacher = (create(lambda: VisionTransformer(config.Backbone(arch="vits16")), 0, "b") for _ in range(2))
    of_crops(student)
    of_teacher(student, teacher)


if __name__ == "__main__":
    main()
