"""linear: x·Wᵀ + b; on a CPU each of its three products is computed by whatever was fastest, torch's own by default.

torch multiplies float32 matrices with MKL (or the BLAS that it was built with), and uses oneDNN, which it contains too,
for other dtypes only. Both compute in float32; they differ in the order of additions, and which is faster depends on
the processor and on the shape. So it is measured (fastmae/ops/tuning.py), and ``linear`` goes by the process's choice.

Where all three products are torch's, ``F.linear`` is called. Otherwise the custom op ``fastmae::linear`` runs, which
has a backward of its own, as torch has no gradient for oneDNN's product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from fastmae.ops import cpu
from fastmae.ops.attention_table import dtype_name
from fastmae.ops.backends import asked_backends, choices_hold, op_choice
from fastmae.ops.choices import CANDIDATES, LINEAR
from fastmae.ops.linear_bf16 import TORCHS, Copies, is_bf16, linear_bf16
from fastmae.torch_compat import has_onednn_linear, onednn_linear

ONEDNN = has_onednn_linear()


class Linear(nn.Linear):
    """``nn.Linear`` that computes with ``linear``."""

    copies: Copies | None = None
    """bfloat16 copies of its weight and bias, while ``model.weight_copies`` lends them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, self.copies)

    def without_bias(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the product alone, for those who add the bias themselves."""
        return linear(x, self.weight, None, self.copies and (self.copies[0], None))

    def some(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Computes some of the outputs: those of these rows of the weight."""
        weight, bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        if self.copies is None:
            return linear(x, weight, bias)
        weight_copy, bias_copy = self.copies
        return linear(x, weight, bias, (weight_copy[rows], None if bias_copy is None else bias_copy[rows]))


class TorchLinear(Linear):
    """A ``Linear`` whose products are torch's own, whatever was chosen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.copies is not None and is_bf16(x):
            return linear_bf16(x, self.weight, self.bias, self.copies)
        return F.linear(x, self.weight, self.bias)


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
    chosen = choice_for(x, weight)
    if is_bf16(x) and (copies is not None or chosen != TORCHS):
        return linear_bf16(x, weight, bias, copies, chosen)
    return F.linear(x, weight, bias) if chosen == TORCHS else _linear(x, weight, bias, *chosen)


def choice_for(x: torch.Tensor, weight: torch.Tensor) -> tuple[str, str, str]:
    """Returns who computes the products of ``linear(x, weight, …)``, as ``linear_choice`` does, or else torch."""
    dtype = _dtype_to_choose_for(x, weight)
    if dtype is None:
        return TORCHS
    # A look at the sizes would fix the batch size of a program that is exported, whose choices do not hold.
    return linear_choice(math.prod(x.shape[:-1]), weight.shape[1], weight.shape[0], dtype)


def _dtype_to_choose_for(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """Returns the dtype of a product of matrices, not empty, for which there is a choice; None if there is none."""
    if not choices_hold() or x.device.type != "cpu" or x.ndim < 2 or x.numel() == 0 or weight.numel() == 0:
        return None
    if is_bf16(x) and x.dtype in (torch.float32, torch.bfloat16) and weight.dtype == torch.float32:
        return torch.bfloat16
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return torch.float32 if is_float32 else None


def reads_copies(device: torch.device) -> bool:
    """Tells whether bfloat16 copies of weights are read: not where all products are computed in float32."""
    if device.type != "cpu" or not choices_hold():
        return True
    taken = {
        entry.taken
        for entry in asked_backends().choices.entries
        if entry.op in LINEAR[:2] and entry.dtype == "bfloat16"
    }
    return taken != {"float32"}


def linear_choice(rows: int, inner: int, outer: int, dtype: torch.dtype) -> tuple[str, str, str]:
    """Returns who computes the forward product, the gradient of the input and that of the weight on a CPU.

    They are candidates of ``LINEAR`` in fastmae/ops/choices.py. torch.compile may call it with rows that are unknown.
    """
    if asked_backends().choices.rules == "0.1" and not ONEDNN:
        return TORCHS
    shape = rows, inner, outer
    if choices_hold() and not torch.compiler.is_compiling():
        return asked_backends().choices.of_layer(shape, dtype_name(dtype))
    forward, of_input, of_weight = LINEAR
    return op_choice(forward, shape, dtype), op_choice(of_input, shape, dtype), op_choice(of_weight, shape, dtype)


def linear_candidates(op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Returns who can compute this product (one of ``LINEAR``) here, torch's own first."""
    if dtype == torch.bfloat16:
        return ("torch", "float32")
    if dtype != torch.float32 or not ONEDNN:
        return ("torch",)
    return tuple(name for name in CANDIDATES[op] if name != "float32")


def describe_linear(device: torch.device, dtype: torch.dtype) -> str:
    """Describes who multiplies matrices of this kind."""
    choices = asked_backends().choices
    if device.type != "cpu" or not choices_hold():
        return "torch"
    if choices.rules == "0.1":
        return "oneDNN for large products, as in version 0.1" if ONEDNN and dtype == torch.float32 else "torch"
    name = dtype_name(dtype)
    products = [entry for entry in choices.entries if entry.op in LINEAR and entry.dtype == name]
    others = sum(not entry.is_torchs for entry in products)
    return f"torch but for {others} of {len(products)} products, as measured" if others else "torch"


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, by: str) -> torch.Tensor:
    """Computes x·Wᵀ + b by ``torch`` or ``onednn``."""
    return onednn_linear(x, weight, bias) if by == "onednn" else F.linear(x, weight, bias)


