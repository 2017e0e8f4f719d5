"""Losses, schedules, masks and draws again, as plain float64 loops written from the papers' formulas.

Nothing here imports model/, shares code with it, or tries to be fast: one image, one pair, one row at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import torch
from torch import Tensor

# --- losses: every one over a whole global batch ----------------------------------------------------------------------


def log_softmax(z: Tensor) -> Tensor:
    return z - z.max() - (z - z.max()).exp().sum().log()


def unit(x: Tensor, eps: float) -> Tensor:
    return x / x.square().sum().sqrt().clamp(min=eps)


def dino(students: Tensor, teachers: Tensor, temperature: float, *, skip_same: bool) -> Tensor:
    """arXiv 2104.14294, equation 3. students [S, b, K]: logits; teachers [T, b, K]: distributions."""
    losses = []
    for s, t in itertools.product(range(len(students)), range(len(teachers))):
        if skip_same and s == t:
            continue
        for z, p in zip(students[s], teachers[t], strict=True):
            losses.append(-(p * log_softmax(z / temperature)).sum())
    return torch.stack(losses).mean()


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """arXiv 2006.09882, appendix A, rows being samples: no maximum is taken off, and every factor is there."""
    q = (logits / temperature).exp()
    q = q / q.sum()
    samples, prototypes = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[:, k] = q[:, k] / q[:, k].sum() / prototypes
        for i in range(samples):
            q[i] = q[i] / q[i].sum() / samples
    return q * samples


def centered(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """arXiv 2104.14294, section 3.1."""
    return torch.stack([log_softmax((row - center) / temperature).exp() for row in logits])


def ibot(logits: Tensor, targets: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """arXiv 2111.07832, equation 2: the mean over all crops, masked or not, of the mean over a crop's masked patches.
    masks [crops, N]; logits and targets [masked patches, K], in the order of the masks."""
    rows = iter(zip(logits, targets, strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for mask in masks:
        here = [next(rows) for hidden in mask if hidden]
        for z, p in here:
            total = total - (p * log_softmax(z / temperature)).sum() / len(here)
    return total / len(masks)


def koleo(features: Tensor, group: int) -> Tensor:
    """arXiv 1806.03198, equation 3, neighbours within consecutive groups. features [b, D]."""
    xs = [unit(x, 1e-8) for x in features]
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(xs):
        others = [j for j in range(i // group * group, (i // group + 1) * group) if j != i]
        nearest = max(others, key=lambda j: float(x.detach() @ xs[j].detach()))
        total = total - ((x - xs[nearest] + 1e-8).square().sum().sqrt() + 1e-8).log()
    return total / len(xs)


def gram(students: Tensor, teachers: Tensor, clamp: str = "none") -> Tensor:
    """arXiv 2508.10104, equation 2 (mean over the entries). [crops, N, D]. clamp: negative similarities count as 0,
    of "both", or of the "teacher" and of the student where the teacher's is negative too; or as the released code
    does, of the "teacher alone"."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for student, teacher in zip(students, teachers, strict=True):
        xs, xg = (torch.stack([unit(x, 1e-12) for x in features]) for features in (student, teacher))
        for i in range(len(xs)):
            s, g = xs @ xs[i], xg @ xg[i]
            if clamp == "both":
                s = torch.where(s < 0, 0.0, s)
            if clamp == "teacher":
                s = torch.where((s < 0) & (g < 0), 0.0, s)
            if clamp != "none":
                g = torch.where(g < 0, 0.0, g)
            total, count = total + (s - g).square().sum(), count + len(s)
    return total / count


