"""The adversarial term (--adversarial): a discriminator that is trained against the model, in the same steps.

Both gradients belong to the same weights: a step first computes both and then changes both, or neither if one is not
finite. ``Adversary`` is a part of the module whose forward pass is the loss, so the backward pass, the micro-batches,
the exchange of gradients and their sharding are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastmae.checkpoint.restore import Restored
from fastmae.checkpoint.save import training_tensors
from fastmae.config import ResolvedConfig
from fastmae.data.sizes import Size
from fastmae.errors import SettingError
from fastmae.messages import logger
from fastmae.model.discriminator import (
    Discriminator,
    Regulariser,
    adaptive_weight,
    gradient_penalty,
    hinge_loss,
    pasted,
)
from fastmae.model.family import MaskedModel
from fastmae.model.pixels import normalised, pixels_of
from fastmae.ops.gather_patches import missing_patches
from fastmae.torch_compat import load_shards
from fastmae.train.schedule import Steps
from fastmae.train.step import Sides

BETAS = (0.5, 0.9)
"""Of the discriminator's AdamW (Esser et al. 2021). It has no weight decay."""
TOLD = ("discriminator_loss", "adversarial_loss", "adversarial_weight")
"""What is told of each step: the hinge loss, the negated mean logit of reconstructions, and λ."""


class Adversary(nn.Module):
    """Judges reconstructions: adds the gradient of the adversarial term to a loss, and that of the discriminator's.

    Args:
        discriminator: the discriminator, on its device.
        regulariser, r1: what keeps it tame; ``r1`` is the factor γ of the gradient penalty γ/2 · R1.
        mean_over_ranks: returns the mean of a tensor that every rank has on its device.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        regulariser: Regulariser,
        r1: float,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self._r1 = r1 if regulariser == "r1" else 0.0
        self._mean_over_ranks = mean_over_ranks
        self.weight: float | None = None
        """Of the adversarial term in the present step; None while there is none, and the discriminator rests."""
        self.told: list[torch.Tensor] = []
        """The numbers of ``TOLD`` of each micro-batch since they were last taken."""

    def forward(
        self, loss: torch.Tensor, pred: torch.Tensor, images: torch.Tensor, ids: torch.Tensor, model: MaskedModel
    ) -> torch.Tensor:
        """Returns a scalar of the value of ``loss`` whose gradient is that of all losses.

        * Of the model's weights: that of loss + weight · λ · adversarial loss. The latter is the negated mean logit of
          the images into which the predictions are pasted. λ follows from the gradients of the last layer, as means
          over ranks, in this micro-batch. So they are never longer for the second than for the first.
        * Of the discriminator's: that of its hinge loss, and of its penalty.

        Without gradients (``torch.no_grad``) it only looks whether the logits are finite.

        Args:
            loss, pred: the reconstruction loss, and the predictions [N, M, P] of which it is.
            images: the batch in either form; they are judged normalised by their channels' mean and deviation.
            ids: [N, M], the patches that are predicted.
            model: what predicted them.
        """
        if self.weight is None:  # DistributedDataParallel waits for a gradient of every weight
            return loss + 0 * sum(weight.sum() for weight in self.parameters())
        pixels, *_, nodata = pixels_of(model, images)
        real, targets = normalised(model, images).detach(), None
        if nodata is not None:
            targets = ~missing_patches(pixels, model.patch_size, nodata).gather(1, ids.long())
        new = pred.detach().requires_grad_()
        fake = pasted(real, new, ids, model.patch_size, model.norm_pix_loss, targets)
        of_real, of_fake = self.discriminator.judge(real.requires_grad_(self._r1 > 0), fake)
        hinge, adversarial = hinge_loss(of_real, of_fake), -of_fake.mean()
        if not torch.is_grad_enabled():
            return loss + 0 * (hinge + adversarial)
        (upward,) = torch.autograd.grad(adversarial, new, retain_graph=True)
        factor = self._factor(loss, pred, upward, model.last_layer)
        others = hinge + (pred * (self.weight * factor * upward)).sum()
        if self._r1:
            others = others + self._r1 / 2 * gradient_penalty(of_real, real)
        self.told.append(torch.stack([hinge, adversarial, factor]).detach())
        return loss + (others - others.detach())

    def take_told(self) -> dict[str, torch.Tensor]:
        """Returns the means of what was told since the last call, by name."""
        told = torch.stack(self.told).mean(dim=0)
        self.told.clear()
        return dict(zip(TOLD, told, strict=True))

    def _factor(self, loss: torch.Tensor, pred: torch.Tensor, upward: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """Returns λ. ``upward`` is the gradient of the adversarial loss by ``pred``, the output of the last layer."""
        last = layer.weight
        assert isinstance(last, torch.Tensor)
        (of_loss,) = torch.autograd.grad(loss, last, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(pred, last, upward, retain_graph=True)
        both = torch.stack([of_loss, of_adversarial])
        return adaptive_weight(*self._mean_over_ranks(both if both.dtype == torch.float64 else both.float()))


def make_adversary(
    config: ResolvedConfig,
    model: MaskedModel,
    smallest: Size,
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> Adversary | None:
    """Returns the adversary of a run, with first weights that follow from the seed; None without --adversarial.

    Args:
        config: the resolved settings.
        model: what it is trained against, on its device.
        smallest: the (height, width) of the smallest crops.
        mean_over_ranks: returns the mean of a tensor that every rank has.

    Raises:
        UserError: the model computes its loss by steps of somebody's own, which say nothing of predictions.
    """
    if not config.adversarial:
        return None
    model.find_overrides()
    own = list(model.overridden)
    if not type(model).training_loss.__module__.startswith("fastmae."):
        own.append("training_loss")
    if model._forward_hooks or model._forward_pre_hooks:
        own.append("forward hook")
    if own:
        names = ", ".join(own)
        problem = f"needs the predictions, which a model with a {names} of its own does not give; leave it out"
        raise SettingError("adversarial", config.adversarial, problem)
    with torch.random.fork_rng([]):  # what the model draws does not depend on it
        torch.default_generator.manual_seed(config.seed)  # the CPU's alone, as no other is forked
        kind = config.adversarial_regulariser or "none"
        discriminator = Discriminator(smallest, config.in_chans, spectral=kind == "spectral")
    return Adversary(discriminator.to(model.device), kind, config.adversarial_r1 or 0.0, mean_over_ranks)


@dataclass(frozen=True)
class Optimizers:
    """The optimisers of a run: that of the model, and that of its adversary, if there is one."""

    optimizer: torch.optim.AdamW
    rival: torch.optim.AdamW | None = None
    adversary: Adversary | None = None
    weight: float = 0.0
    first_step: int = 0
    full_step: int = 0
    """The steps, counted from 0, with which the adversary begins, and from which on its term has the whole weight."""

    def __call__(self, step: int) -> torch.optim.Optimizer | Sides:
        """Returns what a step changes, as ``train_step`` takes it, and gives the adversary the weight of the step."""
        if self.rival is None or self.adversary is None or step < self.first_step:
            return self.optimizer
        share = (step + 1 - self.first_step) / (self.full_step + 1 - self.first_step)
        self.adversary.weight = self.weight * min(1.0, share)
        return Sides(self.optimizer, self.rival, self.adversary.take_told)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all that the adversary consists of, under the names that it has in a checkpoint."""
        if self.rival is None or self.adversary is None:
            return {}
        tensors = training_tensors(self.adversary.discriminator, self.rival)
        return {f"adversary.{name}": tensor for name, tensor in tensors.items()}


