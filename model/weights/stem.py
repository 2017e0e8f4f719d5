"""The patch embedding of other channels: what `init` and `weights` make of weights that saw images of another kind.

The mean over the channels that the weights know, for each channel that images have now, scaled by their ratio: an image
that shows the same in all of its channels is embedded as before (the inflation of arXiv 1705.07750, over channels).
Adam's moments follow the gradients, whose size does not depend on the number of channels: their mean, not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from model import config


class Rows(Protocol):
    """A tensor that is not read yet, as a checkpoint gives it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: range) -> Tensor: ...


Tensors = Mapping[str, Any]
"""By name, each a Tensor or Rows."""

WEIGHT = "patch_embed.proj.weight"

_NAMED = re.compile(r"(?:(?P<entry>\w+)/)?(?:backbone\.)?" + re.escape(WEIGHT))
"""In a backbone, in a student, and in an optimizer, where the entry (`exp_avg`, `step` ..) leads."""

ADAPTED = ("init", "weights")
"""The inputs that go on learning. A frozen network is taken as it is, or refused."""


def fit(tensors: Tensors, channels: int) -> dict[str, Any]:
    """`tensors` with the patch embedding, and its moments, for images of `channels`. The rest is not read or copied."""
    return {name: _fit(tensor, channels, _NAMED.fullmatch(name)) for name, tensor in tensors.items()}


def _fit(tensor: Tensor | Rows, channels: int, named: re.Match[str] | None) -> Tensor | Rows:
    shape = tensor.shape
    if named is None or len(shape) != 4 or shape[1] == channels:  # Adam's count of steps has no channels
        return tensor
    whole = tensor if isinstance(tensor, Tensor) else tensor.read(range(shape[0]))
    mean = whole.float().mean(dim=1, keepdim=True)
    if named["entry"] is None:
        mean *= shape[1] / channels
    return mean.to(whole.dtype).repeat(1, channels, 1, 1)


def handed_over(
    name: str, read: Callable[[str], Tensors], before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[Callable[[str], Any], str]:
    """How the input `name` of a phase reads the parts of a checkpoint, and what to tell of it. `before`, `now`: the
    `model` sections of the checkpoint and of the phase. Raises ValueError for a frozen network of other channels."""
    there, here = (config.read(config.Model, model).backbone.channels for model in (before, now))
    if there == here:
        return read, ""
    if name not in ADAPTED:
        raise ValueError(
            f"{name}: that network looks at images of {there} channels and this job's have {here} (data.channels). It "
            f"stays as it is, so nothing could teach it the others; only {' and '.join(ADAPTED)} are adapted"
        )
    return lambda part: fit(read(part), here), told(there, here)


def told(before: int, now: int) -> str:
    """What `fit` does to an embedding of `before` channels, as the end of a sentence; "" for nothing."""
    if before == now:
        return ""
    return (
        f"; its patch embedding, of {before} channels, is adapted to {now}: each has their mean, times {before}/{now}"
    )
