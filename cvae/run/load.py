"""A trained model, ready to use."""

from pathlib import Path

import torch

from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.model.networks import build
from cvae.run import checkpoint
from cvae.run.folder import BEST, find_run, read_settings, read_split


def start_from(folder: Path, model: CVAE) -> str:
    """Put the best weights of the run in a folder into a model, where they fit it; says which do not, in one line.

    Raises DataError if there are none that can be read, or not one fits.
    """
    state = checkpoint.load(folder / BEST).get("model")
    own = model.state_dict()
    fitting = {
        name: tensor
        for name, tensor in (state if isinstance(state, dict) else {}).items()
        if name in own and isinstance(tensor, torch.Tensor) and tensor.shape == own[name].shape
    }
    if not fitting:
        raise DataError(f"{folder / BEST}: has no weights that fit this network; leave --init out")
    model.load_state_dict({**own, **fitting})
    new = [name for name in own if name not in fitting]
    return f"begun with the weights of {folder}" + (
        f"; newly drawn, since these do not fit: {', '.join(new)}" if new else ""
    )


def load(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> CVAE:
    """The CVAE of a run with its best weights, frozen, in evaluation mode.

    run: its folder, or its name below the folder `runs`. The model's `split` says what it sees of an image.
    Raises DataError if there is no such run, or its weights cannot be read or are not of its settings.
    """
    folder = find_run(run, runs)
    settings, split = read_settings(folder), read_split(folder)
    state = checkpoint.load(folder / BEST)
    if state.get("phase") != "cvae":
        raise DataError(f"{folder}: only its baseline is trained so far; go on with python train.py --resume {folder}")
    try:
        with torch.device("meta"):  # no memory is taken before the weights are known to fit
            wanted = build(split, settings).state_dict()
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in state["model"].items()}
        if found != {name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()}:
            raise ValueError
        model = build(split, settings)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise DataError(f"{folder / BEST}: does not hold the weights of a CVAE of the run's settings") from None
    return model.to(device).requires_grad_(False).eval()
