"""The tutorial's own weights: the same functions as its layers on whole images, and files that are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checkpoint import Payload
from torch import Tensor, nn

import cvae
from cvae.data.masks import quadrants
from cvae.errors import DataError
from cvae.run.load import load_tutorial

HIDDEN, LATENT = (13, 11), 5


def linears(inputs: int, outputs: int, *ends: str) -> nn.ModuleDict:
    sizes = {"fc1": (inputs, HIDDEN[0]), "fc2": HIDDEN, **dict.fromkeys(ends, (HIDDEN[1], outputs))}
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def tutorial_layers() -> nn.ModuleDict:
    """Layers of the names and sizes that Pyro's example has, for whole images; hidden and latent sizes are small."""
    sizes = {"baseline": (784, 784), "prior": (784, LATENT), "generation": (LATENT, 784), "recognition": (784, LATENT)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = {
            f"{net}_net": linears(*s, *(("fc31", "fc32") if s[1] == LATENT else ("fc3",))) for net, s in sizes.items()
        }
        return nn.ModuleDict(nets).requires_grad_(False)


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
    nets, model, random = tutorial_layers(), cvae.load_tutorial(str(path), count), torch.Generator().manual_seed(0)
    observed = quadrants(count).flatten()
    images, eps = torch.rand(6, 784, generator=random), torch.randn(3, 6, LATENT, generator=random)
    units = hidden_units(nets["baseline_net"], torch.where(observed, images, -1.0))
    y_hat = nets["baseline_net"]["fc3"](units).sigmoid()
    prior = encoded(nets["prior_net"], torch.where(observed, images, y_hat))
    posterior = encoded(nets["recognition_net"], images)

    batch = model.task.batch(model.task.rows(images.view(6, 28, 28)))
    torch.testing.assert_close(model.baseline_net(batch.x).sigmoid(), y_hat[:, ~observed])
    for draw, (loc, scale) in ((model.from_prior(batch, eps), prior), (model.from_posterior(batch, eps), posterior)):
        (latent,) = draw.latents
        torch.testing.assert_close(latent.q.loc, loc)
        torch.testing.assert_close(latent.q.log_scale.exp(), scale)
        torch.testing.assert_close(latent.p.loc, prior[0])
        torch.testing.assert_close(latent.p.log_scale.exp(), prior[1])
        means = nets["generation_net"]["fc3"](hidden_units(nets["generation_net"], loc + scale * eps)).sigmoid()
        torch.testing.assert_close(draw.logits.sigmoid(), means[..., ~observed])
    assert (loc - prior[0]).abs().min(0).values.max() > 0.01  # the two encoders are not the same


def test_it_is_ready_to_use(path: Path) -> None:
    model = load_tutorial(path, quadrants=2)
    assert (model.task.name, model.latent_dim) == ("2 quadrants", LATENT)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="quadrants has to be"):
        load_tutorial(path, 4)


CHANGES: list[Callable[[dict[str, Tensor]], object]] = [
    lambda state: {name: tensor for name, tensor in state.items() if name != "prior_net.fc31.bias"},
    lambda state: {**state, "prior_net.fc2.weight": torch.zeros(13, 11)},
    lambda state: {**state, "baseline_net.fc1.weight": torch.zeros(13, 100)},
    lambda state: {name: tensor.tolist() for name, tensor in state.items()},
    lambda state: 3,
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_other_weights_are_refused(path: Path, number: int) -> None:
    torch.save(CHANGES[number](tutorial_layers().state_dict()), path)
    with pytest.raises(DataError) as caught:
        load_tutorial(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_objects_are_not_run(path: Path, tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "written"), path)
    with pytest.raises(DataError, match="is no state_dict of the CVAE of Pyro's example"):
        load_tutorial(path)
    assert not (tmp_path / "written").exists()
