"""What a step may ask of its device: it never waits for it, and all its tensors lie on it."""

from collections import Counter

import pytest
import torch
from support.steps import BATCH, cases, make_training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvae import context


class Watch(TorchDispatchMode):
    """Refuses operators that wait for the device or whose shape hangs on numbers, and tensors elsewhere than on it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.seen = device, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        assert not name.startswith(self.REFUSED), name
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), name
        self.seen[name] += 1
        result = None if name == "_fused_adamw_" and self.device.type == "meta" else func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                assert tensor.device.type == self.device.type, (name, tensor.shape)
        return result


@cases
@pytest.mark.parametrize(("precision", "device"), [("bf16", "cpu"), ("fp16", "cpu"), ("fp32", "meta")])
def test_step_never_waits_for_the_device_and_stays_on_it(network, objective, precision, device, monkeypatch):
    """No number is read, no shape hangs on data, and no tensor is made elsewhere, as on the CPU for a GPU."""
    device = torch.device(device)
    monkeypatch.setattr(context, "generator", lambda device, *key: torch.Generator("cpu").manual_seed(0))
    training = make_training(network, objective, precision, device=device, clip=1.0)
    rows, random = torch.arange(BATCH, device=device), torch.Generator().manual_seed(0)
    eps = [each.to(device) for each in training.phase.noise(BATCH, random)]
    with Watch(device) as watch:
        for number in range(2):
            training.step(rows, *eps)
            training.step.average.update(number, last=True)
    assert watch.seen["_fused_adamw_"] == 2 * 2  # weights with decay and without
