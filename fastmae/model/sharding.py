"""Tensors that are sharded over ranks (DTensors): gathered, and sharded again. Other tensors are left unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Tells whether any parameter is sharded, so that a forward pass needs every rank."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_one_piece(state: Any, keep: bool) -> Any:
    """Gathers the sharded tensors of a state dict, nested or not, on the CPU.

    Every rank must call it. Ranks for which ``keep`` is false drop each gathered tensor at once, to save memory.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        return {key: in_one_piece(value, keep) for key, value in state.items()}
    return state


def laid_out_like(target: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Shards a tensor that every rank has whole as ``target`` is sharded, without communication."""
    if not isinstance(target, DTensor):
        return whole
    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
