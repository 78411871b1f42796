"""Nearest neighbours among frozen features, and their weighted vote (Wu et al. 2018, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

TEMPERATURE = 0.07
QUERIES = 1024
CANDIDATES = 65_536


def inner_products(queries: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """[m, n]; of vectors of length 1 it is the cosine."""
    return queries @ train.T


def nearest(
    train: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = inner_products,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` most similar of ``train`` [n, D] for each of ``queries`` [m, D]: (similarities, indices), [m, k] each.

    Falling. Exact, on the features' device; the largest table that exists at a time is 1,024 × 65,536.
    """
    found = []
    for some in queries.split(QUERIES):
        best = some.new_empty(len(some), 0)
        places = best.long()
        for start in range(0, len(train), CANDIDATES):
            table = similarity(some, train[start : start + CANDIDATES])
            values, columns = table.topk(min(k, table.shape[1]), dim=1)
            best, places = torch.cat([best, values], dim=1), torch.cat([places, columns + start], dim=1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            places = places.gather(1, kept)
        found.append((best, places))
    return torch.cat([best for best, _ in found]), torch.cat([places for _, places in found])


def knn_predictions(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, ks: Sequence[int]
) -> dict[int, torch.Tensor]:
    """For each k the classes int64 [m] that the k most similar samples vote for, with weights exp(cosine / 0.07).

    Args:
        train, test: features [n, D] and [m, D].
        train_labels: int64 [n], from 0.
        ks: numbers of neighbours; of each at most n are used.
    """
    similarity, neighbours = nearest(F.normalize(train, dim=1), F.normalize(test, dim=1), max(ks))
    classes, found = int(train_labels.max()) + 1, {}
    for k in ks:
        pairs = zip(similarity[:, :k].split(QUERIES), neighbours[:, :k].split(QUERIES), strict=True)
        votes = (
            weights.new_zeros(len(weights), classes).scatter_add_(1, train_labels[near], (weights / TEMPERATURE).exp())
            for weights, near in pairs
        )
        found[k] = torch.cat([some.argmax(dim=1) for some in votes])
    return found
