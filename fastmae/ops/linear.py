"""linear: x·Wᵀ + b, in float32 on a CPU by oneDNN instead of torch's own choice.

torch multiplies float32 matrices with MKL (or the BLAS that it was built with), and uses oneDNN, which it contains too,
for other dtypes only. oneDNN uses the widest vectors of processors of every maker. Both compute in float32; they differ
in the order of additions.

How a call is decided, from outside to inside: ``linear`` asks ``_uses_onednn`` whether this is a large float32 product
on a CPU. If it is, the custom op ``fastmae::linear`` runs, which has a backward of its own, as torch has no gradient
for oneDNN's product. In both directions ``_product`` still leaves short sums to torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from fastmae.ops import cpu
from fastmae.ops.backends import ops_backend
from fastmae.ops.linear_bf16 import Copies, linear_bf16, takes_copies
from fastmae.torch_compat import has_onednn_linear, onednn_linear

ONEDNN = has_onednn_linear()
# The two limits were measured on one processor (Zen 4). They decide only who computes a product, not what it is.
# Products of fewer multiply-adds stay with torch: the overhead of a custom op costs more than oneDNN saves.
SMALLEST = 1 << 27
# Products that add up fewer numbers for each result stay with torch, which was faster.
LEAST_SUMMED = 256


class Linear(nn.Linear):
    """``nn.Linear`` that computes with ``linear``."""

    copies: Copies | None = None
    """bfloat16 copies of its weight and bias, while ``model.weight_copies`` lends them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, self.copies)

    def some(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Computes some of the outputs: those of these rows of the weight."""
        weight, bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        if self.copies is None:
            return linear(x, weight, bias)
        weight_copy, bias_copy = self.copies
        return linear(x, weight, bias, (weight_copy[rows], None if bias_copy is None else bias_copy[rows]))


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, copies: Copies | None = None
) -> torch.Tensor:
    """Computes a linear map of the last axis.

    Args:
        x: floating [..., I], any strides.
        weight: [O, I], any strides.
        bias: [O] or None.
        copies: copies of ``weight`` and ``bias``, with which bfloat16 autocast has nothing to cast.

    Returns:
        [..., O] in the dtype of ``x``, or of autocast inside its region. Equivalent to ``F.linear``.
    """
    if copies is not None and takes_copies(x):
        return linear_bf16(x, weight, bias, copies)
    if _uses_onednn(x, weight):
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


def describe_linear(device: torch.device, dtype: torch.dtype) -> str:
    """Describes which library multiplies matrices of this kind."""
    if device.type != "cpu":
        return "torch"
    if dtype != torch.float32:
        return "oneDNN, torch's own choice"
    return "oneDNN" if ONEDNN and ops_backend(device) == "cpu" else "torch"


def _uses_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tells whether oneDNN computes this product. An exported program has torch's ops alone."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim > 1
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and ONEDNN
        and ops_backend(x.device) == "cpu"
        and x.numel() * weight.shape[0]
        >= SMALLEST  # last, as a look at the sizes would fix the batch size of a program that is exported
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes x·Wᵀ + b by the faster of torch and oneDNN."""
    if x.shape[-1] < LEAST_SUMMED:
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


@torch.library.custom_op("fastmae::linear", mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _product(x, weight, bias)


@_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("fastmae::linear_backward", mutates_args=())
def _linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool]
) -> list[torch.Tensor]:
    """Computes the gradients of x, weight and bias for which ``needs`` is true, in this order.

    The list is shorter if some are not needed, because an op cannot return None in place of a tensor.
    """
    rows = grad.flatten(0, -2)  # [R, O]; the weight's gradient adds up over the R rows
    gradients, column_sums = [], None
    if needs[0]:
        gradients.append(_product(grad, weight.T))
    if needs[1]:
        inputs = x.flatten(0, -2)
        if len(rows) < LEAST_SUMMED:
            gradients.append(rows.T @ inputs)
        else:
            # oneDNN needs its first factor without gaps, so it is transposed by a copy, which also adds up the gradient
            # of the bias. The second factor may have any strides: oneDNN copies it in any case.
            transposed, column_sums = cpu.transpose_and_sum(rows)
            gradients.append(onednn_linear(transposed, inputs.T, None))
    if needs[2]:
        gradients.append(rows.sum(0) if column_sums is None else column_sums)
    return gradients


@_linear_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool]) -> list[torch.Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    gradients = iter(_linear_backward(grad, *ctx.saved_tensors, needs))
    return tuple(next(gradients) if needed else None for needed in needs)


_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.fastmae.linear)
def _flops(x: torch.Size, weight: torch.Size, bias: torch.Size | None, **_: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.fastmae.linear_backward)
def _flops_backward(grad: torch.Size, x: torch.Size, weight: torch.Size, needs: list[bool], **_: Any) -> int:
    return 2 * math.prod(x) * weight[0] * (needs[0] + needs[1])
