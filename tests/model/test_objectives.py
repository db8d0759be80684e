"""The objectives against quadrature over z or over its noise, their gradients included; their limits; their sums."""

import copy
import math

import pytest
import torch
from reference.quadrature import formula, integrate, noise_grid
from torch import Tensor

from cvae.data.tasks import Batch
from cvae.model.objectives import OBJECTIVES, Totals, elbo, iwae, maximised, multisample, objective, with_free_nats
from cvae.settings import Settings


def expectation(function, model, batch, particles, points) -> dict[str, Tensor]:
    """Return the expected terms of an objective with so many samples of z, `[B]`: images repeated, noise on a grid."""
    noise, weights = noise_grid(particles * model.latent_dim, points)
    eps = noise.view(-1, particles, model.latent_dim).transpose(0, 1).repeat_interleave(len(batch.x), 1)
    terms = function(model, Batch(*(tensor.repeat(len(noise), 1) for tensor in batch[:2])), eps)
    return {name: weights @ term.view(len(noise), len(batch.x)) for name, term in terms.items()}


@pytest.mark.parametrize("network", ["tutorial", "paper"])
@pytest.mark.parametrize(("function", "lowest"), [(iwae, "elbo"), (multisample, "gsnn")])
def test_bounds_tighten(make_toy, network, function, lowest):
    """In expectation, one sample's bound, another objective's, < that of two < log p(y|x); very many give it."""
    toy = make_toy(latent_dim=1, count=3, gain=1.3, seed=8, network=network)
    exact = integrate(toy.cvae, toy.batch)
    eps = torch.randn(100_000, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        one, two = (maximised(expectation(function, toy.cvae, toy.batch, count, 151)) for count in (1, 2))
        many = maximised(function(toy.cvae, toy.batch, eps))
        same = maximised(expectation(OBJECTIVES[lowest], toy.cvae, toy.batch, 1, 151))
    for found in (one, same):
        torch.testing.assert_close(found, getattr(exact, lowest), rtol=1e-4, atol=0)
    assert (one + 1e-3 < two).all()
    assert (two < exact.log_evidence - 1e-3).all()
    stderr = ((exact.is_variance if function is iwae else exact.mc_variance) / len(eps)).sqrt()
    assert ((many - exact.log_evidence).abs() < 5 * stderr).all()
    assert (stderr < 0.02).all()


def plain_iwae(model, batch, eps):
    """Return the bound with its own gradient."""
    return {"iwae": formula("iwae", model, batch, eps)}


@pytest.mark.parametrize("network", ["smooth", "two smooth levels"])
@pytest.mark.parametrize("particles", [1, 2])
def test_doubly_reparameterized_gradient_is_that_of_the_bound(make_toy, network, particles):
    """In expectation, by integration over all noise of all levels and samples; that of one sample is the elbo's too."""
    latent_dim = 1 if network == "smooth" else 2
    toy = make_toy(1, 2, 2, hidden=(3,), latent_dim=latent_dim, count=1, gain=0.7, seed=4, network=network)
    batch, points = toy.batch, 13 if particles * latent_dim == 4 else 41

    def expected_gradient(function):
        model = copy.deepcopy(toy.cvae)
        maximised(expectation(function, model, batch, particles, points)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    found = expected_gradient(iwae)
    for function in (plain_iwae, elbo) if particles == 1 else (plain_iwae,):
        for name, gradient in expected_gradient(function).items():
            assert ((found[name] - gradient).abs().max() < 1e-4 * gradient.abs().max()).all(), name


def test_gradient_of_iwae_varies_less_than_the_plain_one(make_toy):
    """The recognition network's, the more so the more samples."""
    ratios = []
    for particles in (4, 32):
        toy = make_toy(hidden=(7,), count=1, particles=particles, gain=1.0)
        parameters = [p for name, p in toy.cvae.named_parameters() if name.startswith("recognition")]
        variances = []
        for function in (iwae, plain_iwae):
            random, found = torch.Generator().manual_seed(1), []
            for _ in range(40):
                eps = torch.randn(toy.eps.shape, generator=random, dtype=torch.float64)
                gradient = torch.autograd.grad(maximised(function(toy.cvae, toy.batch, eps)).sum(), parameters)
                found.append(torch.cat([part.flatten() for part in gradient]))
            variances.append(torch.stack(found).var(0).sum())
        ratios.append((variances[0] / variances[1]).item())
    assert ratios[0] < 0.8
    assert ratios[1] < 0.5 * ratios[0]


@pytest.mark.parametrize("network", ["tutorial", "two levels"])
def test_terms(make_toy, network):
    """Their names and order, the elbo's parts, the KL of each level; bounds of several samples report constants."""
    toy, levels = make_toy(particles=3, network=network), ["kl_1", "kl_2"] if network == "two levels" else []
    found = {name: objective(Settings(objective=name))(toy.cvae, toy.batch, toy.eps) for name in OBJECTIVES}
    parts = ["elbo", "log_likelihood", "kl", *levels]
    assert {name: list(terms) for name, terms in found.items()} == {
        "elbo": parts, "iwae": ["iwae", *parts], "gsnn": ["gsnn"], "hybrid": ["hybrid", *parts, "gsnn"],
        "multisample": ["multisample", "gsnn"],
    }  # fmt: skip
    for name in ("elbo", "iwae", "hybrid"):
        terms = found[name]
        torch.testing.assert_close(terms["elbo"], terms["log_likelihood"] - terms["kl"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(terms["elbo"], found["elbo"]["elbo"], rtol=1e-12, atol=1e-12)
        if levels:
            torch.testing.assert_close(terms["kl"], terms["kl_1"] + terms["kl_2"], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["multisample"]["gsnn"], found["gsnn"]["gsnn"], rtol=1e-12, atol=0)
    for name in ("iwae", "multisample"):
        assert [other for other, term in found[name].items() if term.requires_grad] == [name]


def test_free_nats(make_toy):
    """Each level's KL is floored, image by image, with no gradient below; nothing else changes."""
    toy = make_toy(particles=2, network="two levels")
    terms = elbo(toy.cvae, toy.batch, toy.eps)
    kls, free = torch.stack([terms["kl_1"], terms["kl_2"]]), torch.tensor(2.2).double()
    assert 0 < (kls < free).sum() < kls[1].numel()
    found = with_free_nats(terms, free)
    torch.testing.assert_close(found, terms["log_likelihood"] - kls.clamp(min=free).sum(0), rtol=1e-12, atol=0)
    by_kl = torch.autograd.grad(found.sum(), [terms["kl_1"], terms["kl_2"]], retain_graph=True)
    assert torch.equal(torch.stack(by_kl), -(kls > free).double())
    assert torch.equal(with_free_nats(terms, None), terms["elbo"])
    others = iwae(toy.cvae, toy.batch, toy.eps)
    assert torch.equal(with_free_nats(others, free), others["iwae"])


def test_new_objective_is_a_function_and_a_name(make_toy, monkeypatch):
    """Its keyword-only parameters are settings."""

    def tempered(model, batch, eps, *, weight_decay, seed):
        draw = model.from_posterior(batch, eps)
        return {"tempered": draw.log_likelihood(batch).mean(0) - weight_decay * draw.kl_of_levels[0] + seed}

    monkeypatch.setitem(OBJECTIVES, "tempered", tempered)
    toy = make_toy(particles=2)
    terms = objective(Settings(objective="tempered", weight_decay=0.5, seed=7))(toy.cvae, toy.batch, toy.eps)
    usual = elbo(toy.cvae, toy.batch, toy.eps)
    torch.testing.assert_close(terms["tempered"], usual["log_likelihood"] - 0.5 * usual["kl"] + 7, rtol=1e-12, atol=0)
    for name in ("ELBO", "log_likelihood"):
        with pytest.raises(ValueError, match=f"objective has to be one of {', '.join(OBJECTIVES)}, not"):
            objective(Settings(objective=name))


def test_sums_are_divided_once():
    """Uneven batches, an empty one included, give the mean over all images; skipped ones do not count, NaN or not."""
    random, totals = torch.Generator().manual_seed(0), Totals()
    terms = {name: -100 * torch.rand(1000, generator=random).requires_grad_() for name in ("elbo", "kl")}
    assert totals.means() == {}
    for first, last in ((0, 0), (0, 384), (384, 768), (768, 1000)):
        totals.add({name: term[first:last] for name, term in terms.items()}, skipped=torch.tensor(False))
        if not last:
            assert all(math.isnan(mean) for mean in totals.means().values())
        for skipped in (math.nan, 1.0):
            totals.add({name: torch.full((3,), skipped) for name in terms}, skipped=torch.tensor(True))
    assert list(totals.means()) == ["elbo", "kl"]
    assert maximised(totals.means()) == totals.means()["elbo"]
    for name, mean in totals.means().items():
        assert mean == pytest.approx(terms[name].double().mean().item(), rel=1e-14)


def test_sums_are_exact_and_stay_where_they_are():
    """With numbers that float32 would no longer add; a CUDA graph and an exchange have this tensor, in every epoch."""
    totals = Totals()
    totals.add({"elbo": torch.cat([torch.tensor([2.0**25]), torch.ones(3)])})
    sums = totals.sums
    for _ in range(10):
        totals.add({"elbo": torch.ones(3)})
    assert totals.sums is sums
    assert sums.tolist() == [2.0**25 + 33, 34]
