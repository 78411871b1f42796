"""linear_bf16: x·Wᵀ + b in bfloat16 with copies of W and b that were made beforehand; their gradients are float32.

Autocast casts a weight at every use, and casts its gradient back. With copies (``model.weight_copies``) nothing is cast
forward, and on a GPU the weight's gradient leaves its product in float32, without having been rounded to bfloat16. On a
CPU, whose products have the dtype of their factors, the bits are those of autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastmae.torch_compat import product_in_float32

Copies = tuple[torch.Tensor, torch.Tensor | None]
"""bfloat16 copies of a weight and of its bias. They are constants to autograd."""


def takes_copies(x: torch.Tensor) -> bool:
    """Returns whether products with x are bfloat16 here, so that copies can stand in for weights."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16 and x.ndim > 1


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, copies: Copies) -> torch.Tensor:
    """Computes a linear map of the last axis as bfloat16 autocast does, with copies in place of casts.

    Args:
        x: floating [..., I], at least two axes; it is cast to bfloat16 once.
        weight: float32 [O, I], which gets a gradient and is not read.
        bias: float32 [O] or None, the same.
        copies: bfloat16 copies of ``weight`` and ``bias``, which must not change until the backward pass is over.

    Returns:
        bfloat16 [..., O].
    """
    return _LinearBf16.apply(x.to(torch.bfloat16), weight, bias, *copies)


class _LinearBf16(torch.autograd.Function):
    """No custom op: compiler, FLOP counter and selective checkpointing see torch's products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_copy: torch.Tensor,
        bias_copy: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight_copy)
        return F.linear(x, weight_copy, bias_copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_copy = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [R, O]
        # The first and the second product, and the sum, are those of torch's own backward pass of a linear map.
        of_x = (rows @ weight_copy).view(x.shape) if needs_x else None
        of_weight = product_in_float32(rows.T, x.flatten(0, -2)) if needs_weight else None
        of_bias = _sum_in_float32(rows) if needs_bias else None
        return of_x, of_weight, of_bias, None, None


def _sum_in_float32(rows: torch.Tensor) -> torch.Tensor:
    """Adds up rows [R, O]: float32 [O]. On a CPU the sum is rounded to the dtype of the rows first, as by autocast."""
    return rows.sum(0).float() if rows.device.type == "cpu" else rows.sum(0, dtype=torch.float32)
