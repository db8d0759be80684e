"""The tutorial's way of doing the same work, written anew for comparison: what the other benchmarks measure against.

It has the tutorial's networks, data path and inference, and the choices that cost it time: each image becomes a PIL
image, then a tensor, then two images with −1 where a pixel does not belong, one after the other in the main process
(DataLoader, no workers); the networks compute all pixels, and boolean masks pick those that count; the baseline is
applied again in every step; losses are read back step by step; Pyro's SVI with Trace_ELBO trains the CVAE.
Left out, in the tutorial's favour: progress bars, checkpoints.
"""

import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from PIL import Image
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as pictures

from cvae.settings import Settings

PYRO_BATCH = 25  # images of an evaluation: of 10, 25, 50 and 128 it suits Pyro best
ABSENT = -1.0
"""The value of pixels that do not belong to an image: the hidden ones in the input, the observed in the output."""

Sample = dict[str, Tensor]


def mask_quadrants(image: Tensor, num_quadrants: int) -> Sample:
    """The input and the output image of an image `[H, W]`."""
    height, width = image.shape
    output = image.clone()
    output[height // 2 :, : width // 2] = ABSENT
    if num_quadrants == 2:
        output[:, : width // 2] = ABSENT
    if num_quadrants == 3:
        output[: height // 2, :] = ABSENT
    observed = image.clone()
    observed[output != ABSENT] = ABSENT
    return {"input": observed, "output": output}


class QuadrantImages(Dataset[Sample]):
    """Images uint8 `[N, H, W]`, each transformed when it is asked for."""

    def __init__(self, images: Tensor, num_quadrants: int):
        self.images, self.num_quadrants = images, num_quadrants
        self.digits = torch.zeros(len(images), dtype=torch.int64)  # labels are not used: any will do

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        picture = Image.fromarray(self.images[index].numpy())
        original = pictures.to_tensor(picture)
        digit = torch.as_tensor(np.asarray(int(self.digits[index])), dtype=torch.int64)
        return {"original": original, "digit": digit, **mask_quadrants(original.squeeze(), self.num_quadrants)}


def batches(images: Tensor, num_quadrants: int, batch_size: int, shuffle: bool) -> DataLoader[Sample]:
    """The images, batch by batch."""
    return DataLoader(QuadrantImages(images, num_quadrants), batch_size=batch_size, shuffle=shuffle, num_workers=0)


class BaselineNet(nn.Module):
    """Input image → three layers → the probabilities of all pixels, `[B, num_pixels]`."""

    def __init__(self, num_pixels: int = 784, hidden_1: int = 500, hidden_2: int = 500):
        super().__init__()
        self.num_pixels = num_pixels
        self.layer_1 = nn.Linear(num_pixels, hidden_1)
        self.layer_2 = nn.Linear(hidden_1, hidden_2)
        self.layer_3 = nn.Linear(hidden_2, num_pixels)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.layer_1(x.view(-1, self.num_pixels)))
        return torch.sigmoid(self.layer_3(F.relu(self.layer_2(features))))


def masked_bce(probabilities: Tensor, output: Tensor) -> Tensor:
    """The binary cross-entropy, summed over the pixels that belong to the output."""
    output = output.view(probabilities.shape)
    absent = output == ABSENT
    # Later versions of PyTorch refuse a target of −1, whether or not its loss is used.
    loss = F.binary_cross_entropy(probabilities, output.clamp(min=0), reduction="none")
    loss[absent] = 0.0
    return loss.sum()


class Encoder(nn.Module):
    """Two images that complete each other → location and scale over z, each `[B, Z]`."""

    def __init__(self, num_pixels: int, hidden_1: int, hidden_2: int, latent_dim: int):
        super().__init__()
        self.num_pixels = num_pixels
        self.layer_1 = nn.Linear(num_pixels, hidden_1)
        self.layer_2 = nn.Linear(hidden_1, hidden_2)
        self.loc = nn.Linear(hidden_2, latent_dim)
        self.log_scale = nn.Linear(hidden_2, latent_dim)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        whole = x.clone()
        whole[x == ABSENT] = y[x == ABSENT]
        features = F.relu(self.layer_1(whole.view(-1, self.num_pixels)))
        features = F.relu(self.layer_2(features))
        return self.loc(features), torch.exp(self.log_scale(features))


class Decoder(nn.Module):
    """z → the probabilities of all pixels, `[..., num_pixels]`."""

    def __init__(self, latent_dim: int, hidden_1: int, hidden_2: int, num_pixels: int):
        super().__init__()
        self.layer_1 = nn.Linear(latent_dim, hidden_1)
        self.layer_2 = nn.Linear(hidden_1, hidden_2)
        self.layer_3 = nn.Linear(hidden_2, num_pixels)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.layer_3(F.relu(self.layer_2(F.relu(self.layer_1(z))))))


class PyroCVAE(nn.Module):
    """The CVAE as a Pyro model and guide."""

    def __init__(self, baseline_net: BaselineNet, hidden_1: int = 500, hidden_2: int = 500, latent_dim: int = 200):
        super().__init__()
        num_pixels = baseline_net.num_pixels
        self.baseline_net = baseline_net
        self.prior_net = Encoder(num_pixels, hidden_1, hidden_2, latent_dim)
        self.recognition_net = Encoder(num_pixels, hidden_1, hidden_2, latent_dim)
        self.generation_net = Decoder(latent_dim, hidden_1, hidden_2, num_pixels)

    def model(self, x: Tensor, y: Tensor) -> None:
        """p(z|x) p(y|x,z), with any batch of samples of z on the left of the images."""
        pyro.module("cvae", self)
        with pyro.plate("data", len(x)):
            with torch.no_grad():
                y_hat = self.baseline_net(x).view(x.shape)
            loc, scale = self.prior_net(x, y_hat)
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            probabilities = self.generation_net(z)
            hidden = x == ABSENT
            picked = probabilities[..., hidden.flatten(1)].view(*probabilities.shape[:-1], -1)
            wanted = y[hidden].view(len(x), -1)
            # Grey levels are outside of a Bernoulli's support: Pyro would refuse them.
            pyro.sample("y", dist.Bernoulli(picked, validate_args=False).to_event(1), obs=wanted)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """q(z|x,y)."""
        with pyro.plate("data", len(x)):
            loc, scale = self.recognition_net(x, y)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


class TutorialWay:
    """The tutorial's work in one phase; `run` does so many steps, or of `evaluation` so many images."""

    def __init__(self, phase: str, images: Tensor, s: Settings, samples: int):
        pyro.clear_param_store()
        self.phase, self.images, self.s = phase, images, s
        self.loader = endless(batches(images, s.quadrants, s.batch_size, shuffle=True))
        self.baseline_net = BaselineNet()
        self.net = PyroCVAE(self.baseline_net)
        self.adam = torch.optim.Adam(self.baseline_net.parameters(), lr=1e-3)
        self.svi = SVI(self.net.model, self.net.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
        self.importance = RenyiELBO(alpha=0, num_particles=samples, vectorize_particles=True, max_plate_nesting=1)

    def run(self, number: int) -> float:
        """Return the seconds of the work, making the batches included."""
        evaluation = batches(self.images[:number], self.s.quadrants, PYRO_BATCH, shuffle=False)
        samples = evaluation if self.phase == "evaluation" else islice(self.loader, number)
        work = {"baseline": self.train_baseline, "cvae": self.train_cvae, "evaluation": self.evaluate}[self.phase]
        started = time.perf_counter()
        total = sum(work(batch) for batch in samples)
        seconds = time.perf_counter() - started
        if total != total:
            raise FloatingPointError("the tutorial's loss became NaN: its time says nothing")
        return seconds

    def train_baseline(self, batch: Sample) -> float:
        """Take one step of Adam on the masked cross-entropy per image; return the loss."""
        self.adam.zero_grad()
        loss = masked_bce(self.baseline_net(batch["input"]), batch["output"]) / len(batch["input"])
        loss.backward()
        self.adam.step()
        return loss.item()

    def train_cvae(self, batch: Sample) -> float:
        """Take one step of stochastic variational inference; return the loss."""
        return self.svi.step(batch["input"], batch["output"]) / len(batch["input"])

    def evaluate(self, batch: Sample) -> float:
        """Return −log p(y|x) of a batch by importance sampling: the Rényi bound with α = 0."""
        return self.importance.loss(self.net.model, self.net.guide, batch["input"], batch["output"])


def endless(loader: DataLoader[Sample]) -> Iterator[Sample]:
    """Yield the batches of epoch after epoch."""
    while True:
        yield from loader
