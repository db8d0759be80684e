"""Images turned, scaled, sheared and bent a little: pictures that might as well be in the training set."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from cvae import context

DEGREES, STRETCH, SHEAR = 8.0, 0.07, 0.11  # at most, in either direction
PUSH, KNOTS = 0.4 / 28, 5  # the standard deviation of a push, as a share of the shorter side; the points a side
AT_ONCE = 500  # images, few enough for the processor's cache


def bent(images: Tensor, share: float, *key: object) -> Tensor:
    """Return images, uint8 `[N, height, width]`, each with probability `share` turned, stretched, sheared and bent.

    Angle, stretches and shear are uniform between plus and minus the largest one. Bending pushes KNOTS×KNOTS points of
    an image by normal random amounts across and down, and what is between them smoothly (Simard et al. 2003). What
    comes from outside of an image is black. key: of the random numbers, as in `context.derive_seed`.
    """
    random = context.generator(images.device, *key, "bent")
    draw = partial(torch.rand, len(images), generator=random, device=images.device)
    chosen = draw() < share
    limits = (math.radians(DEGREES), SHEAR, STRETCH, STRETCH)
    angle, shear, taller, wider = ((2 * draw() - 1) * limit for limit in limits)
    across = torch.stack([angle.cos() * (1 + wider), shear - angle.sin() * (1 + taller)], dim=-1)
    down = torch.stack([angle.sin() * (1 + wider), angle.cos() * (1 + taller)], dim=-1)
    pushed = 2 * PUSH * torch.randn(len(images), 2, KNOTS, KNOTS, generator=random, device=images.device)
    matrices = torch.stack([across, down], dim=1)
    portions = zip(*(tensor.split(AT_ONCE) for tensor in (images, matrices, pushed)), strict=True)
    seen = torch.cat([warped(*portion) for portion in portions])
    return torch.where(chosen[:, None, None], with_levels_of(images, seen), images)


def warped(images: Tensor, matrices: Tensor, pushed: Tensor) -> Tensor:
    """Return images uint8 `[N, height, width]` seen through matrices `[N, 2, 2]`, about their middles, and pushed.

    A pixel at (across, down) from the middle shows what was at the matrix times it, plus the push there. pushed:
    `[N, 2, KNOTS, KNOTS]`, across and down, in halves of the shorter side; the outer knots are on the image's edges.
    """
    height, width = images.shape[1:]
    sides = torch.tensor([width, height], device=images.device)  # PyTorch counts in halves of each side
    theta = torch.cat([matrices * (sides / sides[:, None]), torch.zeros_like(matrices[..., :1])], dim=-1)
    grid = affine_grid(theta, [len(images), 1, height, width], align_corners=False)
    pushed = pushed * (sides.min() / sides)[:, None, None]
    grid = grid + interpolate(pushed, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    seen = grid_sample(images[:, None].float(), grid, mode="bicubic", align_corners=False)
    return seen.squeeze(1).clamp(0, 255).round().to(torch.uint8)


def with_levels_of(images: Tensor, softened: Tensor) -> Tensor:
    """Return softened images with each grey level replaced so that the levels are distributed as those of the images.

    Interpolation softens edges, and soft edges have more entropy under a Bernoulli: of MNIST's digits 56 nats in place
    of 46. Higher levels stay the higher ones. Both uint8; source: histogram matching, Gonzalez and Woods, section 3.3.
    """
    counts = (torch.bincount(pixels.flatten(), minlength=256).double() for pixels in (images, softened))
    wanted, present = (count / count.sum() for count in counts)
    levels = torch.searchsorted(wanted.cumsum(0), present.cumsum(0) - present / 2).clamp(max=255).to(torch.uint8)
    return levels[softened.int()]