def make_optimizers(
    optimizer: torch.optim.AdamW, adversary: Adversary | None, config: ResolvedConfig, steps: Steps, restored: Restored
) -> Optimizers:
    """Returns the optimisers of a run; that of the adversary is made here, after ranks share its weights.

    Args:
        optimizer: that of the model.
        adversary: None without --adversarial.
        config, steps: the resolved settings, and the schedule.
        restored: what the run resumes, if anything. From a checkpoint, which is always one of a run with an adversary,
            come its weights, moments and vectors. A file of weights has none of it.
    """
    if adversary is None:
        return Optimizers(optimizer)
    start, warm_up = config.adversarial_start, config.adversarial_warmup
    assert config.adversarial_lr is not None
    assert start is not None
    assert warm_up is not None
    group = {"params": list(adversary.parameters()), "lr_scale": config.adversarial_lr / config.lr}
    rival = torch.optim.AdamW([group], lr=config.adversarial_lr, betas=BETAS, weight_decay=0.0, fused=True)
    first, full = round(start * steps.per_epoch), round((start + warm_up) * steps.per_epoch)
    optimizers = Optimizers(optimizer, rival, adversary, config.adversarial, first, full)
    if restored.checkpoint is not None:
        load_shards(restored.checkpoint, optimizers.tensors())
    elif restored.step > first:
        logger.warning(
            "--adversarial: the discriminator begins anew with step %d, as %s has none; a checkpoint folder has it",
            restored.step,
            restored.origin or "a run from --start_epoch",
        )
    return optimizers
