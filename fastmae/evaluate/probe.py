"""k-NN and linear-probe accuracy on frozen features, and which classes an encoder takes for which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmae.config import LinearProbe, Pool
from fastmae.data.loader import Skipped
from fastmae.data.sources import Source
from fastmae.errors import UserError
from fastmae.evaluate.features import Features, class_names, classes_of, extract_features
from fastmae.evaluate.knn import knn_predictions
from fastmae.evaluate.linear_probe import lars_predictions, logistic_predictions
from fastmae.evaluate.pictures import confusion_picture, save_png
from fastmae.files import write_text
from fastmae.model.mae import MaskedAutoencoderViT

MIN_LARS_IMAGES = 10


@dataclass(frozen=True)
class Probed:
    """What was found on the test part, and how."""

    classes: tuple[str, ...]
    """Of both parts."""
    truth: torch.Tensor
    """int64 [m]: a number in ``classes``; so are the predictions."""
    knn: dict[int, torch.Tensor]
    """By k."""
    linear: torch.Tensor
    how: dict[str, Any]
    """Pool, sizes and learning rates."""
    skipped: tuple[Skipped, ...]
    """Unusable images, which were left out."""

    def accuracy(self, predictions: torch.Tensor) -> float:
        """Top-1 in percent."""
        return round(100 * float((predictions == self.truth).double().mean()), 2)

    def summary(self) -> dict[str, Any]:
        """{knn, linear: percent, the first k's; knn_of: by k, if there are several; pool, k, train, test, …}."""
        by_k = {k: self.accuracy(predictions) for k, predictions in self.knn.items()}
        k = next(iter(by_k))
        several = {"knn_of": by_k} if len(by_k) > 1 else {}
        return {"knn": by_k[k], "linear": self.accuracy(self.linear), "k": k, **several, **self.how}

    def confusion(self, predictions: torch.Tensor) -> np.ndarray:
        """int64 [classes, classes]: how many of the class of a row were taken for that of a column."""
        count = len(self.classes)
        return torch.bincount(self.truth * count + predictions, minlength=count**2).view(count, count).cpu().numpy()


def probe(
    model: MaskedAutoencoderViT,
    train: Source,
    test: Source,
    *,
    pool: Pool = "mean",
    k: int = 20,
    batch_size: int = 256,
    num_workers: int = 2,
) -> dict[str, Any]:
    """``probe_in_detail``'s summary, by logistic regression; ``k`` is lowered to the number of train images."""
    k = min(k, len(train))
    found = probe_in_detail(
        model, train, test, pool=pool, ks=(k,), linear="logistic", batch_size=batch_size, num_workers=num_workers
    )
    return found.summary()


def probe_in_detail(
    model: MaskedAutoencoderViT,
    train: Source,
    test: Source,
    *,
    pool: Pool,
    ks: Sequence[int],
    linear: LinearProbe,
    rates: Sequence[float] = (0.1,),
    linear_batch: int = 16_384,
    batch_size: int,
    num_workers: int,
) -> Probed:
    """Fits on ``train``, scores on ``test``.

    Raises:
        UserError: a part has no labels, or only one class; or it has fewer images than are asked for.
    """
    for source in (train, test):
        if source.labels is None:
            raise UserError(f"{source.name(0)} and its like have no labels; probe data in class folders or with labels")
    assert train.labels is not None
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"{train.name(0)} and its like are all of one class; probing needs at least two")
    if max(ks) > len(train):
        raise UserError(f"--k {max(ks)}: must be at most the {len(train)} images of the train part")
    if linear == "lars" and len(train) < MIN_LARS_IMAGES:
        raise UserError(f"--linear lars: needs at least {MIN_LARS_IMAGES} images to train on, not {len(train)}")
    found = [
        extract_features(model, source, pool=pool, batch_size=batch_size, num_workers=num_workers)
        for source in (train, test)
    ]
    classes, labels = _same_classes(train, test, found)
    train_labels, truth = (torch.from_numpy(part).to(found[0].values.device) for part in labels)
    values, test_values = found[0].values, found[1].values
    how: dict[str, Any] = {"pool": pool, "train": len(values), "test": len(test_values)}
    if linear == "lars":
        predictions, rate, scores = lars_predictions(values, train_labels, test_values, rates, linear_batch)
        how |= {"linear_by": "lars", "blr": rate, **({"held_out_of_blr": scores} if scores else {})}
    else:
        predictions = logistic_predictions(values, train_labels, test_values)
    by_k = knn_predictions(values, train_labels, test_values, ks)
    return Probed(classes, truth, by_k, predictions, how, found[0].skipped + found[1].skipped)


def _same_classes(train: Source, test: Source, found: Sequence[Features]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """The classes of both parts, and the labels of their usable images, numbered alike.

    Each part numbers its own class folders, so where one lacks a class their numbers differ: names count.
    """
    named = class_names(train) is not None and class_names(test) is not None
    parts: list[np.ndarray] = []
    for source, features in zip((train, test), found, strict=True):
        labels = classes_of(source, features.indices) if named else source.labels
        assert labels is not None
        parts.append(labels if named else labels[features.indices])
    classes, numbers = np.unique(np.concatenate(parts), return_inverse=True)
    return tuple(map(str, classes)), np.split(numbers.astype(np.int64), [len(parts[0])])


def save_probe(folder: Path, found: Probed, title: str) -> None:
    """Writes probe.json (the summary, a table of classes, the confusion matrices) and confusion.png.

    Raises:
        UserError: they cannot be written.
    """
    tables = {"knn": found.confusion(next(iter(found.knn.values()))), "linear": found.confusion(found.linear)}
    per_class = [
        {"class": name, "test": int(tables["knn"][row].sum())}
        | {f"{who}_recall": _percent(table[row, row], table[row].sum()) for who, table in tables.items()}
        | {f"{who}_precision": _percent(table[row, row], table[:, row].sum()) for who, table in tables.items()}
        for row, name in enumerate(found.classes)
    ]
    confusion = {who: table.tolist() for who, table in tables.items()}
    everything = {**found.summary(), "classes": per_class, "confusion": confusion}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "probe.json", json.dumps(everything, indent=1))
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error}); name another folder") from error
    save_png(folder / "confusion.png", confusion_picture(tables, found.classes, title))


def _percent(part: int, whole: int) -> float | None:
    return round(100 * int(part) / int(whole), 2) if whole else None
