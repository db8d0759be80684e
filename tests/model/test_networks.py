"""The networks: one contract for all of them, those of the tests included, and ours against the plain masked form."""

import copy

import pytest
import torch
from reference.networks import TEST_NETWORKS
from reference.pyro_reference import Reference, assert_gradients_agree
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from cvae.data.images import Batch, ImageSet
from cvae.data.masks import MASKS, Split, quadrants
from cvae.model import networks, objectives
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian
from cvae.model.layers import MLP
from cvae.model.networks import NETWORKS, Tutorial, build
from cvae.model.objectives import elbo, iwae, log_likelihood
from cvae.settings import Settings
from cvae.training.weights import Weights

OURS = pytest.mark.parametrize("network", ["tutorial", "paper"])  # which the plain reference knows
ALL = pytest.mark.parametrize("network", [*NETWORKS, *TEST_NETWORKS])
CASES = pytest.mark.parametrize("case", [(1, 6, 6), (2, 7, 5), (3, 5, 8)], ids="{0[0]} of {0[1]}x{0[2]}".format)


@pytest.fixture(autouse=True)
def _networks_of_the_tests(monkeypatch) -> None:
    """A new network is a builder and a name."""
    for name, builder in TEST_NETWORKS.items():
        monkeypatch.setitem(NETWORKS, name, builder)


@pytest.fixture
def toy(make_toy, network):
    """In evaluation mode: without dropout, and normalised by the running statistics."""
    toy = make_toy(2, 7, 5, particles=3, network=network)
    toy.cvae.eval()
    return toy


def parameters_of(gaussians: list[Gaussian]) -> Tensor:
    return torch.stack([parameter.sum() for gaussian in gaussians for parameter in gaussian]).sum()


def tensors_of(draw: Draw) -> list[Tensor]:
    flat = [t for latent in draw.latents for t in (latent.z, latent.eps, *latent.q, *latent.p)]
    return [draw.logits, *flat]


def assert_same(found: Draw, expected: Draw, same: bool = True) -> None:
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert all(torch.equal(*pair) for pair in pairs) == same


# The contract


@ALL
@CASES
@pytest.mark.parametrize("particles", [1, 3])
def test_shapes(make_toy, network, case, particles):
    toy = make_toy(*case, particles=particles, network=network)
    count, model = len(toy.x), toy.cvae
    assert isinstance(model, CVAE)
    assert model.latent_dim == 4
    assert model.baseline_net(toy.x).shape == (count, toy.split.num_hidden)
    for draw in (model.from_posterior(*toy.batch, toy.eps), model.from_prior(toy.x, None, toy.eps)):
        assert draw.logits.shape == (particles, count, toy.split.num_hidden)
        assert sum(latent.z.shape[-1] for latent in draw.latents) == model.latent_dim
        for z, eps, q, p in draw.latents:
            assert z.shape == eps.shape == (particles, count, z.shape[-1])
            for parameter in (*q, *p):
                assert parameter.shape in ((count, z.shape[-1]), z.shape)
        assert draw.log_ratio.shape == draw.log_likelihood(toy.y).shape == (particles, count)
        assert draw.kl.shape in ((count,), (particles, count))
        assert all(tensor.isfinite().all() for tensor in tensors_of(draw))
    for eps in (toy.eps, toy.eps[:, :1]):
        completions = model.completions(toy.x, eps)
        assert completions.shape == (particles, count, toy.split.num_hidden)
        assert ((completions >= 0) & (completions <= 1)).all()


@ALL
def test_single_images_and_single_precision(make_toy, network):
    toy = make_toy(count=1, dtype=torch.float32, network=network)
    toy.cvae.eval()
    draw = toy.cvae.from_posterior(*toy.batch, toy.eps)
    assert all(tensor.dtype == torch.float32 for tensor in (*tensors_of(draw), draw.kl, draw.log_ratio))


