"""linear_bf16: x·Wᵀ + b in a region of bfloat16 autocast, without a cast of W at every use.

Autocast casts a weight at every use, and casts its gradient back. With copies (``model.weight_copies``) nothing is cast
forward, and on a GPU the weight's gradient leaves its product in float32, without having been rounded to bfloat16. On a
CPU, whose products have the dtype of their factors, the bits are those of autocast.

On a CPU without fast bfloat16 products each of the three products may also be computed in float32 (``float32`` in
fastmae/ops/choices.py). It reads W itself and needs no copy; activations and their gradients stay bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastmae.ops.backends import autocast_dtype
from fastmae.torch_compat import product_in_float32

Copies = tuple[torch.Tensor, torch.Tensor | None]
"""bfloat16 copies of a weight and of its bias. They are constants to autograd."""
TORCHS = ("torch", "torch", "torch")
"""Torch's own for the forward product, the gradient of the input and the gradient of the weight."""


def is_bf16(x: torch.Tensor) -> bool:
    """Tells whether autocast makes products with x [..., I] bfloat16 here."""
    return autocast_dtype(x.device) == torch.bfloat16 and x.ndim > 1


def linear_bf16(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    copies: Copies | None = None,
    by: tuple[str, str, str] = TORCHS,
) -> torch.Tensor:
    """Computes a linear map of the last axis.

    Args:
        x: floating [..., I], at least two axes; it is cast to bfloat16 once.
        weight: float32 [O, I].
        bias: float32 [O] or None.
        copies: copies of ``weight`` and ``bias``, which must not change until the backward pass is over. Without them
            the weight is cast here, once for forward and backward.
        by: ``torch`` (in bfloat16) or ``float32``, for the forward product and the gradients of x and of the weight.

    Returns:
        bfloat16 [..., O]. The gradients of ``weight`` and ``bias`` are float32.
    """
    wide = x if by[0] == "float32" else None  # as it comes: what is float32 already is not rounded first
    with torch.autocast(x.device.type, enabled=False):
        return _LinearBf16.apply(x.to(torch.bfloat16), wide, weight, bias, *(copies or (None, None)), by)


class _LinearBf16(torch.autograd.Function):
    """No custom op: compiler, FLOP counter and selective checkpointing see torch's products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        wide: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_copy: torch.Tensor | None,
        bias_copy: torch.Tensor | None,
        by: tuple[str, str, str],
    ) -> torch.Tensor:
        forward_by, input_by, _ = ctx.by = by
        if weight_copy is None and not forward_by == input_by == "float32":
            weight_copy, bias_copy = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(x, weight if input_by == "float32" else weight_copy)
        if wide is not None:
            return F.linear(wide.float(), weight, bias).to(x.dtype)
        assert weight_copy is not None
        return F.linear(x, weight_copy, bias_copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # torch.compile traces the backward pass in the autocast region of the forward pass.
        with torch.autocast(grad.device.type, enabled=False):
            needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
            needs = needs_x, needs_weight, needs_bias
            of_x, of_weight, of_bias = linear_bf16_gradients(grad, x, weight, needs, ctx.by[1], ctx.by[2])
        return of_x, None, of_weight, of_bias, None, None, None


def linear_bf16_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool], input_by: str, weight_by: str
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of x, of the weight and of the bias, None for those that are not needed.

    ``x`` is bfloat16 [..., I]; ``weight`` is [O, I], float32 or bfloat16. To be called outside of autocast.
    """
    needs_x, needs_weight, needs_bias = needs
    of_x = of_weight = of_bias = None
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)  # [R, O], [R, I]
    is_wide = (needs_x and input_by == "float32") or (needs_weight and weight_by == "float32")
    wide = rows.float() if is_wide else rows
    # In bfloat16 both products, and the sum, are those of torch's own backward pass of a linear map.
    if needs_x:
        product = (wide @ weight).to(x.dtype) if input_by == "float32" else rows @ weight.to(rows.dtype)
        of_x = product.view(x.shape)
    if needs_weight:
        of_weight = wide.T @ inputs.float() if weight_by == "float32" else product_in_float32(rows.T, inputs)
    if needs_bias:
        of_bias = _sum_in_float32(wide)
    return of_x, of_weight, of_bias


def _sum_in_float32(rows: torch.Tensor) -> torch.Tensor:
    """Adds up rows [R, O]: float32 [O]. On a CPU the sum is rounded to the dtype of the rows first, as by autocast."""
    return rows.sum(0).float() if rows.device.type == "cpu" else rows.sum(0, dtype=torch.float32)
