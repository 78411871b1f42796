"""The moving average of the weights (--ema). It has the names and the sharding of the parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastmae.torch_compat import load_shards

Average = dict[str, torch.Tensor]


def start_average(model: nn.Module, checkpoint: Path | None) -> Average:
    """Returns the average of a run: that of the ``checkpoint`` that it resumes, otherwise the weights now."""
    average = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    if checkpoint is not None:
        load_shards(checkpoint, in_checkpoint(average))
    return average


def in_checkpoint(average: Average) -> dict[str, torch.Tensor]:
    """Returns the tensors under the names that they have in a checkpoint."""
    return {f"average.{name}": tensor for name, tensor in average.items()}


@torch.no_grad()
def update_average(average: Average, model: nn.Module, decay: float | None, skipped: torch.Tensor) -> None:
    """Computes average ← decay · average + (1 − decay) · weights, unless the step was skipped. No synchronisation.
    Without a ``decay`` there is no average, and nothing is computed.

    torch's own averaging (torch.optim.swa_utils) takes plain numbers only, so the host would have to wait for
    ``skipped``.
    """
    if decay is None:
        return
    share = (1 - decay) * (1 - skipped)
    weights = dict(model.named_parameters())
    for name, mean in average.items():
        mean.lerp_(weights[name], share)
