"""One optimiser step: micro-batches forward and backward, gradients added up, then AdamW. No host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastmae.errors import UserError
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.vit import Block, Checkpointing


class TrainingLoss(nn.Module):
    """``model.training_loss`` as a forward pass, which is what torch's wrappers expect."""

    def __init__(self, model: MaskedAutoencoderViT, mask_ratio: float) -> None:
        super().__init__()
        self.model = model
        self.mask_ratio = mask_ratio

    def forward(self, images: torch.Tensor, ids_shuffle: torch.Tensor) -> torch.Tensor:
        return self.model.training_loss(images, ids_shuffle, self.mask_ratio)


def prepare(loss_of: TrainingLoss, checkpointing: Checkpointing, compiling: Literal["off", "block", "model"]) -> None:
    """Makes the forward and backward pass what --checkpointing and --compile say, in place; names stay what they are.

    The order is fixed: checkpointing, compiling, then the wrapping for several ranks, then the optimiser. So compiled
    code knows what is to be computed again, and communication happens between compiled regions.
    """
    blocks = [part for part in loss_of.modules() if isinstance(part, Block)]
    for block in blocks:
        block.checkpointing = checkpointing
    # Shapes never change in a run. Blocks share code: the encoder's, the decoder's and its last are compiled once each.
    if compiling == "block":
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)
    elif compiling == "model":
        loss_of.compile(fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class Stepped:
    """What a step came to: scalars on the device, which nobody has waited for."""

    loss: torch.Tensor
    """The mean loss of this rank's micro-batches, whatever it is."""
    grad_norm: torch.Tensor
    """Of the mean gradient of all ranks, before it was clipped."""
    skipped: torch.Tensor
    """1.0 if a loss or gradient of any rank was not finite, so that nothing was changed on any; otherwise 0.0."""


def without_sync(loss_of: nn.Module, is_last: bool) -> AbstractContextManager:
    """A region whose backward pass adds gradients up on this rank alone, but for that of the last micro-batch."""
    if isinstance(loss_of, FSDPModule):
        loss_of.set_requires_gradient_sync(is_last)
    elif isinstance(loss_of, DistributedDataParallel) and not is_last:
        return loss_of.no_sync()
    return nullcontext()


def train_step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    accum_iter: int,
    lr: float,
    autocast: AbstractContextManager,
    clip_grad: float | None = None,
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> Stepped:
    """Steps once with the mean gradient of the micro-batches, unless it or a loss is not finite.

    Args:
        loss_of: maps (images, ids_shuffle) to a scalar; a ``TrainingLoss``, wrapped or not.
        optimizer: fused, so that it can leave a step out by itself; its groups' learning rates are set to ``lr``.
        micro_batches: ``accum_iter`` pairs (images, ids_shuffle), taken one at a time.
        accum_iter: gradients are communicated between ranks with the last of them only.
        autocast: the region of the forward passes; it may be entered several times.
        clip_grad: the largest norm of the gradient; a longer one is scaled down to it. None: any norm.
        mean_over_ranks: of a tensor that every rank has, on the device.

    Raises:
        UserError: torch.compile failed.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    total = None
    for index, (images, ids_shuffle) in enumerate(micro_batches):
        is_last = index + 1 == accum_iter
        with without_sync(loss_of, is_last), _compile_errors_in_one_line():
            with autocast:
                loss = loss_of(images, ids_shuffle) / accum_iter
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip_grad is not None:
        clip_grads_with_norm_(parameters, clip_grad, norm)
    finite = torch.isfinite(total) & torch.isfinite(norm)
    skipped = (mean_over_ranks((~finite).float()) > 0).float()
    # Read by the fused kernel: at 1.0 it leaves weights, moments and step counts as they are.
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    return Stepped(total, norm, skipped)


@contextmanager
def _compile_errors_in_one_line() -> Generator[None]:
    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise UserError(
            f"--compile: torch.compile failed ({why}); on a CPU it needs a C++ compiler while the run starts: install "
            "one (g++), or use --compile off"
        ) from error
