"""The package's own networks: their initial weights, and what weights of earlier versions compute."""

import numpy as np
import pytest
import torch
from reference.quadrature import bernoulli

import cvae
from cvae.data.masks import quadrants
from cvae.data.tasks import FixedMask
from cvae.model.networks import build, upgraded
from cvae.model.objectives import elbo
from cvae.settings import Settings

ROUNDED = {"rtol": 1e-4, "atol": 1e-4}  # float32: a sum of 1,600 numbers, each off by 6e-8
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64: the last digit that is written down


def test_initial_weights_are_those_of_all_versions():
    """Their sums, and sums of squares, as 0.3 drew them from seed 0; normal numbers differ by 1e-6 among processors."""
    sums = {
        "tutorial": (-9.584183384, 165.200497772), "paper": (2.922569157, 180.533110471),
        "deep": (14.766607184, 224.784650876),
    }  # fmt: skip
    for name, expected in sums.items():
        settings = Settings(network=name, hidden=(9, 8), latent_dim=4, levels=2 if name == "deep" else 1, channels=3)
        weights = torch.cat([p.double().flatten() for p in build(FixedMask(quadrants(1, 8, 8)), settings).parameters()])
        assert (weights.sum().item(), weights.square().sum().item()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["tutorial", "paper"])
def test_weights_of_version_0_3_are_taken(make_toy, name):
    """There, each tensor of a fully connected network had a dimension of copies, prior and recognition network two."""
    toy = make_toy(network=name)
    state, old = toy.cvae.state_dict(), {}
    for key, tensor in state.items():
        if key.startswith("prior_net"):
            old[key.replace("prior_net", "encoders")] = torch.stack(
                [tensor, state[key.replace("prior", "recognition")]]
            )
        elif not key.startswith("recognition_net"):
            old[key] = tensor[None]
    for before in (old, state):
        found = upgraded(before)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_levels_are_bounded(make_toy):
    """Whatever the weights are: e^±4 for p's scales, and no more than e^±4 from it for q's."""
    toy = make_toy(network="deep", levels=4, gain=100.0)
    for _, _, q, p in toy.cvae.from_posterior(toy.batch, toy.eps).latents:
        assert 3.9 < p.log_scale.abs().max() <= 4
        assert ((q.log_scale - p.log_scale).abs() <= 4 + 1e-12).all()


PINNED = {  # for each picture: log p(y|ŷ); elbo and its KL at two samples; mean log p(y|x,z) at two samples of p(z|x)
    "default-q1": [
        (-141.877375188, -110.883030072, 16.630194237, -265.264798613),
        (-255.752674506, -188.016985356, 21.687442281, -324.623329060),
    ],
    "q1": [
        (-142.661573515, -109.308930411, 10.464799714, -248.856450824),
        (-248.652023226, -145.728649941, 15.007421458, -456.075411733),
    ],
    "q2": [
        (-92.976046650, -73.832821546, 7.624531305, -143.611920226),
        (-115.535305215, -91.384549572, 5.850593522, -137.436312283),
    ],
    "q3": [
        (-39.384901210, -36.815795914, 2.513503920, -67.128686027),
        (-50.750404099, -42.590471285, 1.602500812, -43.013814296),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_committed_weights_compute_what_they_computed(name):
    """In float64, numbers written down at 0.3: of 9 digits after the point; in float32, within its rounding."""
    row, column = torch.arange(28.0).double()[:, None] - 13.5, torch.arange(28.0).double()
    rings = [((row**2 + (column - middle) ** 2).sqrt() - radius) / 1.5 for radius, middle in ((7, 14), (9, 13))]
    pictures = torch.stack([(-(ring**2)).exp() for ring in rings]).mul(255).round() / 255
    model = cvae.load(f"reference/{name}")
    normal = np.random.RandomState(0).standard_normal((2, 3, model.latent_dim))[:, [0, 2]]  # of three pictures
    for dtype, exact in ((torch.float32, ROUNDED), (torch.float64, EXACT)):
        model, eps = model.to(dtype), torch.from_numpy(normal).to(dtype)
        batch = model.task.batch(model.task.rows(pictures.to(dtype)))
        terms = elbo(model, batch, eps)
        guessed = bernoulli(batch, model.baseline_net(batch.x))
        completed = bernoulli(batch, model.from_prior(batch, eps).logits).mean(0)
        found = torch.stack([guessed, terms["elbo"].double(), terms["kl"].double(), completed], dim=-1)
        torch.testing.assert_close(found, torch.tensor(PINNED[name], dtype=torch.float64), **exact)
