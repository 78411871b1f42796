"""How accurate classifiers on a frozen encoder stay on corrupted and on attacked images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmae.checkpoint.load import Opened, with_head
from fastmae.data.sources import Source, Subset, evenly_spaced
from fastmae.errors import SettingError
from fastmae.evaluate.attacks import fgsm, on_pixels, pgd
from fastmae.evaluate.corruptions import KINDS, Corruption
from fastmae.evaluate.features import Features, usable_batches
from fastmae.evaluate.knn import knn_predictions
from fastmae.evaluate.linear_probe import LinearClassifier, logistic_classifier
from fastmae.evaluate.probe import same_classes
from fastmae.facts import UINT8
from fastmae.messages import logger

MOST_ATTACKED = 1000
"""Of more images, this many evenly spaced ones are attacked."""
ATTACK_BATCH = 64
Extract = Callable[..., Features]
"""Computes features of a source, with ``augment`` and ``of`` as ``extract_features``."""


@dataclass(frozen=True)
class Fitted:
    """What is measured: k-NN and a linear classifier on features, and the head of a fine-tuned classifier."""

    train: Source
    test: Source
    learnt: Features
    """Those of the train part."""
    classes: tuple[str, ...]
    labels: torch.Tensor
    """int64 [n]: of the train part, positions in ``classes``."""
    linear: LinearClassifier
    k: int
    head: Any | None
    """The fine-tuned classifier, if the checkpoint is one of exactly these classes."""
    of_head: torch.Tensor
    """int64 [classes]: the positions of its outputs in ``classes``."""

    def truth(self, test: Source, features: Features) -> torch.Tensor:
        """Returns the positions in ``classes`` of usable images of the test part."""
        _, labels = same_classes(self.train, test, [self.learnt, features])
        return torch.from_numpy(labels[1]).to(features.values.device)


def require_8_bits(opened: Opened, name: str) -> None:
    """Refuses models whose images cannot be corrupted or attacked.

    Raises:
        SettingError: naming what asked for it.
    """
    model = opened.model
    if model.pixels != UINT8 or (name == "corruptions" and model.in_chans not in (1, 3)):
        kind = f"{model.pixels.dtype} of {model.in_chans} channels"
        what = "8 bits with 1 or 3 channels" if name == "corruptions" else "8 bits in 0 to 255"
        raise SettingError(name, problem=f"is for images of {what}, and the model reads {kind}")


def fit(opened: Opened, train: Source, test: Source, learnt: Features, tested: Features, k: int) -> Fitted:
    """Fits k-NN and logistic regression on the features of the train part, as ``fit_and_score``."""
    classes, labels = same_classes(train, test, [learnt, tested])
    numbers = torch.from_numpy(labels[0]).to(learnt.values.device)
    linear = logistic_classifier(learnt.values, numbers, len(classes))
    head, of_head = None, torch.empty(0, dtype=torch.int64)
    if opened.head:
        outputs = opened.head["head.weight"].shape[0]
        names = opened.settings.get("class_names") or [*map(str, range(outputs))]
        if {*names} == {*classes}:
            of_head = torch.tensor([classes.index(name) for name in names])
            head = with_head(opened).to(opened.model.device)
        else:
            logger.warning("its head of %d classes is left out, as the data have others", outputs)
    return Fitted(train, test, learnt, classes, numbers, linear, k, head, of_head.to(numbers.device))


def accuracies(fitted: Fitted, extract: Extract, augment: Corruption | None = None) -> dict[str, float]:
    """Returns the top-1 accuracy in percent on the test part, corrupted or not, by classifier."""
    tested = extract(fitted.test, augment=augment)
    predicted = {
        "knn": knn_predictions(fitted.learnt.values, fitted.labels, tested.values, (fitted.k,))[fitted.k],
        "linear": fitted.linear(tested.values).argmax(dim=1),
    }
    truth = fitted.truth(fitted.test, tested)
    if fitted.head is not None:
        logits = extract(fitted.test, augment=augment, of=fitted.head)
        predicted["fine-tuned"] = fitted.of_head[logits.values.argmax(dim=1)]
    return {name: _percent(classes == truth) for name, classes in predicted.items()}


def _percent(is_right: torch.Tensor) -> float:
    return round(100 * float(is_right.double().mean()), 2)


def under_corruptions(fitted: Fitted, extract: Extract, severities: Sequence[int]) -> dict[str, Any]:
    """Returns the accuracies by classifier, kind and severity, their means over severities, and over all kinds."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        for severity in severities:
            for name, accuracy in accuracies(fitted, extract, Corruption(kind, severity)).items():
                found.setdefault(name, {}).setdefault(kind, []).append(accuracy)
    return {
        name: {
            "mean": round(float(np.mean([*kinds.values()])), 2),
            "kinds": {kind: {"mean": round(float(np.mean(values)), 2), "of": values} for kind, values in kinds.items()},
        }
        for name, kinds in found.items()
    }


def under_attacks(
    opened: Opened,
    fitted: Fitted,
    attacks: Sequence[str],
    radii: Sequence[float],
    *,
    pool: Any,
    num_workers: int,
) -> dict[str, Any]:
    """Returns the accuracies of the linear classifier and of the head on attacked images, by attack and radius."""
    model = opened.model.requires_grad_(False)
    test = fitted.test
    if len(test) > MOST_ATTACKED:
        test = Subset(test, evenly_spaced(test, MOST_ATTACKED, 1))
    judges = {"linear": on_pixels(model, lambda images: fitted.linear(model.features(images, pool).float()))}
    if fitted.head is not None:
        head = fitted.head.requires_grad_(False)
        judges["fine-tuned"] = on_pixels(model, lambda images: head(images)[:, fitted.of_head.argsort()])
    right: dict[tuple[str, str, float], list[torch.Tensor]] = {}
    for ids, images, _ in usable_batches(model, test, batch_size=ATTACK_BATCH, num_workers=num_workers):
        if not len(ids):
            continue
        pixels = images.permute(0, 3, 1, 2).float() / 255
        some = Features(pixels.flatten(1), ids, ())
        truth = fitted.truth(test, some)
        for name, logits_of in judges.items():
            with torch.no_grad():
                right.setdefault((name, "clean", 0.0), []).append(logits_of(pixels).argmax(dim=1) == truth)
            for attack in attacks:
                for radius in radii:
                    share = radius / 255
                    if attack == "fgsm":
                        changed = fgsm(logits_of, pixels, truth, share)
                    else:
                        changed = pgd(logits_of, pixels, truth, share, ids=ids)
                    with torch.no_grad():
                        right.setdefault((name, attack, radius), []).append(logits_of(changed).argmax(dim=1) == truth)
    result: dict[str, Any] = {"images": sum(map(len, right["linear", "clean", 0.0]))}
    for (name, attack, radius), parts in right.items():
        accuracy = _percent(torch.cat(parts))
        if attack == "clean":
            result[name] = {"clean": accuracy}
        else:
            result[name].setdefault(attack, {})[f"{radius:g}"] = accuracy
    return result
