"""Images turned, scaled and sheared a little: pictures that might as well be in the training set."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from cvae import runtime

DEGREES, STRETCH, SHEAR = 6.0, 0.05, 0.08  # at most, in either direction


def bent(images: Tensor, share: float, *key: object) -> Tensor:
    """Some of the images turned, stretched in height and in width, and sheared, each at random; the others as they are.

    images: uint8 `[N, height, width]`, 0 to 255. share: the probability of each to be bent. key: of the random seed, as
    in `runtime.derive_seed`. Each amount is uniform between plus and minus the largest one. What comes from outside
    of an image is black; levels between pixels are interpolated.
    """
    random = runtime.generator(images.device, *key, "bent")

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=random, device=images.device) - 1) * most

    chosen = torch.rand(len(images), generator=random, device=images.device) < share
    angle, shear = uniform(math.radians(DEGREES)), uniform(SHEAR)
    height, width = 1 + uniform(STRETCH), 1 + uniform(STRETCH)
    across = torch.stack([angle.cos() * width, shear - angle.sin() * height], dim=-1)
    down = torch.stack([angle.sin() * width, angle.cos() * height], dim=-1)
    seen = with_levels_of(images, warped(images, torch.stack([across, down], dim=1)))
    return torch.where(chosen[:, None, None], seen, images)


def warped(images: Tensor, matrices: Tensor) -> Tensor:
    """Images uint8 `[N, height, width]` seen through matrices `[N, 2, 2]`, about their middles.

    A pixel at (across, down), in halves of the image's sides from its middle, shows what was at the matrix times it.
    """
    theta = torch.cat([matrices, torch.zeros_like(matrices[..., :1])], dim=-1)
    grid = affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=False)
    seen = grid_sample(images[:, None].float(), grid, mode="bicubic", align_corners=False)
    return seen.squeeze(1).clamp(0, 255).round().to(torch.uint8)


def with_levels_of(images: Tensor, others: Tensor) -> Tensor:
    """The others, with each grey level in them replaced so that the levels are distributed as those of the images.

    Interpolation softens edges, and soft edges have more entropy under a Bernoulli: of MNIST's digits 56 nats in place
    of 46. Higher levels stay the higher ones. Both uint8; source: histogram matching, Gonzalez and Woods, section 3.3.
    """
    wanted, found = (torch.bincount(each.flatten(), minlength=256).double() for each in (images, others))
    wanted, found = wanted / wanted.sum(), found / found.sum()
    levels = torch.searchsorted(wanted.cumsum(0), found.cumsum(0) - found / 2).clamp(max=255).to(torch.uint8)
    return levels[others.int()]
