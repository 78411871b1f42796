"""k-NN and linear-probe accuracy on frozen features, with a confusion matrix of the classes."""

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
from fastmae.data.sources import Source, class_names, classes_of, with_known_classes
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.features import Features, extract_features
from fastmae.evaluate.knn import knn_predictions
from fastmae.evaluate.linear_probe import lars_predictions, logistic_predictions
from fastmae.evaluate.pictures import confusion_picture, save_png
from fastmae.files import write_text
from fastmae.model.family import MaskedModel

MIN_LARS_IMAGES = 10


@dataclass(frozen=True)
class ProbeResult:
    """The predictions for the test part, and the settings that led to them."""

    classes: tuple[str, ...]
    """The names of the classes of both parts."""
    truth: torch.Tensor
    """int64 [m]: positions in ``classes``, as in all predictions."""
    knn: dict[int, torch.Tensor]
    """The predictions of k-NN, by k."""
    linear: torch.Tensor
    """The predictions of the linear classifier."""
    how: dict[str, Any]
    """The pool, the sizes of the parts and the learning rates."""
    skipped: tuple[Skipped, ...]
    """The images that could not be used."""

    def accuracy(self, predictions: torch.Tensor) -> float:
        """Returns the top-1 accuracy in percent."""
        return round(100 * float((predictions == self.truth).double().mean()), 2)

    def summary(self) -> dict[str, Any]:
        """Returns {knn: percent of the first k, linear: percent, knn_of: by k, if there are several, pool, k, …}."""
        by_k = {k: self.accuracy(predictions) for k, predictions in self.knn.items()}
        k = next(iter(by_k))
        several = {"knn_of": by_k} if len(by_k) > 1 else {}
        return {"knn": by_k[k], "linear": self.accuracy(self.linear), "k": k, **several, **self.how}

    def confusion(self, predictions: torch.Tensor) -> np.ndarray:
        """Returns int64 [classes, classes]: how many images of a row's class were predicted as a column's class."""
        count = len(self.classes)
        return torch.bincount(self.truth * count + predictions, minlength=count**2).view(count, count).cpu().numpy()


def probe(
    model: MaskedModel,
    train: Source,
    test: Source,
    *,
    pool: Pool = "mean",
    k: int = 20,
    batch_size: int = 256,
    num_workers: int = 2,
) -> dict[str, Any]:
    """Returns the summary of ``probe_in_detail`` by logistic regression, with at most as many neighbours as images."""
    k = min(k, len(train))
    result = probe_in_detail(
        model, train, test, pool=pool, ks=(k,), linear="logistic", batch_size=batch_size, num_workers=num_workers
    )
    return result.summary()


def knn_accuracy(model: MaskedModel, train: Source, test: Source, *, num_workers: int = 2) -> float:
    """Returns the accuracy of k-NN alone in percent, with the neighbours and the pool of ``probe``.

    Raises:
        UserError: as ``probe_in_detail``.
    """
    k = min(20, len(train))
    test = scorable(train, test, (k,), "logistic")
    features = [
        extract_features(model, part, pool="mean", batch_size=256, num_workers=num_workers) for part in (train, test)
    ]
    _, labels = same_classes(train, test, features)
    train_labels, truth = (torch.from_numpy(part).to(features[0].values.device) for part in labels)
    predictions = knn_predictions(features[0].values, train_labels, features[1].values, (k,))[k]
    return round(100 * float((predictions == truth).double().mean()), 2)


def probe_in_detail(
    model: MaskedModel,
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
) -> ProbeResult:
    """Fits classifiers on the features of ``train`` and scores them on those of ``test`` of the same classes.

    Args:
        pool: as in ``model.features``.
        ks: the numbers of neighbours of k-NN.
        linear: the linear classifier: ``logistic`` regression, or the official probe with ``lars``.
        rates: learning rates of ``lars``, from which a held-out share of ``train`` chooses.
        linear_batch: batch size of ``lars``.
        batch_size, num_workers: images per batch and decoding threads for the features.

    Raises:
        UserError: a part has no labels, ``train`` has only one class or none of those of ``test``, or fewer images
            than ``ks`` or ``lars`` need.
    """
    test = scorable(train, test, ks, linear)
    features = [
        extract_features(model, source, pool=pool, batch_size=batch_size, num_workers=num_workers)
        for source in (train, test)
    ]
    options: dict[str, Any] = {"ks": ks, "linear": linear, "rates": rates, "linear_batch": linear_batch}
    return fit_and_score(train, test, features, pool=pool, **options)


