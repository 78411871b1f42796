"""Probing with few labels: the accuracy of frozen features by how many labelled images are learnt from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastmae.checkpoint.load import Opened
from fastmae.config.model import ModelSpec
from fastmae.data.few import few_labelled, with_few_labels
from fastmae.data.sources import Source, Subset
from fastmae.data.stock import joined
from fastmae.evaluate.features import Features
from fastmae.evaluate.probe import ProbeResult
from fastmae.model.build import build_model
from fastmae.model.family import MaskedModel
from fastmae.model.pixels import normalised, register_pixels

Score = Callable[[Features], ProbeResult]


@dataclass(frozen=True)
class Draws:
    """The labelled images that are learnt from."""

    source: Source
    """Those of all draws: features are computed of these alone."""
    rows: dict[tuple[int | float, int], np.ndarray]
    """int64: which of them a draw takes, by its amount and its seed."""


def draw(train: Source, amounts: Sequence[int | float], seeds: Sequence[int]) -> Draws:
    """Draws labelled images for each amount and seed from a source with labels."""
    assert train.labels is not None
    drawn = {(amount, seed): few_labelled(train.labels, amount, seed) for amount in amounts for seed in seeds}
    every = np.unique(np.concatenate([*drawn.values()]))
    stock = joined(with_few_labels(train, amount, seeds[0]).stock for amount in amounts)
    return Draws(Subset(train, every, stock), {key: np.searchsorted(every, some) for key, some in drawn.items()})


@dataclass(frozen=True)
class FewResult:
    """The accuracies for one amount of labelled images."""

    features: str
    """Whose features they are."""
    amount: int | float
    images: int
    """How many images are learnt from."""
    accuracies: dict[str, tuple[float, ...]]
    """In percent, one for each seed, by the classifier: knn and linear."""

    def summary(self) -> dict[str, Any]:
        """Returns what --json prints of it."""
        unit = "label_share" if isinstance(self.amount, float) else "shots"
        each = {name: mean_and_deviation(values) for name, values in self.accuracies.items()}
        return {"features": self.features, unit: self.amount, "images": self.images, **each}


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean, the standard deviation of a sample (n − 1; None for one value) and the values."""
    deviation = round(statistics.stdev(values), 2) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 2), "std": deviation, "of": list(values)}


def shown_mean(values: Sequence[float]) -> str:
    """Returns the same for people: "61.34 ± 2.10 %"."""
    found = mean_and_deviation(values)
    deviation = "" if found["std"] is None else f" ± {found['std']:.2f}"
    return f"{found['mean']:.2f}{deviation} %"


def score_draws(name: str, draws: Draws, features: Features, score: Score) -> list[FewResult]:
    """Fits and scores classifiers on the features of each draw, and returns what came of each amount.

    Args:
        name: whose features they are.
        features: those of ``draws.source``.
        score: fits classifiers on some of these and scores them on the test part.
    """
    seeds = dict.fromkeys(seed for _, seed in draws.rows)
    results = []
    for amount in dict.fromkeys(amount for amount, _ in draws.rows):
        found = []
        for seed in seeds:
            rows = np.flatnonzero(np.isin(features.indices, draws.rows[amount, seed]))
            values = features.values[torch.from_numpy(rows).to(features.values.device)]
            found.append(score(replace(features, values=values, indices=features.indices[rows])))
        accuracies = {
            "knn": tuple(result.accuracy(next(iter(result.knn.values()))) for result in found),
            "linear": tuple(result.accuracy(result.linear) for result in found),
        }
        results.append(FewResult(name, amount, found[0].how["train"], accuracies))
    return results


def pixels_of(model: MaskedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what makes features of images without an encoder: the normalised pixels [n, C · H · W] themselves."""
    return lambda images: normalised(model, images).flatten(1)


def untrained(opened: Opened) -> MaskedModel:
    """Returns the model of a checkpoint with random weights, of the seed 0, in evaluation mode."""
    own = opened.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(ModelSpec.from_json(opened.settings))
    register_pixels(model, own.in_chans, own.mean.tolist(), own.std.tolist(), own.pixels)
    model.read_as = own.read_as
    return model.eval()
