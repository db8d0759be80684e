"""The contract of all networks and objectives, those of the tests included."""

import copy

import pytest
import torch
from reference.networks import TEST_NETWORKS
from reference.quadrature import bernoulli, formula
from torch.distributions import Independent, Normal, kl_divergence

from cvae.data.masks import quadrants
from cvae.data.tasks import Batch, FixedMask
from cvae.model.networks import NETWORKS, build
from cvae.model.objectives import OBJECTIVES, maximised, objective
from cvae.settings import Settings

ALL = [*NETWORKS, "two levels", "regularised"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of at most a few hundred numbers of moderate size


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
            torch.testing.assert_close(ours, theirs if theirs.dim() == 1 else theirs.mean(0), **EXACT)
        torch.testing.assert_close(draw.log_likelihood(batch), bernoulli(batch, draw.logits), **EXACT)
        torch.testing.assert_close(draw.log_weights(batch), bernoulli(batch, draw.logits) + ratio, **EXACT)
    assert all((kl > 0.01).all() for kl in posterior.kl_of_levels)
    assert prior.log_ratio.eq(0).all()
    assert all(kl.eq(0).all() for kl in prior.kl_of_levels)
    assert torch.equal(model.completions(toy.x, toy.eps), prior.logits.sigmoid())
    assert model.completions(toy.x, toy.eps[:, :1]).shape == prior.logits.shape


def test_both_draws_see_one_generation_network_and_one_prior(toy):
    """What follows from a z is the same, whichever network it comes from; the prior network runs alone."""
    draw, calls = toy.cvae.from_posterior(toy.batch, toy.eps), []
    for name, module in toy.cvae.named_modules():
        if name.startswith("recognition"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    noise = torch.cat([(z - p.loc) / p.log_scale.exp() for z, _, _, p in draw.latents], dim=-1)
    again = toy.cvae.from_prior(toy.batch, noise)
    assert not calls
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
    assert not copy.deepcopy(model).requires_grad_(True).guess(toy.batch).requires_grad
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
        alone = maximised(function(toy.cvae, Batch(toy.x[few], toy.y[few]), toy.eps[:, few]))
        torch.testing.assert_close(alone, terms[few], **EXACT)
    draw, one = (toy.cvae.from_posterior(toy.batch, eps) for eps in (toy.eps, toy.eps[1:2]))
    torch.testing.assert_close(one.logits[0], draw.logits[1], **EXACT)
    torch.testing.assert_close(one.log_ratio[0], draw.log_ratio[1], **EXACT)
