"""The weights that Pyro's example of a CVAE saves, as ours.

Its layers see whole images of 28×28 pixels in raster order, −1 in the place of each hidden pixel of the baseline's
inputs, and have an output for each pixel. Ours see the observed pixels first, and hold what is constant in the biases.
Source: the example `cvae` of Pyro 1.9, on which its tutorial is.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cvae.data.masks import Split, mask, mask_name
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.run.checkpoint import kinds, unpickled
from cvae.run.load import check_device
from cvae.run.weights_file import Weights, assembled
from cvae.settings import Settings

SIDE = 28
MASKED = -1.0  # what the tutorial shows its baseline in the place of a hidden pixel

Layer = tuple[Tensor, Tensor]  # weight `[outputs, inputs]`, and bias


def load_tutorial(path: str | Path, quadrants: int = 1, device: torch.device | str = "cpu") -> CVAE:
    """The CVAE in a `cvae_net.pth` of Pyro's example, frozen, in evaluation mode; it computes the same functions.

    quadrants: how many are observed, 1, 2 or 3, as in its training: the file does not say. Sizes are those of the file.
    Raises DataError, naming the file, if it is no such file, and ValueError for another number and for a device that
    there is not. Nothing in the file is run.
    """
    check_device(device)
    settings, path = Settings(quadrants=quadrants), Path(path)
    weights = unpickled(path, "holds more than tensors, or is damaged: save the state_dict of the CVAE")
    hidden, latent_dim = _sizes(path, weights)
    try:
        settings = replace(settings, hidden=hidden, latent_dim=latent_dim)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    split = Split(mask(settings, SIDE, SIDE), mask_name(settings))
    return assembled(path, settings, split, _converted(weights, split)).to(device)


def _sizes(path: Path, weights: object) -> tuple[tuple[int, int], int]:
    """The sizes of the hidden layers, and of z. Raises DataError unless they are those of a CVAE of the tutorial."""
    found = kinds(weights) or {}
    first, second, z = (
        (*found[f"{name}.bias"][0], 0)[0] if f"{name}.bias" in found else 0
        for name in ("baseline_net.fc1", "baseline_net.fc2", "prior_net.fc31")
    )  # fmt: skip
    pixels = SIDE * SIDE
    encoder = {"fc1": (first, pixels), "fc2": (second, first), "fc31": (z, second), "fc32": (z, second)}
    layers = {
        "baseline_net": {"fc1": (first, pixels), "fc2": (second, first), "fc3": (pixels, second)},
        "prior_net": encoder,
        "recognition_net": encoder,
        "generation_net": {"fc1": (first, z), "fc2": (second, first), "fc3": (pixels, second)},
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for network, sizes in layers.items():
        for name, size in sizes.items():
            wanted |= {f"{network}.{name}.weight": size, f"{network}.{name}.bias": size[:1]}
    problems = [f"it has no {name}" for name in wanted if name not in found]
    problems += [f"{name} is another" for name in found if found[name] != (wanted.get(name), torch.float32)]
    if problems:
        raise DataError(f"{path}: is no CVAE of Pyro's example with all its networks of the same sizes: {problems[0]}")
    return (first, second), z


def _converted(weights: Weights, split: Split) -> Weights:
    """Weights of the tutorial as the state of our network `tutorial` with this split."""

    def layers(network: str, *names: str) -> list[Layer]:
        return [(weights[f"{network}.{name}.weight"], weights[f"{network}.{name}.bias"]) for name in names]

    given, hidden = split.order.split([split.num_observed, split.num_hidden])

    def for_hidden(layer: Layer) -> Layer:
        return layer[0][hidden], layer[1][hidden]

    (weight, bias), second, last = layers("baseline_net", "fc1", "fc2", "fc3")
    first = weight[:, given], bias + MASKED * weight[:, hidden].sum(1)
    networks = {"baseline_net": [[first, second, for_hidden(last)]]}
    first, second, last = layers("generation_net", "fc1", "fc2", "fc3")
    networks["generation_net"] = [[first, second, for_hidden(last)]]
    networks["encoders"] = []
    for network in ("prior_net", "recognition_net"):
        (weight, bias), second, loc, log_scale = layers(network, "fc1", "fc2", "fc31", "fc32")
        last = torch.cat([loc[0], log_scale[0]]), torch.cat([loc[1], log_scale[1]])
        networks["encoders"].append([(weight[:, split.order], bias), second, last])
    state = {}
    for name, copies in networks.items():
        for i, layer in enumerate(zip(*copies, strict=True)):
            for kind, tensors in zip(("weight", "bias"), zip(*layer, strict=True), strict=True):
                state[f"{name}.layers.{i}.{kind}"] = torch.stack(tensors)
    return state