def linear_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool], input_by: str, weight_by: str
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of x, of the weight and of the bias, None for those that are not needed."""
    # What is torch's is left to torch's operations, which need no op of ours and work under torch.func.
    compute = _gradients if (input_by, weight_by) == TORCHS[1:] else _linear_backward
    gradients = iter(compute(grad, x, weight, list(needs), input_by, weight_by))
    return tuple(next(gradients) if needed else None for needed in needs)


@torch.library.custom_op("fastmae::linear", mutates_args=())
def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, forward_by: str, input_by: str, weight_by: str
) -> torch.Tensor:
    return _product(x, weight, bias, forward_by)


@_linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, forward_by: str, input_by: str, weight_by: str
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool], input_by: str, weight_by: str
) -> list[torch.Tensor]:
    """Computes the gradients of x, weight and bias for which ``needs`` is true, in this order.

    The list is shorter if some are not needed, because an op cannot return None in place of a tensor.
    """
    rows = grad.flatten(0, -2)  # [R, O]; the weight's gradient adds up over the R rows
    gradients, column_sums = [], None
    if needs[0]:
        gradients.append(_product(grad, weight.T, None, input_by))
    if needs[1]:
        inputs = x.flatten(0, -2)
        if weight_by == "onednn-copy":
            # oneDNN needs its first factor without gaps, so it is transposed by a copy, which also adds up the gradient
            # of the bias. The second factor may have any strides: oneDNN copies it in any case.
            transposed, column_sums = cpu.transpose_and_sum(rows)
            gradients.append(onednn_linear(transposed, inputs.T, None))
        elif weight_by == "onednn":
            gradients.append(onednn_linear(rows.T, inputs.T, None))  # torch copies the first factor
        else:
            gradients.append(rows.T @ inputs)
    if needs[2]:
        gradients.append(rows.sum(0) if column_sums is None else column_sums)
    return gradients


_linear_backward = torch.library.custom_op("fastmae::linear_backward", mutates_args=())(_gradients)


@_linear_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool], input_by: str, weight_by: str
) -> list[torch.Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.backward_by = inputs[4:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x, weight), (input_by, weight_by) = ctx.saved_tensors, ctx.backward_by
    gradients = linear_gradients(grad, x, weight, ctx.needs_input_grad[:3], input_by, weight_by)
    return (*gradients, None, None, None)


_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.fastmae.linear)
def _flops(x: torch.Size, weight: torch.Size, bias: torch.Size | None, *_: str, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.fastmae.linear_backward)
def _flops_backward(grad: torch.Size, x: torch.Size, weight: torch.Size, needs: list[bool], *_: str, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0] * (needs[0] + needs[1])
