"""The networks: the fast path against the plain masked form, and what may influence what."""

import pytest
import torch
from reference.pyro_reference import Reference, assert_gradients_agree

from cvae.data.images import ImageSet
from cvae.model.densities import bernoulli_log_prob

CASES = pytest.mark.parametrize("case", [(1, 6, 6), (2, 7, 5), (3, 5, 8)], ids="{0[0]} of {0[1]}x{0[2]}".format)


def masked_log_likelihood(images, observed, logits):
    """log p(y|x,z) of whole images in raster order, from the probabilities, over the hidden pixels."""
    pixels = images * torch.log(torch.sigmoid(logits)) + (1 - images) * torch.log(torch.sigmoid(-logits))
    return torch.where(observed, 0.0, pixels).sum(-1)


def plain_cvae(reference, images, eps):
    """log-likelihood and KL of the CVAE as the formulas stand, `[B]` each."""
    p_loc, p_scale = reference.prior(images)
    q_loc, q_scale = reference.recognition(images)
    z = q_loc + q_scale * eps
    log_likelihood = masked_log_likelihood(images, reference.observed, reference.generation_net(z)).mean(0)
    kl = torch.log(p_scale / q_scale) + (q_scale**2 + (q_loc - p_loc) ** 2) / (2 * p_scale**2) - 1 / 2
    return log_likelihood, kl.sum(-1)


@CASES
@pytest.mark.parametrize("cached", [False, True], ids=["guess", "cached guess"])
def test_fast_cvae_is_the_plain_one(make_toy, case, cached):
    """Slices, constant inputs and unused outputs left out, and a known ŷ change no value and no gradient by 1e-10."""
    toy = make_toy(*case, particles=3)
    reference = Reference(toy.cvae, toy.quadrants)
    log_likelihood, kl = plain_cvae(reference, toy.images.flatten(1), toy.eps)
    (kl - log_likelihood).sum().backward()
    y_hat = toy.cvae.baseline_net.guess(toy.x) if cached else None
    terms = toy.cvae(toy.x, toy.y, y_hat, toy.eps)
    (-terms.elbo.sum()).backward()
    torch.testing.assert_close(terms.log_likelihood, log_likelihood, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-10, atol=0)
    assert_gradients_agree(toy.cvae, reference, toy.quadrants, 1e-10)


@CASES
def test_fast_baseline_is_the_plain_one(make_toy, case):
    toy = make_toy(*case)
    reference, images = Reference(toy.cvae, toy.quadrants), toy.images.flatten(1)
    log_likelihood = masked_log_likelihood(images, reference.observed, reference.baseline_logits(images))
    log_likelihood.sum().backward()
    toy.cvae.baseline_net.requires_grad_(True)
    terms = toy.cvae.baseline_net(toy.x, toy.y)
    terms.elbo.sum().backward()
    torch.testing.assert_close(terms.log_likelihood, log_likelihood, rtol=1e-10, atol=0)
    assert terms.kl.eq(0).all()
    assert_gradients_agree(toy.cvae, reference, toy.quadrants, 1e-10)


@CASES
def test_what_is_left_out_has_nothing_to_learn(make_toy, case):
    """The plain networks' outputs for observed pixels get no gradient; their inputs for hidden ones that of a bias."""
    toy = make_toy(*case)
    reference, images = Reference(toy.cvae, toy.quadrants), toy.images.flatten(1)
    log_likelihood, kl = plain_cvae(reference, images, toy.eps)
    baseline = masked_log_likelihood(images, reference.observed, reference.baseline_logits(images))
    (kl - log_likelihood - baseline).sum().backward()
    for net in (reference.baseline_net, reference.generation_net):
        for weights in net[4].parameters():
            assert weights.grad[reference.observed].eq(0).all()
            assert weights.grad[~reference.observed].ne(0).any()
    first = reference.baseline_net[0]
    constant = first.weight.grad[:, ~reference.observed]
    assert first.bias.grad.ne(0).any()
    torch.testing.assert_close(constant, -first.bias.grad[:, None].expand_as(constant), rtol=1e-12, atol=1e-14)


@CASES
def test_completions_are_the_plain_ones(make_toy, case):
    """Pixel means at z ~ p(z|x), as pictures; one noise for all images broadcasts."""
    toy = make_toy(*case, particles=3)
    reference, images = Reference(toy.cvae, toy.quadrants), toy.images.flatten(1)
    loc, scale = reference.prior(images)
    for eps in (toy.eps, toy.eps[:, :1]):
        plain = torch.where(reference.observed, images, torch.sigmoid(reference.generation_net(loc + scale * eps)))
        ours = toy.quadrants.compose(toy.x, toy.cvae.complete(toy.x, eps)).flatten(2)
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


