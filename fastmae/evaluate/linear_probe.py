"""Linear classifiers on frozen features: logistic regression for small data, and the official probe for large."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.data.plan import holdout
from fastmae.philox import STREAM_ORDER, permutation_numpy

MAX_ITERATIONS = 1000
# The official probe (paper, appendix A.1).
EPOCHS, WARMUP_EPOCHS = 90, 10
MOMENTUM, TRUST = 0.9, 1e-3
NORM_EPS, INIT_STD = 1e-6, 0.01
RATE_SHARE = 0.2
NEVER = -1e4
"""The logit of a class that cannot be predicted."""


def logistic_predictions(train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Predicts classes int64 [m] by multinomial logistic regression (L2, C = 1, on the CPU) on standardised features.

    Features are standardised by the training part, as the official probe's BatchNorm without affine does.

    Args:
        train, test: features [n, D] and [m, D].
        train_labels: int64 [n].
    """
    probe, average, deviation = _fit_logistic(train, train_labels)
    return torch.from_numpy(probe.predict(((test - average) / deviation).cpu().numpy())).to(test.device)


def _fit_logistic(train: torch.Tensor, train_labels: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    average, deviation = train.mean(dim=0), train.std(dim=0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an early stop only makes the figure a lower bound
        probe = LogisticRegression(max_iter=MAX_ITERATIONS)
        probe.fit(((train - average) / deviation).cpu().numpy(), train_labels.cpu().numpy())
    return probe, average, deviation


@dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier of C classes behind a standardisation, through which gradients flow."""

    centre: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    """[C, D]."""
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Computes logits [n, C] of features [n, D]."""
        return (features - self.centre) / self.scale @ self.weight.T + self.bias


def logistic_classifier(train: torch.Tensor, train_labels: torch.Tensor, classes: int) -> LinearClassifier:
    """Fits what ``logistic_predictions`` predicts by. A class without a sample in ``train`` is never predicted."""
    probe, centre, scale = _fit_logistic(train, train_labels)
    weight, bias = (torch.from_numpy(part).to(train) for part in (probe.coef_, probe.intercept_))
    if len(weight) == 1:  # of two classes, one logit
        weight, bias = (torch.cat([-part / 2, part / 2]) for part in (weight, bias))
    present = torch.from_numpy(probe.classes_).to(train.device)
    every = weight.new_zeros(classes, weight.shape[1]), bias.new_full((classes,), NEVER)
    return LinearClassifier(
        centre, scale, every[0].index_copy(0, present, weight), every[1].index_copy(0, present, bias)
    )


@dataclass(frozen=True)
class Heads:
    """R linear classifiers of C classes behind one norm."""

    norm: nn.BatchNorm1d
    weight: torch.Tensor
    """The weights [R, C, D]."""
    bias: torch.Tensor
    """The biases [R, C]."""

    @torch.no_grad()
    def predictions(self, features: torch.Tensor) -> torch.Tensor:
        """Predicts the classes int64 [R, m] of features [m, D]."""
        parts = features.split(4096)
        return torch.cat([_logits(self.norm(part), self.weight, self.bias).argmax(dim=2) for part in parts], dim=1)


def _logits(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Computes the logits [R, N, C] in one matrix product."""
    R, C, _ = weight.shape
    return (features @ weight.flatten(0, 1).T + bias.flatten()).view(-1, R, C).transpose(0, 1)


def train_heads(
    features: torch.Tensor, labels: torch.Tensor, rates: Sequence[float], *, classes: int, batch_size: int
) -> Heads:
    """Trains a classifier for each of the ``rates`` at once, all from the same start and on the same batches.

    The recipe is LARS with momentum 0.9 and trust 1e-3 on weights (biases take plain steps), no weight decay, BatchNorm
    without affine before the classifier, and 90 epochs: 10 of warm-up, then half a cosine to 0, by fractional epochs.
    No gradient flows from one classifier to another, so each becomes what it would be alone.

    Args:
        features: float32 [n, D]; labels int64 [n], from 0.
        rates: learning rates per 256 samples; a step takes ``rate · batch / 256``.
        batch_size: samples per step, at most n; an epoch drops the incomplete last batch.
    """
    device, (n, D), R = features.device, features.shape, len(rates)
    batch = min(batch_size, n)
    start = torch.empty(classes, D)
    nn.init.trunc_normal_(start, std=INIT_STD, generator=torch.Generator().manual_seed(0))
    weight = start.to(device).repeat(R, 1, 1).requires_grad_()
    bias = torch.zeros(R, classes, device=device, requires_grad=True)
    norm = nn.BatchNorm1d(D, affine=False, eps=NORM_EPS, device=device)
    steps = [torch.zeros_like(weight), torch.zeros_like(bias)]
    lr = torch.tensor(list(rates), dtype=torch.float32, device=device) * batch / 256
    batches = n // batch
    for epoch in range(EPOCHS):
        order = torch.from_numpy(permutation_numpy(0, STREAM_ORDER, epoch, n)).to(device)
        for i in range(batches):
            rows = order[i * batch : (i + 1) * batch]
            logits = _logits(norm(features[rows]), weight, bias)
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(R), reduction="sum") / batch
            gradients = list(torch.autograd.grad(loss, (weight, bias)))
            with torch.no_grad():
                gradients[0] *= _trust(weight, gradients[0])
                now = lr * _schedule(epoch + i / batches)
                for parameter, gradient, step in zip((weight, bias), gradients, steps, strict=True):
                    step.mul_(MOMENTUM).add_(gradient)
                    parameter -= now.view(-1, *[1] * (parameter.ndim - 1)) * step
    return Heads(norm.eval(), weight.detach(), bias.detach())


def _trust(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Computes LARS' factor [R, 1, 1] (You et al. 2017), a weight's norm over its gradient's; 1 if one is 0."""
    length, slope = weight.norm(dim=(1, 2), keepdim=True), gradient.norm(dim=(1, 2), keepdim=True)
    return torch.where((length > 0) & (slope > 0), TRUST * length / slope, torch.ones_like(length))


def _schedule(epoch: float) -> float:
    """Returns the share of the learning rate at a fractional epoch."""
    if epoch < WARMUP_EPOCHS:
        return epoch / WARMUP_EPOCHS
    return 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS)))


def lars_predictions(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    rates: Sequence[float],
    batch_size: int,
) -> tuple[torch.Tensor, float, dict[float, float]]:
    """Returns classes int64 [m] by the official probe, the rate that it used, and the accuracy in percent by rate.

    Several rates are compared on a held-out fifth of the train part; the best one is trained once more on all of it.
    The test part does not influence the choice. The accuracies are empty for a single rate.

    Args:
        train, test: features [n, D] and [m, D], on one device.
        train_labels: int64 [n], from 0.
        rates, batch_size: as for ``train_heads``.
    """
    classes = int(train_labels.max()) + 1
    best, scores = rates[0], {}
    if len(rates) > 1:
        fitted, held = (torch.from_numpy(part).to(train.device) for part in holdout(len(train), RATE_SHARE))
        heads = train_heads(train[fitted], train_labels[fitted], rates, classes=classes, batch_size=batch_size)
        right = (heads.predictions(train[held]) == train_labels[held]).double().mean(dim=1)
        scores = {rate: round(100 * share, 2) for rate, share in zip(rates, right.tolist(), strict=True)}
        best = max(scores, key=lambda rate: scores[rate])
    heads = train_heads(train, train_labels, [best], classes=classes, batch_size=batch_size)
    return heads.predictions(test)[0], best, scores
