"""The gradient written out by hand: against the plain masked form, against autograd, and in half precision."""

import copy

import pytest
import torch
from reference.pyro_reference import Reference, assert_gradients_agree
from test_model import CASES, masked_log_likelihood, plain_cvae

from cvae import runtime
from cvae.data.images import Batch
from cvae.training.gradients import by_autograd, by_hand
from cvae.training.optimizer import GuardedAdam
from cvae.training.weights import Weights

WAYS = pytest.mark.parametrize("way", [by_hand, by_autograd])
MODELS = pytest.mark.parametrize("which", ["baseline", "cvae"])


def gradients_of(way, model, precision="fp32"):
    """The gradients of a model, and the optimizer that receives them, as `fit` makes them."""
    weights = Weights(model.parameters(), runtime.HALF.get(precision) if way is by_hand else None)
    optimizer = GuardedAdam(weights, 1e-3, loss_scaling=precision == "fp16")
    return by_hand(model, optimizer) if way is by_hand else by_autograd(model, optimizer, precision), optimizer


@WAYS
@CASES
@pytest.mark.parametrize("cached", [False, True], ids=["guess", "cached guess"])
def test_cvae_gradient_is_the_plain_one(make_toy, way, case, cached):
    """Terms and gradients to 1e-10 in float64, for three samples of z."""
    toy = make_toy(*case, particles=3)
    reference = Reference(toy.cvae, toy.quadrants)
    log_likelihood, kl = plain_cvae(reference, toy.images.flatten(1), toy.eps)
    (0.7 * (kl - log_likelihood).sum()).backward()
    y_hat = toy.cvae.baseline_net.guess(toy.x).detach() if cached else None
    gradients, _ = gradients_of(way, toy.cvae)
    terms = gradients(Batch(toy.x, toy.y, y_hat), toy.eps, 0.7)
    assert not terms.elbo.requires_grad
    torch.testing.assert_close(terms.log_likelihood, log_likelihood, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-10, atol=0)
    assert_gradients_agree(toy.cvae, reference, toy.quadrants, 1e-10)


@WAYS
@CASES
def test_baseline_gradient_is_the_plain_one(make_toy, way, case):
    toy = make_toy(*case)
    reference, images = Reference(toy.cvae, toy.quadrants), toy.images.flatten(1)
    log_likelihood = masked_log_likelihood(images, reference.observed, reference.baseline_logits(images))
    (-0.7 * log_likelihood.sum()).backward()
    gradients, _ = gradients_of(way, toy.model("baseline"))
    terms = gradients(Batch(toy.x, toy.y, None), toy.eps[..., :0], 0.7)
    torch.testing.assert_close(terms.log_likelihood, log_likelihood, rtol=1e-10, atol=0)
    assert terms.kl.eq(0).all()
    assert_gradients_agree(toy.cvae, reference, toy.quadrants, 1e-10)


@MODELS
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_that_of_autocast(make_toy, which, precision):
    """The same products of the same numbers, rounded at the same places but for a few; ŷ as training keeps it."""
    toy = make_toy(1, 28, 28, hidden=(100, 80), latent_dim=20, count=64, dtype=torch.float32)
    half = runtime.HALF[precision]
    batch = Batch(toy.x, toy.y, toy.cvae.baseline_net.guess(toy.x).detach().to(half))
    model = toy.model(which)
    results = []
    for way in (by_hand, by_autograd):
        gradients, optimizer = gradients_of(way, model, precision)
        terms = gradients(batch, toy.eps[..., : model.latent_dim], 1.0)
        assert optimizer.gradient.dtype == (half if way is by_hand else torch.float32)
        found = (optimizer.weights.view(parameter, optimizer.gradient).float() for parameter in optimizer.weights)
        results.append((*terms, *found))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 2 * torch.finfo(half).eps * theirs.norm()


@MODELS
@pytest.mark.parametrize("hidden", [(7,), (7, 8, 9), (8, 8), (16, 16, 16)], ids=str)
def test_any_number_of_layers(make_toy, which, hidden):
    toy = make_toy(hidden=hidden, particles=2)
    model = toy.model(which)
    results = []
    for way in (by_hand, by_autograd):
        gradients, optimizer = gradients_of(way, model)
        gradients(Batch(toy.x, toy.y, None), toy.eps[..., : model.latent_dim], 1.0)
        results.append([parameter.grad.clone() for parameter in optimizer.weights])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.ne(0).any()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@MODELS
def test_compiled_model_has_the_same_gradient(make_toy, which):
    """What `--compile` trains by; here without the code generator, which takes a minute."""
    toy = make_toy(particles=2)
    model = toy.model(which)
    eps = toy.eps[..., : model.latent_dim]
    batch = Batch(toy.x, toy.y, toy.cvae.baseline_net.guess(toy.x).detach())
    gradients, optimizer = gradients_of(by_hand, model)
    gradients(batch, eps, 0.7)
    ours = optimizer.gradient.clone()
    by_autograd(torch.compile(model, backend="aot_eager"), optimizer, "fp32")(batch, eps, 0.7)
    assert ours.ne(0).any()
    torch.testing.assert_close(optimizer.gradient, ours, rtol=1e-10, atol=1e-12)


def test_other_layers_are_refused(make_toy):
    """Rather than trained as if they were ReLUs."""
    toy = make_toy()
    toy.cvae.prior_net.layers[1] = torch.nn.Tanh()
    with pytest.raises(TypeError, match="by autograd"):
        gradients_of(by_hand, toy.cvae)


def test_autograd_refuses_a_copy_in_half_precision(make_toy):
    """Its gradients would go elsewhere, and nothing would be trained."""
    toy = make_toy()
    optimizer = GuardedAdam(Weights(toy.cvae.parameters(), torch.bfloat16), 1e-3)
    with pytest.raises(ValueError, match="no copy in half"):
        by_autograd(toy.cvae, optimizer, "bf16")


@MODELS
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_working_copy_follows_the_weights(make_toy, which, precision):
    """After a step, and after it was refreshed: as if the training had begun with these weights."""
    toy = make_toy(dtype=torch.float32, particles=2)
    model = toy.model(which)
    batch, eps = Batch(toy.x, toy.y, None), toy.eps[..., : model.latent_dim]
    weights = Weights(model.parameters(), runtime.HALF[precision])
    optimizer = GuardedAdam(weights, 1e-2)
    gradients = by_hand(model, optimizer)
    weights.vector.mul_(1.5)
    weights.refresh()
    for _ in range(3):
        terms = gradients(batch, eps, 1.0)
        fresh, other = gradients_of(by_hand, copy.deepcopy(model), precision)
        assert torch.equal(fresh(batch, eps, 1.0).elbo, terms.elbo)
        assert torch.equal(other.gradient, optimizer.gradient)
        assert optimizer.step(-terms.elbo.sum())


@WAYS
@MODELS
def test_gradient_replaces_the_last_one(make_toy, way, which):
    """And is proportional to the factor, a number or a tensor."""
    toy = make_toy(particles=2)
    model = toy.model(which)
    gradients, optimizer = gradients_of(way, model)
    batch, eps = Batch(toy.x, toy.y, None), toy.eps[..., : model.latent_dim]
    gradients(batch, eps, 1.0)
    once = optimizer.gradient.clone()
    assert once.ne(0).any()
    gradients(batch, eps, torch.tensor(-4.0))
    torch.testing.assert_close(optimizer.gradient, -4 * once, rtol=1e-12, atol=0)
    gradients(batch, eps, 1.0)
    assert torch.equal(optimizer.gradient, once)