def test_noise_is_drawn_where_none_is_given(make_toy):
    toy = make_toy()
    torch.manual_seed(5)
    drawn = toy.cvae(toy.x, toy.y).elbo
    torch.manual_seed(5)
    eps = torch.randn(1, len(toy.x), toy.cvae.latent_dim, dtype=torch.float64)
    assert torch.equal(drawn, toy.cvae(toy.x, toy.y, eps=eps).elbo)


@CASES
def test_likelihood_is_of_the_hidden_pixels_alone(make_toy, case):
    """Given z, it is the same whatever the observed pixels hold, and another for a change in any hidden one."""
    toy = make_toy(*case, count=1)
    observed, z = toy.quadrants.observed, torch.randn(1, toy.cvae.latent_dim, dtype=torch.float64)

    def likelihood(images):
        return bernoulli_log_prob(toy.quadrants.split(images)[1], toy.cvae.generation(z))

    original = likelihood(toy.images)
    for row in range(observed.shape[0]):
        for column in range(observed.shape[1]):
            images = toy.images.clone()
            images[0, row, column] = (images[0, row, column] + 0.5) % 1
            assert torch.equal(likelihood(images), original) == observed[row, column]


@CASES
def test_hidden_pixels_never_reach_prior_or_baseline(make_toy, case):
    """The gradient with respect to a whole image: exactly zero at hidden pixels, and not at observed ones."""
    toy = make_toy(*case, count=30)
    images = toy.images.clone().requires_grad_()
    x, y = toy.quadrants.split(images)
    p, q = toy.cvae.prior(x), toy.cvae.recognition(x, y)
    outputs = {"prior": p.loc.sum() + p.log_scale.sum(), "baseline": toy.cvae.baseline_net.logits(x).sum()}
    for name, output in outputs.items():
        (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
        assert gradient[:, ~toy.quadrants.observed].eq(0).all(), name
        assert gradient[:, toy.quadrants.observed].ne(0).any(0).all(), name
    (gradient,) = torch.autograd.grad(q.loc.sum() + q.log_scale.sum(), images)
    assert gradient.ne(0).any(0).all()  # the recognition network sees both


def test_baseline_is_frozen_below_the_cvae(make_toy):
    toy = make_toy()
    toy.cvae(toy.x, toy.y, eps=toy.eps).elbo.sum().backward()
    for name, parameter in toy.cvae.named_parameters():
        assert (parameter.grad is None) == name.startswith("baseline_net."), name
    trained = [name for name, parameter in toy.cvae.named_parameters() if parameter.requires_grad]
    assert len(trained) == 18  # weights and biases of three networks of three layers


def test_images_do_not_see_each_other(make_toy):
    """Each image's terms depend on its own pixels and noise alone."""
    toy = make_toy(particles=2)
    x, y, eps = (tensor.clone().requires_grad_() for tensor in (toy.x, toy.y, toy.eps))
    terms = toy.cvae(x, y, eps=eps)
    gradients = torch.autograd.grad(terms.elbo[2], (x, y, eps))
    for gradient, dimension in zip(gradients, (0, 0, 1), strict=True):
        others = torch.arange(len(x)) != 2
        assert gradient.movedim(dimension, 0)[others].eq(0).all()
        assert gradient.select(dimension, 2).ne(0).any()
    alone = toy.cvae(toy.x[2:3], toy.y[2:3], eps=toy.eps[:, 2:3])
    torch.testing.assert_close(alone.elbo[0], terms.elbo[2], rtol=1e-12, atol=0)


def test_cached_guess_follows_the_rows(make_toy):
    """A batch's ŷ is that of its own images."""
    toy = make_toy(count=9, dtype=torch.float32)
    image_set = ImageSet(toy.images.mul(255).round().to(torch.uint8), toy.quadrants)
    with torch.no_grad():
        image_set.y_hat = toy.cvae.baseline_net.guess(image_set.batch(slice(None)).x)
    x, _, y_hat = image_set.batch(torch.tensor([7, 1, 1, 4]))
    torch.testing.assert_close(y_hat, toy.cvae.baseline_net.guess(x).detach(), rtol=1e-6, atol=0)