@ALL
def test_z_is_made_of_the_noise(toy):
    """z = loc + scale · eps of the distribution that it is drawn from: the same noise, the same numbers."""
    model = toy.cvae
    for draw in (model.from_posterior(*toy.batch, toy.eps), model.from_prior(toy.x, None, toy.eps)):
        assert torch.equal(torch.cat([latent.eps for latent in draw.latents], dim=-1), toy.eps)
        for z, eps, q, _ in draw.latents:
            torch.testing.assert_close(z, q.loc + q.log_scale.exp() * eps, rtol=1e-12, atol=1e-12)
    assert_same(model.from_posterior(*toy.batch, toy.eps), model.from_posterior(*toy.batch, toy.eps))
    assert_same(model.from_prior(toy.x, None, toy.eps), model.from_prior(toy.x, None, toy.eps))
    assert_same(model.from_prior(toy.x, None, toy.eps), model.from_prior(toy.x, None, toy.eps + 1), same=False)


@ALL
def test_ratio_and_kl_are_those_of_the_distributions(toy):
    draw = toy.cvae.from_posterior(*toy.batch, toy.eps)
    ratio, kl = 0, 0
    for z, _, q, p in draw.latents:
        as_q, as_p = (Independent(Normal(gaussian.loc, gaussian.log_scale.exp()), 1) for gaussian in (q, p))
        ratio = ratio + as_p.log_prob(z) - as_q.log_prob(z)
        kl = kl + kl_divergence(as_q, as_p)
    torch.testing.assert_close(draw.log_ratio, ratio, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(draw.kl, kl, rtol=1e-10, atol=1e-10)
    assert (draw.kl > 0.01).all()


@ALL
def test_from_the_prior_there_is_no_kl(toy):
    """Exactly zero, and so is the log-ratio: q is p."""
    draw = toy.cvae.from_prior(toy.x, None, toy.eps)
    assert draw.log_ratio.eq(0).all()
    assert draw.kl.eq(0).all()


@ALL
def test_both_draws_see_one_generation_network_and_one_prior(toy):
    """What follows from a z of the recognition network follows from it as a z of the prior network too."""
    draw = toy.cvae.from_posterior(*toy.batch, toy.eps)
    noise = [(z - p.loc) / p.log_scale.exp() for z, _, _, p in draw.latents]
    other = toy.cvae.from_prior(toy.x, None, torch.cat(noise, dim=-1))
    torch.testing.assert_close(other.logits, draw.logits, rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(other.latents, draw.latents, strict=True):
        torch.testing.assert_close(ours.p.loc.expand_as(ours.z), theirs.p.loc.expand_as(ours.z), rtol=1e-8, atol=1e-8)
    different = toy.cvae.from_prior(toy.x, None, toy.eps)
    assert not torch.allclose(different.logits, draw.logits)


@ALL
def test_detached_z_changes_no_value_and_cuts_the_gradient(toy):
    eps = toy.eps.clone().requires_grad_()
    draw = toy.cvae.from_posterior(*toy.batch, eps)
    detached = toy.cvae.from_posterior(*toy.batch, eps, detach_z=True)
    assert_same(detached, draw)
    (by_eps,) = torch.autograd.grad(draw.logits.sum(), eps)
    assert by_eps.ne(0).any()
    assert all(latent.z.is_leaf and latent.z.requires_grad for latent in detached.latents)
    followed = [detached.logits.sum(), *(parameters_of([latent.q, latent.p]) for latent in detached.latents)]
    for output in followed:
        (by_eps,) = torch.autograd.grad(output, eps, retain_graph=True, allow_unused=True)
        assert by_eps is None
    for by_z in torch.autograd.grad(detached.logits.sum(), [latent.z for latent in detached.latents]):
        assert by_z.ne(0).any()


@ALL
def test_hidden_pixels_never_reach_prior_or_baseline(make_toy, network):
    """The gradient with respect to a whole image: exactly zero at hidden pixels, and not at observed ones."""
    toy = make_toy(2, 7, 5, count=30, network=network)
    toy.cvae.eval()
    images = toy.images.clone().requires_grad_()
    x, y = toy.split.split(images)
    latents = toy.cvae.from_posterior(x, y, None, toy.eps, detach_z=True).latents
    outputs = {
        "prior": parameters_of([latent.p for latent in latents]),
        "baseline": toy.cvae.baseline_net(x).sum(),
        "prediction from the prior": toy.cvae.from_prior(x, toy.cvae.baseline_net(x), toy.eps).logits.sum(),
    }
    for name, output in outputs.items():
        (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
        assert gradient[:, ~toy.split.observed].eq(0).all(), name
        assert gradient[:, toy.split.observed].ne(0).any(0).all(), name
    (gradient,) = torch.autograd.grad(parameters_of([latent.q for latent in latents]), images)
    assert gradient.ne(0).any(0).all()  # the recognition network sees both


@ALL
def test_prior_is_the_same_whatever_is_hidden(toy):
    """In value, too: at the same z above, with every hidden pixel another."""
    draws = [toy.cvae.from_posterior(toy.x, y, None, toy.eps) for y in (toy.y, 1 - toy.y)]
    assert not torch.equal(draws[0].latents[0].q.loc, draws[1].latents[0].q.loc)
    for parameter, other in zip(*(draw.latents[0].p for draw in draws), strict=True):
        assert torch.equal(parameter, other)


@ALL
@CASES
def test_observed_pixels_never_count(make_toy, network, case):
    """Given a draw, the likelihood is the same whatever they hold, and another for a change in any hidden one."""
    toy = make_toy(*case, count=1, network=network)
    toy.cvae.eval()
    draw = toy.cvae.from_posterior(*toy.batch, toy.eps)

    def likelihood(images):
        return draw.log_likelihood(toy.split.split(images)[1])

    original = likelihood(toy.images)
    for row in range(toy.split.height):
        for column in range(toy.split.width):
            images = toy.images.clone()
            images[0, row, column] = (images[0, row, column] + 0.5) % 1
            assert torch.equal(likelihood(images), original) == toy.split.observed[row, column]


@ALL
@pytest.mark.parametrize("objective", [elbo, iwae])
def test_all_but_the_baseline_is_trained(toy, objective):
    """Every weight gets a gradient, but the baseline's: not even if they are no longer frozen."""
    names = [name for name, parameter in toy.cvae.named_parameters() if not parameter.requires_grad]
    assert names == [f"baseline_net.{name}" for name, _ in toy.cvae.baseline_net.named_parameters()]
    toy.cvae.requires_grad_(True)
    next(iter(objective(toy.cvae, toy.batch, toy.eps).values())).sum().backward()
    for name, parameter in toy.cvae.named_parameters():
        if name.startswith("baseline_net."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.ne(0).any(), name


def test_of_a_batched_network_both_copies_are_trained(make_toy):
    toy = make_toy()
    elbo(toy.cvae, toy.batch, toy.eps)["elbo"].sum().backward()
    for parameter in toy.cvae.encoders.parameters():
        assert parameter.grad.flatten(1).ne(0).any(1).all()


@ALL
def test_baseline_trains_by_itself(toy):
    baseline = toy.model("baseline")
    log_likelihood(baseline, toy.batch)["log_likelihood"].sum().backward()
    assert all(parameter.grad.ne(0).any() for parameter in baseline.parameters())
    assert all(parameter.grad is None for name, parameter in toy.cvae.named_parameters() if "baseline" not in name)


@ALL
def test_images_do_not_see_each_other(toy):
    """Each image's terms depend on its own pixels and noise alone."""
    x, y, eps = (tensor.clone().requires_grad_() for tensor in (toy.x, toy.y, toy.eps))
    terms = elbo(toy.cvae, Batch(x, y), eps)["elbo"]
    gradients = torch.autograd.grad(terms[2], (x, y, eps))
    for gradient, dimension in zip(gradients, (0, 0, 1), strict=True):
        others = torch.arange(len(x)) != 2
        assert gradient.movedim(dimension, 0)[others].eq(0).all()
        assert gradient.select(dimension, 2).ne(0).any()
    alone = elbo(toy.cvae, Batch(toy.x[2:3], toy.y[2:3]), toy.eps[:, 2:3])["elbo"]
    torch.testing.assert_close(alone[0], terms[2], rtol=1e-12, atol=0)


@ALL
def test_samples_do_not_see_each_other(toy):
    draw, alone = (toy.cvae.from_posterior(*toy.batch, eps) for eps in (toy.eps, toy.eps[1:2]))
    torch.testing.assert_close(alone.logits[0], draw.logits[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone.log_ratio[0], draw.log_ratio[1], rtol=1e-12, atol=1e-12)


@ALL
def test_known_guess_is_the_computed_one(toy):
    """Bit for bit; and what is given is what is used."""
    model = toy.cvae
    with torch.no_grad():
        guess = model.baseline_net(toy.x)
    for draw in (
        lambda guess: model.from_posterior(toy.x, toy.y, guess, toy.eps),
        lambda guess: model.from_prior(toy.x, guess, toy.eps),
    ):
        assert_same(draw(guess), draw(None))
        assert_same(draw(guess + 1), draw(None), same=False)


@ALL
def test_known_guess_in_half_precision(make_toy, network):
    """As training keeps it: the type of everything else stays."""
    toy = make_toy(dtype=torch.float32, network=network)
    toy.cvae.eval()
    with torch.no_grad():
        guess = toy.cvae.baseline_net(toy.x)
        close, exact = (toy.cvae.from_posterior(toy.x, toy.y, g, toy.eps) for g in (guess.bfloat16(), guess))
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(close))
    torch.testing.assert_close(close.logits, exact.logits, rtol=0.1, atol=0.1)


@ALL
def test_cached_guess_follows_the_rows(make_toy, network):
    """A batch's guess is that of its own images."""
    toy = make_toy(count=9, dtype=torch.float32, network=network)
    toy.cvae.eval()
    image_set = ImageSet(toy.images.mul(255).round().to(torch.uint8), toy.split)
    image_set.set_guesses(toy.cvae.baseline_net)
    x, _, guess = image_set.batch(torch.tensor([7, 1, 1, 4]))
    torch.testing.assert_close(guess, toy.cvae.baseline_net(x).detach(), rtol=1e-5, atol=1e-5)


@ALL
def test_weights_come_from_the_seed_alone(network):
    """And nobody else's random numbers do: the global generator is left as it is."""
    split, settings = Split(quadrants(1, 6, 7)), Settings(network=network, hidden=(9, 8), latent_dim=4, seed=5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = build(split, settings)
    assert torch.equal(torch.rand(3), expected)
    again = build(split, settings)
    torch.manual_seed(2)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in build(split, settings).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    other = build(split, Settings(network=network, hidden=(9, 8), latent_dim=4, seed=6))
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and "bias" not in name]
    assert matrices
    assert all(other.state_dict()[name].ne(model.state_dict()[name]).any() for name in matrices)


def test_networks_that_there_are_not(monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", {"tutorial": Tutorial, "paper": Tutorial})
    with pytest.raises(ValueError, match="network has to be one of tutorial, paper, not 'deep'"):
        build(Split(quadrants(1)), Settings(network="deep"))


@ALL
def test_state_goes_from_one_model_into_another(network):
    split = Split(quadrants(1, 6, 7))
    first, second = (build(split, Settings(network=network, hidden=(9, 8), latent_dim=4, seed=seed)) for seed in (1, 2))
    x, y = split.split(torch.rand(8, 6, 7))
    eps = torch.randn(2, 8, 4)
    first.train()
    first.from_posterior(x, y, None, eps)  # running statistics, where there are any
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(*(model.eval().from_posterior(x, y, None, eps) for model in (second, first)))


@ALL
def test_copy_is_a_model_of_its_own(toy):
    copied = copy.deepcopy(toy.cvae)
    assert_same(copied.from_posterior(*toy.batch, toy.eps), toy.cvae.from_posterior(*toy.batch, toy.eps))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.1)
    assert_same(copied.from_posterior(*toy.batch, toy.eps), toy.cvae.from_posterior(*toy.batch, toy.eps), same=False)


@ALL
def test_training_mode_leaves_the_baseline_as_it_is(toy):
    """It was trained before: no dropout in it, and its running statistics stay."""
    expected = copy.deepcopy(toy.cvae.baseline_net.state_dict())
    guess = toy.cvae.baseline_net(toy.x)
    toy.cvae.train()
    assert not any(module.training for module in toy.cvae.baseline_net.modules())
    assert all(module.training for name, module in toy.cvae.named_modules() if not name.startswith("baseline_net"))
    elbo(toy.cvae, toy.batch, toy.eps)
    assert torch.equal(toy.cvae.baseline_net(toy.x), guess)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in toy.cvae.baseline_net.state_dict().items())
    toy.cvae.eval()
    assert not any(module.training for module in toy.cvae.modules())


def test_dropout_and_batch_normalisation_work_in_training_only(make_toy):
    toy = make_toy(network="regularised")
    toy.cvae.eval()
    fixed = elbo(toy.cvae, toy.batch, toy.eps)["elbo"]
    assert torch.equal(elbo(toy.cvae, toy.batch, toy.eps)["elbo"], fixed)
    toy.cvae.train()
    torch.manual_seed(0)
    first = elbo(toy.cvae, toy.batch, toy.eps)["elbo"]
    assert not torch.equal(elbo(toy.cvae, toy.batch, toy.eps)["elbo"], first)
    torch.manual_seed(0)
    toy.cvae.eval()
    assert not torch.equal(elbo(toy.cvae, toy.batch, toy.eps)["elbo"], fixed)  # other running statistics


@ALL
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_collected_gradient_is_autograds(toy, network, name):
    """Every objective and network, layers that write their own gradients or not, to 1e-10 in float64."""
    objective = objectives.objective(Settings(objective=name, alpha=0.3))
    plain = copy.deepcopy(toy.cvae)
    next(iter(objective(plain, toy.batch, toy.eps).values())).sum().backward()
    weights = Weights(toy.cvae, slots=True)
    weights.gradient.fill_(float("nan"))
    terms = objective(weights.model, toy.batch, toy.eps)
    with weights.collecting_gradients():
        next(iter(terms.values())).sum().backward()
    assert any(parameter.grad is not None for parameter in plain.parameters())
    assert_collected(weights, plain)


def assert_collected(weights: Weights, plain: nn.Module) -> None:
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found = weights.view(name, weights.gradient)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item(), msg=name)


# What is trained is what is written, whatever that is


class TanhScale(Tutorial):
    """q's log-scale goes through a tanh."""

    def from_posterior(self, x, y, guess, eps, detach_z=False):
        guess = self.known_guess(x, guess)
        pixels = torch.stack([torch.cat([x, guess.sigmoid()], -1), torch.cat([x, y], -1)])
        p, q = (Gaussian(*parameters.chunk(2, dim=-1)) for parameters in self.encoders(pixels))
        q = q._replace(log_scale=q.log_scale.tanh())
        z = q.sample(eps)
        return Draw(self.generation(z, x, guess), (Latent(z, eps, q, p),))


class SeesX(Tutorial):
    """The generation network sees x as well."""

    def __init__(self, split, s):
        super().__init__(split, s)
        self.generation_net = MLP((s.latent_dim + split.num_observed, *s.hidden, split.num_hidden))

    def generation(self, z, x, guess):
        return self.generation_net(torch.cat([z, x.expand(*z.shape[:-1], -1)], dim=-1))


def four_kl(model: CVAE, batch: Batch, eps: Tensor) -> dict[str, Tensor]:
    """A new objective: the KL counts four times."""
    draw = model.from_posterior(*batch, eps)
    return {"four_kl": draw.log_likelihood(batch.y).mean(0) - 4 * draw.kl}


def plain_objective(model: CVAE, batch: Batch, eps: Tensor, kl_weight: float) -> Tensor:
    """The same of any network of one level, with the densities of PyTorch."""
    draw = model.from_posterior(*batch, eps)
    ((_, _, q, p),) = draw.latents
    pixels = nn.functional.binary_cross_entropy_with_logits(
        draw.logits, batch.y.expand_as(draw.logits), reduction="none"
    )
    kl = kl_divergence(Normal(q.loc, q.log_scale.exp()), Normal(p.loc, p.log_scale.exp())).sum(-1)
    return -pixels.sum(-1).mean(0) - kl_weight * kl


@pytest.mark.parametrize(
    ("builder", "objective", "kl_weight"),
    [
        pytest.param(Tutorial, four_kl, 4, id="four times the KL"),
        pytest.param(TanhScale, elbo, 1, id="tanh on the log-scale"),
        pytest.param(SeesX, elbo, 1, id="generation network that sees x"),
    ],
)
def test_what_is_trained_is_the_formula_that_is_written(make_toy, builder, objective, kl_weight):
    """Overridden draws and new objectives have exactly the gradient of plain operations, and not the usual one."""
    toy = make_toy(particles=3, network=builder)
    plain, usual = copy.deepcopy(toy.cvae), copy.deepcopy(toy.cvae)
    plain_objective(plain, toy.batch, toy.eps, kl_weight).sum().backward()
    weights = Weights(toy.cvae, slots=True)
    terms = objective(weights.model, toy.batch, toy.eps)
    value = next(iter(terms.values()))
    torch.testing.assert_close(value, plain_objective(plain, toy.batch, toy.eps, kl_weight), rtol=1e-12, atol=0)
    with weights.collecting_gradients():
        value.sum().backward()
    assert_collected(weights, plain)
    if builder is not SeesX:  # whose weights are of other shapes
        usual.__class__ = Tutorial
        elbo(usual, toy.batch, toy.eps)["elbo"].sum().backward()
        with pytest.raises(AssertionError):
            assert_collected(weights, usual)


# Ours against the plain masked form


def masked_log_likelihood(images, observed, logits):
    """log p(y|x,z) of whole images in raster order, from the probabilities, over the hidden pixels."""
    pixels = images * torch.log(torch.sigmoid(logits)) + (1 - images) * torch.log(torch.sigmoid(-logits))
    return torch.where(observed, 0.0, pixels).sum(-1)


def plain_cvae(reference, images, eps):
    """log-likelihood and KL of the CVAE as the formulas stand, `[B]` each."""
    p_loc, p_scale = reference.prior(images)
    q_loc, q_scale = reference.recognition(images)
    z = q_loc + q_scale * eps
    log_likelihood = masked_log_likelihood(images, reference.observed, reference.generation(z, images)).mean(0)
    kl = torch.log(p_scale / q_scale) + (q_scale**2 + (q_loc - p_loc) ** 2) / (2 * p_scale**2) - 1 / 2
    return log_likelihood, kl.sum(-1)


@OURS
@CASES
@pytest.mark.parametrize("hidden", [(11, 9), (7,), (7, 8, 9)], ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["guess", "cached guess"])
def test_fast_cvae_is_the_plain_one(make_toy, network, case, hidden, cached):
    """Slices, constant inputs and unused outputs left out, and a known ŷ change no value and no gradient by 1e-10."""
    toy = make_toy(*case, hidden=hidden, particles=3, network=network)
    reference = Reference(toy.cvae)
    likelihood, kl = plain_cvae(reference, toy.images.flatten(1), toy.eps)
    (kl - likelihood).sum().backward()
    guess = toy.cvae.baseline_net(toy.x).detach() if cached else None
    terms = elbo(toy.cvae, toy.batch._replace(guess=guess), toy.eps)
    (-terms["elbo"].sum()).backward()
    assert list(terms) == ["elbo", "log_likelihood", "kl"]
    torch.testing.assert_close(terms["elbo"], likelihood - kl, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["log_likelihood"], likelihood, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-10, atol=0)
    assert_gradients_agree(toy.cvae, reference, 1e-10)


@OURS
@CASES
def test_fast_gsnn_is_the_plain_one(make_toy, network, case):
    """The recognition network gets no gradient, or zeros."""
    toy = make_toy(*case, particles=3, network=network)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    loc, scale = reference.prior(images)
    logits = reference.generation(loc + scale * toy.eps, images)
    expected = masked_log_likelihood(images, reference.observed, logits).mean(0)
    expected.sum().backward()
    terms = objectives.gsnn(toy.cvae, toy.batch, toy.eps)
    terms["gsnn"].sum().backward()
    torch.testing.assert_close(terms["gsnn"], expected, rtol=1e-10, atol=0)
    assert_gradients_agree(toy.cvae, reference, 1e-10)


@CASES
def test_fast_baseline_is_the_plain_one(make_toy, case):
    toy = make_toy(*case)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    expected = masked_log_likelihood(images, reference.observed, reference.baseline_logits(images))
    expected.sum().backward()
    terms = log_likelihood(toy.model("baseline"), toy.batch)
    terms["log_likelihood"].sum().backward()
    assert list(terms) == ["log_likelihood"]
    torch.testing.assert_close(terms["log_likelihood"], expected, rtol=1e-10, atol=0)
    assert_gradients_agree(toy.cvae, reference, 1e-10)


@OURS
@CASES
def test_what_is_left_out_has_nothing_to_learn(make_toy, network, case):
    """The plain networks' outputs for observed pixels get no gradient; their inputs for hidden ones that of a bias."""
    toy = make_toy(*case, network=network)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    likelihood, kl = plain_cvae(reference, images, toy.eps)
    baseline = masked_log_likelihood(images, reference.observed, reference.baseline_logits(images))
    (kl - likelihood - baseline).sum().backward()
    for net in (reference.baseline_net, reference.generation_net):
        for weights in net[4].parameters():
            assert weights.grad[reference.observed].eq(0).all()
            assert weights.grad[~reference.observed].ne(0).any()
    first = reference.baseline_net[0]
    constant = first.weight.grad[:, ~reference.observed]
    assert first.bias.grad.ne(0).any()
    torch.testing.assert_close(constant, -first.bias.grad[:, None].expand_as(constant), rtol=1e-12, atol=1e-14)


@OURS
@CASES
def test_completions_are_the_plain_ones(make_toy, network, case):
    """Pixel means at z ~ p(z|x), as pictures; one noise for all images broadcasts."""
    toy = make_toy(*case, particles=3, network=network)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    loc, scale = reference.prior(images)
    for eps in (toy.eps, toy.eps[:, :1]):
        logits = reference.generation(loc + scale * eps, images)
        plain = torch.where(reference.observed, images, torch.sigmoid(logits))
        ours = toy.split.compose(toy.x, toy.cvae.completions(toy.x, eps)).flatten(2)
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", MASKS)
@OURS
def test_other_masks(network, name):
    """Nothing depends on the shape of what is observed."""
    split = Split(MASKS[name](5, 7))
    torch.manual_seed(0)
    cvae = build(split, Settings(network=network, hidden=(9, 8), latent_dim=4)).double()
    images, eps = torch.rand(6, 5, 7).double(), torch.randn(2, 6, 4).double()
    likelihood, kl = plain_cvae(Reference(cvae), images.flatten(1), eps)
    terms = elbo(cvae, Batch(*split.split(images)), eps)
    torch.testing.assert_close(terms["elbo"], likelihood - kl, rtol=1e-10, atol=0)
