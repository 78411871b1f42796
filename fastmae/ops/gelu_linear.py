"""gelu_linear: GELU and the linear map after it as one step of autograd, which keeps one of their two inputs, not both.

GELU keeps its argument h for the backward pass, and the linear map keeps GELU(h), which is as large: together the
largest pieces of an MLP. Here h is kept alone, and the backward pass computes GELU(h) again: in the pass that computes
GELU's gradient, where it is our op (one more piece is written), and by torch in a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fastmae.ops.backends import asked_backends, autocast_dtype, is_differentiable
from fastmae.ops.gelu import gelu, gelu_again_and_backward, gelu_backward
from fastmae.ops.linear import choice_for, linear, linear_gradients
from fastmae.ops.linear_bf16 import Copies, is_bf16, linear_bf16_gradients
from fastmae.torch_compat import is_exporting


def keeps_less(h: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tells whether ``gelu_linear`` computes this and keeps less for it than GELU and ``linear`` would.

    It does for plain float32 weights with a gradient, in float32 or under bfloat16 autocast. With ``--ops reference``
    the two are apart, to compare.
    """
    if asked_backends().ops == "reference" or is_exporting() or is_differentiable() or not torch.is_grad_enabled():
        return False
    if type(weight) not in (torch.Tensor, nn.Parameter) or not weight.requires_grad or h.ndim < 2 or h.numel() == 0:
        return False
    dtype = torch.bfloat16 if is_bf16(h) else None if autocast_dtype(h.device) else torch.float32
    return weight.dtype == torch.float32 and h.dtype == dtype


def gelu_linear(
    h: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    copies: Copies | None = None,
    fused: bool = False,
) -> torch.Tensor:
    """Computes GELU(h + bias)·Wᵀ + out_bias, where ``keeps_less`` is true, with the bits of the two calls.

    Args:
        h: float32 [..., F], or bfloat16 under bfloat16 autocast, any strides.
        bias: [F] or None; only if ``fused``.
        weight: float32 [O, F].
        out_bias: float32 [O] or None.
        copies: copies of ``weight`` and ``out_bias``, as for ``linear``.
        fused: GELU by ``fastmae.ops.gelu``, and not by torch.

    Returns:
        [..., O] in the dtype of ``h``. Differentiable once in the first four; kept for that are ``h``, and ``weight``
        or its copy.
    """
    copies = copies if is_bf16(h) else None
    return _GeluLinear.apply(h, bias, weight, out_bias, *(copies or (None, None)), fused, choice_for(h, weight))


class _GeluLinear(torch.autograd.Function):
    """No custom op: FLOP counter and selective checkpointing see the products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        h: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        out_bias: torch.Tensor | None,
        weight_copy: torch.Tensor | None,
        out_bias_copy: torch.Tensor | None,
        fused: bool,
        chosen: tuple[str, str, str],
    ) -> torch.Tensor:
        copies = None if weight_copy is None else (weight_copy, out_bias_copy)
        return linear(gelu(h, bias) if fused else F.gelu(h), weight, out_bias, copies)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        h, bias, weight, _, weight_copy, _, ctx.fused, ctx.chosen = inputs
        is_copied = weight_copy is not None and ctx.chosen[1] != "float32"
        ctx.save_for_backward(h, bias, weight_copy if is_copied else weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, bias, weight = ctx.saved_tensors
        needs_h, needs_bias, *needs = ctx.needs_input_grad[:4]
        needs = [needs_h or needs_bias, *needs]
        of_h = of_bias = None
        gradients = linear_gradients if h.dtype == torch.float32 else linear_bf16_gradients
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.fused and needs[0] and needs[1]:
                # GELU(h) has the shape and dtype of h, which are all that the gradient of it needs to know of it.
                of_a = gradients(grad, h, weight, [True, False, False], *ctx.chosen[1:])[0]
                assert of_a is not None
                a, of_h, of_bias = gelu_again_and_backward(of_a, h, bias)
                del of_a
                _, of_weight, of_out_bias = gradients(grad, a, weight, [False, *needs[1:]], *ctx.chosen[1:])
                return of_h, of_bias, of_weight, of_out_bias, None, None, None, None
            a = gelu(h, bias) if ctx.fused else F.gelu(h)
            of_a, of_weight, of_out_bias = gradients(grad, a, weight, needs, *ctx.chosen[1:])
            del a  # before there is another one of its size
            if of_a is not None and ctx.fused:
                of_h, of_bias = gelu_backward(of_a, h, bias)
            elif of_a is not None:
                of_h = torch.ops.aten.gelu_backward(of_a, h)
        return of_h, of_bias, of_weight, of_out_bias, None, None, None, None
