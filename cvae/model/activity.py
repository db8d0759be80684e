"""How many dimensions of z carry anything: the active units of Burda et al. 2016."""

import torch
from torch import Tensor

from cvae import context
from cvae.data.images import ImageSet
from cvae.model.cvae import CVAE
from cvae.model.densities import widen
from cvae.model.likelihood import noise

LEAST_VARIANCE = 0.01
IMAGES, SAMPLES = 1000, 10  # the first images; samples of z for each, where it takes any
IMAGES_AT_ONCE = 50


@torch.no_grad()
def active_units(model: CVAE, images: ImageSet, seed: int, precision: str = "fp32") -> list[tuple[int, int]]:
    """How many dimensions of each level of z are active, from top to bottom, on the first `IMAGES` images; and how many
    there are.

    A dimension is active where the mean of its q(z|x,y), given the image, has a variance over the images above
    `LEAST_VARIANCE`. The model is in evaluation mode. seed: of the noise, on which the levels below the first depend.
    Source: Burda et al. 2016, section 5.1, with their threshold.
    """
    count, device = min(len(images), IMAGES), images.vectors.device
    portions = []
    for start in range(0, count, IMAGES_AT_ONCE):
        batch = images.batch(slice(start, min(start + IMAGES_AT_ONCE, count)))
        eps = noise(SAMPLES, len(batch.x), model, context.generator(device, seed, "activity", start))
        with context.autocast(precision, device):
            locs = [q.loc for _, _, q, _ in model.from_posterior(*batch, eps[:1]).latents]
            if any(loc.dim() > 2 for loc in locs):  # there are levels that depend on what was drawn above
                locs = [q.loc for _, _, q, _ in model.from_posterior(*batch, eps).latents]
            portions.append(locs)
    levels = (torch.cat(locs, dim=-2) for locs in zip(*portions, strict=True))
    return [(int((variance_of_means(loc) > LEAST_VARIANCE).sum()), loc.shape[-1]) for loc in levels]


def variance_of_means(loc: Tensor) -> Tensor:
    """The variance over images of E[loc | image], without bias: `[Z]` float64, zero for a single image.

    loc: `[B, Z]`, or `[L, B, Z]` for L draws of what lies above, of which the expectation is taken. The mean of L draws
    varies by itself too, by 1/L of the variance among them, which is taken off.
    """
    loc = widen(loc).double()
    correction = min(1, loc.shape[-2] - 1)
    if loc.dim() == 2:
        return loc.var(0, correction=correction)
    return loc.mean(0).var(0, correction=correction) - loc.var(0).mean(0) / len(loc)
