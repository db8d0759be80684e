"""The contract of all networks and objectives, those of the tests included; what the committed weights compute."""

import copy

import numpy as np
import pytest
import torch
from reference.networks import TEST_NETWORKS
from reference.quadrature import bernoulli
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

import cvae
from cvae.data.tasks import Batch, FixedMask, quadrants
from cvae.model.cvae import some
from cvae.model.networks import NETWORKS, build, upgraded
from cvae.model.objectives import OBJECTIVES, maximised, objective
from cvae.settings import Settings

ALL = [*NETWORKS, "two levels", "regularised"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of at most a few hundred numbers of moderate size
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}  # float32, the same: 300 · 6e-8, through four layers


@pytest.fixture(params=ALL)
def network(request):
    return request.param


@pytest.fixture
def toy(make_toy, network):
    """In evaluation mode: without dropout, and normalised by running statistics."""
    toy = make_toy(2, 7, 5, particles=3, network=network, levels=2 if network == "deep" else 1)
    toy.cvae.eval()
    return toy


def tensors(draw):
    return [draw.logits, *(t for latent in draw.latents for t in (latent.z, latent.eps, *latent.q, *latent.p))]


def same(draw, other):
    return all(torch.equal(*pair) for pair in zip(tensors(draw), tensors(other), strict=True))


# Every network