def fit_and_score(
    train: Source,
    test: Source,
    features: Sequence[Features],
    *,
    pool: Pool,
    ks: Sequence[int],
    linear: LinearProbe,
    rates: Sequence[float],
    linear_batch: int,
) -> ProbeResult:
    """Does the same with the features of both parts, whose images are ``scorable``."""
    classes, labels = same_classes(train, test, features)
    values, test_values = features[0].values, features[1].values
    train_labels, truth = (torch.from_numpy(part).to(values.device) for part in labels)
    how: dict[str, Any] = {"pool": pool, "train": len(values), "test": len(test_values)}
    if linear == "lars":
        predictions, rate, scores = lars_predictions(values, train_labels, test_values, rates, linear_batch)
        how |= {"linear_by": "lars", "blr": rate, **({"held_out_of_blr": scores} if scores else {})}
    else:
        predictions = logistic_predictions(values, train_labels, test_values)
    by_k = knn_predictions(values, train_labels, test_values, ks)
    return ProbeResult(classes, truth, by_k, predictions, how, features[0].skipped + features[1].skipped)


def scorable(train: Source, test: Source, ks: Sequence[int], linear: LinearProbe) -> Source:
    """Returns the images of ``test`` whose classes are in ``train``, if classifiers can be fitted and scored.

    Raises:
        UserError: as ``probe_in_detail``.
    """
    for source in (train, test):
        if source.labels is None:
            raise UserError(f"images such as {source.name(0)} have no labels; give class folders, or data with labels")
    assert train.labels is not None
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"images such as {train.name(0)} are all of one class; probing needs at least two")
    test = with_known_classes(train, test)
    if max(ks) > len(train):
        raise SettingError("ks", max(ks), f"must be at most the {len(train)} images of the train part", flag="--k")
    if linear == "lars" and len(train) < MIN_LARS_IMAGES:
        problem = f"needs at least {MIN_LARS_IMAGES} images to train on, not {len(train)}"
        raise SettingError("linear", "lars", problem)
    return test


def same_classes(
    train: Source, test: Source, parts_features: Sequence[Features]
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Returns the classes of both parts, and the labels of their usable images in one common numbering.

    Each part numbers its own class folders, so the numbers differ if one part lacks a class; classes are matched by
    name.
    """
    named = class_names(train) is not None and class_names(test) is not None
    parts: list[np.ndarray] = []
    for source, features in zip((train, test), parts_features, strict=True):
        labels = classes_of(source, features.indices) if named else source.labels
        assert labels is not None
        parts.append(labels if named else labels[features.indices])
    classes, numbers = np.unique(np.concatenate(parts), return_inverse=True)
    return tuple(map(str, classes)), np.split(numbers.astype(np.int64), [len(parts[0])])


def save_probe(folder: Path, result: ProbeResult, title: str) -> None:
    """Writes probe.json (the summary, a table of classes, the confusion matrices) and confusion.png.

    Raises:
        UserError: the files cannot be written.
    """
    tables = {"knn": result.confusion(next(iter(result.knn.values()))), "linear": result.confusion(result.linear)}
    per_class = [
        {"class": class_name, "test": int(tables["knn"][row].sum())}
        | {f"{name}_recall": _percent(table[row, row], table[row].sum()) for name, table in tables.items()}
        | {f"{name}_precision": _percent(table[row, row], table[:, row].sum()) for name, table in tables.items()}
        for row, class_name in enumerate(result.classes)
    ]
    confusion = {name: table.tolist() for name, table in tables.items()}
    everything = {**result.summary(), "classes": per_class, "confusion": confusion}
    save_json(folder / "probe.json", everything)
    save_png(folder / "confusion.png", confusion_picture(tables, result.classes, title))


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a result into a folder, which is made.

    Raises:
        SettingError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1))
    except OSError as error:
        problem = f"cannot be written ({error}); name another folder"
        raise SettingError("folder", str(path.parent), problem, flag="--output") from error


def _percent(part: int, whole: int) -> float | None:
    return round(100 * int(part) / int(whole), 2) if whole else None
