"""What an evaluation found: of a run, of runs that differ in their seeds alone, and of the difference between two."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.data.masks import mask_name
from cvae.errors import printable
from cvae.model.likelihood import Likelihoods
from cvae.model.objectives import trains_recognition
from cvae.settings import Settings

# What takes z from the recognition network: it says nothing of runs whose objective does not train that.
OF_RECOGNITION = ("cvae_neg_elbo", "cvae_is_nll", "gap", "kl", "ess", "active_units")

SMALL = 5  # effective samples: with fewer the estimate is what a few samples make of it


class Row(NamedTuple):
    """A quantity of the table: its name, and the number of samples S of those that there is one for each S of."""

    key: str
    samples: int | None = None


class Result(NamedTuple):
    """What was found of one run: its settings, and the estimates per image at these numbers of samples, ascending.

    units: of each level of z, from top to bottom, how many dimensions are active and how many there are. precision: of
    the matrix products. images: the SHA-256 of the test images. epochs: how many an unfinished run has had; None for a
    finished one. against: the result of the run that it is compared with, on the same test images with the same mask.
    """

    run: str
    settings: Settings
    samples: tuple[int, ...]
    per_image: Likelihoods
    units: list[tuple[int, int]]
    precision: str
    images: str | None = None
    epochs: int | None = None
    against: "Result | None" = None

    @property
    def name(self) -> str:
        """The run as a line of text can show it."""
        return printable(self.run)

    @property
    def observed(self) -> str:
        """What its models are given, in words."""
        return mask_name(self.settings)

    @property
    def is_grey(self) -> bool:
        """Whether its pixels are grey levels, and not drawn black or white."""
        return self.settings.targets == "grey"

    def has(self, key: str) -> bool:
        """Whether the quantity of this name says something of the run."""
        return trains_recognition(self.settings) or key not in OF_RECOGNITION

    def values(self, row: Row) -> Tensor:
        """A quantity per image, `[N]`; `gap` is NN minus importance sampling with the largest S."""
        if row.key == "gap":
            return self.per_image.nn_nll - self.per_image.cvae_is_nll[-1]
        found: Tensor = getattr(self.per_image, row.key)
        return found if row.samples is None else found[self.samples.index(row.samples)]

    def effective_samples(self, samples: int) -> tuple[float, float]:
        """The importance weights of S samples: the median over the images, and the share below SMALL."""
        ess = self.values(Row("ess", samples))
        return ess.median().item(), (ess < SMALL).double().mean().item()


class Column(NamedTuple):
    """The results of one run, or of several that differ in their seeds alone."""

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """The one that stands for all where they are alike."""
        return self.results[0]

    @property
    def name(self) -> str:
        """Its runs, in a few words."""
        names = [result.name for result in self.results]
        return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"

    @property
    def heading(self) -> str:
        """The runs, and what sets their numbers apart."""
        marks = [self.first.observed]
        marks += [] if self.first.is_grey else ["binarized"]
        marks += [] if self.first.epochs is None else [f"epoch {self.first.epochs} so far"]
        marks += [] if len(self.results) == 1 else [f"{len(self.results)} seeds"]
        return f"{self.name} ({', '.join(marks)})"

    def values(self, row: Row) -> Tensor:
        """A quantity per image, `[N]`, a mean over the runs."""
        return torch.stack([result.values(row) for result in self.results]).mean(0)

    def spread(self, row: Row) -> float | None:
        """The standard deviation of the runs' means, each over the same images; None for a single run."""
        means = torch.stack([result.values(row).mean() for result in self.results])
        return means.std().item() if len(means) > 1 else None


def by_setting(results: Sequence[Result]) -> list[Column]:
    """The results of runs that differ in their seeds alone as one column each, in the order of their first ones.

    They are on the same test images. Where a run lies, what it is called, and which device it was trained on, does not
    count. Runs that have their seeds in common too, as copies do, are each in a column of their own.
    """
    columns: dict[tuple[object, ...], list[Result]] = {}
    copies: Counter[tuple[object, ...]] = Counter()
    for result in results:
        alike = (replace(result.settings, seed=0, data_root=None, device="auto"), result.images, result.epochs)
        of_seed = (*alike, result.settings.seed)
        columns.setdefault((*alike, copies[of_seed]), []).append(result)
        copies[of_seed] += 1
    return [Column(tuple(group)) for group in columns.values()]
