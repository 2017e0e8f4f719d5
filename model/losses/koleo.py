"""KoLeo: spreads the features of a group of images.

Sablayrolles et al. 2019 (arXiv 1806.03198, equation 3: Kozachenko-Leonenko's estimate of the entropy), as DINOv3 uses
it. With x_i the L2-normalised features of a group's images and B images over all ranks:

    L = 1 / B * sum over groups, images i of  - log(min over j != i of ||x_i - x_j|| + 1e-8)

The neighbour is looked for in the image's own group only, so that no layout of ranks or micro-batches changes it. A
group may be larger than what one rank holds (`koleo_gathered`). L is then no sum over ranks' own pairs, as an image may
be the neighbour of another rank's: each rank computes all of its groups' L with its own rows live and the others' as
constants. The gradient that reaches its rows is that of L; its value is the part that its own images are behind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.precision import at_least_fp32

EPS = 1e-8


@at_least_fp32
def koleo(features: Tensor, group_size: int, images: int) -> Tensor:
    """This micro-batch's share of the loss for one crop, a scalar.

    `features` [b, D] of one crop of b images, whole groups of `group_size` in order; `images` in the global batch.
    Raises ValueError for a group of one image, which has no neighbour.
    """
    return -_log_distances(features, group_size).sum() / images


@at_least_fp32
def koleo_gathered(features: Tensor, everyone: Tensor, first: int, group_size: int, images: int) -> Tensor:
    """This rank's share of the loss for one crop, a scalar, where a group spans several ranks.

    `features` [b, D], live: the images [first, first + b) of `everyone` [B, D], the same crop's features of all ranks
    without gradient (`parallel.all_gather`). The ranks' shares sum to `koleo` of everyone.
    """
    start = first // group_size * group_size
    stop = -(-(first + len(features)) // group_size) * group_size
    rows = torch.cat((everyone[start:first], features, everyone[first + len(features) : stop]))
    terms = -_log_distances(rows, group_size)
    own = terms[first - start : first - start + len(features)].sum().detach()
    return (own + (terms.sum() - terms.sum().detach())) / images


def _log_distances(features: Tensor, group_size: int) -> Tensor:
    """The logarithm of each image's distance to its nearest neighbour, [b]."""
    if group_size < 2:
        raise ValueError(
            f"KoLeo needs at least 2 images in a group, got {group_size} (losses.koleo.group_size, or optim.group_size)"
        )
    x = F.normalize(features, dim=-1, eps=EPS).view(-1, group_size, features.shape[-1])
    with torch.no_grad():
        similarity = x @ x.mT
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-1)
        nearest = similarity.argmax(dim=-1)
    neighbours = x.take_along_dim(nearest[..., None], dim=1)
    # EPS in the difference keeps the gradient of the norm finite for two equal images.
    distance: Tensor = torch.linalg.vector_norm(x - neighbours + EPS, dim=-1)
    return (distance + EPS).log().flatten()
