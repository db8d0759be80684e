"""The reference runs: documents have the numbers of their records, and weights that are kept are as good as said."""

import json
import re
import sys
from types import ModuleType

import pytest
import torch
from support.scripts import ROOT

import cvae
from cvae import context
from cvae.data.sources import load_train
from cvae.data.tasks import ImageSet
from cvae.model.objectives import elbo
from cvae.report.evaluation import MNIST, laid_out
from cvae.run.folder import CONFIG, WEIGHTS, RunFolder

LARGEST = 10_000_000  # bytes of one file of weights
ABSOLUTE = re.compile(r"(=|^)(/|[A-Za-z]:[\\/])")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """benchmarks/reference_tables.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import reference_tables

        yield reference_tables
    for name in ("reference_tables", "start"):
        sys.modules.pop(name)


def test_documents_have_the_tables(reference: ModuleType) -> None:
    """As the script prints them, and no row more."""
    tables = reference.tables()
    assert {file for file, _ in tables} == {"README.md", "docs/tutorial.md", "docs/recipe.md", "docs/realism.md"}
    for file, cells in tables:
        table = f"\n\n{laid_out(cells, 'markdown')}\n\n"
        assert table in (ROOT / file).read_text(encoding="utf-8") + "\n", cells[0]


def test_records_are_of_the_runs(reference: ModuleType) -> None:
    """They are of each run that there has to be and of no other, with the settings that it is named after."""
    records, expected = reference.read(), reference.expected()
    folders = {reference.folder(name) for name in expected}
    assert set(records) == set(expected)
    assert folders == {path.parent for path in reference.REFERENCE.rglob(CONFIG)}
    assert {folder.name for folder in folders if (folder / WEIGHTS).exists()} == set(reference.WITH_WEIGHTS)
    for name, record in records.items():
        folder = reference.folder(name)
        settings, config = RunFolder(folder).settings, json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        assert (settings.preset, settings.seed) == expected[name]
        assert (record["images"], record["samples"], record["unfinished_at_epoch"]) == (10_000, 1000, None)
        assert [record[key] for key in ("seed", "network", "objective", "targets")] == [
            settings.seed, settings.network, settings.objective, settings.targets,
        ]  # fmt: skip
        assert record["quadrants"] == (settings.quadrants if settings.observed is None else None)
        if match := re.search(r"q(\d)$", name):
            assert (settings.quadrants, settings.observed, settings.objective) == (int(match[1]), None, "elbo")
        assert (config["images"]["test"]["sha256"] == MNIST) == (settings.targets == "grey")
        assert not any(ABSOLUTE.search(word) for word in [*config["command"], config.get("init", {}).get("run", "")])
    for name in ("paper-gsnn", "paper-hybrid"):
        assert (name, records[name]["against"]["run"]) == (f"paper-{records[name]['objective']}", "paper-q1")


@pytest.mark.parametrize("run", ["q1", "default-q1"])
def test_weights(run: str) -> None:
    """Half precision, and still the validation −ELBO with which the training ended, to 0.1 nats: other noise alone
    moves it by 0.02."""
    folder = ROOT / "runs" / "reference" / run
    assert (folder / WEIGHTS).stat().st_size <= LARGEST
    model = cvae.load(f"reference/{run}")
    images = ImageSet(load_train().validation, model.task)
    random = context.generator("cpu", 0, "reference")
    total = 0.0
    with torch.inference_mode():
        for first in range(0, len(images), 500):
            batch = images.batch(slice(first, first + 500))
            eps = torch.randn(1, len(batch.x), model.latent_dim, generator=random)
            total -= elbo(model, batch, eps)["elbo"].sum().item()
    best = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["best_loss"]
    assert abs(total / len(images) - best) < 0.1