def test_draws_are_what_they_say(toy):
    """Shapes; z = loc + scale · eps; log-ratio, KL and weights as PyTorch's distributions have them; no KL at p."""
    model, batch, count = toy.cvae, toy.batch, len(toy.images)
    assert model.baseline_net(toy.x).shape == (count, toy.task.y_dim)
    posterior, prior = model.from_posterior(batch, toy.eps), model.from_prior(batch, toy.eps)
    for draw in (posterior, prior):
        assert draw.logits.shape == (3, count, toy.task.y_dim)
        assert torch.equal(torch.cat([latent.eps for latent in draw.latents], dim=-1), toy.eps)
        ratio, kls = 0, []
        for z, eps, q, p in draw.latents:
            assert z.shape == eps.shape
            torch.testing.assert_close(z, q.loc + q.log_scale.exp() * eps, **EXACT)
            as_q, as_p = (Independent(Normal(gaussian.loc, gaussian.log_scale.exp()), 1) for gaussian in (q, p))
            ratio, kls = ratio + as_p.log_prob(z) - as_q.log_prob(z), [*kls, kl_divergence(as_q, as_p)]
        torch.testing.assert_close(draw.log_ratio, ratio, **EXACT)
        for ours, theirs in zip(draw.kl_of_levels, kls, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        torch.testing.assert_close(draw.log_likelihood(batch), bernoulli(batch, draw.logits), **EXACT)
        torch.testing.assert_close(draw.log_weights(batch), bernoulli(batch, draw.logits) + ratio, **EXACT)
    assert all((kl > 0.01).all() for kl in posterior.kl_of_levels)
    assert prior.log_ratio.eq(0).all()
    assert all(kl.eq(0).all() for kl in prior.kl_of_levels)
    assert torch.equal(model.completions(toy.x, toy.eps), prior.logits.sigmoid())
    assert model.completions(toy.x, toy.eps[:, :1]).shape == prior.logits.shape


def test_both_draws_see_one_generation_network_and_one_prior(toy):
    """What follows from a z of the recognition network follows from it as a z of the prior network too."""
    draw = toy.cvae.from_posterior(toy.batch, toy.eps)
    noise = torch.cat([(z - p.loc) / p.log_scale.exp() for z, _, _, p in draw.latents], dim=-1)
    again = toy.cvae.from_prior(toy.batch, noise)
    torch.testing.assert_close(again.logits, draw.logits, rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(again.latents, draw.latents, strict=True):
        torch.testing.assert_close(ours.p.loc.expand_as(ours.z), theirs.p.loc.expand_as(ours.z), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(toy.cvae.from_prior(toy.batch, toy.eps).logits, draw.logits)


def test_detached_z_changes_no_value_and_cuts_the_gradient(toy):
    eps = toy.eps.clone().requires_grad_()
    draw = toy.cvae.from_posterior(toy.batch, eps, detach_z=True)
    assert same(draw, toy.cvae.from_posterior(toy.batch, eps))
    for output in (draw.logits, *(part for latent in draw.latents for part in (*latent.q, *latent.p))):
        (by_eps,) = torch.autograd.grad(output.sum(), eps, retain_graph=True, allow_unused=True)
        assert by_eps is None
    for by_z in torch.autograd.grad(draw.logits.sum(), [latent.z for latent in draw.latents]):
        assert by_z.ne(0).any()


def test_hidden_pixels_never_reach_prior_or_baseline(make_toy, network):
    """The gradient by a whole image: exactly zero at hidden pixels, and not at observed ones."""
    toy = make_toy(2, 7, 5, count=30, network=network)
    images = toy.images.clone().requires_grad_()
    batch, observed = toy.task.batch(toy.task.rows(images)), toy.task.observed
    latents = toy.cvae.eval().from_posterior(batch, toy.eps, detach_z=True).latents
    outputs = [
        sum(part.sum() for latent in latents for part in latent.p),
        toy.cvae.baseline_net(batch.x).sum(),
        toy.cvae.from_prior(batch._replace(guess=toy.cvae.baseline_net(batch.x)), toy.eps).logits.sum(),
    ]
    for output in outputs:
        (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
        assert gradient[:, ~observed].eq(0).all()
        assert gradient[:, observed].ne(0).any(0).all()
    (gradient,) = torch.autograd.grad(sum(part.sum() for latent in latents for part in latent.q), images)
    assert gradient.ne(0).any(0).all()  # the recognition network sees both


def test_known_guess_is_the_computed_one(toy):
    """Bit for bit; it has no gradient; what is given is what is used; in half precision, all else stays in float64."""
    model, guess = toy.cvae, toy.cvae.baseline_net(toy.x)
    assert not model.guess(toy.batch).requires_grad
    for draw in (lambda batch: model.from_posterior(batch, toy.eps), lambda batch: model.from_prior(batch, toy.eps)):
        known = [draw(toy.batch._replace(guess=each)) for each in (guess, guess + 1, guess.bfloat16())]
        assert same(known[0], draw(toy.batch))
        assert not same(known[1], draw(toy.batch))
        assert all(tensor.dtype == torch.float64 for tensor in tensors(known[2]))
        torch.testing.assert_close(known[2].logits, known[0].logits, rtol=0.1, atol=0.1)


def test_training_mode_leaves_the_baseline_as_it_is(toy):
    """It was trained before: no dropout in it, and its running statistics stay. The other networks change theirs."""
    expected, guess = copy.deepcopy(toy.cvae.baseline_net.state_dict()), toy.cvae.baseline_net(toy.x)
    fixed = toy.cvae.from_posterior(toy.batch, toy.eps)
    toy.cvae.train()
    assert all(module.training for name, module in toy.cvae.named_modules() if not name.startswith("baseline_net"))
    draws = [toy.cvae.from_posterior(toy.batch, toy.eps) for _ in range(2)]
    assert same(*draws) == (not any(isinstance(module, torch.nn.Dropout) for module in toy.cvae.modules()))
    assert torch.equal(toy.cvae.baseline_net(toy.x), guess)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in toy.cvae.baseline_net.state_dict().items())
    has_statistics = any(isinstance(module, torch.nn.BatchNorm1d) for module in toy.cvae.modules())
    assert same(toy.cvae.eval().from_posterior(toy.batch, toy.eps), fixed) == (not has_statistics)


def test_weights_come_from_the_seed_alone(monkeypatch, network):
    """Nobody else's random numbers are touched; a new network is a builder and a name."""
    monkeypatch.setattr("cvae.model.networks.NETWORKS", {**NETWORKS, **TEST_NETWORKS})
    task, states = FixedMask(quadrants(1, 6, 7)), []
    for seed, outside in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(outside)
        model = build(task, Settings(network=network, hidden=(9, 8), latent_dim=4, seed=seed))
        assert torch.initial_seed() == outside
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(outside)))
        states.append(model.state_dict())
    matrices = [name for name, tensor in states[0].items() if tensor.dim() > 1]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert all(states[2][name].ne(states[0][name]).any() for name in matrices)
    model.load_state_dict(states[0])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in states[0].items())
    with pytest.raises(ValueError, match=r"^network has to be one of tutorial, paper, deep"):
        build(task, Settings(network="none"))


# Every network with every objective


def formula(name, model, batch, eps):
    """Return an objective of settings alpha = 0.3 as its formula stands, by the densities of PyTorch."""
    draw = (model.from_prior if name in ("gsnn", "multisample") else model.from_posterior)(batch, eps)
    pixels = Bernoulli(logits=draw.logits, validate_args=False).log_prob(batch.y)
    log_likelihood = (pixels if batch.weight is None else pixels * batch.weight).sum(-1)
    if name == "multisample":
        return log_likelihood.exp().mean(0).log()
    normals = [[Normal(g.loc, g.log_scale.exp()) for g in (q, p)] for _, _, q, p in draw.latents]
    if name == "iwae":
        log_q, log_p = (
            sum(pair[i].log_prob(latent.z).sum(-1) for pair, latent in zip(normals, draw.latents, strict=True))
            for i in range(2)
        )
        return (log_likelihood + log_p - log_q).exp().mean(0).log()
    if name == "gsnn":
        return log_likelihood.mean(0)
    value = (log_likelihood - sum(kl_divergence(*pair).sum(-1) for pair in normals)).mean(0)
    return 0.3 * value + 0.7 * formula("gsnn", model, batch, eps) if name == "hybrid" else value


