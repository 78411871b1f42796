"""Logistic regression on frozen features: a linear probe for data that fit in memory."""

from __future__ import annotations

import warnings

import torch

MAX_ITERATIONS = 1000


def linear_probe_accuracy(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """Top-1 accuracy in percent of multinomial logistic regression (L2, C = 1) on standardised features.

    Features are standardised by the training part, as the published probe's BatchNorm without affine does.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    average, deviation = train.mean(dim=0), train.std(dim=0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an early stop only makes the figure a lower bound
        probe = LogisticRegression(max_iter=MAX_ITERATIONS)
        probe.fit(((train - average) / deviation).numpy(), train_labels.numpy())
    return 100 * float(probe.score(((test - average) / deviation).numpy(), test_labels.numpy()))