def contrastive(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """arXiv 2103.00020, figure 3. Normalised [B, E]."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(images)):
        total = total - log_softmax(torch.stack([scale * (images[i] @ text) for text in texts]))[i]
        total = total - log_softmax(torch.stack([scale * (image @ texts[i]) for image in images]))[i]
    return total / (2 * len(images))


def bicubic(features: Tensor, size: tuple[int, int], to: tuple[int, int], offset: float = 0.0) -> Tensor:
    """Keys' kernel with a = -0.75, half-pixel centres, borders repeated, no antialiasing. [h * w, D] row by row.
    offset: what the sampling adds to each new side, as DINO's learnt positions do."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def taps(target: int, old: int, new: int) -> list[tuple[int, float]]:
        at = (target + 0.5) * old / (new + offset) - 0.5
        first = math.floor(at) - 1
        return [(min(max(first + n, 0), old - 1), kernel(at - first - n)) for n in range(4)]

    rows = []
    for y, x in itertools.product(range(to[0]), range(to[1])):
        cells = itertools.product(taps(y, size[0], to[0]), taps(x, size[1], to[1]))
        rows.append(sum(wy * wx * features[iy * size[1] + ix] for (iy, wy), (ix, wx) in cells))
    return torch.stack(rows)  # type: ignore[arg-type]


# --- schedules --------------------------------------------------------------------------------------------------------


def ramp(values: dict, step: int, steps: int) -> float:
    """DINOv3's second form: to `peak` in `warmup_steps`, then to `end` at the last of `steps`. Both ends included."""
    if values.get("form") == "v1":
        return _every_epoch(values, steps)[step // values.get("hold_steps", 1)]
    shapes = {"linear": lambda x: x, "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x)}
    peak, warmup = values["peak"], values.get("warmup_steps", 0)
    if step < warmup:
        start = values.get("start", peak)
        return start + (peak - start) * shapes[values.get("warmup", "linear")](step / warmup)
    rest = steps - 1 - warmup
    share = (step - warmup) / rest if rest > 0 else 0.0
    return peak + (values.get("end", peak) - peak) * shapes[values.get("decay", "cosine")](share)


def _every_epoch(values: dict, steps: int) -> list[float]:
    """DINO's `cosine_scheduler`, whole: a warm-up whose last value is the peak, then cosine(0), cosine(1 / n) ..
    cosine((n - 1) / n) of the way. An epoch is `hold_steps`."""
    epoch, peak = values.get("hold_steps", 1), values["peak"]
    epochs, warmup = math.ceil(steps / epoch), math.ceil(values.get("warmup_steps", 0) / epoch)
    start, end = values.get("start", peak), values.get("end", peak)
    rising = [start + (peak - start) * i / (warmup - 1) if warmup > 1 else start for i in range(warmup)]
    rest = epochs - warmup
    return rising + [end + 0.5 * (peak - end) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def learning_rate(values: dict, step: int, steps: int, batch: int) -> float:
    """v3: 4 sqrt(batch / 1024) times the whole schedule; v1: batch / 256 times its peak alone."""
    if values.get("form") == "v1":
        return ramp({**values, "peak": values["peak"] * batch / 256}, step, steps)
    return ramp(values, step, steps) * 4 * math.sqrt(batch / 1024)


# --- masks and draws --------------------------------------------------------------------------------------------------


def generator(seed: int, stream: str, *keys: int | str) -> np.random.Generator:
    """Philox with the 128-bit BLAKE2b digest of the name as its key, little endian."""
    digest = hashlib.blake2b("\x1f".join(map(str, (seed, stream, *keys))).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def masked_counts(crops: int, patches: int, probability: float, low: float, high: float) -> list[int]:
    """Of the i-th masked crop int(N * probs[i + 1]), probs fp32 and evenly spaced."""
    masked = int(crops * probability)
    return [int(patches * float(np.float32(low + (high - low) * (i + 1) / masked))) for i in range(masked)]


def block_mask(rng: np.random.Generator, side: int, count: int) -> list[list[bool]]:
    """arXiv 2106.08254, algorithm 1: blocks, of up to half the grid and log-uniform aspect, while one is found in ten
    tries; then single patches."""
    mask = [[False] * side for _ in range(side)]

    def hidden() -> int:
        return sum(map(sum, mask))

    def add_block() -> bool:
        most = min(count - hidden(), side * side // 2)
        for _ in range(10):
            area = rng.uniform(min(4, most), most)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= height < side and 1 <= width < side):
                continue
            top, left = int(rng.integers(0, side - height + 1)), int(rng.integers(0, side - width + 1))
            cells = [(y, x) for y in range(top, top + height) for x in range(left, left + width)]
            new = [(y, x) for y, x in cells if not mask[y][x]]
            if 1 <= len(new) <= most:
                for y, x in new:
                    mask[y][x] = True
                return True
        return False

    while hidden() < count and add_block():
        pass
    free = [y * side + x for y in range(side) for x in range(side) if not mask[y][x]]
    for cell in rng.choice(free, size=count - hidden(), replace=False):
        mask[cell // side][cell % side] = True
    return mask


def residuals(
    rates: list[float], kind: str, groups: list[int], size: int, copies: int, seed: int, origin: str, clock: int
) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Batch-subset drop path, each group of `size` images apart, at a rate for each block. By (crop, image): for each
    block, by what attention's and FFN's residual is multiplied; 0 where it is dropped."""
    crops = copies * size
    images = range(len(groups) * size)
    factors = {(crop, image): [[0.0, 0.0] for _ in rates] for crop in range(copies) for image in images}
    for slot, group in enumerate(groups):
        rng = generator(seed, f"{origin}/drop-path/{kind}", clock, group)
        orders = rng.permuted(np.tile(np.arange(crops), (len(rates), 2, 1)), axis=2)
        for block, rate in enumerate(rates):
            keep = max(int(crops * (1 - rate)), 1)
            for branch in range(2):
                for crop in orders[block, branch, :keep]:
                    key = int(crop) // size, slot * size + int(crop) % size
                    factors[key][block][branch] = crops / keep
    return {key: [(attention, ffn) for attention, ffn in blocks] for key, blocks in factors.items()}


def bends(
    blocks: int, shift: float, jitter: float, rescale: float, kind: str, group: int, seed: int, origin: str, clock: int
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """What RoPE's coordinates (y, x) suffer in each block: what is added, and then multiplied with. Rounded to fp32,
    which the engine hands over. With one draw for all blocks, the first is it."""
    rng = generator(seed, f"{origin}/rope/{kind}", clock, group)
    drawn = []
    for u in rng.uniform(-1, 1, (blocks, 5)):
        factors = [jitter ** u[2 + axis] * rescale ** u[4] for axis in range(2)]
        moved = (float(np.float32(u[0] * shift)), float(np.float32(u[1] * shift)))
        drawn.append((moved, (float(np.float32(factors[0])), float(np.float32(factors[1])))))
    return drawn
