"""One optimiser step: micro-batches forward and backward, gradients added up, then AdamW. No host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmae.model.mae import MaskedAutoencoderViT


class TrainingLoss(nn.Module):
    """``model.training_loss`` as a forward pass, which is what torch's wrappers expect."""

    def __init__(self, model: MaskedAutoencoderViT, mask_ratio: float) -> None:
        super().__init__()
        self.model = model
        self.mask_ratio = mask_ratio

    def forward(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        return self.model.training_loss(images, ids_shuffle, self.mask_ratio)


def train_step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    accum_iter: int,
    lr: float,
    autocast: AbstractContextManager,
) -> torch.Tensor:
    """Steps once with the mean gradient of the micro-batches.

    Args:
        loss_of: maps (images, ids_shuffle) to a scalar; a ``TrainingLoss``, wrapped or not.
        optimizer: its groups' learning rates are set to ``lr``.
        micro_batches: ``accum_iter`` pairs (images, ids_shuffle), taken one at a time.
        accum_iter: gradients are communicated between ranks with the last of them only.
        autocast: the region of the forward passes; it may be entered several times.

    Returns:
        The mean loss of this rank's micro-batches, a scalar on the device, detached.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    total = None
    for index, (images, ids_shuffle) in enumerate(micro_batches):
        is_last = index + 1 == accum_iter
        quiet = not is_last and isinstance(loss_of, DistributedDataParallel)
        with loss_of.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            with autocast:
                loss = loss_of(images, ids_shuffle) / accum_iter
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    optimizer.step()
    assert total is not None
    return total
