"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TEMPERATURE = 0.07
CHUNK = 1024


def knn_accuracy(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, k: int = 20
) -> float:
    """Top-1 accuracy in percent of a vote of the k most similar training samples, weighted exp(cosine / 0.07).

    Args:
        train, test: features [n, D] and [m, D].
        train_labels, test_labels: int64 [n] and [m], from 0.
        k: neighbours; at most n are used.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(train_labels.max()) + 1
    correct = 0
    for features, labels in zip(test.split(CHUNK), test_labels.split(CHUNK), strict=True):
        similarity, neighbours = (features @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / TEMPERATURE).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return 100 * correct / len(test)
