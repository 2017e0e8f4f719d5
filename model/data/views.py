"""What the loader makes at one step; an objective says it, step by step (`views(clock)`)."""

from __future__ import annotations

from dataclasses import dataclass

from model import config
from model.draws import generator


@dataclass(frozen=True)
class SslViews:
    """Multi-crop views at one resolution, with iBOT masks over patches of `patch_size` pixels.

    `gram`: a Gram teacher looks too, at `resolution.gram_size` (or at `global_size` if that is not set).
    """

    resolution: config.Resolution
    patch_size: int
    gram: bool = False

    @property
    def gram_size(self) -> int | None:
        """Side of the Gram teacher's view in pixels, None where none is made."""
        return (self.resolution.gram_size or self.resolution.global_size) if self.gram else None


@dataclass(frozen=True)
class PairViews:
    """One square view of `image_size` pixels and a caption of `context` tokens for each image."""

    image_size: int
    context: int


Views = SslViews | PairViews


def resolution_at(seed: int, origin: str, crops: config.Crops, clock: int) -> config.Resolution:
    """The resolution of the step at `clock`: one for the whole global batch, drawn in proportion to `ratio`."""
    if len(crops.resolutions) == 1:
        return crops.resolutions[0]
    point = generator(seed, f"{origin}/resolution", clock).random() * sum(r.ratio for r in crops.resolutions)
    for resolution in crops.resolutions:
        point -= resolution.ratio
        if point < 0:
            return resolution
    return crops.resolutions[-1]
