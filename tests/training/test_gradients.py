"""The gradient that a step takes: that of plain autograd, for every network and objective, in every precision."""

import copy

import pytest
import torch
from support.steps import ALL_NETWORKS, CPU, Case, cases

from cvae import context
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES, OF_PRIOR, maximised
from cvae.training.optimizer import GuardedAdam
from cvae.training.weights import Weights

SLOTS = pytest.mark.parametrize("slots", [True, False], ids=["slots", "no slots"])
OF_LAYERS = ("tutorial", "paper")  # which consist of our layers alone, and get a copy in half precision
HALVES = pytest.mark.parametrize("precision", ["bf16", "fp16"])


def terms_and_gradient(case, model, batch, eps, precision="fp32", slots=True, factor=1.0):
    """As a step does it: by name, and a fresh optimizer's."""
    weights = Weights(model, context.HALF.get(precision), slots)
    optimizer = GuardedAdam(weights, 1e-3)
    terms = collect(case, weights, batch, eps, precision, factor)
    return terms, gradients(weights), optimizer


def collect(case, weights, batch, eps, precision="fp32", factor=1.0):
    weights.model.train()
    context.seed_dropout(0)
    with context.autocast("fp32" if weights.half else precision, CPU):
        terms = case.function()(weights.model, batch, *eps)
    with weights.collecting_gradients():
        (-factor * maximised(terms).sum()).backward()
    return {name: term.detach() for name, term in terms.items()}


def gradients(weights):
    return {name: weights.view(name, weights.gradient).clone() for name in weights}


def plain(case, model, batch, eps, factor=1.0):
    """The same of a copy of the model that is made of parameters only; zeros where there is no gradient."""
    model = copy.deepcopy(model).train()
    context.seed_dropout(0)
    terms = case.function()(model, batch, *eps)
    (-factor * maximised(terms).sum()).backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {name: term.detach() for name, term in terms.items()}, found


def assert_close(ours, theirs, rtol=1e-10):
    """Each tensor by its own largest entry; not all of them zero."""
    assert ours.keys() == theirs.keys()
    assert any(tensor.ne(0).any() for tensor in theirs.values())
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=rtol * tensor.abs().max().item(), msg=name)


@cases()
@SLOTS
@pytest.mark.parametrize("cached", [False, True], ids=["guess", "cached guess"])
def test_gradient_is_that_of_plain_autograd(make_toy, case, slots, cached):
    """Terms and gradients to 1e-10 in float64, for three samples of z."""
    toy = case.make(make_toy, particles=3)
    model, batch, eps = toy.model(case.which).train(), toy.batch, case.noise(toy)
    if cached:
        batch = batch._replace(guess=toy.cvae.baseline_net(toy.x).detach())
    expected_terms, expected = plain(case, model, batch, eps, 0.7)
    terms, found, _ = terms_and_gradient(case, model, batch, eps, slots=slots, factor=0.7)
    assert terms.keys() == expected_terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected_terms[name], rtol=1e-10, atol=0)
    assert_close(found, expected)


@cases()
def test_every_trained_weight_has_a_gradient(make_toy, case):
    """But those of the recognition network where it is not used; and the baseline of a CVAE is not trained."""
    toy = case.make(make_toy, particles=3)
    model = toy.model(case.which)
    _, found, _ = terms_and_gradient(case, model, toy.batch, case.noise(toy))
    assert not any(name.startswith("baseline_net") for name in found)
    without = {name for name, gradient in found.items() if not gradient.ne(0).any()}
    if case.objective in OF_PRIOR:
        assert without == {name for name in found if "recognition" in name}
        if "encoders.layers.0.weight" in found:
            of_prior, of_recognition = found["encoders.layers.0.weight"]
            assert of_prior.ne(0).any()
            assert of_recognition.eq(0).all()
    else:
        # A bias before a batch normalisation is subtracted again.
        useless = {name for name in found if case.network == "regularised" and name.endswith("0.bias")}
        assert without <= useless


@cases(networks=OF_LAYERS)
@HALVES
def test_half_precision_is_that_of_autocast(make_toy, case, precision):
    """The same products of the same numbers, rounded at the same places but for a few; ŷ as training keeps it."""
    toy = case.make(
        make_toy, height=28, width=28, hidden=(100, 80), latent_dim=20, count=64, gain=1.0, dtype=torch.float32
    )
    half = context.HALF[precision]
    batch = toy.batch._replace(guess=toy.cvae.baseline_net(toy.x).detach().to(half))
    model, eps = toy.model(case.which), case.noise(toy)
    results = []
    for by_copy in (True, False):
        weights = Weights(copy.deepcopy(model), half if by_copy else None, slots=by_copy)
        terms = collect(case, weights, batch, eps, precision)
        assert weights.gradient.dtype == (half if by_copy else torch.float32)
        results.append({**terms, **{name: gradient.float() for name, gradient in gradients(weights).items()}})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.ne(0).any() or (case.objective in OF_PRIOR and "recognition" in name), name
        assert (ours[name] - tensor).norm() <= 2 * torch.finfo(half).eps * tensor.norm(), name


