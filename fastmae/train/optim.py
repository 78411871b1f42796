"""The official optimiser: AdamW and its parameter groups (paper, tables 8 and 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.95)
FINETUNING_BETAS = (0.9, 0.999)
WITHOUT_DECAY = ("cls_token", "reg_token", "pos_embed")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two groups in the official order: biases and other 1-D parameters without decay, the rest with it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
    ]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Returns AdamW, which updates all parameters in one fused pass on CPU and GPU."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=BETAS, fused=True)


def layer_decay_groups(model: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Returns the official groups of fine-tuning: two per layer of ``model.layer_of``, of which one has weight decay.

    ``lr_scale`` is ``layer_decay`` to the power of the number of layers above (Clark et al. 2020; Bao et al. 2021).
    Biases, other 1-D parameters, the class token, registers and positions have no weight decay. Empty groups are left
    out.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in WITHOUT_DECAY
            groups.setdefault((model.layer_of(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (model.last_layer - layer),
        }
        for (layer, decays), parameters in groups.items()
    ]


def make_finetuning_optimizer(model: Any, lr: float, weight_decay: float, layer_decay: float) -> torch.optim.AdamW:
    """Returns AdamW for a classifier. ``train_step`` sets the learning rates of its groups."""
    groups = layer_decay_groups(model, weight_decay, layer_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=FINETUNING_BETAS, fused=True)
