"""Tensors that lie in pieces on several ranks (DTensors): put together, and cut again. Others are left as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are in pieces, so that a forward pass needs every rank."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_one_piece(state: Any, keep: bool) -> Any:
    """A state dict, nested or not, with its pieces put together on the CPU.

    Every rank must call it; where ``keep`` is false the whole tensors are dropped at once, to save memory.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        return {key: in_one_piece(value, keep) for key, value in state.items()}
    return state


def laid_out_like(target: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank has whole, cut as ``target`` is. No communication."""
    if not isinstance(target, DTensor):
        return whole
    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
