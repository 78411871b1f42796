"""Few labels: which images of each class are learnt from, as a pure function of the labels and a seed."""

from __future__ import annotations

import numpy as np

from fastmae.data.sources import Source, Subset, class_names
from fastmae.data.stock import Stock, count_of, joined
from fastmae.philox import STREAM_FEW, words_numpy


def few_labelled(labels: np.ndarray, amount: int | float, seed: int) -> np.ndarray:
    """Draws some images of each class: rising numbers int64 [n] of those that are taken.

    Every class is shuffled by the seed, and its first images are taken. So what is drawn for an amount is among what is
    drawn for a larger one, of both kinds of amounts, and nothing depends on ranks, threads or other classes.

    Args:
        labels: int64 [length], at least one.
        amount: a whole number of images of each class, of which a smaller class gives all that it has; or a share of
            them as a float, rounded to the nearest whole number that is at least one.
        seed: in [0, 2**64).
    """
    order = np.lexsort((words_numpy(seed, STREAM_FEW, np.arange(len(labels)), 1)[:, 0], labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    wanted = _wanted(counts, amount)
    place = np.arange(len(labels)) - np.repeat(first, counts)
    return np.sort(order[place < np.repeat(wanted, counts)])


def _wanted(counts: np.ndarray, amount: int | float) -> np.ndarray:
    if isinstance(amount, float):
        return np.maximum(1, np.floor(counts * amount + 0.5).astype(np.int64))
    return np.minimum(counts, amount)


def with_few_labels(source: Source, amount: int | float, seed: int) -> Subset:
    """Returns the images of ``few_labelled`` of a source with labels. Its stock says which classes have too few."""
    labels = source.labels
    assert labels is not None
    classes, counts = np.unique(labels, return_counts=True)
    short = np.flatnonzero(counts < amount if isinstance(amount, int) else counts * amount < 0.5)
    notes: tuple[str, ...] = ()
    if len(short):
        names = class_names(source)
        number = int(classes[short[0]])
        of_first = f"{names[number] if names else number} has {counts[short[0]]:,}"
        whose = "fewer than 1 image in this share" if isinstance(amount, float) else f"fewer than {amount:,} images"
        taken = "one of each is taken" if isinstance(amount, float) else "all of them are taken"
        notes = (f"{count_of(len(short), 'classes')} with {whose} ({of_first}): {taken}",)
    return Subset(source, few_labelled(labels, amount, seed), joined((source.stock, Stock(notes=notes))))


def shown_amount(amount: int | float) -> str:
    """Returns an amount in words, such as "5 per class" or "1 %"."""
    return f"{100 * amount:g} %" if isinstance(amount, float) else f"{amount:,} per class"
