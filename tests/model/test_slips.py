"""A library user's slips are ValueErrors that name shapes and ranges; none of them costs a training step a wait."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.model.likelihood import evaluate
from cvae.model.networks import NETWORKS
from cvae.model.objectives import gsnn


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("x", lambda x: x * 255, "in [0, 1], not float32 [5, 9] from 0 to 255"),
        ("x", lambda x: (x * 255).to(torch.uint8), "not uint8 [5, 9] from 0 to 255"),
        ("x", lambda x: x - 0.5, "from -0.5 to 0.5"),
        ("x", lambda x: torch.full_like(x, torch.nan), "nan"),
        ("x", lambda x: x > 0.5, "not bool [5, 9]"),
        ("x", lambda x: torch.zeros(5, 10), "[5, 9] on cpu, not float32 [5, 10]"),
        ("x", lambda x: x[0], "[9, 9] on cpu, not float32 [9]"),
        ("x", lambda x: x.view(5, 3, 3), "not float32 [5, 3, 3]"),
        ("y", lambda y: y * 255, "in [0, 1], not float32 [5, 27] from 0 to 255"),
        ("y", lambda y: y[:4], "[5, 27] on cpu, not float32 [4, 27]"),
        ("y", lambda y: y[:, :1], "[5, 27] on cpu, not float32 [5, 1]"),
        ("y", lambda y: y.to("meta"), "on cpu, not float32 [5, 27] on meta"),
        ("eps", lambda eps: eps[0], "[5, 5, 4] on cpu, not float32 [5, 4]"),
        ("eps", lambda eps: eps[:, :3], "[1, 5, 4] on cpu, not float32 [1, 3, 4]"),
        ("eps", lambda eps: eps[..., :1], "[1, 5, 4] on cpu, not float32 [1, 5, 1]"),
        ("eps", lambda eps: eps.long(), "floats N(0, 1)"),
        ("guess", lambda guess: torch.zeros(5, 9), "floats logits, [5, 27] on cpu, not float32 [5, 9]"),
    ],
)
def test_what_is_not_of_the_model(
    make_toy: Callable[..., Any], network: str, name: str, change: Callable[[Tensor], Tensor], found: str
) -> None:
    toy = make_toy(network=network, dtype=torch.float32)
    model = toy.cvae.eval()
    x = toy.x.clone()
    x[0, :2] = torch.tensor([0, 1])
    y = toy.y.clone()
    y[0, :2] = torch.tensor([0, 1])
    right: dict[str, Any] = {"x": x, "y": y, "guess": None, "eps": toy.eps}
    wrong = right | {name: change(right[name])}

    def draw(x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor) -> None:
        model.from_posterior(x, y, guess, eps)

    def draw_from_prior(x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor) -> None:
        model.from_prior(x, guess, eps)

    def complete(x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor) -> None:
        model.completions(x, eps)

    calls = [draw, *([draw_from_prior] if name != "y" else []), *([complete] if name in ("x", "eps") else [])]
    for call in calls:
        call(**right)
        with pytest.raises(ValueError, match=f"^{name} has to be") as error:
            call(**wrong)
        assert found in str(error.value)
        assert "\n" not in str(error.value)


def test_targets_of_another_shape(make_toy: Callable[..., Any]) -> None:
    """Those that would be spread over the predictions included."""
    toy = make_toy(dtype=torch.float32)
    for y in (toy.y[:1], toy.y[:, :1], toy.y[0]):
        with pytest.raises(ValueError, match=r"^y has to be floats in \[0, 1\], \[5, 27\]"):
            gsnn(toy.cvae, toy.batch._replace(y=y), toy.eps)


def test_evaluation_of_other_images(make_toy: Callable[..., Any]) -> None:
    model = make_toy(height=6, width=6, dtype=torch.float32).cvae.eval()
    images = torch.zeros(3, 6, 6, dtype=torch.uint8)
    as_many = quadrants(1, 6, 6).T.contiguous()  # pixels, and others
    for observed in (quadrants(2, 6, 6), quadrants(1, 8, 8), as_many):
        others = ImageSet(torch.zeros(3, *observed.shape, dtype=torch.uint8), Split(observed))
        with pytest.raises(ValueError, match="another split"):
            evaluate(model, others, [2], 0)
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(model, ImageSet(images, model.split), [2, 0], 0)
    with pytest.raises(ValueError, match="the images are on meta, and the model on cpu"):
        evaluate(model, ImageSet(images, model.split, "meta"), [2], 0)
    assert len(list(evaluate(model, ImageSet(images, model.split), [2], 0))) == 1
