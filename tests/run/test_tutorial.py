"""The tutorial's own weights: the same functions as its layers on whole images, and files that are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checkpoint import Payload, saved_by_torch
from torch import Tensor, nn

import cvae
from cvae.data.masks import quadrants
from cvae.errors import DataError
from cvae.run.tutorial import load_tutorial

HIDDEN, LATENT = (13, 11), 5

State = dict[str, Tensor]


def linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def tutorial_layers(seed: int = 0) -> nn.ModuleDict:
    """Layers of the names and sizes that Pyro's example has, for whole images; hidden and latent sizes are small."""
    (first, second), pixels = HIDDEN, 784
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ends = dict.fromkeys(("fc31", "fc32"), (second, LATENT))
        encoders = [linears(fc1=(pixels, first), fc2=(first, second), **ends) for _ in range(2)]
        return nn.ModuleDict(
            {
                "baseline_net": linears(fc1=(pixels, first), fc2=(first, second), fc3=(second, pixels)),
                "prior_net": encoders[0],
                "generation_net": linears(fc1=(LATENT, first), fc2=(first, second), fc3=(second, pixels)),
                "recognition_net": encoders[1],
            }
        ).requires_grad_(False)


def hidden_units(net: nn.ModuleDict, inputs: Tensor) -> Tensor:
    return net["fc2"](net["fc1"](inputs).relu()).relu()


def encoded(net: nn.ModuleDict, image: Tensor) -> tuple[Tensor, Tensor]:
    """loc and scale, as its encoder gives them for an image in which nothing is masked any more."""
    units = hidden_units(net, image)
    return net["fc31"](units), net["fc32"](units).exp()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(tutorial_layers().state_dict(), tmp_path / "cvae_net.pth")
    return tmp_path / "cvae_net.pth"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_same_outputs_as_its_own_layers(path: Path, count: int) -> None:
    """On whole images, −1 in the place of what is hidden from the baseline; outputs for given pixels are left out."""
    nets, model = tutorial_layers(), cvae.load_tutorial(str(path), count)
    observed = quadrants(count).flatten()
    images, eps = torch.rand(6, 784), torch.randn(3, 6, LATENT)
    units = hidden_units(nets["baseline_net"], torch.where(observed, images, -1.0))
    y_hat = nets["baseline_net"]["fc3"](units).sigmoid()
    prior = encoded(nets["prior_net"], torch.where(observed, images, y_hat))
    posterior = encoded(nets["recognition_net"], images)

    x, y = model.split.split(images.view(6, 28, 28))
    torch.testing.assert_close(model.baseline_net(x).sigmoid(), y_hat[:, ~observed])
    for draw, (loc, scale) in (
        (model.from_prior(x, None, eps), prior),
        (model.from_posterior(x, y, None, eps), posterior),
    ):
        (latent,) = draw.latents
        torch.testing.assert_close(latent.q.loc, loc)
        torch.testing.assert_close(latent.q.log_scale.exp(), scale)
        torch.testing.assert_close(latent.p.loc, prior[0])
        torch.testing.assert_close(latent.p.log_scale.exp(), prior[1])
        generation = nets["generation_net"]
        means = generation["fc3"](hidden_units(generation, loc + scale * eps)).sigmoid()
        torch.testing.assert_close(draw.logits.sigmoid(), means[..., ~observed])
    assert (loc - prior[0]).abs().min(0).values.max() > 0.01  # the two encoders are not the same


def test_it_is_ready_to_use(path: Path) -> None:
    model = load_tutorial(path, quadrants=2)
    assert (model.split.name, model.latent_dim) == ("2 quadrants", LATENT)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("count", [0, 4, "1", None])
def test_number_of_quadrants_that_the_tutorial_has_not(path: Path, count: int) -> None:
    with pytest.raises(ValueError, match="quadrants has to be 1, 2 or 3"):
        load_tutorial(path, count)


# Files that are refused


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        load_tutorial(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def without(name: str) -> Callable[[State], object]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("prior_net.fc31.bias"), "it has no prior_net.fc31.bias"),
        (without("baseline_net.fc1.bias"), "it has no baseline_net.fc1.bias"),
        (lambda state: {k: v for k, v in state.items() if "baseline" not in k}, "it has no baseline_net.fc1.weight"),
        (lambda state: {**state, "more": torch.zeros(1)}, "more is another"),
        (lambda state: {**state, "prior_net.fc2.weight": torch.zeros(13, 11)}, r"prior_net\.fc2\.weight is another"),
        (lambda state: {**state, "prior_net.fc31.bias": torch.zeros(())}, r"prior_net\.fc31\.weight is another"),
        (lambda state: {k: v.double() for k, v in state.items()}, r"baseline_net\.fc1\.weight is another"),
        (lambda state: {k: v.tolist() for k, v in state.items()}, "it has no baseline_net.fc1.weight"),
        (lambda state: {"model": state}, "it has no baseline_net.fc1.weight"),
        (lambda state: list(state.values()), "it has no baseline_net.fc1.weight"),
        (lambda state: 3, "it has no baseline_net.fc1.weight"),
    ],
)  # fmt: skip
def test_other_weights(path: Path, change: Callable[[State], object], reason: str) -> None:
    torch.save(change(tutorial_layers().state_dict()), path)
    assert_refused(path, reason)


def test_layers_of_no_size(path: Path) -> None:
    state = {name: tensor[:0] for name, tensor in tutorial_layers().state_dict().items()}
    torch.save({**state, "baseline_net.fc1.weight": torch.zeros(0, 784)}, path)
    assert_refused(path, r"baseline_net\.fc2\.weight is another")


def test_pickled_objects_are_not_run(path: Path, tmp_path: Path) -> None:
    """Nor is a whole module read, which is a pickled object too; nor what is damaged."""
    path.write_bytes(saved_by_torch(Payload((tmp_path / "run").write_text, "was run")))
    assert_refused(path, "holds more than tensors, or is damaged: save the state_dict")
    torch.save(tutorial_layers(), path)
    assert_refused(path, "holds more than tensors, or is damaged: save the state_dict")
    torch.save(tutorial_layers().state_dict(), path)
    content = path.read_bytes()
    for damaged in (b"", content[:-100], content[: len(content) // 2], b"text"):
        path.write_bytes(damaged)
        assert_refused(path, "holds more than tensors, or is damaged")
    path.unlink()
    assert_refused(path, "cannot be read")
    path.mkdir()
    assert_refused(path, "cannot be read")
    assert not (tmp_path / "run").exists()
