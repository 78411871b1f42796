"""Nearest neighbours among frozen features, and their weighted vote (Wu et al. 2018, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

TEMPERATURE = 0.07
QUERIES = 1024
CANDIDATES = 65_536


def inner_products(queries: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Computes the inner products [m, n], which are cosines if all vectors have length 1."""
    return queries @ train.T


def nearest(
    train: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = inner_products,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the ``k`` rows of ``train`` [n, D] that are most similar to each of ``queries`` [m, D].

    Returns (similarities, indices), [m, k] each, the most similar first. The search is exact, on the features' device;
    the largest table of similarities that exists at a time is 1,024 × 65,536.
    """
    results = []
    for chunk in queries.split(QUERIES):
        best = chunk.new_empty(len(chunk), 0)
        indices = best.long()
        for start in range(0, len(train), CANDIDATES):
            table = similarity(chunk, train[start : start + CANDIDATES])
            values, columns = table.topk(min(k, table.shape[1]), dim=1)
            best, indices = torch.cat([best, values], dim=1), torch.cat([indices, columns + start], dim=1)
            best, positions = best.topk(min(k, best.shape[1]), dim=1)
            indices = indices.gather(1, positions)
        results.append((best, indices))
    return torch.cat([best for best, _ in results]), torch.cat([indices for _, indices in results])


def knn_predictions(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, ks: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Predicts, for each k, the classes int64 [m]: the k most similar samples vote with weights exp(cosine / 0.07).

    Args:
        train, test: features [n, D] and [m, D].
        train_labels: int64 [n], from 0.
        ks: numbers of neighbours; at most n are used.
    """
    similarity, neighbours = nearest(F.normalize(train, dim=1), F.normalize(test, dim=1), max(ks))
    classes, predictions = int(train_labels.max()) + 1, {}
    for k in ks:
        pairs = zip(similarity[:, :k].split(QUERIES), neighbours[:, :k].split(QUERIES), strict=True)
        votes = (
            weights.new_zeros(len(weights), classes).scatter_add_(1, train_labels[near], (weights / TEMPERATURE).exp())
            for weights, near in pairs
        )
        predictions[k] = torch.cat([chunk.argmax(dim=1) for chunk in votes])
    return predictions
