"""The published optimiser: AdamW, its parameter groups, and the learning-rate schedule (paper, table 8)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.95)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the published order: biases and other 1-D parameters without decay, then the rest with it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
    ]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW in one fused pass over all parameters, on CPU and GPU alike."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=BETAS, fused=True)


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: int) -> float:
    """Linear warm-up, then half a cosine from ``lr`` to ``min_lr``; ``epoch`` is fractional."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