def gradients(value, model):
    """Return the gradient by each parameter but the baseline's, zeros where there is none."""
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("baseline_net")}
    found = torch.autograd.grad(value.sum(), list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(toy, name):
    """Its value and gradient are those of its formula, image by image, whatever the weights of pixels are.

    The gradient of iwae is another estimate of the same, but for the generation network's: see test_objectives.py.
    """
    weight = torch.rand(toy.y.shape, generator=torch.Generator().manual_seed(0)).gt(0.4).double()
    for batch in (toy.batch, toy.batch._replace(weight=weight)):
        terms = objective(Settings(objective=name, alpha=0.3))(toy.cvae, batch, toy.eps)
        expected = formula(name, toy.cvae, batch, toy.eps)
        assert next(iter(terms)) == name
        assert all(term.shape == (len(toy.images),) for term in terms.values())
        torch.testing.assert_close(maximised(terms), expected, **EXACT)
        with torch.no_grad():
            for other, value in objective(Settings(objective=name, alpha=0.3))(toy.cvae, batch, toy.eps).items():
                torch.testing.assert_close(value, terms[other], **EXACT)
        found, wanted = (gradients(value, toy.cvae) for value in (maximised(terms), expected))
        for parameter, gradient in wanted.items():
            if name != "iwae" or not any(part in parameter for part in ("prior", "recognition", "levels")):
                torch.testing.assert_close(found[parameter], gradient, **EXACT, msg=parameter)
            untrained = "recognition" in parameter and name in ("gsnn", "multisample")
            assert found[parameter].ne(0).any() != untrained, parameter


@pytest.mark.parametrize("name", OBJECTIVES)
def test_images_and_samples_do_not_see_each_other(toy, name):
    """The terms of an image depend on its own pixels, weights and noise alone, and on no number of images."""
    function = objective(Settings(objective=name))
    inputs = [tensor.clone().requires_grad_() for tensor in (toy.x, toy.y, toy.eps)]
    terms = maximised(function(toy.cvae, Batch(*inputs[:2]), inputs[2]))
    for tensor, gradient in zip(inputs, torch.autograd.grad(terms[2], inputs, allow_unused=True), strict=True):
        if gradient is not None and tensor is not inputs[1]:  # y's likelihood is no function of y for autograd
            by_image = gradient.movedim(-2, 0).flatten(1).ne(0).any(1)
            assert by_image.tolist() == [image == 2 for image in range(len(toy.images))]
    for few in (slice(2, 3), slice(0, 0), slice(1, 4)):
        alone = maximised(function(toy.cvae, some(toy.batch, few), toy.eps[:, few]))
        torch.testing.assert_close(alone, terms[few], **EXACT)
    draw, one = (toy.cvae.from_posterior(toy.batch, eps) for eps in (toy.eps, toy.eps[1:2]))
    torch.testing.assert_close(one.logits[0], draw.logits[1], **EXACT)
    torch.testing.assert_close(one.log_ratio[0], draw.log_ratio[1], **EXACT)


@pytest.mark.parametrize("name", ["gsnn", "multisample"])
def test_unweighted_pixels_change_nothing(toy, name):
    """Not the images', each of which has pixels of its own that count, nor the baseline's; not even their gradient."""
    weight = torch.zeros_like(toy.y)
    for image, row in enumerate(weight):
        row[image :: image + 2] = 1
    spoilt = torch.where(weight > 0, toy.y, 1 - toy.y)
    batches = [toy.batch._replace(y=y, weight=weight) for y in (toy.y, spoilt)]
    values = [maximised(objective(Settings(objective=name))(toy.cvae, batch, toy.eps)) for batch in batches]
    assert torch.equal(*values)
    found, wanted = (gradients(value, toy.cvae) for value in values)
    assert all(torch.equal(found[parameter], gradient) for parameter, gradient in wanted.items())


# The networks of the package


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
    for dtype, exact in ((torch.float32, ROUNDED), (torch.float64, {"rtol": 1e-9, "atol": 1e-9})):
        model, eps = model.to(dtype), torch.from_numpy(normal).to(dtype)
        batch = model.task.batch(model.task.rows(pictures.to(dtype)))
        terms = OBJECTIVES["elbo"](model, batch, eps)
        guessed = bernoulli(batch, model.baseline_net(batch.x))
        completed = bernoulli(batch, model.from_prior(batch, eps).logits).mean(0)
        found = torch.stack([guessed, terms["elbo"].double(), terms["kl"].double(), completed], dim=-1)
        torch.testing.assert_close(found, torch.tensor(PINNED[name], dtype=torch.float64), **exact)
