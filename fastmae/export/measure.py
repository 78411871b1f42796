"""Comparison of an exported encoder with the original: difference of its features, their accuracy, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastmae.data.sources import Source, classes_of, train_and_val, with_known_classes
from fastmae.errors import SettingError
from fastmae.evaluate.features import usable_batches
from fastmae.evaluate.knn import knn_predictions
from fastmae.evaluate.linear_probe import logistic_predictions
from fastmae.evaluate.sharing import WHOLE, Share, gather
from fastmae.export.encoder import AnyEncoder, Exported, linear_of
from fastmae.facts import ReadAs
from fastmae.model.pixels import DTYPES, normalised, range_ends

Encode = Callable[[torch.Tensor], torch.Tensor]
"""A function from a batch of images, in the form that the encoder takes, to tokens [N, 1+R+L, D]."""
BATCH, NEIGHBOURS = 32, 20
INDICES = ""
"""The name of the numbers of the images beside the features of encoders."""


@dataclass(frozen=True)
class EncoderFigures:
    """The figures of an encoder on labelled data."""

    difference: float
    """The largest difference between its tokens of the test part and those of the first encoder."""
    knn: float
    """The accuracy of k-NN in percent, on mean-pooled features, as ``fastmae probe`` measures it."""
    linear: float
    """The accuracy of logistic regression in percent."""
    images_per_second: float
    """The speed at the median batch; all encoders take the same batches in turns."""


def as_taken(model: Exported, images: torch.Tensor, raw: bool) -> torch.Tensor:
    """Returns pixels [N, H, W, C] in the form that an encoder takes: unchanged, or normalised float32 [N, C, H, W]."""
    return images if raw else normalised(model, images).contiguous()


@torch.no_grad()
def sample_difference(
    model: AnyEncoder, encode: Encode, raw: bool, head: dict[str, torch.Tensor] | None = None
) -> tuple[float, float]:
    """Returns (largest difference from the model's tokens, largest of these tokens) for five images of noise.

    With the ``head`` of a classifier, these are its logits.
    """
    images = as_taken(model, noise_for(model), raw)
    truth = model.forward_features(images)
    if head:
        truth = linear_of(head)(model.pool_tokens(truth, "mean" if model.fc_norm else "cls"))
    return float((encode(images) - truth).abs().max()), float(truth.abs().max())


def noise_for(model: Exported) -> torch.Tensor:
    """Returns five images of noise: pixels [5, H, W, C] from the low to the high end of the value range."""
    shape, generator = (5, *model.img_size, model.in_chans), torch.Generator().manual_seed(0)
    dtype = DTYPES[model.pixels.dtype]
    if model.pixels.dtype == "uint8" and model.value_range is None:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    low, high = range_ends(model)
    pixels = low + torch.rand(shape, generator=generator) * (high - low)
    return pixels if dtype == torch.float32 else pixels.round().clamp(0, torch.iinfo(dtype).max).to(dtype)


def open_labelled(data_path: str | tuple[str, ...], read_as: ReadAs, flag: str = "--check") -> tuple[Source, Source]:
    """Opens the part that ``measure`` fits on and the part that it scores.

    Args:
        flag: what the command line calls ``data_path``.

    Raises:
        UserError: there are no such data, or they have no labels, or only one class.
    """
    train, test = train_and_val(data_path, read_as)
    for source in (train, test):
        if source.labels is None:
            problem = f"images such as {source.name(0)} have no labels; give data with labels"
            raise SettingError("data_path", problem=problem, flag=flag)
    if len(np.unique(np.asarray(train.labels))) < 2:
        problem = f"images such as {train.name(0)} are all of one class; give data of two or more"
        raise SettingError("data_path", problem=problem, flag=flag)
    return train, with_known_classes(train, test)


def measure(
    model: AnyEncoder,
    encoders: dict[str, Encode],
    train: Source,
    test: Source,
    *,
    raw: bool,
    num_workers: int,
    share: Share = WHOLE,
) -> dict[str, EncoderFigures]:
    """Measures each of ``encoders``; differences are from the first of them.

    With a ``share`` of several ranks, all of them call it; the first returns the figures, the others none.
    """
    fitted, scored = (_encoded(model, encoders, source, raw, num_workers, share) for source in (train, test))
    if not share.is_first:
        return {}
    # Classes are matched by name, as each part numbers its own class folders.
    _, numbered = np.unique(np.concatenate([fitted.classes, scored.classes]), return_inverse=True)
    labels, truth = (torch.from_numpy(part) for part in np.split(numbered.astype(np.int64), [len(fitted.classes)]))

    def percent(predictions: torch.Tensor) -> float:
        return 100 * float((predictions == truth).double().mean())

    figures = {}
    for name in encoders:
        features = fitted.features[name], labels, scored.features[name]
        figures[name] = EncoderFigures(
            scored.differences[name],
            percent(knn_predictions(*features, [NEIGHBOURS])[NEIGHBOURS]),
            percent(logistic_predictions(*features)),
            1 / statistics.median(fitted.seconds[name] + scored.seconds[name]),
        )
    return figures


@dataclass(frozen=True)
class _Encoded:
    """The results of encoders on one part of the data, by the encoders' names."""

    classes: np.ndarray
    features: dict[str, torch.Tensor]
    differences: dict[str, float]
    seconds: dict[str, list[float]]
    """The seconds per image of each batch."""


@torch.no_grad()
def _encoded(
    model: AnyEncoder,
    encoders: dict[str, Encode],
    source: Source,
    raw: bool,
    num_workers: int,
    share: Share,
) -> _Encoded:
    """Returns the results on a part of the data; on the first rank those of all."""
    names, numbers = list(encoders), [np.empty(0, np.int64)]
    features: dict[str, list[torch.Tensor]] = {name: [] for name in encoders}
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    differences = dict.fromkeys(encoders, 0.0)
    for indices, pixels, _ in usable_batches(model, source, batch_size=BATCH, num_workers=num_workers, share=share):
        if not len(indices):  # none of them can be used
            continue
        images, tokens = as_taken(model, pixels, raw), {}
        # Another one begins each time, as the first to read a batch takes longer.
        for name in (*names[len(numbers) % len(names) :], *names[: len(numbers) % len(names)]):
            start = time.perf_counter()
            tokens[name] = encoders[name](images)
            seconds[name].append((time.perf_counter() - start) / len(images))
        numbers.append(indices)
        for name in names:
            differences[name] = max(differences[name], float((tokens[name] - tokens[names[0]]).abs().max()))
            features[name].append(model.pool_tokens(tokens[name]))
    own = {name: torch.cat(parts) for name, parts in features.items() if parts}
    parts = gather(share, own | {INDICES: torch.from_numpy(np.concatenate(numbers))}, [differences, seconds])
    if parts is None:
        return _Encoded(np.empty(0), own, differences, seconds)
    everything, order = torch.cat([tensors[INDICES] for tensors, _ in parts]).sort()
    return _Encoded(
        np.asarray(classes_of(source, everything.numpy())),
        {name: torch.cat([tensors[name] for tensors, _ in parts if name in tensors])[order] for name in encoders},
        {name: max(facts[0][name] for _, facts in parts) for name in encoders},
        {name: [one for _, facts in parts for one in facts[1][name]] for name in encoders},
    )
