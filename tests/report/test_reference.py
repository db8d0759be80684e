"""The reference runs: documents have their numbers, and the weights that are kept are those of the tables."""

import importlib
import json
import sys
from types import ModuleType

import pytest
import torch
from support.scripts import ROOT

import cvae
from cvae import runtime
from cvae.data.images import ImageSet
from cvae.data.sources import load_train
from cvae.model.objectives import elbo
from cvae.report.tables import MNIST, laid_out
from cvae.run.folder import read_settings

LARGEST = 10_000_000  # bytes of one file of weights
KEPT = ("q1", "q2", "q3", "default-q1")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """benchmarks/reference.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        return importlib.import_module("reference")


def test_documents_have_the_tables(reference: ModuleType) -> None:
    """As `python benchmarks/reference.py` prints them."""
    tables = reference.tables()
    assert {file for file, _ in tables} == {"README.md", "docs/tutorial.md", "docs/recipe.md", "docs/realism.md"}
    for file, cells in tables:
        assert laid_out(cells, "markdown") in (ROOT / file).read_text(encoding="utf-8"), cells[0]


def test_records_are_of_the_runs(reference: ModuleType) -> None:
    """On all 10,000 test images, and each with the settings that it is named after."""
    records = reference.read()
    expected = {reference.name(preset, k) for preset in reference.PRESETS for k in reference.QUADRANTS}
    assert expected <= set(records)
    for name, record in records.items():
        folder = reference.folder(name)
        settings = read_settings(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert (record["images"], record["samples"], record["unfinished_at_epoch"]) == (10_000, 1000, None)
        assert (record["seed"], record["network"], record["objective"]) == (
            settings.seed,
            settings.network,
            settings.objective,
        )
        assert not any(word.startswith("/") for word in config["command"]), "a path of one machine"
        assert (config["images"]["test"]["sha256"] == MNIST) == (settings.targets == "grey")
        if settings.observed is None:
            assert name.endswith(f"q{settings.quadrants}") or settings.objective != "elbo"
            assert record["quadrants"] == settings.quadrants
        if name in expected:
            preset = "best" if name.startswith("q") else name.split("-")[0]
            assert (settings.preset, settings.seed) == (preset, 0)


@pytest.mark.parametrize("run", KEPT)
def test_weights(reference: ModuleType, run: str) -> None:
    """Half precision, and still the validation −ELBO with which the training ended, to 0.1 nats: other noise alone
    moves it by 0.02."""
    folder = ROOT / "runs" / "reference" / run
    assert set(reference.WITH_WEIGHTS) == set(KEPT)
    assert (folder / "model.safetensors").stat().st_size <= LARGEST
    model = cvae.load(f"reference/{run}")
    images = ImageSet(load_train().validation, model.split)
    random = runtime.generator("cpu", 0, "reference")
    total = 0.0
    with torch.inference_mode():
        for batch in images.batches(500):
            eps = torch.randn(1, len(batch.x), model.latent_dim, generator=random)
            total -= elbo(model, batch, eps)["elbo"].sum().item()
    best = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["best_loss"]
    assert abs(total / len(images) - best) < 0.1
