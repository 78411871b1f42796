"""linear: x·Wᵀ + b. On a CPU in float32 through oneDNN, which torch itself asks for other dtypes only.

torch multiplies float32 matrices with MKL (or whatever BLAS it was built with). oneDNN's kernels, which are in torch as
well, use the widest vectors of any maker's processor. Both compute in float32; they add up in another order.
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
from fastmae.torch_compat import has_onednn_linear, onednn_linear

ONEDNN = has_onednn_linear()
# Multiply-adds below which calling an op of our own costs more than oneDNN wins.
SMALLEST = 1 << 27
# Numbers that are added up for each of the result, from which on oneDNN was faster (Zen 4).
LEAST_SUMMED = 256


class Linear(nn.Linear):
    """``nn.Linear`` that computes with ``linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear map of the last axis.

    Args:
        x: floating [..., I], any strides.
        weight: [O, I], any strides.
        bias: [O] or None.

    Returns:
        [..., O] in the dtype of ``x``, or of autocast inside its region. Equivalent to ``F.linear``.
    """
    if _is_foronednn_linear(x, weight):
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


def describe_linear(device: torch.device, dtype: torch.dtype) -> str:
    """Who multiplies matrices of this kind, for people."""
    if device.type != "cpu":
        return "torch"
    if dtype != torch.float32:
        return "oneDNN, torch's own choice"
    return "oneDNN" if ONEDNN and ops_backend(device) == "cpu" else "torch"


def _is_foronednn_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether it is oneDNN's, though torch would not ask it. A program that is exported knows torch's ops alone."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim > 1
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and ONEDNN
        and ops_backend(x.device) == "cpu"
        and x.numel() * weight.shape[0] >= SMALLEST  # last: an exported program must not be bound to a batch by it
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
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
    """Those gradients of x, weight and bias that are needed."""
    rows = grad.flatten(0, -2)
    made, sums = [], None
    if needs[0]:
        made.append(_product(grad, weight.T))
    if needs[1]:
        inputs = x.flatten(0, -2)
        if len(rows) < LEAST_SUMMED:
            made.append(rows.T @ inputs)
        else:
            # oneDNN takes its first factor without gaps alone; the second it lays out anew in any case.
            transposed, sums = cpu.transpose_and_sum(rows)
            made.append(onednn_linear(transposed, inputs.T, None))
    if needs[2]:
        made.append(rows.sum(0) if sums is None else sums)
    return made


@_linear_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool]) -> list[torch.Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    made = iter(_linear_backward(grad, *ctx.saved_tensors, needs))
    return tuple(next(made) if needed else None for needed in needs)


_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.fastmae.linear)
def _flops(x: torch.Size, weight: torch.Size, bias: torch.Size | None, **_: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.fastmae.linear_backward)
def _flops_backward(grad: torch.Size, x: torch.Size, weight: torch.Size, needs: list[bool], **_: Any) -> int:
    return 2 * math.prod(x) * weight[0] * (needs[0] + needs[1])