@cases(networks=NETWORKS)
@pytest.mark.parametrize("hidden", [(7,), (7, 8, 9), (8, 8), (16, 16, 16)], ids=str)
def test_any_number_of_layers(make_toy, case, hidden):
    toy = case.make(make_toy, hidden=hidden, particles=2)
    model, batch, eps = toy.model(case.which), toy.batch, case.noise(toy)
    _, expected = plain(case, model, batch, eps)
    _, found, _ = terms_and_gradient(case, model, batch, eps)
    assert_close(found, expected)


COMPILED = [
    Case(network, objective)
    for network in (*NETWORKS, "convolutional", "regularised")
    for objective in ("baseline", *OBJECTIVES)
    if objective == "elbo" or (network in NETWORKS and objective != "iwae")  # which `train.py` refuses to compile
]


@pytest.mark.parametrize("case", COMPILED, ids=" ".join)
def test_compiled_objective_has_the_same_gradient(make_toy, case, monkeypatch):
    """What `--compile` trains by; here without the code generator, which takes a minute."""
    torch.compiler.reset()
    toy = case.make(make_toy, particles=2)
    model, eps = toy.model(case.which).train(), case.noise(toy)
    batch = toy.batch._replace(guess=toy.cvae.baseline_net(toy.x).detach())
    if case.network == "regularised":  # the compiler draws other random numbers than the eager dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    expected_terms, expected = plain(case, model, batch, eps)
    function = torch.compile(case.function(), backend="aot_eager")
    monkeypatch.setattr(Case, "function", lambda self: function)
    terms, found, _ = terms_and_gradient(case, model, batch, eps, slots=False)
    for name, term in terms.items():
        torch.testing.assert_close(term, expected_terms[name], rtol=1e-10, atol=1e-12)
    assert_close(found, expected)


@cases(networks=OF_LAYERS)
@HALVES
def test_working_copy_follows_the_weights(make_toy, case, precision):
    """After a step, and after it was refreshed: as if the training had begun with these weights."""
    toy = case.make(make_toy, dtype=torch.float32, particles=2)
    model, batch, eps = toy.model(case.which), toy.batch, case.noise(toy)
    weights = Weights(model, context.HALF[precision], slots=True)
    optimizer = GuardedAdam(weights, 1e-2)
    weights.vector.mul_(1.5)
    weights.refresh()
    for _ in range(3):
        terms = collect(case, weights, batch, eps, precision)
        fresh_terms, fresh, other = terms_and_gradient(case, copy.deepcopy(model), batch, eps, precision)
        assert other.weights.half == context.HALF[precision]
        assert all(torch.equal(terms[name], fresh_terms[name]) for name in terms)
        assert all(torch.equal(gradient, fresh[name]) for name, gradient in gradients(weights).items())
        assert not optimizer.step(-maximised(terms).sum())  # not skipped


@cases()
@SLOTS
def test_gradient_replaces_the_last_one(make_toy, case, slots):
    """And is proportional to the factor, a number or a tensor."""
    toy = case.make(make_toy, particles=2)
    model, batch, eps = toy.model(case.which), toy.batch, case.noise(toy)
    weights = Weights(model, slots=slots)
    found = []
    for factor in (1.0, torch.tensor(-4.0), 1.0):
        collect(case, weights, batch, eps, factor=factor)
        found.append(gradients(weights))
    once, times, again = found
    assert_close(times, {name: -4 * gradient for name, gradient in once.items()}, rtol=1e-12)
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize("network", ALL_NETWORKS)
@SLOTS
def test_gradient_of_an_earlier_objective_does_not_stay(make_toy, network, slots):
    """The recognition network has none under gsnn, whatever it had before."""
    elbo, gsnn = Case(network, "elbo"), Case(network, "gsnn")
    toy = elbo.make(make_toy, particles=2)
    weights = Weights(toy.cvae, slots=slots)
    collect(gsnn, weights, toy.batch, (toy.eps,))
    alone = gradients(weights)
    collect(elbo, weights, toy.batch, (toy.eps,))
    collect(gsnn, weights, toy.batch, (toy.eps,))
    assert all(torch.equal(gradient, alone[name]) for name, gradient in gradients(weights).items())
