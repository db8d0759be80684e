"""The weights that Pyro's example of a CVAE saves, as ours. Source: the example `cvae` of Pyro 1.9, of its tutorial.

Its layers see whole images of 28×28 pixels, −1 in the place of each hidden pixel of the baseline's inputs, and have an
output for each pixel. Ours see the observed pixels first, and hold what is constant in the biases.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cvae.data.tasks import FixedMask, make_task
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.run.checkpoint import kinds, unpickled
from cvae.run.load import check_device
from cvae.run.weights_file import assembled
from cvae.settings import Settings

SIDE, MASKED = 28, -1.0  # the images' size; what the tutorial shows its baseline in the place of a hidden pixel


def load_tutorial(path: str | Path, quadrants: int = 1, device: torch.device | str = "cpu") -> CVAE:
    """Return the CVAE in a `cvae_net.pth` of Pyro's example, frozen; it computes the same functions.

    Args:
        path: The file, a state_dict. Nothing in it is run; sizes are those of the file.
        quadrants: How many are observed, 1, 2 or 3, as in its training: the file does not say.
        device: Where the model is to be.

    Raises:
        DataError: It is no such file.
        ValueError: For another number, and a device that there is not.
    """
    check_device(device)
    settings, path = Settings(quadrants=quadrants), Path(path)
    weights = unpickled(path, "holds more than tensors, or is damaged: save the state_dict of the CVAE")
    task, state = make_task(settings, SIDE, SIDE), dict[str, Tensor]()
    try:
        for network in ("baseline_net", "prior_net", "recognition_net", "generation_net"):
            names = ("fc1", "fc2", "fc31", "fc32") if f"{network}.fc31.bias" in weights else ("fc1", "fc2", "fc3")
            layers = [(weights[f"{network}.{name}.weight"], weights[f"{network}.{name}.bias"]) for name in names]
            state |= _converted(network, layers, task)
        first, second, z = (
            len(weights[f"{n}.bias"]) for n in ("baseline_net.fc1", "baseline_net.fc2", "prior_net.fc31")
        )
        settings = replace(settings, hidden=(first, second), latent_dim=z)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise DataError(f"{path}: is no CVAE of Pyro's example ({type(error).__name__}: {error})") from None
    if not kinds(weights) or len(weights) != 2 * 14:
        raise DataError(f"{path}: is no CVAE of Pyro's example: it has other weights than that")
    return assembled(path, settings, task, state).to(device)


def _converted(network: str, layers: list[tuple[Tensor, Tensor]], task: FixedMask) -> dict[str, Tensor]:
    """Return the layers of one of its networks as those of ours with this mask."""
    given, hidden = task.order.split([task.x_dim, task.y_dim])
    (weight, bias), second, *last = layers
    if network == "baseline_net":
        weight, bias = weight[:, given], bias + MASKED * weight[:, hidden].sum(1)
    elif network != "generation_net":
        weight = weight[:, task.order]  # and loc and log-scale become one layer:
    end = [torch.cat(parts) for parts in zip(*last, strict=True)]
    end = end if len(last) == 2 else [part[hidden] for part in end]
    names = (f"{network}.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))
    return dict(zip(names, (weight, bias, *second, *end), strict=True))
