"""`eval.py --realism`: the table of realism and diversity in all forms, and its picture."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prdc import compute_prdc
from support.inprocess import call_eval
from support.trainings import fork_two
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import pil_to_tensor

from cvae.context import Context, generator
from cvae.report import realism

HERE = Context(torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("place")


def test_measures_computed_another_way(record: dict[str, Any], case: realism.Case) -> None:
    """From the public functions, with the noise of each ten images, which comes from the seed and their place."""
    model, classes, images = case.model, case.classes, case.images / 255
    parts = [(part, generator(HERE.device, 0, "realism", 10 * i)) for i, part in enumerate(images.split(10))]
    made = torch.cat([model.complete(part, 50, random) for part, random in parts], dim=1)
    y, means = (model.task.asked(pictures).double() for pictures in (images, made))
    guess = model.guess(model.task.batch(model.task.rows(images))).sigmoid().double()
    logits, of_classes = case.x_only(images).double(), case.whole(made.flatten(0, 1)).argmax(1).view(50, 60)
    for who, name, values in (
        ("x_only", "log_score", cross_entropy(logits, classes, reduction="none")),
        ("x_only", "entropy", torch.distributions.Categorical(logits=logits).entropy()),
        ("x_only", "validity", (logits.argmax(1) == classes).double()),
        ("truth", "validity", (case.whole(images).argmax(1) == classes).double()),
        ("nn", "mse", (guess - y).square().mean(1)),
        ("nn", "energy_score", (guess - y).norm(dim=1)),
        ("cvae", "validity", (of_classes == classes).double().mean(0)),
        ("cvae", "best_mse", (means - y).square().mean(2).amin(0)),
    ):
        expected = {"mean": values.mean().item(), "stderr": values.std().item() / 60**0.5}
        assert record[who][name] == pytest.approx(expected, rel=1e-5), (who, name)  # float32, of some hundred terms
    truth, first = case.whole.features(images), case.whole.features(made[0])
    torch.testing.assert_close(realism.judge("q1", case, 0, HERE)["cvae", "features"].T, first)
    expected = compute_prdc(truth.numpy(), first.numpy(), 5)
    for name in ("density", "coverage"):
        assert record["cvae"][name] == {"mean": pytest.approx(expected[name], abs=1 / 60), "stderr": None}
    # Squared errors of black and white pixels exceed those of their means p by p (1 − p): of 60 × 50 × 588 draws.
    for who, p in (("nn", guess), ("cvae", means)):
        more = record[f"{who}_drawn"]["mse"]["mean"] - record[who]["mse"]["mean"]
        assert more == pytest.approx((p * (1 - p)).mean().item(), rel=0.01)


def test_forms_have_the_same_numbers(record: dict[str, Any]) -> None:
    """Also those that follow: of one completion, however often, and of the truth."""
    assert (record["images"], record["completions"]) == (60, 50)
    means = {who: {name: parts["mean"] for name, parts in record[who].items()} for who in realism.COLUMNS}
    assert all(list(means[who]) == list(realism.ROWS)[: 4 if who == "x_only" else None] for who in means)
    for who in ("nn", "truth"):
        assert (means[who]["entropy"], means[who]["correlation"]) == (0, None)
        assert means[who]["mse"] == means[who]["best_mse"]
    assert (means["truth"]["energy_score"], means["truth"]["mse"], means["truth"]["density"]) == (0, 0, 1)
    (line,) = csv.DictReader(io.StringIO(call_eval("q1", "--realism", "--format", "csv").out))
    assert float(line["realism_cvae_log_score_mean"]) == record["cvae"]["log_score"]["mean"]
    assert line["realism_truth_coverage_stderr"] == ""
    for form in ("text", "markdown"):
        code, text, err = call_eval("q1", "--realism", "--format", form)
        assert (code, "q1 (1 quadrant), 60 images" in text, err) == (0, True, "")  # the classifiers are there
        for validity in (record["nn"]["validity"], record["cvae_drawn"]["validity"]):
            assert f"{validity['mean']:.3f} ± {validity['stderr']:.3f}" in text


def test_noise_is_of_the_seed_and_the_place(case: realism.Case) -> None:
    """The first images are judged as in the whole set; one image again and again has other completions each time."""
    few = realism.judge("q1", case._replace(images=case.images[:20], classes=case.classes[:20]), 0, HERE)
    whole = realism.judge("q1", case, 0, HERE)
    assert all(torch.equal(values, whole[key][..., :20]) for key, values in few.items())
    case = case._replace(images=case.images[:1].expand(20, -1, -1))
    scores = [realism.judge("q1", case, seed, HERE)["cvae", "energy_score"] for seed in (0, 1)]
    assert len(torch.cat(scores).unique()) == 40


def test_two_processes_print_the_same(place: Path, record: dict[str, Any]) -> None:
    words = ("--realism", "--format", "json", "--samples", "3", "--device", "cpu")
    (code, out, err), other = fork_two("eval.py", "q1", *words, cwd=place)
    assert (code, err, other) == (0, "", (0, "", ""))
    for who in realism.COLUMNS:
        for name, parts in record[who].items():
            for part, value in parts.items():
                near = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
                assert json.loads(out)[0]["realism"][who][name][part] == near


def test_chosen_images_are_ever_more_ambiguous() -> None:
    ambiguity = torch.rand(500, dtype=torch.float64) ** 4
    shown = ambiguity[realism.chosen(ambiguity)]
    assert len(shown) == 10
    assert (shown[0], shown[-1]) == (ambiguity.min(), ambiguity.max())
    assert (shown.diff() - shown.diff().mean()).abs().max() < 0.1
    assert realism.chosen(torch.zeros(3)) == [0]


def test_charts(case: realism.Case) -> None:
    """The bar of the true class is red, and as high as its share; each row of charts is of what its label says."""
    chart = realism._chart(torch.tensor([0.25, 0.75]), 1, "")
    colours = (torch.tensor(colour)[:, None, None] for colour in (realism.OTHER, realism.TRUE))
    assert [int((chart == colour).all(0).any(1)[:72].sum()) for colour in colours] == [15, 45]  # of 60 pixels
    ambiguity = torch.rand(60)
    drawn = pil_to_tensor(realism.draw(case, ambiguity, 0, HERE))
    for i, number in enumerate(numbers := realism.chosen(ambiguity)):
        image, true, random = (
            case.images[number],
            int(case.classes[number]),
            generator(HERE.device, 0, "realism figure", number),
        )
        came = case.whole(case.model.complete(image, 50, random)[:, 0]).argmax(1).bincount(minlength=10) / 50
        known = case.x_only(image[None] / 255)[0].softmax(0)
        charts = realism._chart(came, true, ""), realism._chart(known, true, f"{ambiguity[number]:.2f}")
        column = drawn[..., drawn.shape[-1] - 88 * (len(numbers) - i) :][..., :84]
        assert torch.equal(column[:, -88:-4], charts[0])
        assert torch.equal(column[:, 4 + 2 * 88 :][:, :84], charts[1])


def test_pictures_of_several_runs(copied: Path, tmp_path: Path) -> None:
    words = ("--realism", "--realism-images", "10", "--realism-figure", tmp_path / "a.png")
    assert call_eval("q1", copied, *words)[::2] == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"a-q1.png", "a-copy.png", "copy"}
