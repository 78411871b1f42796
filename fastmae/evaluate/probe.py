"""The two figures that say what an encoder is worth: k-NN and linear-probe accuracy on its frozen features."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fastmae.data.sources import Source
from fastmae.errors import UserError
from fastmae.evaluate.features import extract_features
from fastmae.evaluate.knn import knn_accuracy
from fastmae.evaluate.linear_probe import linear_probe_accuracy
from fastmae.model.mae import MaskedAutoencoderViT


def probe(
    model: MaskedAutoencoderViT,
    train: Source,
    test: Source,
    *,
    pool: Literal["mean", "cls"] = "mean",
    k: int = 20,
    batch_size: int = 256,
    num_workers: int = 2,
) -> dict[str, Any]:
    """Fits on ``train``, scores on ``test``: {knn, linear: percent; pool, k, train, test: how it was measured}.

    Raises:
        UserError: a part has no labels, or only one class.
    """
    labels = []
    for source in (train, test):
        if source.labels is None:
            raise UserError(f"{source.name(0)} and its like have no labels; probe data in class folders or with labels")
        labels.append(torch.from_numpy(source.labels))
    if len(labels[0].unique()) < 2:
        raise UserError(f"{train.name(0)} and its like are all of one class; probing needs at least two")
    features = [
        extract_features(model, source, pool=pool, batch_size=batch_size, num_workers=num_workers)
        for source in (train, test)
    ]
    return {
        "knn": round(knn_accuracy(features[0], labels[0], features[1], labels[1], k), 2),
        "linear": round(linear_probe_accuracy(features[0], labels[0], features[1], labels[1]), 2),
        "pool": pool,
        "k": k,
        "train": len(train),
        "test": len(test),
    }
