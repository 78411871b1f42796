"""The training loss as a module that draws its own masks: what training loops and their wrappers call."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn

from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.ops.random_masking import random_masking
from fastmae.torch_compat import is_in_backward, is_replica

log = logging.getLogger("fastmae")

DRAWS_PER_STEP = 2**32


class MAELoss(nn.Module):
    """Computes the training loss of images, with masks of its own, by the fast path of ``model.training_loss``.

    It is a forward pass, so that DistributedDataParallel, ``fully_shard``, Accelerate and Lightning can wrap it. Give
    its parameters to the optimiser; the model is ``loss_of.model``.

    The masks are a pure function of ``seed``, the number of the forward pass, the rank and the place in the batch. In
    training mode each forward pass has the next number, which is in the state dict as ``forwards``: a training that
    goes on from a checkpoint of this module has the masks that it would have had. Place n in the batch of rank r is
    place r·N + n in the batch of all ranks, so that two ranks with N images each have the masks of one with 2·N. In
    evaluation mode the number stays, and the masks are the same in every pass: a held-out loss can be compared between
    epochs.

    A model with an overridden step that draws masks itself (``random_masking``, or official code) is left to do so; a
    line in the log says that ``seed`` is not used then.

    Args:
        model: the masked autoencoder.
        mask_ratio, predict_ratio: as in ``training_loss``.
        seed: of the masks, in [0, 2**64).
        rank: which part of the batch of all ranks this process has. None is the rank of torch.distributed, once that
            is initialised, and 0 before. Give it where other processes than all have parts of the batch, as with
            tensor or pipeline parallelism.

    Raises:
        ValueError: a ratio that leaves no patch visible or none masked, or a wrong seed or rank.
        TypeError: a model that is no masked autoencoder of fastmae.
    """

    forwards: torch.Tensor

    def __init__(
        self,
        model: MaskedAutoencoderViT,
        mask_ratio: float = 0.75,
        *,
        predict_ratio: float | None = None,
        seed: int = 0,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, MaskedAutoencoderViT):
            raise TypeError(f"model must be a masked autoencoder of fastmae, got {type(model).__name__}")
        model.num_predicted(mask_ratio, predict_ratio)
        if type(seed) is not int or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
        if rank is not None and (type(rank) is not int or rank < 0):
            raise ValueError(f"rank must be an integer of at least 0, got {rank!r}")
        self.model = model
        self.mask_ratio, self.predict_ratio, self.seed, self.rank = mask_ratio, predict_ratio, seed, rank
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64, device=model.cls_token.device))
        model.find_overrides()  # methods of the class itself may have been replaced since the model was made
        if model.draws_masks is not None:
            log.warning("%s.%s draws the masks itself: seed is not used", type(model).__name__, model.draws_masks)

    def forward(
        self, images: torch.Tensor, *, ids_shuffle: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the loss, a scalar.

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            ids_shuffle, mask: masks of your own in place of drawn ones, as in ``training_loss``.

        Raises:
            RuntimeError: it is called in a backward pass or by ``nn.DataParallel``, where it would draw wrong masks.
        """
        if ids_shuffle is None and mask is None and self.model.draws_masks is None:
            ids_shuffle = self._draw(images)
        return self.model.training_loss(images, ids_shuffle, self.mask_ratio, self.predict_ratio, mask=mask)

    def extra_repr(self) -> str:
        """Returns the settings, as torch prints modules."""
        return f"mask_ratio={self.mask_ratio}, predict_ratio={self.predict_ratio}, seed={self.seed}, rank={self.rank}"

    def _draw(self, images: torch.Tensor) -> torch.Tensor:
        """Draws the order of the patches, int32 [N, L], on the device of the images; nobody waits for it."""
        if is_in_backward():
            raise RuntimeError(
                "MAELoss was called in a backward pass, as torch.utils.checkpoint does, and would draw other masks; "
                'checkpoint the blocks (block.checkpointing = "full" for those of the model), or give ids_shuffle'
            )
        if is_replica(self):
            raise RuntimeError(
                "nn.DataParallel makes copies of MAELoss that forget which masks were drawn; use "
                "DistributedDataParallel, or give ids_shuffle"
            )
        if self.training:
            self.forwards += 1
        rank = self.rank
        if rank is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        places = torch.arange(len(images), device=images.device) + rank * len(images)
        number = self.forwards if self.training else torch.zeros_like(self.forwards)
        return random_masking(number.to(images.device) * DRAWS_PER_STEP + places, self.seed, self._patches(images))

    def _patches(self, images: torch.Tensor) -> int:
        """Returns how many patches an image has."""
        rows, columns = self.model.grid_of(self.model._size_of(images))
        return rows * columns
