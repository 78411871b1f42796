"""The loss on images that a model is not trained on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from fastmae.data.loader import Skipped
from fastmae.data.masks import Masks, shuffled_ids
from fastmae.data.sources import Source
from fastmae.evaluate.features import usable_batches
from fastmae.evaluate.spread import some_of
from fastmae.model.family import MaskedModel


@torch.no_grad()
def held_out_loss(
    model: MaskedModel,
    source: Source,
    masks: Masks,
    mask_ratio: float,
    predict_ratio: float | None = None,
    *,
    autocast: AbstractContextManager[object],
    batch_size: int = 64,
    num_workers: int = 2,
) -> tuple[float | None, list[Skipped]]:
    """Computes the mean loss of the central crops of images, each with one mask that is the same at every call.

    Of more than ``spread.MOST_IMAGES`` images, as many evenly spaced ones are taken. Image i of these has the mask of
    draw id i. The order is fixed, so equal weights give equal bits, whatever the number of ranks.

    Args:
        masks: how patches are masked, with their seed.
        mask_ratio, predict_ratio: as in ``model.training_loss``.
        autocast: the number format of the training.

    Returns:
        The mean over images, None if none is usable; and the images that could not be used.
    """
    total, count, skipped = 0.0, 0, list[Skipped]()
    for chosen, images, bad in usable_batches(model, some_of(source), batch_size=batch_size, num_workers=num_workers):
        skipped += bad
        if len(chosen):
            ids_shuffle = shuffled_ids(torch.from_numpy(chosen), masks, images.device)
            with autocast:
                loss = model.training_loss(images, ids_shuffle, mask_ratio, predict_ratio)
            total += float(loss) * len(chosen)
            count += len(chosen)
    return (total / count if count else None), skipped
